"""The noise u ~ N(0, 1): a hash of (seed, step, direction, parameter, index) and of nothing else.

No global random state is read or changed. A hash makes a pair of numbers: number i of the first
half of a parameter's rows and number i of the second half share one. ``VERSION`` counts changes of
what a seed stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

VERSION = 3
# Stochastic rounding draws from this direction; those of u count from 0.
ROUNDING = -1
# No number of u is larger.
LARGEST = 5.4

MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1
SIGN_BIT = -(1 << 31)


def mix_seed(*numbers: int) -> int:
    """Hash whole numbers into one 64-bit seed (splitmix64's finaliser, folded over them)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
        state ^= state >> 31
    return state


def chunk_key(stream: int, parameter: int, first: int) -> tuple[int, int]:
    """Return the odd multiplier and the offset that count a chunk's pairs (see ``counters``).

    Pair ``i`` of the ``parameter``-th parameter counts as multiplier * i + offset modulo 2**32, so
    up to 2**32 pairs of a parameter have counters of their own, and every parameter and step
    another sequence. ``first`` is the index of the chunk's first pair.
    """
    mixed = mix_seed(stream, parameter)
    multiplier = (mixed & MASK_32) | 1
    offset = ((mixed >> 32) + first * multiplier) & MASK_32
    return _signed(multiplier), _signed(offset)


def _signed(number: int) -> int:
    return number - (1 << 32) if number >> 31 else number


def counters(key: Sequence[int] | Tensor, index: Tensor) -> Tensor:
    """Return the counters, int32, of pairs whose ``index`` begins with 0 at the chunk's first."""
    return index.mul(key[0]).add_(key[1])


def hashed(bits: Tensor) -> Tensor:
    """Mix int32 numbers so that every bit depends on every bit; overwrites them.

    Two rounds of xor-shift and multiplication, with the constants that Chris Wellons's search for
    the least biased functions found (hash-prospector, "lowbias32").
    """
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def halves_swapped(bits: Tensor) -> Tensor:
    """Exchange the upper and the lower 16 bits."""
    return (bits << 16) | ((bits >> 16) & 0xFFFF)


def rounding_bits(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn hashed int32 numbers into random bits for both numbers of pairs; upper bits count."""
    return bits, halves_swapped(bits)


def standard_normals(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn hashed int32 numbers into pairs of u ~ N(0, 1), float32 (Box and Muller, 1958).

    20 bits become the radius √(-2 ln U) and 12 the angle, in the middle of their intervals; the
    numbers are the radius times its sine and its cosine, and independent. So |u| is at most 5.4,
    and its distribution is the normal one to about 1e-6. Sine, cosine and logarithm are polynomials
    fitted to 2e-6: as fused arithmetic they cost a tenth of the library's functions.
    """
    angle = (bits >> 21).to(torch.float32).add_(0.5).mul_(1 / 1024)  # in (-1, 1), times π/2
    square = angle * angle
    sine = square.mul(-0.00437101).add_(0.07950065).mul_(square).add_(-0.64592596)
    sine.mul_(square).add_(1.57079514).mul_(angle)
    cosine = square.mul(0.00085819).add_(-0.02081063).mul_(square).add_(0.25365075)
    cosine.mul_(square).add_(-1.2336982).mul_(square).add_(1)
    uniform = (bits & 0xFFFFF).to(torch.float32).add_(0.5).mul_(2**-20)
    # U = (1 + t) 2**e with 1 + t between √½ and √2
    pattern = uniform.view(torch.int32)
    exponent = (pattern - 0x3F3504F3) >> 23
    t = (pattern - (exponent << 23)).view(torch.float32).sub_(1)
    logarithm = t.mul(-0.14337014).add_(0.22314531).mul_(t).add_(-0.254644).mul_(t).add_(0.3322804)
    logarithm.mul_(t).add_(-0.49985581).mul_(t).add_(1.000012).mul_(t)
    logarithm.add_(exponent.to(torch.float32).mul_(math.log(2)))
    radius = logarithm.mul_(-2).sqrt_()
    # Those angles are half a circle: the sign of the cosine is the twelfth bit.
    signed = (radius.view(torch.int32) ^ ((bits << 11) & SIGN_BIT)).view(torch.float32)
    return sine.mul_(radius), cosine.mul_(signed)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic for weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
