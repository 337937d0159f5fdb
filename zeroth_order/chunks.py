"""How parameters are cut into chunks, the pieces that one kernel call works on.

A chunk has two pieces, one in each half of a parameter's rows: their numbers are the pairs that
share a hash. The middle row of an odd matrix has no partner, so it forms chunks of one piece.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroth_order.rounding import is_half

# Numbers of a chunk. Operations that run one by one on a CPU core want it in the cache, and so do
# kernels on float32 copies. Other kernels want it so large that starting them (0.05 ms) is cheap.
CACHED_CHUNK = 1 << 17
COPIED_CHUNK = 1 << 20
COMPILED_CHUNK = 1 << 22
GPU_CHUNK = 1 << 23


@dataclass(frozen=True, eq=False)
class TrainedParameter:
    """A parameter that the optimizer trains.

    Attributes:
        number: counts all parameters of the optimizer, frozen ones too; the noise depends on it.
        low_rank: whether its h is; the pieces of a chunk are then whole rows.
        compiles: whether torch.compile makes its kernels.
        hessian_dtype: dtype of its full h.
    """

    parameter: Tensor
    group: dict[str, Any]
    number: int
    low_rank: bool
    compiles: bool
    hessian_dtype: torch.dtype

    @functools.cached_property
    def columns(self) -> int:
        """Columns of the matrix that a low-rank h sees."""
        return math.prod(self.parameter.shape[1:])

    @functools.cached_property
    def rounds(self) -> bool:
        """Whether updates of the parameter or of its full h round stochastically."""
        return is_half(self.parameter.dtype) or is_half(self.hessian_dtype)

    @functools.cached_property
    def copies(self) -> bool:
        """Whether kernels see float32 copies: compiled for a CPU, casts go through memory."""
        return self.compiles and self.rounds and self.parameter.device.type == "cpu"

    @functools.cached_property
    def length(self) -> int:
        """Numbers of a piece, at most."""
        on_cpu = self.parameter.device.type == "cpu"
        if self.compiles:
            count = (COPIED_CHUNK if self.copies else COMPILED_CHUNK) if on_cpu else GPU_CHUNK
        else:
            count = CACHED_CHUNK if on_cpu else COMPILED_CHUNK
        length = count // 2
        return max(1, length // self.columns) * self.columns if self.low_rank else length

    @functools.cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks, pairs first."""
        shape, count, length = self.parameter.shape, self.parameter.numel(), self.length
        # Numbers of the first half of the rows, the middle row included.
        first = -(-shape[0] // 2) * self.columns if shape else 1
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

    def view(self, tensor: Tensor) -> list[Tensor]:
        """Return the pieces of ``tensor``, which has the parameter's shape, as views."""
        flat = tensor.view(-1)
        pieces = [flat[start : start + self.size] for start in self.starts]
        if self.of.low_rank:
            pieces = [piece.view(-1, self.of.columns) for piece in pieces]
        # ``data`` hides what they are views of, for which torch.compile would compile anew.
        return [piece.data for piece in pieces]

    def rows(self) -> list[slice]:
        """Return the rows of each piece, where h is low-rank."""
        columns = self.of.columns
        return [slice(start // columns, (start + self.size) // columns) for start in self.starts]
