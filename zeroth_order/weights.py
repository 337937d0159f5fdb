"""The trained weights: how they are perturbed by μ u/√h, and how a step updates them and h.

``InPlaceWeights`` shifts them where they are; ``layerwise.LayerwiseWeights`` leaves them as they
are and runs each module with perturbed copies; ``streamed.StreamedWeights`` does so too, and has
one block of the model in memory at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeroth_order import curvature, kernels
from zeroth_order.chunks import Chunk, Noise, TrainedParameter, bundles, noise_of_bundle
from zeroth_order.compiling import SMALLEST_COMPILED, can_compile, float32_copies, kernel, scalars
from zeroth_order.config import HiZOOConfig
from zeroth_order.curvature import COLUMNS, ROWS, State, hessian_of_chunk
from zeroth_order.noise import ROUNDING
from zeroth_order.signals import signals_wait

States = dict[Tensor, State]
# A direction, and how many times μ u/√h the weights are shifted along it.
Shift = tuple[int, float]
# A forward pass: its closure, and the shift that it runs at; None: at θ.
Pass = tuple[Callable[[], Any], Shift | None]


class GroupStep(NamedTuple):
    """What a step does to a parameter group."""

    gradients: list[float]  # g of each direction, divided by their number
    curvatures: list[float] | None  # c, likewise; None: not measured, h stays
    learning_rate: float
    smooth: float  # α
    decay: float  # λ


class Update(NamedTuple):
    """A step of all groups: what it takes to update any parameter, now or later."""

    seed_and_step: tuple[int, int]  # of the noise
    of_groups: dict[int, GroupStep]  # by the group's id


class Weights:
    """The trained parameters of some groups in chunks, with their noise and their h.

    ``param_groups`` and ``states`` are the optimizer's: ``eps``, ``hessian_smooth`` and
    ``weight_decay`` are read whenever they are needed, ``seed`` and ``step`` from the first group.
    """

    shift: Shift | None = None  # where the weights are; None: at θ
    updated_chunks: int = 0  # by the running update, or the last one

    def __init__(
        self, param_groups: list[dict[str, Any]], states: States, config: HiZOOConfig
    ) -> None:
        self.param_groups, self.states = param_groups, states
        parameters = [(group, p) for group in param_groups for p in group["params"]]
        compiles = can_compile([p for _, p in parameters if p.requires_grad], config.compile)
        self.trained: dict[Tensor, TrainedParameter] = {}
        for number, (group, p) in enumerate(parameters):
            if p.requires_grad:
                # The h of a vector is never low-rank.
                is_matrix = p.dim() > 1 and p.numel() > 0
                low_rank = config.hessian == "lowrank" and is_matrix
                low_rank |= ROWS in states.get(p, {})
                compiled = compiles and p.numel() >= SMALLEST_COMPILED
                self.trained[p] = TrainedParameter(p, group, number, low_rank, compiled)
        self.parameters = [*self.trained.values()]

    def losses(self, passes: Sequence[Pass]) -> list[float]:
        """Return the losses of forward passes, which may run in any order."""
        values = []
        for closure, shift in passes:
            # Under autocast torch keeps weights that it has cast, and would not see other ones.
            torch.clear_autocast_cache()
            values.append(self.loss_at(closure, shift))
        return values

    def loss_at(self, closure: Callable[[], Any], shift: Shift | None) -> float:
        """Return the loss at some shift."""
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
        seed_and_step: tuple[int, int] | None = None,
    ) -> Iterator[tuple[Chunk, Noise]]:
        """Yield every chunk of some parameters with its u; by default that of this step."""
        for bundle in bundles(parameters):
            noises = noise_of_bundle(bundle, seed_and_step or self.seed_and_step, direction)
            yield from zip(bundle, noises, strict=True)

    @property
    def seed_and_step(self) -> tuple[int, int]:
        """Seed and number of the step that is under way."""
        first = self.param_groups[0]
        return first["seed"], first["step"]

    def perturb_chunk(self, chunk: Chunk, noise: Noise, scale: float, target: Tensor) -> None:
        """Write θ + ``scale`` μ u/√h of a chunk into ``target``, of its parameter's shape."""
        trained, pieces = chunk.of, chunk.view(target)
        source = None if target is trained.parameter else chunk.view(trained.parameter)
        hessian = hessian_of_chunk(chunk, self.states.get(trained.parameter, {}))
        perturb = kernel(kernels.perturb, trained)
        (factor,) = scalars([scale * trained.group["eps"]], trained)
        if trained.copies:
            values = float32_copies(source or pieces, 0)
            perturb(values, float32_copies(hessian, 2), noise, factor)
            kernels.write(pieces, values)
        else:
            perturb(pieces, hessian, noise, factor, source)

    # ---- the update

    def update(self, steps: Sequence[GroupStep]) -> None:
        """Take a shift back, then update h and θ, in one pass over the noise.

        An exception leaves some chunks updated and the others as they were before the step.
        """
        self.apply(self.parameters, self.update_of(steps))

    def update_of(self, steps: Sequence[GroupStep]) -> Update:
        """Return the update of the step that is under way."""
        groups = map(id, self.param_groups)
        return Update(self.seed_and_step, dict(zip(groups, steps, strict=True)))

    def apply(self, parameters: Sequence[TrainedParameter], update: Update) -> None:
        """Update h and θ of some parameters."""
        # A low-rank h is averaged as a whole, before its parameter's update.
        averaged = {t.parameter: self._averaged(t, update) for t in parameters if t.low_rank}
        numbers = {
            t.parameter: self._numbers_of(t, update.of_groups[id(t.group)]) for t in parameters
        }
        self.updated_chunks = 0
        directions = len(next(iter(update.of_groups.values())).gradients)
        for bundle in bundles(parameters):
            noises = [noise_of_bundle(bundle, update.seed_and_step, i) for i in range(directions)]
            rounding: list[Noise | None] = [None] * len(bundle)
            if bundle[0].of.rounds:
                rounding = noise_of_bundle(bundle, update.seed_and_step, ROUNDING)
            for chunk, bits, *of_chunk in zip(bundle, rounding, *noises, strict=True):
                parameter = chunk.of.parameter
                state = averaged.get(parameter, self.states.get(parameter, {}))
                self._update_chunk(chunk, state, of_chunk, numbers[parameter], bits)
                self.updated_chunks += 1
        self.states.update(averaged)

    def _update_chunk(
        self,
        chunk: Chunk,
        state: State,
        noises: Sequence[Noise],
        numbers: kernels.Numbers,
        rounding: Noise | None,
    ) -> None:
        """Take the shift back, and update h and θ of a chunk."""
        trained = chunk.of
        pieces, hessian = chunk.view(trained.parameter), hessian_of_chunk(chunk, state)
        update = kernel(kernels.update, trained)
        rest = noises, numbers, rounding, trained.parameter.dtype, trained.hessian_dtype
        if not trained.copies:
            update(pieces, hessian, *rest)
            return
        values, copied = float32_copies(pieces, 0), float32_copies(hessian, 2)
        update(values, copied, *rest)
        kernels.write(pieces, values)
        if numbers.growths is not None:
            kernels.write(hessian, copied)

    def _numbers_of(self, trained: TrainedParameter, step: GroupStep) -> kernels.Numbers:
        """Return the scalars of a parameter's update."""
        samples, (direction, sign) = len(step.gradients), self.shift or (None, 0.0)
        smooth, decay = step.smooth, step.learning_rate * step.decay
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

    def _averaged(self, trained: TrainedParameter, update: Update) -> State:
        """Return a low-rank h after a step: averages of the row and column means of c h u²."""
        state, parameter = self.states.get(trained.parameter, {}), trained.parameter
        step = update.of_groups[id(trained.group)]
        smooth = step.smooth
        if step.curvatures is None or not smooth:
            return state
        measure = kernel(kernels.measured_squares, trained)
        rows, columns = (1 - smooth) * state[ROWS], (1 - smooth) * state[COLUMNS]
        for direction, c in enumerate(step.curvatures):
            row_means, column_means = torch.zeros_like(rows), torch.zeros_like(columns)
            for chunk, u in self.chunks_with_noise([trained], direction, update.seed_and_step):
                squares = measure(chunk.view(parameter), hessian_of_chunk(chunk, state), u)
                for of_piece, square in zip(chunk.rows(), squares, strict=True):
                    row_means[of_piece] += square.sum(1) / len(columns)
                    column_means += square.sum(0) / len(rows)
            rows += smooth * c * row_means
            columns += smooth * c * column_means
        # As for a full h: 0 would make the next perturbation infinite.
        limits = torch.finfo(torch.float32)
        vectors = {ROWS: rows, COLUMNS: columns}
        return {name: each.clamp_(limits.eps, limits.max) for name, each in vectors.items()}


