"""HiZOO: a Hessian-informed zeroth-order optimizer that needs forward passes only.

One file, torch only: copy it into your project.

    optimizer = HiZOO(model.parameters(), lr=1e-6, eps=1e-3, hessian_smooth=1e-8)
    for batch in batches:
        loss = optimizer.step(lambda: model(**batch).loss)

When to use it: fine-tuning a model whose gradients or Adam states do not fit in memory, or whose
objective has no gradient. When not: training from scratch. A step sees one random direction, so it
needs many more steps than backpropagation, and a start that is good already (a pre-trained model
and a prompt that says what is asked).

Sources: HiZOO, Zhao et al., ICLR 2025 (arXiv 2402.15173); MeZO, which is HiZOO with
``hessian_smooth=0``, Malladi et al., NeurIPS 2023 (arXiv 2305.17333); the factorised curvature of
HiZOO-L after Adafactor, Shazeer and Stern, 2018 (arXiv 1804.04235).

One step, for parameters θ, diagonal curvature h (starts at 1), learning rate η, perturbation scale
μ, smoothing α, weight decay λ, and u ~ N(0, I) drawn from the step's seed:

    l0 = L(θ)     l+ = L(θ + μ u/√h)     l- = L(θ - μ u/√h)
    g  = (l+ - l-) / 2μ                   projected gradient, a scalar
    c  = |l+ + l- - 2 l0| / 2μ²           curvature along u/√h, a scalar
    h  <- (1-α) h + α c h u²              elementwise
    θ  <- θ - η (g u/√h + λ θ)            with the new h

Along u/√h a batch's loss is lowest at η = 1/2c. ``step_size="curvature"`` takes a part k of that,
from the running mean of c, η = k / 2c̄: no learning rate has to be known, and where the curvature
rises, steps become shorter.

The noise u is never stored. Every number of it is a function of (seed, step, parameter, index), a
hash that is computed again, tile by tile, whenever it is needed: three times a step, once for each
perturbed forward pass and once for the update. A hash makes a pair of numbers, one in each half of
a parameter. No global random state is read or changed. For large models torch.compile makes one
kernel of the hash and all arithmetic on a tile, which costs less than drawing with torch's
generator alone; without a compiler the same functions run one by one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ------------------------------------------------------------- the mathematics of a step, on a tile
#
# These functions are compiled as they are, or run as they are. Scalars are 0-dimensional tensors in
# a compiled kernel, which would otherwise be compiled anew for every number, and floats elsewhere.
# A tile is one block of numbers or two of the same shape, the first and the second ones of pairs. A
# block holds its numbers as they are, or as int32 words, two bfloat16 numbers each: then its parts
# are the first numbers of all words and the second ones, else it is one part. The parts of a tile
# are those of its blocks, one block after the other.

Scalar = float | Tensor
# A direction's number, and how many times μ u/√h the parameters are shifted along it.
Point = tuple[int, float]
# The loss at a point: of a batch, or (examples,) of each of its examples.
Losses = float | Tensor
Tile = Sequence[Tensor]
# h of a tile: h - 1 as it is kept, a list of blocks, or a tuple of h of each part.
HessianTile = list[Tensor] | tuple[Tensor, ...] | None


class Draw(NamedTuple):
    """Where a tile's random numbers come from.

    Attributes:
        key: of the ``counters`` of the tile's pairs.
        index: of the pairs, from the tile's first one, int32; it may be longer than a block, and
            None means that they follow one another.
        halves: for every block which number of its pairs it gets, 0 or 1.
    """

    key: Sequence[int] | Tensor
    index: Tensor | None
    halves: tuple[int, ...]


# Random numbers of a tile: drawn already, those of each block, or to be drawn in a compiled kernel.
Random = Draw | Sequence[Tensor]


class Coefficients(NamedTuple):
    """Scalars of an update.

    Attributes:
        steps: what u/√h of each direction is multiplied by in each part, -η g; with a direction for
            every example tensors of the part's shape, which hold their signs too.
        back: what u/√h of each direction has to be added to take the shift back; None: no shift.
        growths: α c of each direction; None: h stays as it is, or is low-rank.
        smooth: α.
        decay: -η λ; None for 0.
    """

    steps: Sequence[Sequence[Scalar]]
    back: Sequence[Scalar] | None
    growths: Sequence[Scalar] | None
    smooth: Scalar
    decay: Scalar | None


def hessian_of(tile: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return h of each part of a tile, new tensors."""
    if isinstance(tile, tuple):
        return [part.clone() for part in tile]
    return [offset.to(dtype) + 1 for offset in parts_of(tile)]


def shift_tile(
    target: Tile,
    source: Tile | None,
    hessian: HessianTile,
    noise: Random,
    scale: Scalar,
    measured: bool = False,
) -> list[Tensor] | None:
    """Write ``source`` + ``scale`` u/√h into ``target``, half precision rounded once, at the end.

    ``source`` None means in place. Returns h u² of each part if ``measured``.
    """
    source = target if source is None else source
    noises = drawn(noise, source)
    squares = None
    if hessian is not None:
        hessians = hessian_of(hessian, noises[0].dtype)
        if measured:
            squares = [u.square().mul_(h) for u, h in zip(noises, hessians, strict=True)]
        noises = [u.mul_(h.rsqrt_()) for u, h in zip(noises, hessians, strict=True)]
    values = parts_of(source)
    write(target, [u.mul_(scale).add_(value) for u, value in zip(noises, values, strict=True)])
    return squares


def update_tile(
    target: Tile,
    hessian: HessianTile,
    shifted_with: HessianTile,
    noises: Sequence[Random],
    coefficients: Coefficients,
    rounding: Random | None,
) -> None:
    """Take the shift back, and update h and θ of a tile.

    ``shifted_with`` is the low-rank h before this step's average; None: it is ``hessian`` itself,
    or there is no shift.
    Half precision rounds stochastically, by the bits ``rounding``.
    """
    steps, back, growths, smooth, decay = coefficients
    directions = [drawn(noise, target) for noise in noises]
    dtype = directions[0][0].dtype
    shifted_with = hessian if shifted_with is None else shifted_with
    before = None
    if shifted_with is not None and (back is not None or growths is not None):
        before = hessian_of(shifted_with, dtype)
    rounds = [is_half(target[0]), growths is not None and is_half(hessian[0])]
    bits = numbers_of_pairs(rounding, target, rounding_bits) if any(rounds) else None
    after = None if hessian is None or growths is not None else hessian_of(hessian, dtype)
    values, offsets = parts_of(target), None if growths is None else parts_of(hessian)
    for part, value in enumerate(values):
        noises = [direction[part] for direction in directions]
        of_part = None if bits is None else bits[part]
        if back is not None:
            move = weighted_sum(noises, back)
            value = value + (move if before is None else move.mul_(before[part].rsqrt()))
        change = weighted_sum(noises, [step[part] for step in steps])
        if growths is not None:
            growth = weighted_sum([noise * noise for noise in noises], growths).sub_(smooth)
            growth.mul_(before[part])
            # Bits that θ rounds by as well come last here.
            turned = None if of_part is None else half_turned(of_part)
            offset = added(offsets[part], growth, turned, hessian[0])
            # An h of 0 would make the next perturbation infinite, an infinite one would become NaN.
            limits = torch.finfo(format_of(hessian[0]))
            offsets[part] = offset.clamp(limits.eps - 1, limits.max)
            change.mul_((offsets[part].to(dtype) + 1).rsqrt_())
        elif after is not None:
            change.mul_(after[part].rsqrt_())
        if decay is not None:
            change.add_(value * decay)
        values[part] = added(value, change, of_part, target[0])
    write(target, values)
    if growths is not None:
        write(hessian, offsets)


def direction_tile(like: Tile, hessian: HessianTile, noise: Random, scale: Scalar) -> list[Tensor]:
    """Return ``scale`` u/√h of every block of a tile, in its shape and dtype."""
    noises = drawn(noise, like)
    if hessian is not None:
        hessians = hessian_of(hessian, noises[0].dtype)
        noises = [u.mul(h.rsqrt_()) for u, h in zip(noises, hessians, strict=True)]
    return blocks_of_parts([u.mul(scale) for u in noises], like)


def measured_squares(like: Tile, hessian: HessianTile, noise: Random) -> list[Tensor]:
    """Return h u² of each part of a tile."""
    noises = drawn(noise, like)
    hessians = hessian_of(hessian, noises[0].dtype)
    return [u.square().mul_(h) for u, h in zip(noises, hessians, strict=True)]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Scalar]) -> Tensor:
    """Return the sum of ``tensors`` times ``weights``, a new tensor."""
    total = tensors[0] * weights[0]
    for index in range(1, len(tensors)):
        total.add_(tensors[index] * weights[index])
    return total


def scalars(
    differences: list[list[float]], eps: float, curvature_eps: float
) -> tuple[list[float], list[float]]:
    """Return g and c of every direction, divided by the number of directions."""
    samples = len(differences)
    gradients = [first / (2 * eps) / samples for first, _ in differences]
    return gradients, [abs(second) / (2 * curvature_eps**2) / samples for _, second in differences]


def mean_of(losses: Losses) -> float:
    """Return a loss, or the mean of several examples'."""
    return float(losses.mean()) if isinstance(losses, Tensor) else losses


def running_mean(mean: float, value: float, count: int) -> float:
    """Return the mean of a stream after its ``count``-th value: of the last ``MEMORY`` or so."""
    return mean + (value - mean) / min(count, MEMORY)


# ------------------------------------------------------------------------------ the optimizer


