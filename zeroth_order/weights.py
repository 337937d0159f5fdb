"""The trained weights: how they are perturbed by μ u/√h, and how a step updates them and h.

``in_place.InPlaceWeights`` shifts them where they are; ``layerwise.LayerwiseWeights`` leaves them
as they are and runs each module with perturbed copies; ``streamed.StreamedWeights`` does so too,
and has one block of the model in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeroth_order import curvature, kernels
from zeroth_order.chunk_noise import Noise, OfPairs, bundles, noise_of_bundle
from zeroth_order.chunks import Chunk, TrainedParameter
from zeroth_order.config import HiZOOConfig
from zeroth_order.noise import ROUNDING, mix_seed, rounding_bits, standard_normals
from zeroth_order.running import (
    SMALLEST_COMPILED,
    can_compile,
    kernel,
    perturb_chunk,
    scalars,
    update_chunk,
)

States = dict[Tensor, curvature.State]
# A direction, and how many times μ u/√h the weights are shifted along it.
Shift = tuple[int, float]
# A forward pass: its closure, and the shift that it runs at; None: at θ.
Pass = tuple[Callable[[], Any], Shift | None]


class GroupStep(NamedTuple):
    """What a step does to a parameter group.

    Attributes:
        gradients: g of each direction, divided by their number.
        curvatures: c of each direction, divided by their number; None: not measured, h stays.
        learning_rate: η.
    """

    gradients: list[float]
    curvatures: list[float] | None
    learning_rate: float


class Update(NamedTuple):
    """A step of all groups: what it takes to update any parameter, now or later.

    Attributes:
        noise: seed and number of the step.
        of_groups: what it does to each group, with α and λ, by the group's id.
    """

    noise: tuple[int, int]
    of_groups: dict[int, tuple[GroupStep, float, float]]


class Weights:
    """The trained parameters of some groups in chunks, with their noise and their h.

    ``param_groups`` and ``states`` are the optimizer's: ``eps``, ``hessian_smooth`` and
    ``weight_decay`` are read whenever they are needed, ``seed`` and ``step`` from the first group.

    Attributes:
        shift: where the weights are; None: at θ.
        updated_chunks: how many chunks the running update, or the last one, has updated.
    """

    shift: Shift | None = None
    updated_chunks: int = 0

    def __init__(
        self, param_groups: list[dict[str, Any]], states: States, config: HiZOOConfig
    ) -> None:
        self.param_groups, self.states = param_groups, states
        parameters = [(group, p) for group in param_groups for p in group["params"]]
        compiles = can_compile([p for _, p in parameters if p.requires_grad], config.compile)
        self.trained: dict[Tensor, TrainedParameter] = {}
        for number, (group, parameter) in enumerate(parameters):
            if parameter.requires_grad:
                state = states.get(parameter, {})
                self.trained[parameter] = TrainedParameter(
                    parameter,
                    group,
                    number,
                    low_rank=curvature.is_low_rank(parameter, state, config.hessian),
                    compiles=compiles and parameter.numel() >= SMALLEST_COMPILED,
                    hessian_dtype=curvature.dtype_of_hessian(parameter),
                )
        self.parameters = [*self.trained.values()]

    def losses(self, passes: Sequence[Pass]) -> list[float]:
        """Return the losses of forward passes, which may run in any order."""
        values = []
        for closure, shift in passes:
            # Under autocast torch keeps weights that it has cast, and would not see other ones.
            torch.clear_autocast_cache()
            values.append(self.loss_at(closure, *(shift or (0, 0.0))))
        return values

    def loss_at(self, closure: Callable[[], Any], direction: int, sign: float) -> float:
        """Return the loss at θ + ``sign`` μ u/√h; at θ itself for a sign of 0."""
        raise NotImplementedError

    def restore(self) -> None:
        """Take back a shift that ``loss_at`` has left."""

    def finish(self) -> None:
        """Apply updates that wait, if this kind lets them wait."""

    def prepare(self, closure: Callable[[], Any]) -> None:
        """Let h begin at 1 where α is above 0, before the losses of ``closure`` are taken."""
        for trained in self.parameters:
            if trained.group["hessian_smooth"] > 0 and not self.states.get(trained.parameter):
                self.start_hessian(trained)

    def start_hessian(self, trained: TrainedParameter) -> None:
        """Let a parameter's h begin at 1."""
        self.states[trained.parameter] = curvature.start(trained)

    # ---- perturbed weights

    def chunks_with_noise(
        self,
        parameters: Sequence[TrainedParameter],
        direction: int,
        noise: tuple[int, int] | None = None,
    ) -> Iterator[tuple[Chunk, Noise]]:
        """Yield every chunk of some parameters with its u; ``noise`` None: of this step."""
        numbers = noise or self._noise_of_step()
        for bundle in bundles(parameters):
            yield from zip(bundle, _noise_of(bundle, numbers, direction), strict=True)

    def _noise_of_step(self) -> tuple[int, int]:
        """Return seed and number of the step that is under way."""
        first = self.param_groups[0]
        return first["seed"], first["step"]

    def perturb_chunk(self, chunk: Chunk, noise: Noise, scale: float, target: Tensor) -> None:
        """Write θ + ``scale`` μ u/√h of a chunk into ``target``, of its parameter's shape."""
        state = self.states.get(chunk.of.parameter, {})
        perturb_chunk(chunk, state, noise, scale, target)

    # ---- the update

    def update(self, steps: Sequence[GroupStep]) -> None:
        """Take a shift back, then update h and θ, in one pass over the noise.

        An exception leaves some chunks updated and the others as they were before the step.
        """
        self.apply(self.parameters, self.update_of(steps))

    def update_of(self, steps: Sequence[GroupStep]) -> Update:
        """Return the update of the step that is under way."""
        of_groups = {
            id(group): (step, group["hessian_smooth"], group["weight_decay"])
            for group, step in zip(self.param_groups, steps, strict=True)
        }
        return Update(self._noise_of_step(), of_groups)

    def apply(self, parameters: Sequence[TrainedParameter], update: Update) -> None:
        """Update h and θ of some parameters."""
        # A low-rank h is averaged as a whole, before its parameter's update.
        averaged = {
            trained.parameter: self._averaged(trained, update)
            for trained in parameters
            if trained.low_rank
        }
        self.updated_chunks = 0
        directions = len(next(iter(update.of_groups.values()))[0].gradients)
        for bundle in bundles(parameters):
            noises = [_noise_of(bundle, update.noise, i) for i in range(directions)]
            rounding: list[Noise | None] = [None] * len(bundle)
            if bundle[0].of.rounds:
                rounding = _noise_of(bundle, update.noise, ROUNDING, rounding_bits)
            for chunk, bits, *of_chunk in zip(bundle, rounding, *noises, strict=True):
                parameter = chunk.of.parameter
                state = averaged.get(parameter, self.states.get(parameter, {}))
                numbers = self._numbers_of(chunk.of, *update.of_groups[id(chunk.of.group)])
                update_chunk(chunk, state, of_chunk, numbers, bits)
                self.updated_chunks += 1
        self.states.update(averaged)

    def _numbers_of(
        self, trained: TrainedParameter, step: GroupStep, smooth: float, decay: float
    ) -> kernels.Numbers:
        """Return the scalars of a parameter's update."""
        samples, (direction, sign) = len(step.gradients), self.shift or (None, 0.0)
        decay *= step.learning_rate
        grows = smooth > 0 and step.curvatures is not None and not trained.low_rank
        eps = trained.group["eps"]
        values = scalars(
            [
                *(-step.learning_rate * g for g in step.gradients),
                *(-sign * eps * (d == direction) for d in range(samples)),
                *(smooth * c for c in step.curvatures or [0.0] * samples),
                smooth,
                -decay,
            ],
            trained,
        )
        return kernels.Numbers(
            steps=values[:samples],
            back=values[samples : 2 * samples] if self.shift else None,
            growths=values[2 * samples : 3 * samples] if grows else None,
            smooth=values[-2],
            decay=values[-1] if decay else None,
        )

    def _averaged(self, trained: TrainedParameter, update: Update) -> curvature.State:
        """Return a parameter's low-rank h after a step."""
        state = self.states.get(trained.parameter, {})
        step, smooth, _ = update.of_groups[id(trained.group)]
        if step.curvatures is None or not smooth:
            return state
        directions = range(len(step.curvatures))
        measured = [self._measured_squares(trained, i, update.noise) for i in directions]
        return curvature.averaged(state, smooth, step.curvatures, measured)

    def _measured_squares(
        self, trained: TrainedParameter, direction: int, noise: tuple[int, int]
    ) -> Iterator[tuple[Chunk, list[Tensor]]]:
        """Yield every chunk with h u² of its pieces."""
        state, parameter = self.states[trained.parameter], trained.parameter
        measure = kernel(kernels.measured_squares, trained)
        for chunk, u in self.chunks_with_noise([trained], direction, noise):
            hessian = curvature.hessian_of_chunk(chunk, state)
            yield chunk, measure(chunk.view(parameter), hessian, u)


def _noise_of(
    bundle: list[Chunk],
    numbers: tuple[int, int],
    direction: int,
    of_pairs: OfPairs = standard_normals,
) -> list[Noise]:
    """Return the noise of a bundle in a step of some seed and number."""
    return noise_of_bundle(bundle, mix_seed(*numbers, direction), of_pairs)