class InPlaceWeights(Weights):
    """Shifts the weights and takes the shift back, which rounds by a unit in the last place."""

    def loss_at(self, closure: Callable[[], Any], shift: Shift | None) -> float:
        """Return the loss at some shift; the weights stay there."""
        self._move_to(shift)
        return float(closure())

    def restore(self) -> None:
        """Take the shift back. If this raises, the shift is whole or gone; call again."""
        self._move_to(None)

    def _move_to(self, wanted: Shift | None) -> None:
        """Shift the weights from where they are, first to θ if the direction changes."""
        if self.shift and (wanted is None or wanted[0] != self.shift[0]):
            direction, sign = self.shift
            self._add(direction, -sign, None)
        if wanted and wanted != self.shift:
            direction, sign = wanted
            self._add(direction, sign - (self.shift[1] if self.shift else 0.0), wanted)

    def _add(self, direction: int, scale: float, arrives_at: Shift | None) -> None:
        """Add ``scale`` μ u/√h to all weights or, if it raises, to none."""
        written = 0
        with signals_wait():
            try:
                for chunk, noise in self.chunks_with_noise(self.parameters, direction):
                    self.perturb_chunk(chunk, noise, scale, chunk.of.parameter)
                    written += 1
            except BaseException:
                self._add_to_chunks(direction, -scale, 0, written)
                raise
            self.shift = arrives_at

    def _add_to_chunks(self, direction: int, scale: float, start: int, stop: int | None) -> None:
        chunks = self.chunks_with_noise(self.parameters, direction)
        for chunk, noise in itertools.islice(chunks, start, stop):
            self.perturb_chunk(chunk, noise, scale, chunk.of.parameter)

    def update(self, steps: Sequence[GroupStep]) -> None:
        """Take the shift back, then update h and θ, in one pass over the noise in full precision.

        Half precision comes back to θ first: it rounds to the nearest there, and stochastically in
        the update. So do weights with a low-rank h, which the update changes as a whole.
        """
        if any(trained.rounds or trained.low_rank for trained in self.parameters):
            self.restore()
        try:
            super().update(steps)
        except BaseException:
            # A kernel that fails, for want of memory, has written nothing.
            if self.shift:
                self._add_to_chunks(self.shift[0], -self.shift[1], self.updated_chunks, None)
            raise
        finally:
            self.shift = None