HESSIANS = ("full", "lowrank")
STEP_SIZES = ("fixed", "curvature")
# Measurements that a running mean of c or of g² remembers. A single c raises its mean to this part
# of itself at least, and the step grows over so many first measurements to its length.
MEMORY, LEAST_PART, FIRST_MEASUREMENTS = 20, 0.3, 5
# Steps between two measurements of c where they are all that its forward passes are for.
RARELY = 10
# Number of the stream that stochastic rounding draws from; those of u are numbered from 0.
ROUNDING = -1
# With the number of a direction, that of the stream of its examples' signs.
SIGNS = -3
# No number of u is larger.
LARGEST_NOISE = 5.4
# Part of the weights that a perturbation has to change, at least.
CHANGED_WEIGHTS = 0.01
# What taking a shift back may leave, at most, in units of the weights' root mean square.
LARGEST_REMAINDER = 0.1
# Part of a perturbation's change of the loss by which two equal calls may differ.
NOISY_LOSS = 0.1
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HiZOO(torch.optim.Optimizer):
    """Zeroth-order optimizer with a diagonal curvature estimate; mathematics: module docstring.

    ``step(closure)`` does a whole step. ``estimate(closure)`` runs the forward passes alone and may
    be called several times before one ``step()``: the estimates share the noise, and their losses
    are averaged (gradient accumulation). In between the parameters may be shifted; ``restore()``
    takes the shift back.

    Args:
        params: tensors or parameter groups. ``lr``, ``eps``, ``hessian_smooth``, ``weight_decay``
            may differ between groups, and may change between steps (schedulers).
        lr: learning rate η, per unit of the projected gradient. Published runs: 1e-7 to 1e-6 for
            all parameters of a large model. With ``step_size="curvature"`` it is k, for instance
            0.1, whatever the model.
        eps: perturbation scale μ, in units of the weights; larger than 0.
        hessian_smooth: smoothing α of h, from 0 (MeZO: two forward passes a step) to below 1.
        weight_decay: decoupled weight decay λ, multiplied by ``lr``.
        hessian: "full", an entry for each weight, or "lowrank" (HiZOO-L): a vector for the rows and
            one for the columns of each matrix.
        hessian_dtype: of the full h; None: that of the weights, bfloat16 for float16.
        num_samples: directions u a step, averaged (n-SPSA, MeZO paper, section 2).
        step_size: "fixed", η = lr, or "curvature", η = lr n / 2c̄ for n directions; times √B with a
            direction for each of B examples: between 1, where the examples' gradients have little
            in common, and B, where they are alike, as for n.
        curvature_every: steps from one measurement of c to the next; each of the first so many
            steps has one. h changes in steps with one only. None: 1, and 10 where c takes forward
            passes that nothing else needs, for its own μ or for the step size alone.
        curvature_eps: μ of c, where rounding wants a larger one than for g: c takes two further
            forward passes a direction then. None: ``eps``. Other groups' are in proportion.
        clip: |g| is bounded by so many times its running root mean square; None: it is not.
        layers: None shifts the weights in place and back, which rounds: by up to a unit in the
            last place a step. ``layerwise.LayerwiseWeights(model)`` leaves them as they are and
            perturbs one module at a time, with scratch memory for the largest; for half precision.
            Two forward passes at the first estimate try whether the model allows it.
        directions: None: all examples of a batch share u. ``example_directions.ExampleDirections``
            (model) gives each a direction of its own, u with random signs for its rows and its
            columns (GRZO, arXiv 2606.02857): ``closure`` then returns the examples' losses,
            (examples,), g is one number for each, and c the mean of theirs. The weights stay as
            they are during the forward passes. Excludes ``layers``.
        shards: None, or where parameters are parts of larger ones, whose other parts other
            processes have: an object whose ``places`` maps them to their ``Shard``, and whose
            ``sum(tensor)`` and ``max(tensor)`` return those over the processes, number by number.
            Each part has the noise, and the h, of its place in the whole. ``closure`` has to
            return the same loss in all processes. Excludes ``directions``.
        normalize: with ``directions``, divide the examples' g by their standard deviation.
        seed: the noise is a function of it and of the step's number.
        compile: whether torch.compile makes one kernel of the arithmetic on a tile, which takes 10
            to 30 seconds in a first run. None: from 16 million weights on. Where it fails, a
            warning says so and the operations run one by one.

    State, by parameter: ``hessian_minus_one``, or ``hessian_rows`` and ``hessian_columns``; nothing
    without curvature. The step's number is in ``param_groups``: ``state_dict()`` resumes exactly.
    Parameters that do not require a gradient when a step begins are left alone. With
    ``accelerate`` no ``prepare`` is needed; it returns this optimizer as it is.

    Attributes:
        projected_gradient: g of the last step (first group's μ; mean over the directions).
        curvature: c of the last step that measured it (likewise), 0 without curvature.
        examples: with ``directions``, how many examples the last step had; 1 without.
        shares: None, or where several processes take some of a step's directions each: an object
            whose ``owns(point)`` says whether this one runs the forward pass at a point, and whose
            ``exchanged(losses)`` returns those of all, given its own and NaN for the others'.

    Raises:
        ValueError: an argument out of range, a parameter that is not contiguous or not of a
            floating-point dtype, or none that requires a gradient.
        layerwise.OnlyInPlace: the first estimate found that ``layers`` does not fit the model.
    """

    # What accelerate asks for: it then wraps nothing, and step() returns the loss there too.
    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        hessian_smooth: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        hessian: str = "full",
        hessian_dtype: torch.dtype | None = None,
        num_samples: int = 1,
        step_size: str = "fixed",
        curvature_every: int | None = None,
        curvature_eps: float | None = None,
        clip: float | None = None,
        layers: Any = None,
        directions: Any = None,
        shards: Any = None,
        normalize: bool = False,
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples!r}")
        if hessian not in HESSIANS:
            raise ValueError(f"hessian must be one of {', '.join(HESSIANS)}, not {hessian!r}")
        if step_size not in STEP_SIZES:
            raise ValueError(f"step_size must be one of {', '.join(STEP_SIZES)}, not {step_size!r}")
        if curvature_every is not None and curvature_every < 1:
            raise ValueError(f"curvature_every must be at least 1, not {curvature_every!r}")
        for name, value in (("curvature_eps", curvature_eps), ("clip", clip)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be larger than 0 and finite, not {value!r}")
        if layers is not None and directions is not None:
            raise ValueError("layers and directions exclude each other: give one of them")
        if shards is not None and directions is not None:
            raise ValueError("shards and directions exclude each other: give one of them")
        if normalize and directions is None:
            raise ValueError("normalize needs directions: there is one g for all examples")
        self.num_samples = num_samples
        self.step_size = step_size
        self.curvature_every = curvature_every
        self.clip = clip
        self.hessian = hessian
        self.hessian_dtype = hessian_dtype
        self.layers = layers
        self.directions = directions
        self.shards = shards
        self.shares: Any = None
        self.normalize = normalize
        self.compile = compile
        self._compiles: bool | None = None
        self.projected_gradient = math.nan
        self.curvature = 0.0
        self.examples = 1
        self._slots: list[Slot] = []
        self._slot_of: dict[Tensor, Slot] = {}
        self._forget_estimates()
        defaults = {
            "lr": lr,
            "eps": eps,
            "hessian_smooth": hessian_smooth,
            "weight_decay": weight_decay,
            "curvature_eps": curvature_eps,
            "seed": seed,
            "step": 0,
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
            "clipped_steps": 0,
            "mean_curvature": 0.0,
            "measured_steps": 0,
            "mean_square_gradient": 0.0,
        }
        super().__init__(params, defaults)
        self._check_parameters()

    # ---- public interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own ``lr``, ``eps`` and so on; before training."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not (group[name] >= 0 and math.isfinite(group[name])):
                raise ValueError(f"{name} must be at least 0 and finite, not {group[name]!r}")
        if group["eps"] == 0:
            raise ValueError("eps must be larger than 0, not 0")
        if not 0 <= group["hessian_smooth"] < 1:
            raise ValueError(f"hessian_smooth must be in [0, 1), not {group['hessian_smooth']!r}")
        self._cut_slots()

    def check_perturbation_scale(self) -> None:
        """Check μ against the weights, which the first ``estimate`` does too; reads all of them.

        Raises:
            ValueError: eps is so small that hardly a weight would change, or so large beside the
                weights that shifting them back would not restore them.
        """
        in_place = self.layers is None and self.directions is None
        check_perturbation_scale(self._slots, in_place, self.shards)

    @property
    def optimizer(self) -> HiZOO:
        """Itself: accelerate looks here for what it would have wrapped."""
        return self

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing since a loss was not finite.

        Those at the end of the run so far are in ``param_groups[0]["skipped_in_a_row"]``.
        """
        return self.param_groups[0]["skipped_steps"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float | None:
        """Apply the estimates made since the last step; with ``closure``, make one first.

        Returns the loss of ``closure``, None without. A step in which a loss was not finite takes
        the shift back, changes nothing else and counts in ``skipped_steps``. A signal (Ctrl-C)
        that arrives within the update waits for its end. An exception within the update leaves
        a part of the weights updated and the others as they were; the step does not count.
        """
        loss = None if closure is None else self.estimate(closure)
        if not self._estimates:
            raise RuntimeError(
                "step() needs a closure, or estimate(closure) before it; with transformers take "
                "ZerothOrderTrainer (trainer.py), a plain Trainer calls neither"
            )
        differences = self._mean_differences()
        skipped = not all(math.isfinite(value) for pair in differences for value in pair)
        with signals_wait():
            if skipped:
                self.restore()
            else:
                self._apply(differences, self._example_differences())
            for group in self.param_groups:
                group["step"] += 1
                group["skipped_steps"] += skipped
                group["skipped_in_a_row"] = group["skipped_in_a_row"] + 1 if skipped else 0
            self._forget_estimates()
        torch.clear_autocast_cache()
        return loss

    @torch.no_grad()
    def estimate(self, closure: Callable[[], Any], weight: float | None = None) -> float:
        """Run the forward passes of one batch: 2 a direction, and those of c if it is measured.

        ``closure`` returns the loss of the batch, a number or a tensor of one, and must give the
        same loss for the same weights (no dropout): the first step calls it once more than it
        needs, and warns if it does not. With ``directions`` it returns a loss for each example,
        (examples,), whose mean is the loss of the batch. Of several batches before one ``step``
        each counts by its ``weight``, for instance the tokens that its loss is the mean over;
        without weights they count alike. Returns the unperturbed loss, or without it the mean of
        the perturbed ones. If anything raises, the weights come back and the step starts anew.
        """
        self._prepare()
        measures, ratio = self._measures_curvature(), self._curvature_ratio()
        scales = (1.0, ratio, -ratio, -1.0) if measures and ratio != 1 else (1.0, -1.0)
        order: list[Point | None] = [None] if measures else []
        order += [(draw, scale) for draw in range(self.num_samples) for scale in scales]
        if self.layers is not None and not self.layers.checked:
            self._check_layers(closure)
        if self.directions is not None and not self.directions.checked:
            self._check_directions(closure)
        if len(self._estimates) % 2:
            # Every other batch goes backwards, from where the one before it ended.
            order.reverse()
        first = self.param_groups[0]["step"] == 0 and not self._estimates
        losses: dict[Point | None, Losses] = {}
        try:
            for point in order:
                owns = self.shares is None or self.shares.owns(point)
                losses[point] = self._loss_at(point, closure if owns else lambda: math.nan)
            if self.shares is not None:
                losses = self.shares.exchanged(losses)
            if first:
                self._compare_again(losses, order[-1], closure)
            center = losses.get(None, sum(losses.values()) / len(losses))
            differences = [
                (
                    losses[draw, 1.0] - losses[draw, -1.0],
                    losses[draw, ratio] + losses[draw, -ratio] - 2 * center if measures else 0.0,
                )
                for draw in range(self.num_samples)
            ]
            self._estimates.append((1.0 if weight is None else float(weight), differences))
            self._measured = measures
        except BaseException:
            self.restore()
            self._forget_estimates()
            raise
        finally:
            torch.clear_autocast_cache()
        return mean_of(center)

    @torch.no_grad()
    def loss_along(self, closure: Callable[[], Any], distance: float, draw: int = 0) -> float:
        """Return the loss at θ + ``distance`` u/√h, u the direction of this number in this step.

        For looking at the loss between steps. ``distance`` is that of the first group; others' are
        in proportion of their ``eps``. With ``directions``, too, u is that of all examples. In
        place the parameters stay shifted until ``restore()``, or until a further loss.
        """
        if self._estimates:
            raise RuntimeError("loss_along() between estimate() and step() would lose the estimate")
        self._prepare()
        scale = distance / self.param_groups[0]["eps"]
        if self.directions is None:
            return self._loss_at((draw, scale) if scale else None, closure)
        with self.directions.perturbed(ExampleNoise(self, draw, scale, alike=True)):
            return float(closure())

    @torch.no_grad()
    def restore(self) -> None:
        """Take back the shift that ``estimate`` may have left on the parameters.

        If this raises, the shift is whole or gone, and a further call takes back what there is.
        """
        self._move_to(None)
        torch.clear_autocast_cache()

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: all but hooks, torch's own would be less.

        A scheduler puts a ``step`` into the object that steps the original, whoever calls it.
        """
        kept = self.__dict__.items()
        return {n: v for n, v in kept if n != "step" and not n.endswith("_hooks")}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as of the last whole step; takes a shift back first."""
        self.restore()
        self._forget_estimates()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()``; takes a shift back first. h keeps the dtype it was saved in."""
        self.restore()
        self._forget_estimates()
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        # torch casts a state to its parameter's dtype: h would lose digits, or its range.
        for parameter, number in zip(self._parameters(), saved, strict=True):
            for name, tensor in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = tensor.to(parameter.device, copy=True)
        self._cut_slots()

    def hessian_mean_and_max(self) -> tuple[float, float]:
        """Return the mean and the maximum of h over all parameters; reads all of h."""
        # Of whole parameters, and of parts.
        totals, counts, largest = [0.0, 0.0], [0, 0], 0.0
        for slot in self._slots:
            hessian, size = self._hessian(slot), slot.parameter.numel()
            if size:
                mean, maximum = hessian.mean_and_max() if hessian else (1.0, 1.0)
                part = slot.shard is not None
                totals[part] += mean * size
                counts[part] += size
                largest = max(largest, maximum)
        if self.shards is not None:
            of_parts = torch.tensor([totals[1], counts[1]], dtype=torch.float64)
            totals[1], counts[1] = self.shards.sum(of_parts).tolist()
            largest = self.shards.max(torch.tensor([largest], dtype=torch.float64)).item()
        count = sum(counts)
        return (sum(totals) / count, largest) if count else (1.0, 1.0)

    # ---- the points that losses are taken at

    @property
    def wants_curvature(self) -> bool:
        """Whether c is measured at all: for h, or for the step size."""
        return self.step_size == "curvature" or self._grows()

    def _grows(self) -> bool:
        """Whether h changes at all."""
        return any(group["hessian_smooth"] > 0 for group in self.param_groups)

    def _measures_curvature(self) -> bool:
        """Whether this step takes the loss at θ too."""
        every = self.curvature_every
        if every is None:
            every = 1 if self._grows() and self._curvature_ratio() == 1 else RARELY
        step = self.param_groups[0]["step"]
        return self.wants_curvature and (step < every or step % every == 0)

    def _curvature_ratio(self) -> float:
        """Return how many times the μ of g the μ of c is."""
        group = self.param_groups[0]
        return 1.0 if group["curvature_eps"] is None else group["curvature_eps"] / group["eps"]

    def _scalars_of(
        self, group: dict[str, Any], differences: list[list[float]]
    ) -> tuple[list[float], list[float]]:
        return scalars(differences, group["eps"], group["eps"] * self._curvature_ratio())

    def _forget_estimates(self) -> None:
        # (weight, [(l+ - l-, l+ + l- - 2 l0) of every direction]) of every batch: numbers, or with
        # directions for every example tensors.
        self._estimates: list[tuple[float, list[tuple[Losses, Losses]]]] = []
        # Whether they have taken the loss at θ too.
        self._measured = False
        # What of each g counts.
        self._bounded = torch.ones(1, 1)
        # Signs of the columns of the matrix that is being updated, by direction.
        self._known_signs: dict[tuple[Slot, int], Tensor] = {}
        # Where the parameters are if they are shifted in place.
        self._point: Point | None = None
        # How many tiles a shift in place has written, should it end early.
        self._written_tiles = 0
        self._moments: dict[tuple[Tensor, int], tuple[Tensor, Tensor]] = {}

    def _mean_differences(self) -> list[list[float]]:
        """(l+ - l-, l+ + l- - 2 l0) of every direction, averaged over the batches."""
        weights = torch.tensor([weight for weight, _ in self._estimates], dtype=torch.float64)
        apart = self.directions is not None
        values = torch.tensor(
            [
                # Examples with directions of their own have curvatures of their own.
                [
                    (mean_of(first), mean_of(abs(second) if apart else second))
                    for first, second in pairs
                ]
                for _, pairs in self._estimates
            ],
            dtype=torch.float64,
        )
        return torch.tensordot(weights / weights.sum(), values, dims=1).tolist()

    def _loss_at(self, point: Point | None, closure: Callable[[], Any]) -> Losses:
        """The loss at θ ± μ u/√h, or at θ itself for None; of every example with ``directions``."""
        # Under autocast torch keeps weights that it has cast, and would not see that they changed.
        torch.clear_autocast_cache()
        if self.directions is not None:
            return self._losses_of_examples(point and ExampleNoise(self, *point), closure)
        if self.layers is None:
            self._move_to(point)
            return float(closure())
        if point is None:
            return float(closure())
        with self.layers.replaced(functools.partial(self._perturb, *point)):
            return float(closure())

    def _losses_of_examples(self, noise: ExampleNoise | None, closure: Callable[[], Any]) -> Tensor:
        """Every example's loss with its own weights, or with θ for None: (examples,), float64."""
        with self.directions.perturbed(noise) if noise else contextlib.nullcontext():
            losses = closure()
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not len(losses):
            raise ValueError(
                "with directions the closure has to return the losses of the examples, (examples,)"
            )
        return losses.detach().to("cpu", torch.float64)

    def _compare_again(
        self,
        losses: dict[Point | None, Losses],
        point: Point | None,
        closure: Callable[[], Any],
    ) -> None:
        """Take a loss a second time, and warn if it differs by what the perturbation may change."""
        means = [mean_of(loss) for loss in losses.values()]
        known = mean_of(losses[point])
        difference = abs(mean_of(self._loss_at(point, closure)) - known)
        change = max(means) - min(means)
        # Kernels that add in any order differ by rounding.
        precision = max(torch.finfo(slot.parameter.dtype).eps for slot in self._slots)
        if difference > max(NOISY_LOSS * change, precision * abs(known)):
            warnings.warn(
                f"the closure's loss differs by {difference:.2g} between two calls with the same "
                f"weights, the perturbation changes it by {change:.2g}: give the same batch, and "
                "leave dropout out (model.eval())",
                stacklevel=4,
            )

    def _check_layers(self, closure: Callable[[], Any]) -> None:
        """Try whether the closure's model can be perturbed module by module."""
        unused = self.layers.check(closure)
        if unused:
            raise RuntimeError(
                f"the loss does not depend on {unused[0]}: freeze it before "
                "LayerwiseWeights(model), with requires_grad_(False)"
            )

    def _check_directions(self, closure: Callable[[], Any]) -> None:
        """Try whether the closure's model can be perturbed example by example."""
        unused = self.unused_by_examples(closure)
        if unused:
            raise RuntimeError(
                f"no loss depends on {unused[0]}: freeze it before ExampleDirections(model), with "
                "requires_grad_(False)"
            )

    @torch.no_grad()
    def unused_by_examples(self, closure: Callable[[], Any]) -> list[str]:
        """Check ``directions`` with a batch: names of the weights that no loss depends on.

        Raises:
            example_directions.NotByExample: the model does not fit.
        """
        if self._estimates:
            raise RuntimeError("unused_by_examples() between estimate() and step()")
        noises = [ExampleNoise(self, 0, 1.0, last=last) for last in (-1, 0)]
        return self.directions.check(lambda: self._losses_of_examples(None, closure), *noises)

    def _move_to(self, point: Point | None) -> None:
        """Shift the parameters in place from the point they are at to ``point``."""
        if self._point and (point is None or point[0] != self._point[0]):
            draw, scale = self._point
            self._shift(draw, -scale, None)
        if point and point != self._point:
            draw, scale = point
            self._shift(draw, scale - (self._point[1] if self._point else 0.0), point)

    def _shift(self, draw: int, scale: float, point: Point | None) -> None:
        """Add ``scale`` μ u/√h in place to all parameters, or, if it raises, to none.

        ``point`` is where they are then.
        """
        with signals_wait():
            self._written_tiles = 0
            try:
                self._perturb(draw, scale)
            except BaseException:
                self._perturb(draw, -scale, stop=self._written_tiles)
                raise
            self._point = point

    def _perturb(
        self,
        draw: int,
        scale: float,
        outputs: dict[Tensor, Tensor] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        """Write θ + scale μ u/√h into ``outputs``, or in place for all parameters.

        On the way, the row and column means of h u² are taken for a low-rank h, which needs them
        once for every direction, before the update. ``start`` and ``stop`` are the numbers of the
        first tile that is written, and of the first that is not any more.
        """
        slots = self._slots
        if outputs is not None:
            slots = [self._slot_of[parameter] for parameter in outputs]
        hessians = {slot: self._hessian(slot) for slot in slots}
        new: dict[tuple[Tensor, int], tuple[Tensor, Tensor]] = {}
        for slot, tile, noise in itertools.islice(self._tiles_with_noise(slots, draw), start, stop):
            parameter, hessian = slot.parameter, hessians[slot]
            measured = (
                isinstance(hessian, LowRankHessian) and (parameter, draw) not in self._moments
            )
            own = slot.view(parameter, tile)
            if slot.draws_apart:
                noise = run(drawn, slot)(noise, own)
            squares = run(shift_tile, slot)(
                own if outputs is None else slot.view(outputs[parameter], tile),
                None if outputs is None else own,
                tile_of(hessian, tile),
                noise,
                self._scalars([scale * slot.group["eps"]], slot)[0],
                measured,
            )
            self._written_tiles += 1
            if measured:
                if (parameter, draw) not in new:
                    new[parameter, draw] = hessian.no_moments()
                hessian.add_moments(new[parameter, draw], tile, squares)
        self._moments |= new

    # ---- the update

    def _apply(
        self, differences: list[list[float]], examples: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Take the shift back and update h and θ, in one pass over the noise in full precision.

        ``differences`` holds (l+ - l-, l+ + l- - 2 l0) of every direction; ``examples``, with
        ``directions``, is what ``_example_differences`` returns.
        """
        if any(slot.parameter.element_size() < 4 for slot in self._slots):
            # Rounded once before they round stochastically, which a fused kernel would leave out.
            self.restore()
        gradients, curvatures = self._scalars_of(self.param_groups[0], differences)
        self.projected_gradient = sum(gradients)
        if self._measured:
            self.curvature = sum(curvatures)
        if examples is None:
            sizes = torch.tensor(gradients, dtype=torch.float64).abs() * len(gradients)
            self._take_means(sizes.unsqueeze(1), torch.ones(1, dtype=torch.float64))
        else:
            firsts, weights = examples
            self.examples = len(weights)
            self._take_means(firsts.abs() / (2 * self.param_groups[0]["eps"]), weights)
        before = {slot: self._hessian(slot) for slot in self._slots}
        averaged = self._averaged_hessians(before, differences)
        begun, own = 0, None
        try:
            for slot, tile, noises, rounding in self._tiles_to_update():
                hessian = averaged.get(slot, before[slot])
                begun, own = begun + 1, slot.view(slot.parameter, tile)
                run(update_tile, slot)(
                    own,
                    tile_of(hessian, tile),
                    tile_of(before[slot], tile) if slot in averaged and self._point else None,
                    noises,
                    self._coefficients(slot, tile, hessian, differences, examples),
                    rounding,
                )
        except BaseException:
            if self._point:
                draw, scale = self._point
                # What is written first to a tile takes its shift back.
                written = begun if own is None or own[0]._version > 0 else begun - 1
                self._perturb(draw, -scale, start=written)
            self._forget_estimates()
            raise
        for slot, hessian in averaged.items():
            self.state[slot.parameter] = hessian.state
        self._point = None

    def _take_means(self, sizes: Tensor, weights: Tensor) -> None:
        """Bring the running means of c and g² up to date; g counts as it is bounded.

        ``sizes`` are |g|, (directions, examples), and ``weights`` those of the examples, whose sum
        is 1; where they share a direction there is one.
        """
        group = self.param_groups[0]
        done = group["step"] - group["skipped_steps"]
        bound = math.inf
        if self.clip is not None and done >= FIRST_MEASUREMENTS:
            bound = self.clip * math.sqrt(group["mean_square_gradient"])
        self._bounded = torch.where(sizes > bound, bound / sizes, 1.0)
        square = float(sizes.clamp(max=bound).square().mv(weights).mean())
        mean, measured = group["mean_curvature"], group["measured_steps"] + self._measured
        if self._measured:
            mean = running_mean(mean, self.curvature, measured)
            mean = max(mean, LEAST_PART * self.curvature)
        for group in self.param_groups:
            group["mean_square_gradient"] = running_mean(
                group["mean_square_gradient"], square, done + 1
            )
            group["mean_curvature"], group["measured_steps"] = mean, measured
            group["clipped_steps"] += bool((self._bounded < 1).any())

    def _example_differences(self) -> tuple[Tensor, Tensor] | None:
        """Return l+ - l- of the step's examples and by how much each counts; None if they share u.

        (directions, examples) and (examples,), float64; the weights' sum is 1.
        """
        if self.directions is None:
            return None
        firsts = [torch.stack([first for first, _ in pairs]) for _, pairs in self._estimates]
        weights = [
            torch.full_like(batch[0], weight / batch.shape[1])
            for batch, (weight, _) in zip(firsts, self._estimates, strict=True)
        ]
        whole = torch.cat(weights)
        return torch.cat(firsts, dim=1), whole / whole.sum()

    def learning_rate(self, group: dict[str, Any]) -> float:
        """Return η of a group's next step; 0 where no curvature was found, as in a flat loss."""
        lr = float(group["lr"])
        if self.step_size == "fixed":
            return lr
        if not group["mean_curvature"]:
            return 0.0
        # A single c may be far below the mean.
        lr *= min(1.0, group["measured_steps"] / FIRST_MEASUREMENTS)
        return lr * self.num_samples * math.sqrt(self.examples) / (2 * group["mean_curvature"])

    def _averaged_hessians(
        self, hessians: dict[Slot, Hessian | None], differences: list[list[float]]
    ) -> dict[Slot, LowRankHessian]:
        """Low-rank h after this step's average; a full h is averaged tile by tile."""
        growing = {
            slot: hessian
            for slot, hessian in hessians.items()
            if isinstance(hessian, LowRankHessian)
            and slot.group["hessian_smooth"] > 0
            and self._measured
        }
        for slot, hessian in growing.items():
            self._measure_moments(slot, hessian)
        if self.shards is not None:
            self._sum_moments([slot.parameter for slot in growing if slot.shard])
        averaged = {}
        for slot, hessian in growing.items():
            _, curvatures = self._scalars_of(slot.group, differences)
            moments = [self._moments[slot.parameter, d] for d in range(self.num_samples)]
            averaged[slot] = hessian.averaged(slot.group["hessian_smooth"], curvatures, moments)
        return averaged

    def _sum_moments(self, parts: Sequence[Tensor]) -> None:
        """Make the row and column means of h u² of wholes, from those of all processes' parts."""
        keys = [(parameter, draw) for parameter in parts for draw in range(self.num_samples)]
        if not keys:
            return
        vectors = [vector for key in keys for vector in self._moments[key]]
        summed = self.shards.sum(torch.cat(vectors)).split([len(vector) for vector in vectors])
        self._moments |= zip(keys, zip(summed[::2], summed[1::2], strict=True), strict=True)

    def _measure_moments(self, slot: Slot, hessian: LowRankHessian) -> None:
        """Take the row and column means of h u² that did not come on the way, in a shift.

        So it is with directions for every example; and layer by layer of a module that did not run,
        as an expert without a token, or all of them where the closure knows the losses already.
        """
        for draw in range(self.num_samples):
            if (slot.parameter, draw) in self._moments:
                continue
            moments = self._moments[slot.parameter, draw] = hessian.no_moments()
            for _, tile, noise in self._tiles_with_noise([slot], draw):
                squares = run(measured_squares, slot)(
                    slot.view(slot.parameter, tile), hessian.tile(tile), noise
                )
                hessian.add_moments(moments, tile, squares)

    def _tiles_to_update(
        self,
    ) -> Iterator[tuple[Slot, int, Sequence[Random], Random | None]]:
        """Yield every tile with u of every direction and the bits that it rounds by."""
        for packet in cut_into_packets(self._slots):
            noises = zip(*(self._noise(packet, d) for d in range(self.num_samples)), strict=True)
            rounds = any(slot.rounds for slot, _ in packet)
            roundings = (
                self._random(packet, ROUNDING, rounding_bits) if rounds else [None] * len(packet)
            )
            for (slot, tile), of_tile, rounding in zip(packet, noises, roundings, strict=True):
                yield slot, tile, of_tile, rounding

    def _coefficients(
        self,
        slot: Slot,
        tile: int,
        hessian: Hessian | None,
        differences: list[list[float]],
        examples: tuple[Tensor, Tensor] | None,
    ) -> Coefficients:
        group = slot.group
        gradients, curvatures = self._scalars_of(group, differences)
        lr, smooth = self.learning_rate(group), group["hessian_smooth"]
        samples = len(gradients)
        # With examples these differ, and ``steps`` are tiles.
        bounded = self._bounded[:, 0].tolist()
        shifted_draw, scale = self._point or (None, 0.0)
        numbers = [
            *(-lr * g * part for g, part in zip(gradients, bounded, strict=True)),
            *(-scale * group["eps"] * (draw == shifted_draw) for draw in range(samples)),
            *(smooth * curvature for curvature in curvatures),
            smooth,
            -lr * group["weight_decay"],
        ]
        values = self._scalars(numbers, slot)
        grows = isinstance(hessian, FullHessian) and smooth > 0 and self._measured
        return Coefficients(
            steps=[[value] * slot.parts(tile) for value in values[:samples]]
            if examples is None
            else self._steps_of(slot, tile, *examples),
            back=values[samples : 2 * samples] if self._point else None,
            growths=values[2 * samples : 3 * samples] if grows else None,
            smooth=values[-2],
            decay=values[-1] if numbers[-1] else None,
        )

    def _steps_of(
        self, slot: Slot, tile: int, firsts: Tensor, weights: Tensor
    ) -> list[list[Tensor]]:
        """What u/√h of every direction is multiplied by in a tile's parts: -η Σ_i w_i g_i r_i s_iᵀ.

        Of (directions, examples) ``firsts`` and (examples,) ``weights``.
        """
        group, parameter = slot.group, slot.parameter
        gradients = self._bounded * firsts / (2 * group["eps"])
        if self.normalize:
            spread = gradients.std(dim=1, correction=0, keepdim=True)
            gradients = torch.where(spread > 0, gradients / spread, 0.0)
        steps = -self.learning_rate(group) / len(firsts) * weights * gradients
        dtype = compute_dtype(parameter.dtype)
        steps = steps.to(parameter.device, dtype)
        examples = torch.arange(len(weights), dtype=torch.int32, device=parameter.device)
        tiles = []
        for draw, of_examples in enumerate(steps):
            parts = []
            if slot.columns:
                columns = self._column_signs(slot, draw, examples).to(dtype)
            for block in slot.rows(tile):
                positions = torch.arange(
                    block.start, block.stop, dtype=torch.int32, device=parameter.device
                )
                rows = self._signs(slot, draw, examples, positions.unsqueeze(1)).to(dtype)
                if slot.columns:
                    of_parts = [columns[:, part :: slot.packed] for part in range(slot.packed)]
                    parts += [(rows * of_examples) @ of_part for of_part in of_parts]
                else:
                    of_parts = [rows[part :: slot.packed] for part in range(slot.packed)]
                    parts += [of_part @ of_examples for of_part in of_parts]
            tiles.append(parts)
        return tiles

    def _column_signs(self, slot: Slot, draw: int, examples: Tensor) -> Tensor:
        """Return signs of a matrix's columns, (examples, columns), once for all of its tiles."""
        known = self._known_signs.get((slot, draw))
        if known is None:
            rows = slot.parameter.shape[0]
            stop = rows + slot.columns
            positions = torch.arange(rows, stop, dtype=torch.int32, device=examples.device)
            known = self._signs(slot, draw, examples.unsqueeze(1), positions)
            # Of this matrix alone: its tiles follow one another.
            self._known_signs = {k: v for k, v in self._known_signs.items() if k[0] is slot}
            self._known_signs[slot, draw] = known
        return known

    # ---- how tiles are computed

    def _parameters(self) -> Iterator[Tensor]:
        """Yield the parameters of all groups, frozen ones too, in the order of ``state_dict``."""
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    def _cut_slots(self) -> None:
        """Cut what is trained; a parameter keeps its number, and its noise, whatever is frozen."""
        numbers = itertools.count()
        slots: list[Slot] = []
        for group in self.param_groups:
            for parameter, number in zip(group["params"], numbers, strict=False):
                if not parameter.requires_grad:
                    continue
                check_parameter(parameter)
                as_matrix = self._is_low_rank(parameter) or self._has_rows(parameter)
                as_matrix |= "hessian_rows" in self.state.get(parameter, {})
                shard = self.shards.places.get(parameter) if self.shards is not None else None
                slots.append(
                    Slot.cut(
                        parameter,
                        group,
                        number,
                        as_matrix,
                        bool(self._compiles),
                        self._dtype_of_hessian(parameter),
                        shard,
                    )
                )
        self._slots, self._slot_of = slots, {slot.parameter: slot for slot in slots}

    def _check_parameters(self) -> None:
        trained = {slot.parameter for slot in self._slots}
        if not trained:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        if self.layers and set(self.layers.uses) != trained:
            raise ValueError("layers must hold exactly the parameters that the optimizer trains")
        if self.directions and self.directions.parameters != trained:
            raise ValueError(
                "directions must hold exactly the parameters that the optimizer trains"
            )

    def _prepare(self) -> None:
        """Do what has to wait for an estimate: before it weights may move, or be frozen."""
        trained = [parameter for parameter in self._parameters() if parameter.requires_grad]
        same = [*map(id, trained)] == [id(slot.parameter) for slot in self._slots]
        if not self._estimates and not same:
            self._cut_slots()
            self._check_parameters()
        if self._compiles is None:
            self.check_perturbation_scale()
            self._decide_whether_to_compile()
        self._start_hessians()

    def _decide_whether_to_compile(self) -> None:
        # Of wholes: whole parameters have to be the same, bit for bit, beside parts of any size.
        count = sum(math.prod(slot.whole_shape) for slot in self._slots)
        self._compiles = count >= COMPILE_FROM_ELEMENTS if self.compile is None else self.compile
        if self._compiles:
            for device in {slot.parameter.device for slot in self._slots}:
                reason = why_not_compiled(device)
                if reason is not None:
                    warnings.warn(
                        f"the step runs several times slower, torch.compile fails here: {reason}",
                        stacklevel=2,
                    )
                    self._compiles = False
        self._cut_slots()

    def _scalars(self, numbers: list[float], slot: Slot) -> Sequence[Scalar]:
        if not slot.compiles:
            return numbers
        dtype = compute_dtype(slot.parameter.dtype)
        return torch.tensor(numbers, dtype=dtype).to(slot.parameter.device, non_blocking=True)

    def _draws(self, packet: Packet, draw: int) -> list[Draw]:
        """Return where the random numbers of a packet's tiles come from, in a direction's stream.

        The key is ``tile_key``, for compiled kernels as a tensor.
        """
        stream = self._stream(draw)
        first, _ = packet[0]
        keys = [tile_key(stream, slot.number, slot.first_pair(tile)) for slot, tile in packet]
        if first.compiles:
            numbers = torch.tensor(keys, dtype=torch.int32)
            numbers = numbers.to(first.parameter.device, non_blocking=True)
            keys = [key.clone() for key in numbers]
        return [
            Draw(key, slot.index(tile), slot.places[tile].halves)
            for key, (slot, tile) in zip(keys, packet, strict=True)
        ]

    def _tiles_with_noise(
        self, slots: Sequence[Slot], draw: int
    ) -> Iterator[tuple[Slot, int, Random]]:
        """Yield every tile of ``slots``, in the order of their packets, with its ``_noise``."""
        for packet in cut_into_packets(slots):
            for (slot, tile), noise in zip(packet, self._noise(packet, draw), strict=True):
                yield slot, tile, noise

    def _noise(self, packet: Packet, draw: int) -> Sequence[Random]:
        """Return u of every tile of a packet."""
        return self._random(packet, draw, standard_normals)

    def _random(
        self, packet: Packet, draw: int, of_pairs: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Sequence[Random]:
        """Return random numbers of every tile of a packet, which ``of_pairs`` makes of bits.

        Where the kernel draws them itself, where they come from.
        """
        draws = self._draws(packet, draw)
        if packet[0][0].compiles:
            return draws
        bits = hashed(torch.cat([counters(draw.key, draw.index) for draw in draws]))
        sizes = [len(draw.index) for draw in draws]
        both = [numbers.split(sizes) for numbers in of_pairs(bits)]
        return [
            slot.joined(tile, [both[half][number] for half in draw.halves])
            for number, ((slot, tile), draw) in enumerate(zip(packet, draws, strict=True))
        ]

    def _stream(self, draw: int) -> int:
        group = self.param_groups[0]
        return mix_seed(group["seed"], group["step"], draw)

    def _signs(self, slot: Slot, draw: int, examples: Tensor, positions: Tensor) -> Tensor:
        """Return signs of a parameter's examples, float32; see ``ExampleNoise.signs``."""
        group = self.param_groups[0]
        stream = mix_seed(group["seed"], group["step"], draw, SIGNS)
        shape = slot.parameter.shape
        width = shape[0] + slot.columns
        key = tile_key(stream, slot.number, 0)
        bits = hashed(counters(key, examples * width + positions))
        return (bits >> 31).mul_(2).add_(1).to(torch.float32)

    def _hessian(self, slot: Slot) -> Hessian | None:
        """Return h of a parameter; None as long as it is 1."""
        state = self.state.get(slot.parameter)
        if not state:
            return None
        return (LowRankHessian if "hessian_rows" in state else FullHessian)(slot, state)

    def _has_rows(self, parameter: Tensor) -> bool:
        """Whether an example has signs for the rows of a parameter, and for its columns."""
        return self.directions is not None and parameter.dim() > 1

    def _is_low_rank(self, parameter: Tensor) -> bool:
        return self.hessian == "lowrank" and parameter.dim() > 1 and parameter.numel() > 0

    def _start_hessians(self) -> None:
        for slot in self._slots:
            if slot.group["hessian_smooth"] == 0 or self.state.get(slot.parameter):
                continue
            kind = LowRankHessian if self._is_low_rank(slot.parameter) else FullHessian
            self.state[slot.parameter] = kind.start(slot, self._dtype_of_hessian(slot.parameter))

    def _dtype_of_hessian(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype that a parameter's full h has, or would have."""
        state = self.state.get(parameter, {})
        if "hessian_minus_one" in state:
            return state["hessian_minus_one"].dtype
        if self.hessian_dtype is not None:
            return self.hessian_dtype
        return torch.bfloat16 if parameter.dtype == torch.float16 else parameter.dtype


# ----------------------------------------------------------------- a direction for every example


class ExampleNoise:
    """A direction as ``directions`` asks for it: μ u/√h by parameter, and the examples' signs.

    The matrix of example i is u∘(r_i s_iᵀ), with signs r_i for its rows and s_i for its columns; a
    vector is u∘r_i. Signs, too, are a function of (seed, step, parameter, index). Examples count
    through all batches, and processes, of a step.

    Args:
        optimizer: whose step it is.
        draw: number of the direction.
        scale: how many times μ u/√h.
        alike: all signs are 1: the examples share u.
        last: the signs of later examples are 0; None: of none.
    """

    def __init__(
        self,
        optimizer: HiZOO,
        draw: int,
        scale: float,
        alike: bool = False,
        last: int | None = None,
    ) -> None:
        self.optimizer, self.draw, self.scale = optimizer, draw, scale
        self.alike, self.last = alike, last
        self.slots = {slot.parameter: slot for slot in optimizer._slots}
        earlier = sum(len(pairs[0][0]) for _, pairs in optimizer._estimates)
        self.first_example = earlier + optimizer.directions.first_example

    def signs(self, parameter: Tensor, examples: Tensor, positions: Tensor) -> Tensor:
        """Return signs, float32, in the broadcast shape of ``examples`` and ``positions``, int32.

        ``examples`` are numbers within the batch, ``positions`` those of a row, or behind all rows
        those of a column.
        """
        examples = examples + self.first_example
        if self.alike:
            return torch.ones(
                torch.broadcast_shapes(examples.shape, positions.shape), device=positions.device
            )
        signs = self.optimizer._signs(self.slots[parameter], self.draw, examples, positions)
        return signs if self.last is None else signs * (examples <= self.last)

    def tiles(self, parameter: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield μ u/√h of a parameter in its dtype: some of its rows, and which they are."""
        slot = self.slots[parameter]
        hessian = self.optimizer._hessian(slot)
        (scale,) = self.optimizer._scalars([self.scale * slot.group["eps"]], slot)
        for _, tile, noise in self.optimizer._tiles_with_noise([slot], self.draw):
            own = slot.view(parameter, tile)
            if slot.draws_apart:
                noise = run(drawn, slot)(noise, own)
            blocks = run(direction_tile, slot)(own, tile_of(hessian, tile), noise, scale)
            for rows, block in zip(slot.rows(tile), blocks, strict=True):
                yield rows, block.view(parameter.dtype)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """Return some rows of μ u/√h of a matrix, (rows, columns), in its dtype."""
        slot = self.slots[parameter]
        key = tile_key(self.optimizer._stream(self.draw), slot.number, 0)
        height = slot.first_half // slot.columns
        is_second = (rows >= height).unsqueeze(1)
        pairs = torch.where(rows < height, rows, rows - height).to(torch.int32)
        index = pairs.unsqueeze(1) * slot.columns
        index = index + torch.arange(slot.columns, dtype=torch.int32, device=rows.device)
        first, second = standard_normals(hashed(counters(key, index)))
        noise = torch.where(is_second, second, first)
        noise = noise.to(compute_dtype(parameter.dtype))
        hessian = self.optimizer._hessian(slot)
        if hessian is not None:
            (whole,) = hessian_of(hessian.of_rows(rows), noise.dtype)
            noise.mul_(whole.rsqrt_())
        return noise.mul_(self.scale * slot.group["eps"]).to(parameter.dtype)


# ------------------------------------------------------------------------------------ h


class FullHessian:
    """h of one parameter, an entry for each weight, kept as h - 1 in ``state``.

    h starts at 1 and changes by as little as α = 1e-10 a step: near 1, float32 would swallow
    changes below 6e-8, and bfloat16 those below 4e-3. Near 0 their digits are finer.
    """

    def __init__(self, slot: Slot, state: dict[str, Any]) -> None:
        self.slot, self.offset = slot, state["hessian_minus_one"]

    @staticmethod
    def start(slot: Slot, dtype: torch.dtype) -> dict[str, Any]:
        """State of h = 1."""
        return {"hessian_minus_one": torch.zeros_like(slot.parameter, dtype=dtype)}

    def tile(self, tile: int) -> HessianTile:
        """Return h - 1 of a tile."""
        return self.slot.view(self.offset, tile)

    def of_rows(self, rows: Tensor) -> HessianTile:
        """Return h - 1 of some rows of a matrix."""
        return [self.offset.view(-1, self.slot.columns)[rows]]

    def mean_and_max(self) -> tuple[float, float]:
        """Mean and maximum of h."""
        return 1 + self.offset.mean(dtype=torch.float32).item(), 1 + self.offset.max().item()


class LowRankHessian:
    """h of one matrix as h_ij = r_i k_j / mean(r): HiZOO-L, after Adafactor (arXiv 1804.04235).

    r and k are float64 vectors; a matrix of h's is never formed, only tiles of it. Of a part of a
    matrix they are those of the whole.
    """

    def __init__(self, slot: Slot, state: dict[str, Any]) -> None:
        self.slot, self.state = slot, state
        self.rows, self.columns = state["hessian_rows"], state["hessian_columns"]
        self.row_factors = self.rows / self.rows.mean()

    @staticmethod
    def start(slot: Slot, dtype: torch.dtype) -> dict[str, Any]:
        """State of h = 1."""
        one = torch.ones((), dtype=torch.float64, device=slot.parameter.device)
        rows, *columns = slot.whole_shape
        return {
            "hessian_rows": one.repeat(rows),
            "hessian_columns": one.repeat(math.prod(columns)),
        }

    def tile(self, tile: int) -> HessianTile:
        """Return h of each part of a tile.

        Outside of compiled kernels: torch.compile would cut those in two, for what has rows and
        columns and for what has numbers alone.
        """
        dtype = compute_dtype(self.slot.parameter.dtype)
        factors = self.row_factors.to(dtype).unsqueeze(1)
        columns = self.columns[self.slot.own_columns].to(dtype)
        columns = columns.view(-1, self.slot.packed).t().contiguous()
        blocks = [factors[rows] for rows in self.slot.rows(tile)]
        return tuple(rows * of_part for rows in blocks for of_part in columns)

    def of_rows(self, rows: Tensor) -> HessianTile:
        """Return h of some rows."""
        dtype = compute_dtype(self.slot.parameter.dtype)
        return (self.row_factors[rows].to(dtype).unsqueeze(1) * self.columns.to(dtype),)

    def no_moments(self) -> tuple[Tensor, Tensor]:
        """Return row and column means of h u², of no tile so far."""
        return torch.zeros_like(self.rows), torch.zeros_like(self.columns)

    def add_moments(
        self, moments: tuple[Tensor, Tensor], tile: int, squares: Sequence[Tensor]
    ) -> None:
        """Add what h u² of a tile's parts contributes to the row and column means of the matrix."""
        of_rows, of_columns = moments
        own_columns = of_columns[self.slot.own_columns]
        rows, packed = self.slot.rows(tile), self.slot.packed
        for part, of_part in enumerate(squares):
            of_rows[rows[part // packed]] += of_part.sum(1) / len(self.columns)
            own_columns[part % packed :: packed] += of_part.sum(0) / len(self.rows)

    def averaged(
        self, smooth: float, curvatures: list[float], moments: list[tuple[Tensor, Tensor]]
    ) -> LowRankHessian:
        """Return h after a step, from the row and column means of h u² of every direction."""
        rows, columns = (1 - smooth) * self.rows, (1 - smooth) * self.columns
        for curvature, (of_rows, of_columns) in zip(curvatures, moments, strict=True):
            rows += smooth * curvature * of_rows
            columns += smooth * curvature * of_columns
        return LowRankHessian(self.slot, {"hessian_rows": rows, "hessian_columns": columns})

    def mean_and_max(self) -> tuple[float, float]:
        """Mean and maximum of h, also of a part those of the whole matrix."""
        largest = self.row_factors.max() * self.columns.max()
        return self.columns.mean().item(), largest.item()


Hessian = FullHessian | LowRankHessian


def tile_of(hessian: Hessian | None, tile: int) -> HessianTile:
    """Return what ``hessian_of`` needs for a tile; None where h is 1."""
    return None if hessian is None else hessian.tile(tile)


# ------------------------------------------------------------------------- parameters in tiles

# A tile is what is drawn, scaled and added at once. Where operations run one by one on a CPU core
# it has to stay in the cache; in a compiled kernel, or on another device, it has to be large enough
# that starting the work, about 0.05 ms, costs little.
CACHED_TILE_ELEMENTS = 1 << 17
LARGE_TILE_ELEMENTS = 1 << 22
GPU_TILE_ELEMENTS = 1 << 23
# Smaller parameters are computed together, one operation after the other, for less overhead. And
# torch.compile makes kernels for one core if the first tile that it sees is small.
COMPILED_PARAMETER_ELEMENTS = 1 << 16
# Weights from which compiling, 10 to 30 seconds once, pays within about a hundred steps.
COMPILE_FROM_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Shard:
    """The place of a parameter that is a part of a larger one: some of its rows or its columns.

    Attributes:
        shape: of the whole.
        dimension: the one that is cut: 0, or 1.
        start: where the part begins in it.
    """

    shape: tuple[int, ...]
    dimension: int
    start: int

    @property
    def first(self) -> int:
        """The index of the part's first number among those of the whole."""
        return self.start * math.prod(self.shape[self.dimension + 1 :])

    def index(self, part: Tensor, start: int, stop: int) -> Tensor:
        """Return the indices in the whole, int64, of a part's numbers from start to stop."""
        index = torch.arange(start, stop, device=part.device)
        if self.dimension == 1:
            columns = part[0].numel()
            rows = index.div(columns, rounding_mode="floor")
            index += rows * (math.prod(self.shape[1:]) - columns)
        return index.add_(self.first)


class Place(NamedTuple):
    """Where a tile lies in its parameter.

    Attributes:
        starts: where its blocks begin, among the parameter's numbers.
        size: of a block, in numbers.
        halves: which numbers of pairs it holds: those of one half of the parameter, 0 or 1, or of
            both, of as many blocks or of one.
        pairs: how many pairs its numbers are of.
    """

    starts: tuple[int, ...]
    size: int
    halves: tuple[int, ...]
    pairs: int


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter's place in the optimizer, and how it is cut into tiles.

    The first number of a pair lies in the first half of a parameter, the second one in the second;
    the halves are of whole rows, and where these are odd in number the first one has one more. A
    tile is two blocks, one of each half, of ``length`` numbers at most. It is one block where a
    number stands alone, as that row's, or as in some rows of a larger parameter; and where nothing
    is compiled and the whole parameter is one tile.

    Where h is low-rank, or the parameter is some columns of a larger one, a block is a matrix of
    whole rows with ``columns`` numbers each; otherwise, and of a vector, with ``columns`` 0, it is
    one-dimensional.
    Kernels see it as words if ``in_words``: those for bfloat16 on a CPU work on twice as many
    numbers at once as those for float32, and then torch.compile takes the casts of bits, for u and
    for rounding, through memory.
    """

    parameter: Tensor
    group: dict[str, Any]
    number: int
    columns: int
    length: int
    compiles: bool
    hessian_dtype: torch.dtype | None = None
    shard: Shard | None = None

    @classmethod
    def cut(
        cls,
        parameter: Tensor,
        group: dict[str, Any],
        number: int,
        as_matrix: bool,
        compiles: bool,
        hessian_dtype: torch.dtype | None = None,
        shard: Shard | None = None,
    ) -> Slot:
        """Choose the length of the blocks, and whether kernels are compiled for them."""
        compiles = compiles and parameter.numel() >= COMPILED_PARAMETER_ELEMENTS
        if parameter.device.type == "cpu":
            length = LARGE_TILE_ELEMENTS if compiles else CACHED_TILE_ELEMENTS
        else:
            length = GPU_TILE_ELEMENTS if compiles else LARGE_TILE_ELEMENTS
        as_matrix |= shard is not None and shard.dimension == 1
        columns = parameter[0].numel() if as_matrix and parameter.numel() else 0
        length //= 2
        if columns:
            length = max(1, length // columns) * columns
        return cls(parameter, group, number, columns, length, compiles, hessian_dtype, shard)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the parameter, or of the one that it is a part of."""
        return self.shard.shape if self.shard else tuple(self.parameter.shape)

    @property
    def first_half(self) -> int:
        """How many numbers of the whole are in its first half."""
        return first_half(self.whole_shape)

    @functools.cached_property
    def places(self) -> list[Place]:
        """Where the tiles lie."""
        count, length = self.parameter.numel(), self.length
        some_rows = self.shard is not None and self.shard.dimension == 0
        if some_rows:
            first, pairs = min(max(self.first_half - self.shard.first, 0), count), 0
        else:
            first = first_half(self.parameter.shape)
            pairs = count - first
            if 0 < count <= 2 * length and not self.compiles:
                return [Place((0,), count, (0, 1), first)]

        def alone(start: int, stop: int, half: int) -> list[Place]:
            sizes = ((at, min(length, stop - at)) for at in range(start, stop, length))
            return [Place((at,), size, (half,), size) for at, size in sizes]

        sizes = ((at, min(length, pairs - at)) for at in range(0, pairs, length))
        places = [Place((at, first + at), size, (0, 1), size) for at, size in sizes]
        return places + alone(pairs, first, 0) + alone(first + pairs, count, 1)

    @functools.cached_property
    def in_words(self) -> bool:
        """Whether kernels see the parameter, and its full h, as words of two numbers."""
        of_words = self.parameter.dtype == self.hessian_dtype == torch.bfloat16
        if not (self.compiles and self.parameter.device.type == "cpu" and of_words):
            return False
        numbers = [self.parameter.storage_offset(), self.columns]
        numbers += [number for place in self.places for number in (*place.starts, place.size)]
        return not any(number % 2 for number in numbers)

    def index(self, tile: int) -> Tensor | None:
        """Return the index of a tile's pairs for ``Draw``, for kernels of each word's first one."""
        if self.compiles:
            return self.loaded_index
        pairs = self.places[tile].pairs
        return self.spread(counted(pairs, 1, self.parameter.device)[:pairs])

    @functools.cached_property
    def loaded_index(self) -> Tensor | None:
        """What kernels load as the index of a tile's pairs; None: they count.

        On a CPU torch.compile builds a vector of consecutive numbers from its elements, which takes
        as long as half of a draw.
        """
        device = self.parameter.device
        if device.type != "cpu" and not self.row_step:
            return None
        return self.spread(counted(self.length, self.packed, device))

    def spread(self, index: Tensor) -> Tensor:
        """Return the indices in the whole, from a tile's first number, of those in the tile."""
        if not self.row_step:
            return index
        rows = index.div(self.columns, rounding_mode="floor")
        return rows.mul_(self.row_step - self.columns).add_(index)

    @property
    def row_step(self) -> int:
        """From a row of a block to the next in the whole; 0: its numbers lie side by side."""
        apart = self.shard is not None and self.shard.dimension == 1
        return math.prod(self.whole_shape[1:]) if apart else 0

    @property
    def own_columns(self) -> slice:
        """The columns of the whole, where h is low-rank."""
        start = self.shard.first if self.row_step else 0
        return slice(start, start + self.columns)

    def first_pair(self, tile: int) -> int:
        """Return the index of a tile's first pair among those of the whole."""
        place = self.places[tile]
        start = place.starts[0]
        if self.row_step:
            start = start // self.columns * self.row_step
        start += self.shard.first if self.shard else 0
        return start - self.first_half if place.halves == (1,) else start

    @property
    def packed(self) -> int:
        """Return the number of parts that kernels see a block in."""
        return 2 if self.in_words else 1

    def parts(self, tile: int) -> int:
        """Return the number of parts that kernels see a tile in."""
        return self.packed * len(self.places[tile].starts)

    @property
    def draws_apart(self) -> bool:
        """Whether a shift's u is drawn by a kernel of its own: half precision not in words."""
        on_cpu = self.parameter.device.type == "cpu"
        return self.compiles and on_cpu and is_half(self.parameter) and not self.in_words

    @property
    def rounds(self) -> bool:
        """Whether the parameter or its full h is of half precision."""
        dtypes = self.parameter.dtype, self.hessian_dtype or self.parameter.dtype
        return min(dtype.itemsize for dtype in dtypes) < 4

    def rows(self, tile: int) -> list[slice]:
        """Return the rows of a tile's blocks in the whole; the numbers, if it has no columns."""
        columns, place = max(1, self.columns), self.places[tile]
        first = self.shard.start if self.shard and self.shard.dimension == 0 else 0
        starts = [first + start // columns for start in place.starts]
        return [slice(start, start + place.size // columns) for start in starts]

    def view(self, tensor: Tensor, tile: int) -> list[Tensor]:
        """Return the blocks of a tile of ``tensor``, which has the parameter's shape, as views.

        ``data`` hides what it is a view of, for which torch.compile would compile anew.
        """
        place, flat = self.places[tile], tensor.view(-1)
        blocks = [flat[start : start + place.size] for start in place.starts]
        if self.in_words:
            blocks = [block.view(torch.int32) for block in blocks]
        if self.columns:
            blocks = [block.view(-1, self.columns // self.packed) for block in blocks]
        return [block.data for block in blocks]

    def joined(self, tile: int, halves: list[Tensor]) -> list[Tensor]:
        """Return each block's random numbers, of the first and of the second ones of its pairs."""
        place = self.places[tile]
        return halves if len(halves) == len(place.starts) else [torch.cat(halves)[: place.size]]


def counted(stop: int, step: int, device: torch.device) -> Tensor:
    """Return 0, ``step``, and so on to ``stop`` at least, int32: memory that is not written to."""
    return counted_to_power(max(0, stop - 1).bit_length(), step, device)


@functools.lru_cache(maxsize=8)
def counted_to_power(power: int, step: int, device: torch.device) -> Tensor:
    """Return 0, ``step``, and so on below 2**``power``, the same tensor for all that ask."""
    return torch.arange(0, 1 << power, step, dtype=torch.int32, device=device)


def first_half(shape: Sequence[int]) -> int:
    """Return how many numbers the first half of a parameter has: that of its rows, and one more."""
    return -(-shape[0] // 2) * math.prod(shape[1:]) if shape else 1


def check_parameter(parameter: Tensor) -> None:
    """Check that a parameter is one that can be cut into tiles and perturbed.

    Raises:
        ValueError: it is not contiguous, or of a dtype without fractions.
    """
    shown = f"parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{shown} is {str(parameter.dtype).removeprefix('torch.')}: give {known}")
    if not parameter.is_contiguous():
        raise ValueError(f"{shown} not contiguous")


def check_perturbation_scale(slots: Sequence[Slot], in_place: bool, shards: Any = None) -> None:
    """Check that a shift by μ u changes weights, and that shifting back restores them.

    Weights that are 0, as LoRA's second matrix at the start, take any shift and do not count.
    ``shards`` as of ``HiZOO``.

    Raises:
        ValueError: it does not.
    """
    changed, others, weights, norm, remainder = _effect_of_shift(
        [slot for slot in slots if slot.shard is None], in_place
    )
    if shards is not None:
        *counts, norm_of_parts, largest = _effect_of_shift(
            [slot for slot in slots if slot.shard is not None], in_place
        )
        sums = torch.tensor([*counts, norm_of_parts**2], dtype=torch.float64)
        *counts, squares = shards.sum(sums).tolist()
        changed, others, weights = (
            one + int(other) for one, other in zip((changed, others, weights), counts, strict=True)
        )
        norm = math.hypot(norm, math.sqrt(squares))
        largest = shards.max(torch.tensor([largest], dtype=torch.float64)).item()
        remainder = max(remainder, largest)
    eps = max((slot.group["eps"] for slot in slots), default=0.0)
    size = norm / math.sqrt(weights) if weights else 0.0
    if changed < CHANGED_WEIGHTS * others:
        raise ValueError(
            f"eps {eps!r} is below the precision of the weights, it changes {changed:,} of "
            f"{others:,}; give a larger one"
        )
    if remainder > LARGEST_REMAINDER * size > 0 or remainder == math.inf:
        raise ValueError(
            f"eps {eps!r} would destroy the weights: taking such a shift back leaves "
            f"{remainder:.2g} of it, their root mean square is {size:.2g}; give a smaller one"
        )


def _effect_of_shift(slots: Sequence[Slot], in_place: bool) -> tuple[int, int, int, float, float]:
    """Return what a shift by μ u does to weights.

    Returns:
        How many it changes for certain, of how many that are not 0, how many there are, their norm,
        and what taking the shift back leaves at most.
    """
    changed = others = weights = 0
    norm, remainder = 0.0, 0.0
    for slot in slots:
        dtype = slot.parameter.dtype
        limits, shift = torch.finfo(dtype), LARGEST_NOISE * slot.group["eps"]
        # Half a unit in a number's last place is at least a quarter of it times its dtype's eps.
        largest_changed = 4 * shift / limits.eps
        rounding = torch.finfo(dtype if in_place else compute_dtype(dtype)).eps / 2
        remainder = max(remainder, shift * rounding if shift < limits.max else math.inf)
        for values in slot.parameter.detach().view(-1).split(slot.length):
            others += int(values.count_nonzero())
            changed += int((values.ne(0) & values.abs().lt(largest_changed)).sum())
            weights += values.numel()
            of_tile = torch.linalg.vector_norm(values, dtype=compute_dtype(dtype))
            norm = math.hypot(norm, float(of_tile))
    return changed, others, weights, norm, remainder


Packet = list[tuple[Slot, int]]


def cut_into_packets(slots: Sequence[Slot]) -> list[Packet]:
    """Cut ``slots`` into packets of tiles whose noise is drawn together, about one whole tile.

    A packet lies on one device and is compiled as a whole or not at all.
    """
    packets: list[Packet] = []
    room, kind = 0, None
    for slot in sorted(slots, key=lambda slot: slot.compiles):
        for tile, place in enumerate(slot.places):
            if room <= 0 or kind != (slot.compiles, slot.parameter.device):
                packets.append([])
                room, kind = 2 * slot.length, (slot.compiles, slot.parameter.device)
            packets[-1].append((slot, tile))
            room -= place.size * len(place.starts)
    return packets


# A C++ compiler makes one operation of a product and a sum, rounded once: a sixth less time.
COMPILER_OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one kernel for tiles of every size."""
    # One for each kind of tile: its dtype, its h, where it begins. The limit is for accidents.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 64)
    # float16 weights whose h is bfloat16 are meant to be mixed.
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
    return torch.compile(function, dynamic=True, options=COMPILER_OPTIONS)


def run(function: Callable[..., Any], slot: Slot) -> Callable[..., Any]:
    """Return ``function`` as it runs on tiles of ``slot``."""
    return compiled(function) if slot.compiles else function


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Try to compile a small kernel for ``device``; returns the reason if it can't be done."""
    target = [*torch.zeros(2, COMPILED_PARAMETER_ELEMENTS // 2, device=device)]
    noise = Draw(torch.zeros(2, dtype=torch.int32, device=device), None, (0, 1))
    try:
        compiled(shift_tile)(target, None, None, noise, torch.ones((), device=device))
    except Exception as error:  # of torch, Triton, a compiler or the system, as it may be
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic for weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The second number of a word, in its upper half.
UPPER_HALF = -(1 << 16)


def is_in_words(block: Tensor) -> bool:
    """Whether a block holds two bfloat16 numbers in each int32 one."""
    return block.dtype == torch.int32


def format_of(block: Tensor) -> torch.dtype:
    """The dtype of a block's numbers."""
    return torch.bfloat16 if is_in_words(block) else block.dtype


def parts_of(tile: Tile) -> list[Tensor]:
    """Return the numbers of each part of a tile, float32 where they are of half precision."""
    parts: list[Tensor] = []
    for block in tile:
        if is_in_words(block):
            parts += [(block << 16).view(torch.float32), (block & UPPER_HALF).view(torch.float32)]
        else:
            parts.append(block.to(torch.float32) if is_half(block) else block)
    return parts


def blocks_of_parts(parts: Sequence[Tensor], like: Tile) -> list[Tensor]:
    """Return blocks that hold these numbers, half precision rounded to the nearest.

    The inverse of ``parts_of``, for a tile as ``like``.
    """
    if not is_in_words(like[0]):
        return [part.to(block.dtype) for part, block in zip(parts, like, strict=True)]
    patterns = [part.view(torch.int32) for part in parts]
    rounded = [pattern + (0x7FFF + ((pattern >> 16) & 1)) for pattern in patterns]
    pairs = zip(rounded[::2], rounded[1::2], strict=True)
    return [((first >> 16) & 0xFFFF) | (second & UPPER_HALF) for first, second in pairs]


def write(tile: Tile, parts: Sequence[Tensor]) -> None:
    """Let a tile hold these numbers, half precision rounded to the nearest."""
    for block, values in zip(tile, blocks_of_parts(parts, tile), strict=True):
        block.copy_(values)


# ------------------------------------------------------------------------- noise from seeds

SIGN_BIT = -(1 << 31)
MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


def mix_seed(*numbers: int) -> int:
    """Hash whole numbers into one 64-bit seed (splitmix64's finaliser, folded over them)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
        state ^= state >> 31
    return state


def tile_key(stream: int, parameter: int, first: int) -> tuple[int, int]:
    """Return the odd multiplier and the offset of ``counters`` for a tile of a 64-bit ``stream``.

    Number ``i`` of the ``parameter``-th parameter counts as multiplier * i + offset, modulo 2**32:
    up to 2**32 numbers of a parameter have counters of their own, and every parameter and step has
    another sequence. ``first`` is the index of the tile's first number.
    """
    mixed = mix_seed(stream, parameter)
    multiplier = (mixed & MASK_32) | 1
    offset = ((mixed >> 32) + first * multiplier) & MASK_32
    return _signed(multiplier), _signed(offset)


def _signed(number: int) -> int:
    return number - (1 << 32) if number >> 31 else number


def counters(key: Sequence[int] | Tensor, index: Tensor) -> Tensor:
    """Return the counters, int32, of numbers whose ``index`` counts from that of the key."""
    return index.mul(key[0]).add_(key[1])


def hashed(bits: Tensor) -> Tensor:
    """Mix int32 numbers so that every bit depends on every bit; overwrites them.

    Two rounds of xor-shift and multiplication, with the constants that Chris Wellons's search for
    functions with the least bias found (hash-prospector, "lowbias32").
    """
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def half_turned(bits: Tensor) -> Tensor:
    """Exchange the upper and the lower 16 bits."""
    return (bits << 16) | ((bits >> 16) & 0xFFFF)


def rounding_bits(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return random bits for the two numbers of pairs, of which the upper ones count most."""
    return bits, half_turned(bits)


def standard_normals(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn hashed int32 numbers into pairs of u ~ N(0, 1), float32 (Box and Muller, 1958).

    20 bits become the radius √(-2 ln U) and 12 the angle, in the middle of their intervals; the
    numbers are the radius times its sine and its cosine, and independent. So |u| is at most 5.4,
    and its distribution is the normal one to about 1e-6. Sine, cosine and logarithm are polynomials
    fitted to 2e-6: as fused arithmetic they cost a tenth of the library's functions.
    """
    angle = (bits >> 21).to(torch.float32).add_(0.5).mul_(1 / 1024)  # in (-1, 1), times π/2
    square = angle * angle
    sine = square.mul(-0.00437101).add_(0.07950065).mul_(square).add_(-0.64592596)
    sine.mul_(square).add_(1.57079514).mul_(angle)
    cosine = square.mul(0.00085819).add_(-0.02081063).mul_(square).add_(0.25365075)
    cosine.mul_(square).add_(-1.2336982).mul_(square).add_(1)
    uniform = (bits & 0xFFFFF).to(torch.float32).add_(0.5).mul_(2**-20)
    # U = (1 + t) 2**e with 1 + t between √½ and √2
    pattern = uniform.view(torch.int32)
    exponent = (pattern - 0x3F3504F3) >> 23
    t = (pattern - (exponent << 23)).view(torch.float32).sub_(1)
    logarithm = t.mul(-0.14337014).add_(0.22314531).mul_(t).add_(-0.254644).mul_(t).add_(0.3322804)
    logarithm.mul_(t).add_(-0.49985581).mul_(t).add_(1.000012).mul_(t)
    logarithm.add_(exponent.to(torch.float32).mul_(math.log(2)))
    radius = logarithm.mul_(-2).sqrt_()
    # Those angles are half a circle: the sign of the cosine is the twelfth bit.
    signed = (radius.view(torch.int32) ^ ((bits << 11) & SIGN_BIT)).view(torch.float32)
    return sine.mul_(radius), cosine.mul_(signed)


def numbers_of_pairs(
    random: Random, tile: Tile, of_pairs: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Return random numbers of each part of a tile, in its shape.

    ``random`` are these numbers, of each block, or where they come from: then ``of_pairs`` makes
    them of hashed counters here, as a part of a compiled kernel.
    """
    if not isinstance(random, Draw):
        return [numbers.view(block.shape) for numbers, block in zip(random, tile, strict=True)]
    like, index = tile[0], random.index
    count, packed = like.numel(), 2 if is_in_words(like) else 1
    if index is None:
        index = torch.arange(0, packed * count, packed, dtype=torch.int32, device=like.device)
    first = counters(random.key, index.narrow(0, 0, count)).view(like.shape)
    of_parts = [first, first + random.key[0]][:packed]
    both = [of_pairs(hashed(part)) for part in of_parts]
    return [numbers[half] for half in random.halves for numbers in both]


def drawn(noise: Random, tile: Tile) -> list[Tensor]:
    """Return u of each part of a tile, in the part's shape and the dtype of arithmetic."""
    dtype = compute_dtype(tile[0].dtype)
    return [u.to(dtype) for u in numbers_of_pairs(noise, tile, standard_normals)]


# ----------------------------------------------------------------------------------- rounding


def is_half(block: Tensor) -> bool:
    """Whether a block's numbers are of half precision."""
    return format_of(block).itemsize < 4


def added(value: Tensor, change: Tensor, bits: Tensor | None, block: Tensor) -> Tensor:
    """Return ``value`` + ``change``, of a part of ``block``, as a number that it can hold."""
    if is_half(block):
        return rounded_stochastically(value, change, bits, format_of(block))
    return value + change.to(value.dtype)


def rounded_stochastically(
    value: Tensor, change: Tensor, bits: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``value`` + ``change`` in float32, rounded to ``dtype``, right on average.

    So a change far below one unit in the last place is neither lost nor biased, for normal and
    subnormal numbers; where it is 0 nothing moves. ``value`` is of that half-precision dtype, and
    ``bits`` are random, int32; the upper ones count most.
    """
    if dtype == torch.bfloat16:
        return rounded_to_bfloat16(value, change, bits)
    return rounded_to_units(value, change, bits, dtype)


def rounded_to_bfloat16(value: Tensor, change: Tensor, bits: Tensor) -> Tensor:
    """Round by adding random bits below bfloat16's last one to float32's, and cutting them off.

    The sum in float32, whose last place is 2**-16 units, rounds at random too: half a last place
    at most is added to it before.
    """
    power = (value.view(torch.int32) & 0x7F800000).view(torch.float32)
    below = (bits & 0xFFFF).to(torch.float32).sub_(0x7FFF + 0.5).mul_(2**-39)
    total = value + below.mul_(power).add_(change)
    total = torch.where(change == 0, value, total)
    pattern = total.view(torch.int32) + ((bits >> 16) & 0xFFFF)
    return (pattern & UPPER_HALF).view(torch.float32)


def rounded_to_units(value: Tensor, change: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round by moving ``value`` by whole units in the last place of the larger, old or new.

    That is ``change`` in those units, rounded up with the probability of its fraction.
    """
    information = torch.finfo(dtype)
    total = value + change
    largest = torch.maximum(value.abs(), total.abs())
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = power.clamp(min=information.smallest_normal).mul_(information.eps)
    # Where the last place of the sum is a higher one, the sum itself is rounded to it.
    outgrown = value.abs() < power
    value = torch.where(outgrown, 0.0, value)
    fraction = ((bits >> 8) & 0xFFFFFF).to(torch.float32).mul_(2**-24)
    moves = fraction.add_(torch.where(outgrown, total, change).div_(unit)).floor_()
    return moves.mul_(unit).add_(value)


# ------------------------------------------------------------------------------------ signals

# Those that schedulers and people end or pause a program with, as far as the platform has them.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals wait for the end of the block: Ctrl-C raises between any two operations.

    Python runs the handlers of signals in its main thread, and lets only that one set them.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = ((number, signal.getsignal(number)) for number in SIGNALS)
        handlers = {number: handler for number, handler in found if callable(handler)}
    arrived: list[tuple[int, Any]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda *signal_and_frame: arrived.append(signal_and_frame))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in arrived:
            handlers[number](number, frame)
