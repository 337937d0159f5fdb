"""Checks of parameters and of μ against them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from zeroth_order.noise import LARGEST, compute_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Part of the weights that a perturbation has to change, at least.
CHANGED_WEIGHTS = 0.01
# What taking a shift back may leave, at most, in units of the weights' root mean square.
LARGEST_REMAINDER = 0.1
# Part of a perturbation's change of the loss by which two equal calls may differ.
NOISY_LOSS = 0.1
# Numbers that are read at once.
CHECKED_AT_ONCE = 1 << 22


def check_parameter(parameter: Tensor) -> None:
    """Check that a parameter can be cut into chunks and perturbed.

    Raises:
        ValueError: it is not contiguous, or of a dtype without fractions.
    """
    shown = f"parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{shown} is {str(parameter.dtype).removeprefix('torch.')}: give {known}")
    # Streamed weights that are not in memory are one number, expanded.
    if not parameter.is_contiguous() and any(parameter.stride()):
        raise ValueError(f"{shown} is not contiguous: give its contiguous()")


def check_perturbation_scale(scales: Iterable[tuple[Tensor, float]], in_place: bool) -> None:
    """Check that a shift by μ u changes weights, and that shifting back restores them.

    Weights that are 0 take any shift (LoRA's second matrix starts so) and do not count. In place,
    weights are shifted in their own dtype.

    Raises:
        ValueError: μ is too small, or too large.
    """
    changed = nonzero = weights = 0
    norm, remainder, largest_eps = 0.0, 0.0, 0.0
    for parameter, eps in scales:
        shift, compute = LARGEST * eps, compute_dtype(parameter.dtype)
        limits = torch.finfo(parameter.dtype)
        # Half a unit in a number's last place is at least a quarter of it times its dtype's eps.
        largest_changed = 4 * shift / limits.eps
        for values in parameter.detach().view(-1).split(CHECKED_AT_ONCE):
            nonzero += int(values.count_nonzero())
            changed += int((values.ne(0) & values.abs().lt(largest_changed)).sum())
            weights += values.numel()
            norm = math.hypot(norm, float(torch.linalg.vector_norm(values, dtype=compute)))
        rounding = torch.finfo(parameter.dtype if in_place else compute).eps / 2
        remainder = max(remainder, shift * rounding if shift < limits.max else math.inf)
        largest_eps = max(largest_eps, eps)
    size = norm / math.sqrt(max(1, weights))
    if changed < CHANGED_WEIGHTS * nonzero:
        raise ValueError(
            f"eps {largest_eps!r} is below the precision of the weights, it changes {changed:,} of "
            f"{nonzero:,}; give a larger one"
        )
    if remainder > LARGEST_REMAINDER * size > 0 or remainder == math.inf:
        raise ValueError(
            f"eps {largest_eps!r} would destroy the weights: taking such a shift back leaves "
            f"{remainder:.2g} of it, their root mean square is {size:.2g}; give a smaller one"
        )


def check_repeats(
    loss: float,
    again: float,  # at the same weights
    losses: Collection[float],  # of all perturbations
    parameters: Iterable[Tensor],  # kernels that add in any order differ by their rounding
) -> None:
    """Warn if a loss differs from itself by what the perturbation may change."""
    difference, change = abs(again - loss), max(losses) - min(losses)
    precision = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    if difference > max(NOISY_LOSS * change, precision * abs(loss)):
        warnings.warn(
            f"the closure's loss differs by {difference:.2g} between two calls with the same "
            f"weights, the perturbation changes it by {change:.2g}: give the same batch, and "
            "leave dropout out (model.eval())",
            stacklevel=7,
        )
