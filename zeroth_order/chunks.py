"""How parameters are cut into chunks, the pieces that one kernel call works on.

A chunk has two pieces, one in each half of a parameter's rows: their numbers are the pairs that
share a hash. The middle row of an odd matrix has no partner, so it forms chunks of one piece.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroth_order.noise import chunk_key
from zeroth_order.rounding import is_half

# Numbers of a chunk. Operations that run one by one on a CPU core want it in the cache, and so do
# kernels on float32 copies. Other kernels want it so large that starting them (0.05 ms) is cheap.
CACHED_CHUNK = 1 << 17
COPIED_CHUNK = 1 << 20
COMPILED_CHUNK = 1 << 22
GPU_CHUNK = 1 << 23
# Smaller parameters run operation by operation: torch.compile makes kernels for one core if the
# first chunk that it sees is small.
SMALLEST_COMPILED = 1 << 16


@dataclass(frozen=True, eq=False)
class TrainedParameter:
    """A parameter that the optimizer trains.

    Attributes:
        parameter: the tensor.
        group: its parameter group.
        number: counts all parameters of the optimizer, frozen ones too; the noise depends on it.
        columns: of the matrix that a low-rank h sees; 0: pieces are one-dimensional.
        length: numbers of a piece, at most.
        compiles: whether torch.compile makes its kernels.
        hessian_dtype: dtype of its full h.
    """

    parameter: Tensor
    group: dict[str, Any]
    number: int
    columns: int
    length: int
    compiles: bool
    hessian_dtype: torch.dtype

    @classmethod
    def cut(
        cls,
        parameter: Tensor,
        group: dict[str, Any],
        number: int,
        low_rank: bool,
        compiles: bool,
        hessian_dtype: torch.dtype,
    ) -> TrainedParameter:
        """Choose the length of the pieces, and whether kernels are compiled for them."""
        compiles = compiles and parameter.numel() >= SMALLEST_COMPILED
        half = is_half(parameter.dtype) or is_half(hessian_dtype)
        if parameter.device.type == "cpu":
            length = (COPIED_CHUNK if half else COMPILED_CHUNK) if compiles else CACHED_CHUNK
        else:
            length = GPU_CHUNK if compiles else COMPILED_CHUNK
        length //= 2
        columns = parameter[0].numel() if low_rank and parameter.numel() else 0
        if columns:
            length = max(1, length // columns) * columns
        return cls(parameter, group, number, columns, length, compiles, hessian_dtype)

    @functools.cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks, pairs first."""
        shape, count, length = self.parameter.shape, self.parameter.numel(), self.length
        first = first_half(shape)
        pairs = count - first
        if 0 < count <= 2 * length and not self.compiles:
            return [Chunk(self, (0,), count, first)]
        chunks = []
        for start in range(0, pairs, length):
            size = min(length, pairs - start)
            chunks.append(Chunk(self, (start, first + start), size, size))
        for start in range(pairs, first if count else 0, length):
            size = min(length, first - start)
            chunks.append(Chunk(self, (start,), size, size))
        return chunks

    @property
    def rounds(self) -> bool:
        """Whether updates of the parameter or of its full h round stochastically."""
        return is_half(self.parameter.dtype) or is_half(self.hessian_dtype)

    @property
    def copies(self) -> bool:
        """Whether kernels see float32 copies: compiled for a CPU, casts go through memory."""
        return self.compiles and self.rounds and self.parameter.device.type == "cpu"


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some numbers of a parameter.

    Attributes:
        of: the parameter.
        starts: where its pieces begin among the parameter's numbers. A small parameter is one piece
            with both halves.
        size: numbers of a piece.
        pairs: how many pairs its numbers belong to.
    """

    of: TrainedParameter
    starts: tuple[int, ...]
    size: int
    pairs: int

    def key(self, stream: int) -> tuple[int, int]:
        """Return the key of the chunk's ``noise.counters``."""
        return chunk_key(stream, self.of.number, self.starts[0])

    def view(self, tensor: Tensor) -> list[Tensor]:
        """Return the pieces of ``tensor``, which has the parameter's shape, as views.

        ``data`` hides what it is a view of, for which torch.compile would compile anew.
        """
        flat = tensor.view(-1)
        pieces = [flat[start : start + self.size] for start in self.starts]
        if self.of.columns:
            pieces = [piece.view(-1, self.of.columns) for piece in pieces]
        return [piece.data for piece in pieces]

    def rows(self) -> list[slice]:
        """Return the rows of each piece, where h is low-rank."""
        columns = self.of.columns
        return [slice(start // columns, (start + self.size) // columns) for start in self.starts]

    def joined(self, halves: Sequence[Tensor]) -> list[Tensor]:
        """Return the random numbers of each piece from those of both halves of its pairs."""
        if self.pairs < self.size:
            return [torch.cat(list(halves))[: self.size]]
        return list(halves[: len(self.starts)])


def first_half(shape: Sequence[int]) -> int:
    """Return how many numbers the first half of the rows has, the middle row included."""
    return -(-shape[0] // 2) * math.prod(shape[1:]) if shape else 1


def bundles(parameters: Sequence[TrainedParameter]) -> Iterator[list[Chunk]]:
    """Yield chunks in bundles whose noise is drawn at once, about as many numbers as one chunk.

    A bundle lies on one device, and its kernels are compiled or not.
    """
    bundle: list[Chunk] = []
    room, kind = 0, None
    for parameter in sorted(parameters, key=lambda parameter: parameter.compiles):
        of_parameter = parameter.compiles, parameter.parameter.device
        for chunk in parameter.chunks:
            if bundle and (room <= 0 or kind != of_parameter):
                yield bundle
                bundle = []
            if not bundle:
                room, kind = 2 * parameter.length, of_parameter
            bundle.append(chunk)
            room -= chunk.size * len(chunk.starts)
    if bundle:
        yield bundle


def counted(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, ... to ``count`` at least, int32: shared memory that nobody writes to."""
    return _counted_to_power(max(0, count - 1).bit_length(), device)


@functools.lru_cache(maxsize=8)
def _counted_to_power(power: int, device: torch.device) -> Tensor:
    return torch.arange(1 << power, dtype=torch.int32, device=device)
