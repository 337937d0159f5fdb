"""Stochastic rounding of updates to half precision: right on average, however small the change."""

from __future__ import annotations

import torch
from torch import Tensor

from zeroth_order.noise import chunk_key, counters, hashed

# Numbers that an added product works on at a time.
CHUNK = 1 << 22
# The bits of a float32: its exponent, and those that bfloat16 keeps.
EXPONENT, UPPER_HALF = 0x7F800000, -(1 << 16)


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype is a half-precision one."""
    return dtype.itemsize < 4


def rounded_sum(value: Tensor, change: Tensor, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``value`` + ``change`` as numbers that ``dtype`` can hold.

    Half precision rounds at random, right on average: a change far below one unit in the last place
    is neither lost nor biased, for normal and subnormal numbers; a change of 0 moves nothing.
    ``value`` is in float32 where ``dtype`` is of half precision, and fits it. ``bits`` are random,
    int32, the upper ones count most; None for full precision.
    """
    change = change.to(value.dtype)
    if not is_half(dtype):
        return value + change
    if dtype == torch.bfloat16:
        return rounded_to_bfloat16(value, change, bits)
    return rounded_to_units(value, change, bits, dtype)


def rounded_to_bfloat16(value: Tensor, change: Tensor, bits: Tensor) -> Tensor:
    """Round by adding random bits below bfloat16's last one to float32's, and cutting them off.

    The sum in float32, whose last place is 2**-16 units, rounds at random too: half a last place
    at most is added to it before.
    """
    power = (value.view(torch.int32) & EXPONENT).view(torch.float32)
    below = (bits & 0xFFFF).to(torch.float32).sub_(0x7FFF + 0.5).mul_(2**-39)
    total = value + below.mul_(power).add_(change)
    total = torch.where(change == 0, value, total)
    pattern = total.view(torch.int32) + ((bits >> 16) & 0xFFFF)
    return (pattern & UPPER_HALF).view(torch.float32)


def rounded_to_units(value: Tensor, change: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round by moving ``value`` by whole units in the last place of the larger, old or new.

    That is ``change`` in those units, rounded up with the probability of its fraction.
    """
    limits = torch.finfo(dtype)
    total = value + change
    largest = torch.maximum(value.abs(), total.abs())
    power = (largest.view(torch.int32) & EXPONENT).view(torch.float32)
    unit = power.clamp(min=limits.smallest_normal).mul_(limits.eps)
    # Where the last place of the sum is a higher one, the sum itself is rounded to it.
    outgrown = value.abs() < power
    value = torch.where(outgrown, 0.0, value)
    fraction = ((bits >> 8) & 0xFFFFFF).to(torch.float32).mul_(2**-24)
    moves = fraction.add_(torch.where(outgrown, total, change).div_(unit)).floor_()
    return moves.mul_(unit).add_(value)


def add_product(
    weight: Tensor,  # (m, n)
    errors: Tensor,  # (S, m), scaled
    inputs: Tensor,  # (S, n)
    stream: int,  # 64-bit seed of the step's rounding
    number: int,  # of the parameter
) -> None:
    """Add errorsᵀ inputs to a weight in place; half precision rounds at random."""
    columns = weight.shape[1]
    for start in range(0, len(weight), rows := max(1, CHUNK // columns)):
        piece, bits = weight[start : start + rows], None
        change = errors[:, start : start + rows].T @ inputs
        if is_half(weight.dtype):
            index = torch.arange(change.numel(), dtype=torch.int32, device=weight.device)
            key = chunk_key(stream, number, start * columns)
            bits = hashed(counters(key, index)).view(change.shape)
        piece.copy_(rounded_sum(piece.to(change.dtype), change, bits, weight.dtype))
