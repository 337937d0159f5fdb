"""The random numbers of chunks: drawn for many small ones at once, or made within a kernel."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zeroth_order.chunks import Chunk, TrainedParameter
from zeroth_order.noise import chunk_key, compute_dtype, counters, hashed, standard_normals


class NoiseSource(NamedTuple):
    """Where a compiled kernel finds the random numbers of a chunk.

    Attributes:
        key: of the ``counters`` of the chunk's pairs, int32 (2,).
        index: of the pairs, int32, from the chunk's first one; it may be longer than the chunk.
            None: the kernel counts.
    """

    key: Tensor
    index: Tensor | None


# Random numbers of a chunk: those of each piece, or where a kernel finds them.
Noise = NoiseSource | Sequence[Tensor]
# Makes random numbers of hashed counters: ``standard_normals`` or ``rounding_bits``.
OfPairs = Callable[[Tensor], tuple[Tensor, Tensor]]


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


def noise_of_bundle(bundle: Sequence[Chunk], stream: int, of_pairs: OfPairs) -> list[Noise]:
    """Return random numbers of a bundle's chunks, or where their kernels find them.

    ``stream`` is the 64-bit seed of one direction of one step.
    """
    first = bundle[0].of
    device = first.parameter.device
    keys = [chunk_key(stream, chunk.of.number, chunk.starts[0]) for chunk in bundle]
    if first.compiles:
        on_device = torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True)
        # For a CPU torch.compile would build the index from its elements: half of a draw.
        power = (first.length - 1).bit_length()
        index = counted(power, device) if device.type == "cpu" else None
        return [NoiseSource(key.clone(), index) for key in on_device]
    sizes = [chunk.pairs for chunk in bundle]
    indices = [counted((size - 1).bit_length(), device)[:size] for size in sizes]
    bits = hashed(torch.cat([counters(k, i) for k, i in zip(keys, indices, strict=True)]))
    halves = (numbers.split(sizes) for numbers in of_pairs(bits))
    return [numbers_of_pieces(*of_chunk) for of_chunk in zip(bundle, *halves, strict=True)]


def numbers_of_pieces(chunk: Chunk, first: Tensor, second: Tensor) -> list[Tensor]:
    """Return the random numbers of each piece from those of both halves of its pairs."""
    if chunk.pairs < chunk.size:
        return [torch.cat([first, second])[: chunk.size]]
    return [first, second][: len(chunk.starts)]


@functools.lru_cache(maxsize=8)
def counted(power: int, device: torch.device) -> Tensor:
    """Return 0, 1, ... to 2 ** ``power``, int32: shared memory that nobody writes to."""
    return torch.arange(1 << power, dtype=torch.int32, device=device)


def numbers_of_chunk(noise: Noise, pieces: Sequence[Tensor], of_pairs: OfPairs) -> list[Tensor]:
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
    return [u.to(dtype) for u in numbers_of_chunk(noise, pieces, standard_normals)]
