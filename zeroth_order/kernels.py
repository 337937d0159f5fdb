"""The arithmetic of a step on one chunk: perturb the weights, update them and h.

The functions run as they are, or torch.compile makes one kernel of the noise's hash and all
arithmetic (``compiling.py``). Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zeroth_order.chunks import Noise, drawn, numbers_of_chunk
from zeroth_order.noise import halves_swapped, rounding_bits
from zeroth_order.rounding import is_half, rounded_sum

# 0-dimensional in a compiled kernel, which a float would have compiled anew for every number.
Scalar = float | Tensor
Pieces = Sequence[Tensor]
# h of a chunk: a list holds h - 1 of each piece, a tuple h itself (low-rank); None: h is 1.
Hessian = list[Tensor] | tuple[Tensor, ...] | None


class Numbers(NamedTuple):
    """The scalars of an update; lists hold one for each direction."""

    steps: Sequence[Scalar]  # -η g, by which u/√h is multiplied
    back: Sequence[Scalar] | None  # likewise, to take the shift back; None: nothing is shifted
    growths: Sequence[Scalar] | None  # α c; None: h stays as it is, or is low-rank
    smooth: Scalar  # α
    decay: Scalar | None  # -η λ; None for 0


def perturb(
    target: Pieces, hessian: Hessian, noise: Noise, scale: Scalar, source: Pieces | None = None
) -> None:
    """Write ``source`` + ``scale`` u/√h into ``target``; ``source`` None is ``target`` itself."""
    directions = drawn(noise, target)
    if hessian is not None:
        hessians = hessian_of(hessian, directions[0].dtype)
        directions = [u.mul_(h.rsqrt_()) for u, h in zip(directions, hessians, strict=True)]
    values = values_of(target if source is None else source)
    write(target, [u.mul_(scale).add_(v) for u, v in zip(directions, values, strict=True)])


def update(
    target: Pieces,  # of θ, or float32 copies of them
    hessian: Hessian,  # before the step; a low-rank h after it
    noises: Sequence[Noise],  # u of each direction
    numbers: Numbers,
    rounding: Noise | None,  # random bits; None: nothing is of half precision
    dtype: torch.dtype,  # what θ rounds to
    hessian_dtype: torch.dtype,  # what h rounds to
) -> None:
    """Take the shift back, then update h and θ of a chunk, in place."""
    steps, back, growths, smooth, decay = numbers
    directions = [drawn(noise, target) for noise in noises]
    compute_dtype = directions[0][0].dtype
    bits = rounding and numbers_of_chunk(rounding, target, rounding_bits)
    before = hessian and hessian_of(hessian, compute_dtype)
    values = values_of(target)
    offsets = [] if growths is None else values_of(hessian)
    for i, value in enumerate(values):
        us = [direction[i] for direction in directions]
        if back is not None:
            move = weighted_sum(us, back)
            value = value + (move if before is None else move.mul_(before[i].rsqrt()))
        change = weighted_sum(us, steps)
        if growths is not None:
            growth = weighted_sum([u * u for u in us], growths).sub_(smooth).mul_(before[i])
            # h rounds by the bits of θ with the last ones first.
            offset = rounded_sum(
                offsets[i], growth, bits and halves_swapped(bits[i]), hessian_dtype
            )
            # An h of 0 would make the next perturbation infinite, an infinite one would become NaN.
            limits = torch.finfo(hessian_dtype)
            offsets[i] = offset.clamp(limits.eps - 1, limits.max)
            change.mul_((offsets[i].to(compute_dtype) + 1).rsqrt_())
        elif before is not None:
            change.mul_(before[i].rsqrt_())
        if decay is not None:
            change.add_(value * decay)
        values[i] = rounded_sum(value, change, bits and bits[i], dtype)
    write(target, values)
    if growths is not None:
        write(hessian, offsets)


def measured_squares(like: Pieces, hessian: Hessian, noise: Noise) -> list[Tensor]:
    """Return h u² of each piece."""
    directions = drawn(noise, like)
    hessians = hessian_of(hessian, directions[0].dtype)
    return [u.square().mul_(h) for u, h in zip(directions, hessians, strict=True)]


def hessian_of(hessian: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return h of each piece, new tensors."""
    if isinstance(hessian, tuple):
        return [piece.clone() for piece in hessian]
    return [offset.to(dtype) + 1 for offset in hessian]


def values_of(pieces: Pieces) -> list[Tensor]:
    """Return the numbers of each piece, float32 where they are of half precision."""
    return [piece.to(torch.float32) if is_half(piece.dtype) else piece for piece in pieces]


def write(pieces: Pieces, values: Pieces) -> None:
    """Let a chunk hold these numbers, half precision rounded to the nearest."""
    for piece, value in zip(pieces, values, strict=True):
        piece.copy_(value)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Scalar]) -> Tensor:
    """Return the sum of ``tensors`` times ``weights``, a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor * weight)
    return total
