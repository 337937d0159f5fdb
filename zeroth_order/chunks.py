"""Parameters in chunks, the pieces that one kernel call works on, and the random numbers of each.

A chunk has two pieces, one in each half of a parameter's rows: their numbers are the pairs that
share a hash. The middle row of an odd matrix has no partner, so it forms chunks of one piece. Many
small chunks draw their noise at once; compiled kernels make it themselves.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeroth_order.noise import (
    ROUNDING,
    chunk_key,
    compute_dtype,
    counters,
    hashed,
    mix_seed,
    rounding_bits,
    standard_normals,
)
from zeroth_order.rounding import is_half

# Numbers of a chunk. Operations that run one by one on a CPU core want it in the cache, and so do
# kernels on float32 copies. Other kernels want it so large that starting them (0.05 ms) is cheap.
CACHED_CHUNK = 1 << 17
COPIED_CHUNK = 1 << 20
COMPILED_CHUNK = 1 << 22
GPU_CHUNK = 1 << 23


@dataclass(frozen=True, eq=False)
class TrainedParameter:
    """A parameter that the optimizer trains."""

    parameter: Tensor
    group: dict[str, Any]
    number: int  # counts all parameters of the optimizer, frozen ones too; the noise depends on it
    low_rank: bool  # whether its h is; the pieces of a chunk are then whole rows
    compiles: bool  # whether torch.compile makes its kernels

    @functools.cached_property
    def columns(self) -> int:
        """Columns of the matrix that a low-rank h sees; experts lie below one another."""
        return self.parameter.shape[-1]

    @functools.cached_property
    def hessian_dtype(self) -> torch.dtype:
        """The dtype of its full h: float16's range is too small for it."""
        dtype = self.parameter.dtype
        return torch.bfloat16 if dtype == torch.float16 else dtype

    @functools.cached_property
    def rounds(self) -> bool:
        """Whether updates of the parameter and of its full h round stochastically."""
        return is_half(self.parameter.dtype)

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
        # Numbers of the first half along the first dimension, the middle included.
        first = -(-shape[0] // 2) * math.prod(shape[1:]) if shape else 1
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
    """Some numbers of a parameter; a small parameter is one piece with both halves."""

    of: TrainedParameter
    starts: tuple[int, ...]  # where its pieces begin among the parameter's numbers
    size: int  # numbers of a piece
    pairs: int  # how many pairs its numbers belong to

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


# ---- noise


class NoiseSource(NamedTuple):
    """Where a compiled kernel finds the random numbers of a chunk."""

    key: Tensor  # of the ``counters`` of its pairs, int32 (2,)
    index: Tensor | None  # 0, 1, ... for its pairs and beyond, int32; None: the kernel counts


# Random numbers of a chunk: those of each piece, or where a kernel finds them.
Noise = NoiseSource | Sequence[Tensor]


def bundles(parameters: Sequence[TrainedParameter]) -> Iterator[list[Chunk]]:
    """Yield chunks in bundles whose noise is drawn at once, about as many numbers as one chunk.

    A bundle lies on one device; its kernels are compiled, and its updates round, or not.
    """

    def kind(trained: TrainedParameter) -> tuple[bool, bool, str]:
        return trained.compiles, trained.rounds, str(trained.parameter.device)

    for _, alike in itertools.groupby(sorted(parameters, key=kind), kind):
        bundle: list[Chunk] = []
        room = 0
        for chunk in itertools.chain.from_iterable(trained.chunks for trained in alike):
            if room <= 0:
                if bundle:
                    yield bundle
                bundle, room = [], 2 * chunk.of.length
            bundle.append(chunk)
            room -= chunk.size * len(chunk.starts)
        if bundle:
            yield bundle


def noise_of_bundle(
    bundle: Sequence[Chunk], seed_and_step: tuple[int, int], direction: int
) -> list[Noise]:
    """Return u of a bundle's chunks, or ``ROUNDING`` bits, or where kernels find them."""
    first = bundle[0].of
    device, stream = first.parameter.device, mix_seed(*seed_and_step, direction)
    keys = [chunk_key(stream, chunk.of.number, chunk.starts[0]) for chunk in bundle]
    if first.compiles:
        on_device = torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True)
        # For a CPU torch.compile would build the index from its elements: half of a draw.
        power = (max(chunk.of.length for chunk in bundle) - 1).bit_length()
        index = counted(power, device) if device.type == "cpu" else None
        return [NoiseSource(key.clone(), index) for key in on_device]
    sizes = [chunk.pairs for chunk in bundle]
    indices = [counted((size - 1).bit_length(), device)[:size] for size in sizes]
    bits = hashed(torch.cat([counters(k, i) for k, i in zip(keys, indices, strict=True)]))
    of_pairs = rounding_bits(bits) if direction == ROUNDING else standard_normals(bits)
    found: list[Noise] = []
    for chunk, *halves in zip(bundle, *(each.split(sizes) for each in of_pairs), strict=True):
        if chunk.pairs < chunk.size:
            halves = [torch.cat(halves)[: chunk.size]]
        found.append(halves[: len(chunk.starts)])
    return found


@functools.lru_cache(maxsize=8)
def counted(power: int, device: torch.device) -> Tensor:
    """Return 0, 1, ... to 2 ** ``power``, int32: shared memory that nobody writes to."""
    return torch.arange(1 << power, dtype=torch.int32, device=device)


def numbers_of_chunk(
    noise: Noise,
    pieces: Sequence[Tensor],
    of_pairs: Callable[[Tensor], tuple[Tensor, Tensor]] = standard_normals,
) -> list[Tensor]:
    """Return random numbers for each piece of a chunk, in its shape; a kernel makes them here."""
    if not isinstance(noise, NoiseSource):
        return [numbers.view(piece.shape) for numbers, piece in zip(noise, pieces, strict=True)]
    first, index = pieces[0], noise.index
    if index is None:
        index = torch.arange(first.numel(), dtype=torch.int32, device=first.device)
    pairs = counters(noise.key, index.narrow(0, 0, first.numel())).view(first.shape)
    return list(of_pairs(hashed(pairs))[: len(pieces)])


def drawn(noise: Noise, pieces: Sequence[Tensor]) -> list[Tensor]:
    """Return u of each piece of a chunk, in its shape and the dtype of arithmetic."""
    dtype = compute_dtype(pieces[0].dtype)
    return [u.to(dtype) for u in numbers_of_chunk(noise, pieces)]
