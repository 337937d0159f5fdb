"""The arithmetic of a step on one chunk: perturb the weights, update them and h.

The functions run as they are, or torch.compile makes one kernel of the noise's hash and all
arithmetic. Scalars are 0-dimensional tensors in a compiled kernel, which would otherwise be
compiled anew for every number, and floats elsewhere. Half precision is computed in float32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeroth_order.noise import (
    Noise,
    NoiseSource,
    drawn,
    half_turned,
    numbers_of_chunk,
    rounding_bits,
)
from zeroth_order.rounding import added, is_half

Scalar = float | Tensor
Pieces = Sequence[Tensor]
# h of a chunk: a list holds h - 1 of each piece, a tuple h itself (low-rank); None: h is 1.
Hessian = list[Tensor] | tuple[Tensor, ...] | None
# A C++ compiler makes one operation of a product and a sum, rounded once: a sixth less time.
COMPILER_OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}


# Compiling takes 10 to 30 seconds once. From so many weights on it pays within a hundred steps.
COMPILE_FROM = 1 << 24


class Numbers(NamedTuple):
    """The scalars of an update; lists hold one for each direction.

    Attributes:
        steps: what u/√h is multiplied by, -η g.
        back: what u/√h is multiplied by to take the shift back; None: nothing is shifted.
        growths: α c; None: h stays as it is, or is low-rank.
        smooth: α.
        decay: -η λ; None for 0.
    """

    steps: Sequence[Scalar]
    back: Sequence[Scalar] | None
    growths: Sequence[Scalar] | None
    smooth: Scalar
    decay: Scalar | None


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


def perturb(target: Pieces, source: Pieces, hessian: Hessian, noise: Noise, scale: Scalar) -> None:
    """Write ``source`` + ``scale`` u/√h into ``target``, which may be ``source``."""
    directions = drawn(noise, source)
    if hessian is not None:
        hessians = hessian_of(hessian, directions[0].dtype)
        directions = [u.mul_(h.rsqrt_()) for u, h in zip(directions, hessians, strict=True)]
    sources = values_of(source)
    write(target, [u.mul_(scale).add_(v) for u, v in zip(directions, sources, strict=True)])


def update(
    target: Pieces,
    hessian: Hessian,
    noises: Sequence[Noise],
    numbers: Numbers,
    rounding: Noise | None,
    dtype: torch.dtype,
    hessian_dtype: torch.dtype,
) -> None:
    """Take the shift back, then update h and θ of a chunk, in place.

    Args:
        target: pieces of θ, or float32 copies of them.
        hessian: h before the step; a low-rank h after it.
        noises: u of each direction.
        numbers: the scalars of the step.
        rounding: random bits for stochastic rounding; None: nothing is of half precision.
        dtype: what θ rounds to.
        hessian_dtype: what h rounds to.
    """
    steps, back, growths, smooth, decay = numbers
    directions = [drawn(noise, target) for noise in noises]
    compute_dtype = directions[0][0].dtype
    bits = None
    if rounding is not None:
        bits = numbers_of_chunk(rounding, target, rounding_bits)
    before = None if hessian is None else hessian_of(hessian, compute_dtype)
    values = values_of(target)
    offsets = values_of(hessian) if growths is not None else []
    for i, value in enumerate(values):
        noises_of_piece = [direction[i] for direction in directions]
        bits_of_piece = None if bits is None else bits[i]
        if back is not None:
            move = weighted_sum(noises_of_piece, back)
            value = value + (move if before is None else move.mul_(before[i].rsqrt()))
        change = weighted_sum(noises_of_piece, steps)
        if growths is not None:
            growth = weighted_sum([u * u for u in noises_of_piece], growths).sub_(smooth)
            growth.mul_(before[i])
            offset = added(offsets[i], growth, turned(bits_of_piece), hessian_dtype)
            # An h of 0 would make the next perturbation infinite, an infinite one would become NaN.
            limits = torch.finfo(hessian_dtype)
            offsets[i] = offset.clamp(limits.eps - 1, limits.max)
            change.mul_((offsets[i].to(compute_dtype) + 1).rsqrt_())
        elif before is not None:
            change.mul_(before[i].rsqrt_())
        if decay is not None:
            change.add_(value * decay)
        values[i] = added(value, change, bits_of_piece, dtype)
    write(target, values)
    if growths is not None:
        write(hessian, offsets)


def turned(bits: Tensor | None) -> Tensor | None:
    """Return the bits that h rounds by: those of θ with the last ones first."""
    return None if bits is None else half_turned(bits)


def measured_squares(like: Pieces, hessian: Hessian, noise: Noise) -> list[Tensor]:
    """Return h u² of each piece."""
    directions = drawn(noise, like)
    hessians = hessian_of(hessian, directions[0].dtype)
    return [u.square().mul_(h) for u, h in zip(directions, hessians, strict=True)]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Scalar]) -> Tensor:
    """Return the sum of ``tensors`` times ``weights``, a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor * weight)
    return total


# ------------------------------------------------------------------------------------- compiling


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as one kernel for chunks of every size."""
    # One for each kind of chunk: its dtype, its h, its pieces. The limit is for accidents.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 64)
    # float16 weights with an h in bfloat16 are meant to be mixed.
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
    return torch.compile(function, dynamic=True, options=COMPILER_OPTIONS)


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Try to compile a small kernel for ``device``; return the reason if it cannot be done."""
    pieces = [*torch.zeros(2, 1 << 15, device=device)]
    noise = NoiseSource(torch.zeros(2, dtype=torch.int32, device=device), None)
    try:
        compiled(perturb)(pieces, pieces, None, noise, torch.ones((), device=device))
    except Exception as error:  # of torch, Triton, a compiler or the system, as it may be
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def can_compile(parameters: Sequence[Tensor], wanted: bool | None) -> bool:
    """Return whether kernels are compiled; warn where they should be and cannot.

    ``wanted`` None: for ``COMPILE_FROM`` weights and more.
    """
    if wanted is None:
        wanted = sum(parameter.numel() for parameter in parameters) >= COMPILE_FROM
    for device in {parameter.device for parameter in parameters} if wanted else ():
        reason = why_not_compiled(device)
        if reason is not None:
            warnings.warn(
                f"the step runs several times slower, torch.compile fails here: {reason}",
                stacklevel=6,
            )
            return False
    return wanted
