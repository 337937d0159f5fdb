"""HiZOO: a Hessian-informed zeroth-order optimizer that needs forward passes only.

    optimizer = HiZOO(model.parameters(), lr=1e-6, eps=1e-3, hessian_smooth=1e-8)
    for batch in batches:
        loss = optimizer.step(lambda: model(**batch).loss)

When to use it: fine-tuning a model whose gradients or Adam states do not fit in memory, or whose
objective has no gradient. When not: training from scratch. A step sees one random direction, so it
needs a start that is good already (a pre-trained model and a prompt that says what is asked), and
many more steps than backpropagation.

One step, for parameters θ, diagonal curvature h (starts at 1), learning rate η, perturbation scale
μ, smoothing α, weight decay λ, and u ~ N(0, I) drawn from the step's seed:

    l0 = L(θ)     l+ = L(θ + μ u/√h)     l- = L(θ - μ u/√h)
    g  = (l+ - l-) / 2μ                   projected gradient, a scalar
    c  = |l+ + l- - 2 l0| / 2μ²           curvature along u/√h, a scalar
    h  <- (1-α) h + α c h u²              elementwise
    θ  <- θ - η (g u/√h + λ θ)            with the new h

``examples/hizoo_reference.py`` is this step in 50 plain lines. Here the noise u is never stored: it
is a hash (``zeroth_order/noise.py``) that is computed again, chunk by chunk, three times a step.

Sources: HiZOO, Zhao et al., ICLR 2025 (arXiv 2402.15173); MeZO, which is HiZOO with
``hessian_smooth=0``, Malladi et al., NeurIPS 2023 (arXiv 2305.17333); the factorised curvature of
HiZOO-L after Adafactor, Shazeer and Stern, 2018 (arXiv 1804.04235).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zeroth_order import step_rule
from zeroth_order.checks import check_parameter, check_perturbation_scale, check_repeats
from zeroth_order.config import AUTO, HiZOOConfig, check_settings
from zeroth_order.curvature import mean_and_max
from zeroth_order.layerwise import Layers, OnlyInPlace
from zeroth_order.signals import signals_wait
from zeroth_order.weights import GroupStep, InPlaceWeights, Pass, Shift, Weights

__all__ = ["HiZOO", "HiZOOConfig", "Layers", "OnlyInPlace"]
__version__ = "0.2.0"


class HiZOO(torch.optim.Optimizer):
    """Zeroth-order optimizer with a diagonal curvature estimate; mathematics: module docstring.

    ``step(closure)`` does a whole step. ``estimate(closure)`` runs the forward passes alone and may
    be called several times before one ``step()``: the estimates share the noise, and their losses
    are averaged (gradient accumulation). In between the weights may be shifted; ``restore()``
    takes the shift back.

    Args:
        params: tensors or parameter groups. ``lr``, ``eps``, ``hessian_smooth`` and
            ``weight_decay`` may differ between groups, and may change between steps (schedulers).
        config: the settings; None: the defaults.
        layers: None shifts the weights in place and back, which rounds by up to a unit in the last
            place a step. ``Layers(model)`` leaves them as they are, bit for bit, and perturbs
            one module at a time, with scratch memory for the largest: for half precision.
            ``StreamedLayers(model)`` (``zeroth_order/streamed.py``) does so where the blocks of the
            model lie on disk; read its weights after ``finish()``.
        **settings: fields of ``HiZOOConfig``, in place of those of ``config``. Published learning
            rates: 1e-7 to 1e-6 for all parameters of a large model; ``lr="auto"`` needs none.

    State, by parameter: ``hessian_minus_one``, or ``hessian_rows`` and ``hessian_columns``; nothing
    without curvature. The step's number is in ``param_groups``: ``state_dict()`` resumes exactly.
    Parameters that do not require a gradient when a step begins are left alone.

    Attributes:
        projected_gradient, curvature: the last g and c that were measured, for the first group's μ.
        losses: of each batch of the last estimate, in the order of its forward passes.

    Raises:
        ValueError: an argument out of range, a parameter that is not contiguous or not of a
            floating-point dtype, or none that requires a gradient.
        OnlyInPlace: the first estimate found that ``layers`` does not fit the model.
    """

    # What accelerate asks for: it then wraps nothing, and step() returns the loss there too.
    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(
        self,
        params: Iterable[Any],
        config: HiZOOConfig | None = None,
        *,
        layers: Layers | None = None,
        **settings: Any,
    ) -> None:
        config = dataclasses.replace(config or HiZOOConfig(), **settings)
        self.config, self.layers = config, layers
        self.weights: Weights | None = None
        self.projected_gradient, self.curvature = math.nan, 0.0
        self._checked_scales: list[tuple[int, float]] = []
        self._forget_estimates()
        names = ("eps", "hessian_smooth", "weight_decay", "seed")
        defaults = {name: getattr(config, name) for name in names}
        defaults["lr"] = step_rule.CURVATURE_PART if config.lr == AUTO else config.lr
        counts = ("step", "skipped_steps", "skipped_in_a_row", "measured_steps")
        defaults |= dict.fromkeys(counts, 0) | {"mean_curvature": 0.0}
        super().__init__(params, defaults)
        self._check_trained()

    # ---- the algorithm

    def estimate(self, closure: Callable[[], Any], weight: float | None = None) -> float:
        """Run the forward passes of one batch: two for each direction, and one at θ for c.

        ``closure`` returns the loss of the batch, a number or a tensor of one, and must give the
        same loss for the same weights (no dropout): the first step calls it once more than it
        needs, and warns if it does not. Of several batches before one ``step`` each counts by its
        ``weight``, for instance the tokens that its loss is the mean over; without weights they
        count alike. Returns the unperturbed loss, or without it the mean of the perturbed ones. If
        anything raises, the weights come back and the step starts anew.
        """
        return self.estimate_batches([(closure, 1.0 if weight is None else weight)])[0]

    @torch.no_grad()
    def estimate_batches(self, batches: Sequence[tuple[Callable[[], Any], float]]) -> list[float]:
        """As ``estimate`` for each batch in turn, but streamed weights are read once for all.

        ``batches`` are a closure and a weight each; returns what ``estimate`` does for each.
        """
        self._prepare(batches[0][0])
        self._measured, directions = self._measures_curvature(), range(self.config.num_samples)
        shifts: list[Shift | None] = [None] if self._measured else []
        shifts += itertools.product(directions, (1.0, -1.0))
        passes: list[Pass] = []
        for number, (closure, _) in enumerate(batches, start=len(self._estimates)):
            # Every other batch goes backwards, from where the one before it ended.
            passes += [(closure, shift) for shift in (shifts[::-1] if number % 2 else shifts)]
        is_first = self.param_groups[0]["step"] == 0 and not self._estimates
        try:
            values = self.weights.losses(passes + passes[-1:] if is_first else passes)
            if is_first:
                *others, loss, again = values
                check_repeats(loss, again, [*others, loss][-len(shifts) :], self.weights.trained)
        except BaseException:
            self.restore()
            self._forget_estimates()
            raise
        finally:
            torch.clear_autocast_cache()
        pairs = zip((shift for _, shift in passes), values, strict=False)
        self.losses, centers = [], []
        for _, weight in batches:
            loss = dict(itertools.islice(pairs, len(shifts)))
            l0 = loss.get(None, sum(loss.values()) / len(loss))
            slopes = [loss[d, 1.0] - loss[d, -1.0] for d in directions]
            bends = [loss[d, 1.0] + loss[d, -1.0] - 2 * l0 for d in directions]
            self._estimates.append((float(weight), [slopes, bends]))
            self.losses.append([*loss.values()])
            centers.append(l0)
        return centers

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float | None:
        """Apply the estimates made since the last step; with ``closure``, make one first.

        Returns the loss of ``closure``, None without. A step in which a loss was not finite takes
        the shift back, changes nothing else and counts in ``skipped_steps``. A signal (Ctrl-C) that
        arrives within the update waits for its end. An exception within the update leaves some of
        the weights updated and the others as they were; the step does not count.
        """
        loss = None if closure is None else self.estimate(closure)
        if not self._estimates:
            raise RuntimeError(
                "step() needs a closure, or estimate(closure) before it; with transformers take "
                "ForwardOnlyMixin (forward_only.py), a plain Trainer calls neither"
            )
        differences = itertools.chain.from_iterable(self._mean_differences())
        skipped = not all(map(math.isfinite, differences))
        with signals_wait():
            try:
                if skipped:
                    self.restore()
                else:
                    self._update()
            finally:
                self._forget_estimates()
            for group in self.param_groups:
                group["step"] += 1
                group["skipped_steps"] += skipped
                group["skipped_in_a_row"] = group["skipped_in_a_row"] + 1 if skipped else 0
        torch.clear_autocast_cache()
        return loss

    def _update(self) -> None:
        """Make g, c and η of every group, and update θ and h."""
        self.projected_gradient, c, _ = self.pending()
        if c is not None:
            self.curvature = c
            noted = step_rule.averaged_curvature(self.param_groups[0], c)
            for group in self.param_groups:
                group.update(noted)
        steps = []
        for group in self.param_groups:
            rates = self.learning_rate(group), group["hessian_smooth"], group["weight_decay"]
            steps.append(GroupStep(*self._g_and_c(group), *rates))
        self.weights.update(steps)

    def pending(self) -> tuple[float, float | None, float]:
        """Return g, c (None: not measured) and η of the step that ``step()`` is about to take.

        They are the first group's, g and c means over the directions.
        """
        group = self.param_groups[0]
        gradients, curvatures = self._g_and_c(group)
        c = None if curvatures is None else sum(curvatures)
        noted = {} if c is None else step_rule.averaged_curvature(group, c)
        return sum(gradients), c, self.learning_rate(group | noted)

    def _g_and_c(self, group: dict[str, Any]) -> tuple[list[float], list[float] | None]:
        """Return g and c of every direction with a group's μ, as parts of their means."""
        slopes, bends = self._mean_differences()
        eps, samples = group["eps"], self.config.num_samples
        gradients = [slope / (2 * eps) / samples for slope in slopes]
        curvatures = [abs(bend) / (2 * eps**2) / samples for bend in bends]
        return gradients, curvatures if self._measured else None

    def learning_rate(self, group: dict[str, Any]) -> float:
        """Return η of a group's next step."""
        return step_rule.learning_rate(group, self.config.lr == AUTO, self.config.num_samples)

    # ---- the rest of the public interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own ``lr``, ``eps`` and so on; before training."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = ("lr", "weight_decay", "eps", "hessian_smooth")
        check_settings({name: group[name] for name in names})
        for parameter in group["params"]:
            if parameter.requires_grad:
                check_parameter(parameter)
        self.weights = None

    def check_perturbation_scale(self) -> None:
        """Check μ against the weights, which the first ``estimate`` does too; reads all of them.

        Raises:
            ValueError: eps is so small that hardly a weight would change, or so large beside the
                weights that shifting them back would not restore them.
        """
        scales = {p: group["eps"] for group, p in self._parameters() if p.requires_grad}
        loaded = self._loaded(scales)
        self._checked_scales = [(id(p), eps) for p, eps in scales.items()]
        check_perturbation_scale(((p, scales[p]) for p in loaded), in_place=self.layers is None)

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
    def loss_along(self, closure: Callable[[], Any], distance: float, direction: int = 0) -> float:
        """Return the loss at θ + ``distance`` u/√h, u being a direction of this step.

        For looking at the loss between steps. ``distance`` is that of the first group; others' are
        in proportion of their ``eps``. In place the weights stay shifted until ``restore()``.
        """
        if self._estimates:
            raise RuntimeError("loss_along() between estimate() and step() would lose the estimate")
        self._prepare(closure)
        shift = (direction, distance / self.param_groups[0]["eps"]) if distance else None
        return self.weights.losses([(closure, shift)])[0]

    @torch.no_grad()
    def restore(self) -> None:
        """Take back the shift that ``estimate`` may have left on the weights.

        If this raises, the shift is whole or gone, and a further call takes back what there is.
        """
        if self.weights is not None:
            self.weights.restore()
        torch.clear_autocast_cache()

    @torch.no_grad()
    def finish(self) -> None:
        """Apply the updates of streamed weights that wait until their block is read again."""
        if self.weights is not None:
            self.weights.finish()

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: all but hooks; torch's own keeps less.

        A scheduler puts a ``step`` into the object: of a copy it would step the original.
        """
        kept = self.__dict__.items()
        return {n: v for n, v in kept if n != "step" and not n.endswith("_hooks")}

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last whole step; takes a shift back first.

        The full h of streamed weights is not in it.
        """
        self.restore()
        self.finish()
        self._forget_estimates()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()``; takes a shift back first. h keeps the dtype it was saved in."""
        self.restore()
        self.finish()
        self._forget_estimates()
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        # torch casts a state to its parameter's dtype: h would lose digits, or its range.
        for (_, parameter), number in zip(self._parameters(), saved, strict=True):
            for name, tensor in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = tensor.to(parameter.device, copy=True)
        self.weights = None

    def hessian_mean_and_max(self) -> tuple[float, float]:
        """Return the mean and the maximum of h over all trained parameters; reads all of h."""
        return mean_and_max(self.state.get(p, {}) for p in self._loaded(self._trained()))

    # ---- when c is measured

    @property
    def wants_curvature(self) -> bool:
        """Whether c is measured at all: for h, or for the step size."""
        return self.config.lr == AUTO or self._has_hessian

    @property
    def _has_hessian(self) -> bool:
        return any(group["hessian_smooth"] > 0 for group in self.param_groups)

    def _measures_curvature(self) -> bool:
        """Return whether this step takes the loss at θ too."""
        every, step = self.config.curvature_every, self.param_groups[0]["step"]
        if every is None:
            every = 1 if self._has_hessian else step_rule.RARELY
        return self.wants_curvature and step_rule.is_measured(step, every)

    def _forget_estimates(self) -> None:
        # Of every batch its weight, and of every direction the slope, l+ - l-, and the bend,
        # l+ + l- - 2 l0.
        self._estimates: list[tuple[float, list[list[float]]]] = []
        self._measured = False

    def _mean_differences(self) -> tuple[list[float], list[float]]:
        """Return the slope and the bend of every direction, averaged over the batches."""
        weights = torch.tensor([weight for weight, _ in self._estimates], dtype=torch.float64)
        values = torch.tensor([pair for _, pair in self._estimates], dtype=torch.float64)
        slopes, bends = torch.tensordot(weights / weights.sum(), values, dims=1).tolist()
        return slopes, bends

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield every parameter with its group, frozen ones too, in the order of state_dict."""
        return ((group, p) for group in self.param_groups for p in group["params"])

    def _trained(self) -> list[Tensor]:
        return [parameter for _, parameter in self._parameters() if parameter.requires_grad]

    def _loaded(self, parameters: Iterable[Tensor]) -> Iterable[Tensor]:
        """Return parameters, in any order; streamed ones are in memory as they come."""
        return self.layers.loaded(parameters) if self.layers else parameters

    def _check_trained(self) -> None:
        trained = set(self._trained())
        if not trained:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        if self.layers is not None and self.layers.trained != trained:
            raise ValueError("layers must hold exactly the parameters that the optimizer trains")

    def _prepare(self, closure: Callable[[], Any]) -> None:
        """Make ``self.weights`` anew if other parameters are trained than before."""
        known = self.weights.trained if self.weights else ()
        if not self._estimates and [*map(id, known)] != [*map(id, self._trained())]:
            self._check_trained()
            trained = [(id(p), group["eps"]) for group, p in self._parameters() if p.requires_grad]
            if trained != self._checked_scales:
                self.check_perturbation_scale()
            make = self.layers.make_weights if self.layers else InPlaceWeights
            self.weights = make(self.param_groups, self.state, self.config)
        self.weights.prepare(closure)
