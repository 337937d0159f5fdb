"""The trained weights: how they are perturbed by μ u/√h, and how a step updates them and h.

``in_place.InPlaceWeights`` shifts them where they are; ``layerwise.LayerwiseWeights`` leaves them
as they are and runs each module with perturbed copies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeroth_order import curvature, kernels
from zeroth_order.chunks import Chunk, TrainedParameter, bundles, counted
from zeroth_order.config import HiZOOConfig
from zeroth_order.noise import (
    ROUNDING,
    Noise,
    NoiseSource,
    compute_dtype,
    counters,
    hashed,
    rounding_bits,
    standard_normals,
    stream_of,
)

States = dict[Tensor, curvature.State]
# A direction, and how many times μ u/√h the weights are shifted along it.
Shift = tuple[int, float]


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


class Weights:
    """The trained parameters of some groups in chunks, with their noise and their h.

    Args:
        param_groups: of the optimizer; ``eps``, ``hessian_smooth`` and ``weight_decay`` are read
            whenever they are needed, ``seed`` and ``step`` from the first group.
        states: the optimizer's state by parameter, which holds h.
        config: of the optimizer.

    Attributes:
        shift: where the weights are; None: at θ.
        updated_chunks: how many chunks the running update, or the last one, has updated.
    """

    shift: Shift | None = None
    updated_chunks: int = 0

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        states: States,
        config: HiZOOConfig,
    ) -> None:
        self.param_groups, self.states = param_groups, states
        trained = [p for group in param_groups for p in group["params"] if p.requires_grad]
        compiles = kernels.can_compile(trained, config.compile)
        self.parameters: list[TrainedParameter] = []
        number = itertools.count()
        for group in param_groups:
            for parameter, count in zip(group["params"], number, strict=False):
                if parameter.requires_grad:
                    state = states.get(parameter, {})
                    low_rank = curvature.is_low_rank(parameter, state, config.hessian)
                    dtype = curvature.dtype_of_hessian(parameter, state, config.hessian_dtype)
                    self.parameters.append(
                        TrainedParameter.cut(parameter, group, count, low_rank, compiles, dtype)
                    )
        self.trained = {trained.parameter: trained for trained in self.parameters}

    def loss_at(self, closure: Callable[[], Any], direction: int, sign: float) -> float:
        """Return the loss at θ + ``sign`` μ u/√h; at θ itself for a sign of 0."""
        raise NotImplementedError

    def restore(self) -> None:
        """Take back a shift that ``loss_at`` has left."""

    def update(self, steps: Sequence[GroupStep]) -> None:
        """Take a shift back, then update h and θ, in one pass over the noise.

        An exception leaves some chunks updated and the others as they were before the step.
        """
        by_group = dict(zip(map(id, self.param_groups), steps, strict=True))
        averaged = self._averaged_low_rank(by_group)
        self.updated_chunks = 0
        for chunk, noises, rounding in self._chunks_to_update(len(steps[0].gradients)):
            parameter = chunk.of.parameter
            state = averaged.get(parameter, self.states.get(parameter, {}))
            numbers = self._numbers_of(chunk.of, by_group[id(chunk.of.group)])
            self._update_chunk(chunk, state, noises, rounding, numbers)
            self.updated_chunks += 1
        self.states.update(averaged)

    def prepare(self, closure: Callable[[], Any]) -> None:
        """Let h begin at 1 where α is above 0, before the losses of ``closure`` are taken."""
        for trained in self.parameters:
            if trained.group["hessian_smooth"] > 0 and not self.states.get(trained.parameter):
                start = curvature.start(trained, low_rank=trained.columns > 0)
                self.states[trained.parameter] = start

    # ---- noise

    def chunks_with_noise(
        self, parameters: Sequence[TrainedParameter], direction: int
    ) -> Iterator[tuple[Chunk, Noise]]:
        """Yield every chunk of some parameters with its u."""
        for bundle in bundles(parameters):
            noise = self._random(bundle, direction, standard_normals)
            yield from zip(bundle, noise, strict=True)

    def _random(
        self,
        bundle: list[Chunk],
        direction: int,
        of_pairs: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> list[Noise]:
        """Return random numbers of a bundle's chunks, or where their kernels find them."""
        group, first = self.param_groups[0], bundle[0].of
        device = first.parameter.device
        stream = stream_of(group["seed"], group["step"], direction)
        keys = [chunk.key(stream) for chunk in bundle]
        if first.compiles:
            on_device = torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True)
            # For a CPU torch.compile would build the index from its elements: half of a draw.
            loads = device.type == "cpu"
            return [
                NoiseSource(key.clone(), counted(chunk.of.length, device) if loads else None)
                for key, chunk in zip(on_device, bundle, strict=True)
            ]
        sizes = [chunk.pairs for chunk in bundle]
        indices = [counted(size, device)[:size] for size in sizes]
        bits = hashed(torch.cat([counters(k, i) for k, i in zip(keys, indices, strict=True)]))
        firsts, seconds = (numbers.split(sizes) for numbers in of_pairs(bits))
        return [chunk.joined(pair) for chunk, *pair in zip(bundle, firsts, seconds, strict=True)]

    # ---- perturbed weights

    def perturb_chunk(self, chunk: Chunk, noise: Noise, scale: float, target: Tensor) -> None:
        """Write θ + ``scale`` μ u/√h of a chunk into ``target``, of its parameter's shape."""
        trained = chunk.of
        pieces = chunk.view(target)
        # torch.compile wants one tensor, not two views of the same numbers.
        source = pieces if target is trained.parameter else chunk.view(trained.parameter)
        hessian = curvature.hessian_of_chunk(chunk, self.states.get(trained.parameter, {}))
        (scale,) = scalars([scale * trained.group["eps"]], trained)
        if trained.copies:
            values = float32_copies(source, 0)
            hessian = float32_copies(hessian, 2)
            run(kernels.perturb, trained)(values, values, hessian, noise, scale)
            kernels.write(pieces, values)
        else:
            run(kernels.perturb, trained)(pieces, source, hessian, noise, scale)

    # ---- the update

    def _update_chunk(
        self,
        chunk: Chunk,
        state: curvature.State,
        noises: Sequence[Noise],
        rounding: Noise | None,
        numbers: kernels.Numbers,
    ) -> None:
        """Take the shift back, and update h and θ of a chunk."""
        trained = chunk.of
        pieces = chunk.view(trained.parameter)
        hessian = curvature.hessian_of_chunk(chunk, state)
        dtypes = trained.parameter.dtype, trained.hessian_dtype
        if not trained.copies:
            kernel = run(kernels.update, trained)
            kernel(pieces, hessian, noises, numbers, rounding, *dtypes)
            return
        values = float32_copies(pieces, 0)
        copied = float32_copies(hessian, 2)
        run(kernels.update, trained)(values, copied, noises, numbers, rounding, *dtypes)
        kernels.write(pieces, values)
        if numbers.growths is not None:
            kernels.write(hessian, copied)

    def _chunks_to_update(
        self, directions: int
    ) -> Iterator[tuple[Chunk, list[Noise], Noise | None]]:
        """Yield every chunk with u of every direction and the bits that it rounds by."""
        for bundle in bundles(self.parameters):
            noises = [self._random(bundle, d, standard_normals) for d in range(directions)]
            rounding: Sequence[Noise | None] = [None] * len(bundle)
            if any(chunk.of.rounds for chunk in bundle):
                rounding = self._random(bundle, ROUNDING, rounding_bits)
            for chunk, bits, *of_chunk in zip(bundle, rounding, *noises, strict=True):
                yield chunk, of_chunk, bits if chunk.of.rounds else None

    def _numbers_of(self, trained: TrainedParameter, step: GroupStep) -> kernels.Numbers:
        """Return the scalars of a parameter's update."""
        group, samples = trained.group, len(step.gradients)
        direction, sign = self.shift or (None, 0.0)
        smooth, decay = group["hessian_smooth"], step.learning_rate * group["weight_decay"]
        grows = smooth > 0 and step.curvatures is not None and not trained.columns
        values = scalars(
            [
                *(-step.learning_rate * g for g in step.gradients),
                *(-sign * group["eps"] * (d == direction) for d in range(samples)),
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

    def _averaged_low_rank(self, steps: dict[int, GroupStep]) -> States:
        """Return every low-rank h after this step's average; a full h is averaged in the update.

        ``steps`` are found by the ``id`` of their group.
        """
        averaged: States = {}
        for trained in self.parameters:
            step, smooth = steps[id(trained.group)], trained.group["hessian_smooth"]
            if not trained.columns or step.curvatures is None or not smooth:
                continue
            state = self.states[trained.parameter]
            means = []
            for direction in range(len(step.gradients)):
                of_direction = curvature.RowAndColumnMeans(state)
                for chunk, noise in self.chunks_with_noise([trained], direction):
                    like = chunk.view(trained.parameter)
                    hessian = curvature.hessian_of_chunk(chunk, state)
                    measure = run(kernels.measured_squares, trained)
                    of_direction.add(chunk, measure(like, hessian, noise))
                means.append(of_direction)
            averaged[trained.parameter] = curvature.averaged(state, smooth, step.curvatures, means)
        return averaged


def run(function: Callable[..., Any], trained: TrainedParameter) -> Callable[..., Any]:
    """Return a kernel as it runs on chunks of a parameter."""
    return kernels.compiled(function) if trained.compiles else function


def scalars(numbers: list[float], trained: TrainedParameter) -> list[kernels.Scalar]:
    """Return numbers as the kernels of a parameter take them."""
    if not trained.compiles:
        return numbers
    dtype = compute_dtype(trained.parameter.dtype)
    return [*torch.tensor(numbers, dtype=dtype).to(trained.parameter.device, non_blocking=True)]


def float32_copies(pieces: kernels.Hessian, first: int) -> kernels.Hessian:
    """Return float32 copies of pieces, in scratch memory number ``first`` and the next.

    A low-rank h, a tuple, is in float32 already.
    """
    if not isinstance(pieces, list):
        return pieces
    copies = [
        scratch(number, piece.numel()).view(piece.shape)
        for number, piece in enumerate(pieces, first)
    ]
    kernels.write(copies, pieces)
    return copies


def scratch(number: int, count: int) -> Tensor:
    """Return the first numbers of a float32 buffer that is made once."""
    return _buffer(number, max(0, count - 1).bit_length())[:count]


@functools.lru_cache(maxsize=16)
def _buffer(number: int, power: int) -> Tensor:
    return torch.empty(1 << power)
