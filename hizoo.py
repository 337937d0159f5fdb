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

The noise u is never stored. It is a function of (seed, step, parameter, tile) and is drawn again,
tile by tile, whenever it is needed: three times a step, once for each perturbed forward pass and
once for the update. No global random state is read or changed.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A tile is what is drawn, scaled and added at once. On a CPU core it has to stay in the cache (the
# last level: in smaller tiles Python's part of the loop costs more than the memory); on another
# device it has to be large enough that launching its kernels costs little.
CPU_TILE_ELEMENTS = 1 << 17
DEVICE_TILE_ELEMENTS = 1 << 21
# Neighbouring tiles go to a worker together, so that handing them out costs little.
PACKET_ELEMENTS = 1 << 20
MAX_WORKERS = 16
MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


# ------------------------------------------------------------------------- noise from seeds


def mix_seed(*numbers: int) -> int:
    """Hash whole numbers into one 64-bit seed (splitmix64's finaliser, folded over them)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
        state ^= state >> 31
    return state


def tile_seed(stream: int, tile: int) -> int:
    """Seed of one tile of a 64-bit noise ``stream``.

    torch's CPU generator uses the lower 32 bits of a seed only. They are a bijection of the tile's
    number, so that no two tiles of a step ever share their noise.
    """
    low = (stream + tile) & MASK_32
    low = ((low ^ (low >> 16)) * 0x85EBCA6B) & MASK_32
    low = ((low ^ (low >> 13)) * 0xC2B2AE35) & MASK_32
    return (stream & ~MASK_32 & MASK_64) | (low ^ (low >> 16))


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter's place in the optimizer, and how it is cut into contiguous tiles.

    It is seen as a matrix of ``rows`` x ``columns``; vectors have one row. A tile is ``height``
    whole rows, or ``width`` numbers of one row where a row alone is larger than a tile.
    ``first_tile`` counts the tiles of all parameters before.
    """

    parameter: Tensor
    group: dict[str, Any]
    first_tile: int
    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def cut(cls, parameter: Tensor, group: dict[str, Any], first_tile: int) -> Slot:
        """Choose the tiles of a parameter."""
        size = CPU_TILE_ELEMENTS if parameter.device.type == "cpu" else DEVICE_TILE_ELEMENTS
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        columns = parameter.numel() // max(1, rows)
        height = max(1, min(rows, size // max(1, columns)))
        return cls(parameter, group, first_tile, rows, columns, height, min(columns, size))

    def __len__(self) -> int:
        """Return the number of tiles."""
        if not self.width:
            return 0
        return math.ceil(self.rows / self.height) * math.ceil(self.columns / self.width)

    def place(self, tile: int) -> tuple[slice, slice]:
        """Return the rows and columns of a tile."""
        block, part = divmod(tile, math.ceil(self.columns / self.width))
        row, column = block * self.height, part * self.width
        return (
            slice(row, min(self.rows, row + self.height)),
            slice(column, min(self.columns, column + self.width)),
        )

    def views(self, tensor: Tensor, tiles: range) -> Sequence[Tensor]:
        """Return tiles of ``tensor``, which has the parameter's shape, as views."""
        matrix = tensor.detach().view(self.rows, self.columns)
        if self.width < self.columns:
            return [matrix[self.place(tile)] for tile in tiles]
        # One call for all tiles: the loops over tiles below cost as much as their arithmetic.
        return matrix[tiles.start * self.height : tiles.stop * self.height].split(self.height)


Packet = list[tuple[Slot, range]]


def cut_into_packets(slots: Sequence[Slot]) -> list[Packet]:
    """Cut the tiles of ``slots`` into packets of about ``PACKET_ELEMENTS`` numbers, in order."""
    packets: list[Packet] = []
    room = 0
    for slot in slots:
        per_tile, first = slot.height * slot.width, 0
        while first < len(slot):
            if room <= 0:
                packets.append([])
                room = PACKET_ELEMENTS
            last = min(len(slot), first + max(1, room // per_tile))
            packets[-1].append((slot, range(first, last)))
            room -= (last - first) * per_tile
            first = last
    return packets


class Scratch(threading.local):
    """Buffers and generators of the calling thread, made once and used for every tile."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.generators: dict[torch.device, torch.Generator] = {}

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised tensor of ``like``'s shape and device, in the dtype of arithmetic."""
        dtype = compute_dtype(like.dtype)
        key = (name, like.device, dtype)
        flat = self.buffers.get(key)
        if flat is None or flat.numel() < like.numel():
            flat = self.buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return flat[: like.numel()].view(like.shape)

    def generator(self, device: torch.device) -> torch.Generator:
        """The thread's generator for ``device``, to be seeded."""
        generator = self.generators.get(device)
        if generator is None:
            generator = self.generators[device] = torch.Generator(device)
        return generator


SCRATCH = Scratch()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of noise and arithmetic for weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=1)
def worker_threads(count: int) -> ThreadPoolExecutor:
    """The threads that share the tiles of CPU parameters; each computes on one core."""
    return ThreadPoolExecutor(count, "hizoo", initializer=torch.set_num_threads, initargs=(1,))


def run_packets(function: Callable[[Packet], Any], slots: Sequence[Slot]) -> Iterator[Any]:
    """Apply ``function`` to all tiles of ``slots``, packet by packet, on all cores if on the CPU.

    Yields the results in the order of the packets, whatever the number of threads.
    """
    packets = cut_into_packets(slots)
    workers = min(MAX_WORKERS, torch.get_num_threads(), os.cpu_count() or 1)
    on_cpu = all(slot.parameter.device.type == "cpu" for slot in slots)
    if not on_cpu or workers < 2 or len(packets) < 2:
        return map(function, packets)
    return worker_threads(workers).map(function, packets)


# --------------------------------------------------------------------------- arithmetic on tiles


def draw_noise(noise: Tensor, generator: torch.Generator, seed: int) -> None:
    """Fill a tile with u ~ N(0, 1)."""
    noise.normal_(generator=generator.manual_seed(seed))


def shift(target: Tensor, source: Tensor, noise: Tensor, root: Tensor | None, scale: float) -> None:
    """Write ``source`` + ``scale`` u/√h into ``target``, half precision rounded once, at the end.

    ``root`` holds 1/√h; None means h = 1.
    """
    if target is not source or target.dtype != noise.dtype:
        moved = torch.mul(noise, scale, out=SCRATCH.buffer("value", target))
        target.copy_((moved if root is None else moved.mul_(root)).add_(source))
    elif root is None:
        target.add_(noise, alpha=scale)
    else:
        target.addcmul_(noise, root, value=scale)


def add_rounding_stochastically(target: Tensor, change: Tensor, seed: int) -> None:
    """Add ``change``, in float32, to a tile of half-precision numbers, right on average.

    The tile moves by whole units in its last place: ``change`` in those units, rounded up with the
    probability of its fraction. So a change far below one unit is neither lost nor biased, for
    normal and subnormal numbers.
    """
    information = torch.finfo(target.dtype)
    value = SCRATCH.buffer("value", target).copy_(target)
    exponents = SCRATCH.buffer("unit", target)
    torch.bitwise_and(value.view(torch.int32), 0x7F800000, out=exponents.view(torch.int32))
    unit = exponents.clamp_(min=information.smallest_normal).mul_(information.eps)
    moves = SCRATCH.buffer("dither", target)
    # Behind a change this large the number's own last place is lost, and their ratio overflows.
    torch.maximum(unit, torch.abs(change, out=moves).mul_(2**-24), out=unit)
    moves.uniform_(generator=SCRATCH.generator(target.device).manual_seed(seed))
    moves.addcdiv_(change, unit).floor_()
    target.copy_(value.addcmul_(moves, unit))


def descend(
    target: Tensor, direction: Tensor, root: Tensor | None, scale: float, decay: float, seed: int
) -> None:
    """Add ``scale`` u/√h + ``decay`` θ to a tile of weights; may overwrite ``direction``.

    Half precision rounds stochastically, from ``seed``.
    """
    if target.dtype != direction.dtype:
        change = direction.mul_(scale) if root is None else direction.mul_(scale).mul_(root)
        add_rounding_stochastically(target, change.add_(target, alpha=decay), seed)
        return
    if decay:
        target.mul_(1 + decay)
    shift(target, target, direction, root, scale)


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

    def views(self, tiles: range) -> Sequence[Tensor]:
        """Return h - 1 of each tile."""
        return self.slot.views(self.offset, tiles)

    @staticmethod
    def whole(offset: Tensor, out: Tensor) -> Tensor:
        """Return h of one tile."""
        if offset.dtype == out.dtype:
            return torch.add(offset, 1, out=out)
        return out.copy_(offset).add_(1)

    @staticmethod
    def inverse_root(offset: Tensor, out: Tensor) -> Tensor:
        """Return 1/√h of one tile."""
        return FullHessian.whole(offset, out).rsqrt_()

    @staticmethod
    def grow(offset: Tensor, hessian: Tensor, growth: Tensor, seed: int) -> None:
        """Multiply h of one tile by 1 + growth, where growth is α c u² - α."""
        if offset.dtype == hessian.dtype:
            offset.addcmul_(growth, hessian)
        else:
            add_rounding_stochastically(offset, growth.mul_(hessian), seed)
            # Rounded down to 0, h would make the next perturbation infinite.
            offset.clamp_(min=torch.finfo(offset.dtype).eps - 1)

    def mean_and_max(self) -> tuple[float, float]:
        """Mean and maximum of h."""
        return 1 + self.offset.mean(dtype=torch.float32).item(), 1 + self.offset.max().item()


class LowRankHessian:
    """h of one matrix as h_ij = r_i k_j / mean(r): HiZOO-L, after Adafactor (arXiv 1804.04235).

    r and k are float64 vectors; a matrix of h's is never formed, only tiles of it.
    """

    def __init__(self, slot: Slot, state: dict[str, Any]) -> None:
        self.slot = slot
        self.rows, self.columns = state["hessian_rows"], state["hessian_columns"]
        self.row_factors = self.rows / self.rows.mean()

    @staticmethod
    def start(slot: Slot, dtype: torch.dtype) -> dict[str, Any]:
        """State of h = 1."""
        one = torch.ones((), dtype=torch.float64, device=slot.parameter.device)
        return {
            "hessian_rows": one.repeat(slot.rows),
            "hessian_columns": one.repeat(slot.columns),
        }

    def views(self, tiles: range) -> Sequence[tuple[Tensor, Tensor]]:
        """Return 1/√ of the row factors, (rows, 1), and of the column factors of each tile."""
        dtype = compute_dtype(self.slot.parameter.dtype)
        rows = self.row_factors.rsqrt().to(dtype).unsqueeze(1)
        columns = self.columns.rsqrt().to(dtype)
        places = (self.slot.place(tile) for tile in tiles)
        return [(rows[place[0]], columns[place[1]]) for place in places]

    @staticmethod
    def inverse_root(factors: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """Return 1/√h of one tile."""
        return torch.mul(*factors, out=out)

    def averaged(
        self, smooth: float, curvatures: list[float], moments: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """State after a step, from the row and column means of h u² of every direction."""
        rows, columns = (1 - smooth) * self.rows, (1 - smooth) * self.columns
        for curvature, (of_rows, of_columns) in zip(curvatures, moments, strict=True):
            rows += smooth * curvature * of_rows
            columns += smooth * curvature * of_columns
        return {"hessian_rows": rows, "hessian_columns": columns}

    def mean_and_max(self) -> tuple[float, float]:
        """Mean and maximum of h."""
        largest = self.row_factors.max() * self.columns.max()
        return self.columns.mean().item(), largest.item()


Hessian = FullHessian | LowRankHessian


def views_of(hessian: Hessian | None, tiles: range) -> Sequence[Any]:
    """Return what ``inverse_root`` needs for each tile; None where h is 1."""
    return [None] * len(tiles) if hessian is None else hessian.views(tiles)


# ------------------------------------------------------------------------------ the optimizer


HESSIANS = ("full", "lowrank")
# Number of the stream that stochastic rounding draws from; those of u are numbered from 0.
ROUNDING = -1


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
            all parameters of a large model.
        eps: perturbation scale μ, in units of the weights; larger than 0.
        hessian_smooth: smoothing α of h, from 0 (MeZO: two forward passes a step) to below 1.
        weight_decay: decoupled weight decay λ, multiplied by ``lr``.
        hessian: "full", an entry for each weight, or "lowrank" (HiZOO-L): a vector for the rows and
            one for the columns of each matrix.
        hessian_dtype: of the full h; None: that of the weights, bfloat16 for float16.
        num_samples: directions u a step, averaged (n-SPSA, MeZO paper, section 2).
        layers: None shifts the weights in place and back, which rounds: by up to a unit in the
            last place a step. ``layerwise.LayerwiseWeights(model)`` leaves them as they are and
            perturbs one module at a time, with scratch memory for the largest; for half precision.
        seed: the noise is a function of it and of the step's number.

    State, by parameter: ``hessian_minus_one``, or ``hessian_rows`` and ``hessian_columns``; nothing
    without curvature. The step's number is in ``param_groups``: ``state_dict()`` resumes exactly.

    Attributes:
        projected_gradient: g of the last step (first group's μ; mean over the directions).
        curvature: c of the last step (likewise), 0 without curvature.

    Raises:
        ValueError: an argument out of range, or a parameter that is not contiguous.
    """

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
        layers: Any = None,
        seed: int = 0,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples!r}")
        if hessian not in HESSIANS:
            raise ValueError(f"hessian must be one of {', '.join(HESSIANS)}, not {hessian!r}")
        self.num_samples = num_samples
        self.hessian = hessian
        self.hessian_dtype = hessian_dtype
        self.layers = layers
        self.projected_gradient = math.nan
        self.curvature = 0.0
        self._slots: list[Slot] = []
        self._forget_estimates()
        defaults = {
            "lr": lr,
            "eps": eps,
            "hessian_smooth": hessian_smooth,
            "weight_decay": weight_decay,
            "seed": seed,
            "step": 0,
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
        }
        super().__init__(params, defaults)
        if layers and set(layers.uses) != {slot.parameter for slot in self._slots}:
            raise ValueError("layers must hold exactly the parameters that the optimizer has")

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
        self._slots = list(self._number_tiles())

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
        the shift back, changes nothing else and counts in ``skipped_steps``.
        """
        loss = None if closure is None else self.estimate(closure)
        if not self._estimates:
            raise RuntimeError("step() needs a closure, or estimate(closure) before it")
        differences = torch.tensor(self._estimates, dtype=torch.float64).mean(dim=0).tolist()
        skipped = not all(math.isfinite(value) for pair in differences for value in pair)
        if skipped:
            self.restore()
        else:
            self._apply(differences)
        for group in self.param_groups:
            group["step"] += 1
            group["skipped_steps"] += skipped
            group["skipped_in_a_row"] = group["skipped_in_a_row"] + 1 if skipped else 0
        self._forget_estimates()
        return loss

    @torch.no_grad()
    def estimate(self, closure: Callable[[], Any]) -> float:
        """Run the forward passes of one batch: 2 a direction, and one unperturbed if α > 0.

        ``closure`` returns the loss of the batch, a number or a tensor of one, and must give the
        same loss for the same weights (no dropout). Returns the unperturbed loss, or without it the
        mean of the perturbed ones. If ``closure`` raises, the weights come back and the step starts
        anew.
        """
        with_curvature = any(group["hessian_smooth"] > 0 for group in self.param_groups)
        points = [(draw, sign) for draw in range(self.num_samples) for sign in (1, -1)]
        order = [None, *points] if with_curvature else points
        self._start_hessians()
        if len(self._estimates) % 2:
            # Every other batch goes backwards, from where the one before it ended.
            order.reverse()
        losses = {}
        try:
            for point in order:
                losses[point] = self._loss_at(point, closure)
        except BaseException:
            self.restore()
            self._forget_estimates()
            raise
        center = losses.get(None, sum(losses.values()) / len(losses))
        pairs = [(losses[draw, 1], losses[draw, -1]) for draw in range(self.num_samples)]
        self._estimates.append(
            [
                (plus - minus, plus + minus - 2 * center if with_curvature else 0.0)
                for plus, minus in pairs
            ]
        )
        return center

    @torch.no_grad()
    def restore(self) -> None:
        """Take back the shift that ``estimate`` may have left on the parameters."""
        self._move_to(None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as of the last whole step; takes a shift back first."""
        self.restore()
        self._forget_estimates()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()``; h keeps the dtype it was saved in."""
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        # torch casts a state to its parameter's dtype: h would lose digits, or its range.
        for slot, number in zip(self._slots, saved, strict=True):
            device = slot.parameter.device
            for name, tensor in state_dict["state"].get(number, {}).items():
                self.state[slot.parameter][name] = tensor.to(device, copy=True)
        self._slots = list(self._number_tiles())

    def hessian_mean_and_max(self) -> tuple[float, float]:
        """Return the mean and the maximum of h over all parameters; reads all of h."""
        total, largest, count = 0.0, 0.0, 0
        for slot in self._slots:
            hessian, size = self._hessian(slot), slot.parameter.numel()
            if size:
                mean, maximum = hessian.mean_and_max() if hessian else (1.0, 1.0)
                total, largest, count = total + mean * size, max(largest, maximum), count + size
        return total / count, largest

    # ---- the points that losses are taken at

    def _forget_estimates(self) -> None:
        self._estimates: list[list[tuple[float, float]]] = []
        # The direction's number and its sign if the parameters are shifted in place.
        self._point: tuple[int, int] | None = None
        self._moments: dict[tuple[Slot, int], tuple[Tensor, Tensor]] = {}

    def _number_tiles(self) -> Iterator[Slot]:
        first_tile = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.is_contiguous():
                    raise ValueError(f"parameter of shape {tuple(parameter.shape)} not contiguous")
                slot = Slot.cut(parameter, group, first_tile)
                yield slot
                first_tile += len(slot)

    def _loss_at(self, point: tuple[int, int] | None, closure: Callable[[], Any]) -> float:
        """The loss at θ ± μ u/√h, or at θ itself for None."""
        if self.layers is None:
            self._move_to(point)
            return float(closure())
        if point is None:
            return float(closure())
        with self.layers.replaced(functools.partial(self._perturb, dict([point]))):
            return float(closure())

    def _move_to(self, point: tuple[int, int] | None) -> None:
        """Shift the parameters in place from the point they are at to ``point``."""
        scales: dict[int, int] = {}
        if self._point:
            scales[self._point[0]] = -self._point[1]
        if point:
            scales[point[0]] = scales.get(point[0], 0) + point[1]
        self._perturb({draw: scale for draw, scale in scales.items() if scale}, None)
        self._point = point

    def _perturb(self, scales: dict[int, int], outputs: dict[Tensor, Tensor] | None) -> None:
        """Write θ + scale μ u/√h into ``outputs``, or in place for all parameters.

        On the way, the row and column means of h u² are taken for a low-rank h, which needs them
        once for every direction, before the update.
        """
        if not scales:
            return
        function = functools.partial(self._perturb_packet, scales, outputs)
        slots = self._slots
        if outputs is not None:
            slots = [slot for slot in slots if slot.parameter in outputs]
        new: dict[tuple[Slot, int], tuple[Tensor, Tensor]] = {}
        for sums in run_packets(function, slots):
            for slot, draw, (rows, columns), of_rows, of_columns in sums:
                if (slot, draw) not in new:
                    state = self.state[slot.parameter]
                    new[slot, draw] = (
                        torch.zeros_like(state["hessian_rows"]),
                        torch.zeros_like(state["hessian_columns"]),
                    )
                new[slot, draw][0][rows] += of_rows / slot.columns
                new[slot, draw][1][columns] += of_columns / slot.rows
        self._moments |= new

    def _perturb_packet(
        self, scales: dict[int, int], outputs: dict[Tensor, Tensor] | None, packet: Packet
    ) -> list[tuple[Slot, int, tuple[slice, slice], Tensor, Tensor]]:
        sums = []
        arriving = list(scales)[-1]
        for slot, tiles in packet:
            sources = slot.views(slot.parameter, tiles)
            targets = sources if outputs is None else slot.views(outputs[slot.parameter], tiles)
            hessian, eps = self._hessian(slot), slot.group["eps"]
            moves = [(self._stream(draw), scale * eps) for draw, scale in scales.items()]
            measure = isinstance(hessian, LowRankHessian) and (slot, arriving) not in self._moments
            generator, shape, root = SCRATCH.generator(slot.parameter.device), None, None
            for tile, source, target, part in zip(
                tiles, sources, targets, views_of(hessian, tiles), strict=True
            ):
                if source.shape != shape:
                    shape = source.shape
                    noise, out = (SCRATCH.buffer(name, source) for name in ("noise", "root"))
                if hessian is not None:
                    root = hessian.inverse_root(part, out)
                for stream, scale in moves:
                    draw_noise(noise, generator, tile_seed(stream, slot.first_tile + tile))
                    shift(target, source, noise, root, scale)
                if measure:
                    squares = noise.div_(root).square_()
                    of_tile = (slot.place(tile), squares.sum(1), squares.sum(0))
                    sums.append((slot, arriving, *of_tile))
        return sums

    def _stream(self, draw: int) -> int:
        group = self.param_groups[0]
        return mix_seed(group["seed"], group["step"], draw)

    # ---- the update

    def _hessian(self, slot: Slot) -> Hessian | None:
        """Return h of a parameter; None as long as it is 1."""
        state = self.state.get(slot.parameter)
        if not state:
            return None
        return (LowRankHessian if "hessian_rows" in state else FullHessian)(slot, state)

    def _start_hessians(self) -> None:
        for slot in self._slots:
            if slot.group["hessian_smooth"] == 0 or self.state.get(slot.parameter):
                continue
            dtype = self.hessian_dtype
            if dtype is None:
                dtype = slot.parameter.dtype
                dtype = torch.bfloat16 if dtype == torch.float16 else dtype
            low_rank = self.hessian == "lowrank" and slot.parameter.dim() > 1
            kind = LowRankHessian if low_rank else FullHessian
            self.state[slot.parameter] = kind.start(slot, dtype)

    def _apply(self, differences: list[list[float]]) -> None:
        """Take the shift back and update h and θ, in one pass over the noise.

        ``differences`` holds (l+ - l-, l+ + l- - 2 l0) of every direction.
        """
        gradients, curvatures = scalars(differences, self.param_groups[0]["eps"])
        self.projected_gradient, self.curvature = sum(gradients), sum(curvatures)
        shifted_with = {slot: self._hessian(slot) for slot in self._slots}
        for slot, hessian in shifted_with.items():
            smooth = slot.group["hessian_smooth"]
            if isinstance(hessian, LowRankHessian) and smooth > 0:
                _, curvatures = scalars(differences, slot.group["eps"])
                moments = [self._moments[slot, draw] for draw in range(self.num_samples)]
                self.state[slot.parameter] = hessian.averaged(smooth, curvatures, moments)
        update = functools.partial(self._update_packet, differences, shifted_with)
        for _ in run_packets(update, self._slots):
            pass
        self._point = None

    def _update_packet(
        self,
        differences: list[list[float]],
        shifted_with: dict[Slot, Hessian | None],
        packet: Packet,
    ) -> None:
        streams = [self._stream(draw) for draw in range(self.num_samples)]
        rounding = self._stream(ROUNDING)
        shifted_draw, shifted_sign = self._point or (None, 0)
        for slot, tiles in packet:
            group, old, hessian = slot.group, shifted_with[slot], self._hessian(slot)
            gradients, curvatures = scalars(differences, group["eps"])
            smooth, lr = group["hessian_smooth"], float(group["lr"])
            back, decay = -shifted_sign * group["eps"], -lr * group["weight_decay"]
            grows = isinstance(hessian, FullHessian) and smooth > 0
            targets, shape, root = slot.views(slot.parameter, tiles), None, None
            less = targets[0].new_tensor(-smooth, dtype=compute_dtype(slot.parameter.dtype))
            generator = SCRATCH.generator(slot.parameter.device)
            for tile, target, old_part, part in zip(
                tiles, targets, views_of(old, tiles), views_of(hessian, tiles), strict=True
            ):
                if target.shape != shape:
                    shape = target.shape
                    # With one direction 1/√h is done with when h grows: less to keep in the cache.
                    names = ("noise", "root", "hessian", "root", "direction")
                    if len(streams) > 1:
                        names = ("noise", "root", "hessian", "growth", "direction")
                    noise, out, whole, growth, direction = (
                        SCRATCH.buffer(name, target) for name in names
                    )
                number = slot.first_tile + tile
                before = hessian.whole(part, whole) if grows else None
                for draw, stream in enumerate(streams):
                    draw_noise(noise, generator, tile_seed(stream, number))
                    if draw == shifted_draw:
                        if grows:
                            root = torch.rsqrt(before, out=out)
                        elif old is not None:
                            root = old.inverse_root(old_part, out)
                        shift(target, target, noise, root, back)
                    if grows:
                        start, value = growth if draw else less, smooth * curvatures[draw]
                        torch.addcmul(start, noise, noise, value=value, out=growth)
                    if len(streams) > 1:
                        added = direction if draw else direction.zero_()
                        added.add_(noise, alpha=gradients[draw])
                if grows:
                    hessian.grow(part, before, growth, tile_seed(rounding, ~number))
                if hessian is not None:
                    root = hessian.inverse_root(part, out)
                seed = tile_seed(rounding, number)
                if len(streams) > 1:
                    descend(target, direction, root, -lr, decay, seed)
                else:
                    descend(target, noise, root, -lr * gradients[0], decay, seed)


def scalars(differences: list[list[float]], eps: float) -> tuple[list[float], list[float]]:
    """Return g and c of every direction, divided by the number of directions."""
    samples = len(differences)
    gradients = [first / (2 * eps) / samples for first, _ in differences]
    return gradients, [abs(second) / (2 * eps**2) / samples for _, second in differences]
