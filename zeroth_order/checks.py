"""Checks of parameters and of μ against them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass

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
READ_AT_ONCE = 1 << 22


def check_parameter(parameter: Tensor) -> None:
    """Check that a parameter can be cut into chunks and perturbed.

    Raises:
        ValueError: it is not contiguous, or of a dtype without fractions.
    """
    shown = f"parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{shown} is {str(parameter.dtype).removeprefix('torch.')}: give {known}")
    if not parameter.is_contiguous():
        raise ValueError(f"{shown} not contiguous")


@dataclass
class Effect:
    """What a shift by μ u does to weights.

    Attributes:
        changed: weights that it changes for certain, of those that are not 0.
        nonzero: weights that are not 0. The others take any shift (LoRA's second matrix starts so).
        weights: all of them.
        norm: of the weights.
        remainder: what taking the shift back leaves, at most.
    """

    changed: int = 0
    nonzero: int = 0
    weights: int = 0
    norm: float = 0.0
    remainder: float = 0.0

    def add(self, parameter: Tensor, eps: float, in_place: bool) -> None:
        """Count a parameter that is shifted with scale μ ``eps``."""
        dtype = parameter.dtype
        limits, shift = torch.finfo(dtype), LARGEST * eps
        # Half a unit in a number's last place is at least a quarter of it times its dtype's eps.
        largest_changed = 4 * shift / limits.eps
        rounding = torch.finfo(dtype if in_place else compute_dtype(dtype)).eps / 2
        remainder = shift * rounding if shift < limits.max else math.inf
        self.remainder = max(self.remainder, remainder)
        for values in parameter.detach().view(-1).split(READ_AT_ONCE):
            self.nonzero += int(values.count_nonzero())
            self.changed += int((values.ne(0) & values.abs().lt(largest_changed)).sum())
            self.weights += values.numel()
            norm = torch.linalg.vector_norm(values, dtype=compute_dtype(dtype))
            self.norm = math.hypot(self.norm, float(norm))


def check_perturbation_scale(scales: Iterable[tuple[Tensor, float]], in_place: bool) -> None:
    """Check that a shift by μ u changes weights, and that shifting back restores them.

    Args:
        scales: parameters with their μ.
        in_place: whether weights are shifted in their own dtype.

    Raises:
        ValueError: μ is too small, or too large.
    """
    effect, eps = Effect(), 0.0
    for parameter, of_parameter in scales:
        effect.add(parameter, of_parameter, in_place)
        eps = max(eps, of_parameter)
    size = effect.norm / math.sqrt(effect.weights) if effect.weights else 0.0
    if effect.changed < CHANGED_WEIGHTS * effect.nonzero:
        raise ValueError(
            f"eps {eps!r} is below the precision of the weights, it changes {effect.changed:,} of "
            f"{effect.nonzero:,}; give a larger one"
        )
    if effect.remainder > LARGEST_REMAINDER * size > 0 or effect.remainder == math.inf:
        raise ValueError(
            f"eps {eps!r} would destroy the weights: taking such a shift back leaves "
            f"{effect.remainder:.2g} of it, their root mean square is {size:.2g}; give a smaller "
            "one"
        )


def check_repeats(
    loss: float, again: float, losses: Collection[float], parameters: Iterable[Tensor]
) -> None:
    """Warn if a loss differs from itself by what the perturbation may change.

    Args:
        loss: at some weights.
        again: at the same weights.
        losses: of all perturbations.
        parameters: the trained ones; kernels that add in any order differ by their rounding.
    """
    difference, change = abs(again - loss), max(losses) - min(losses)
    precision = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    if difference > max(NOISY_LOSS * change, precision * abs(loss)):
        warnings.warn(
            f"the closure's loss differs by {difference:.2g} between two calls with the same "
            f"weights, the perturbation changes it by {change:.2g}: give the same batch, and "
            "leave dropout out (model.eval())",
            stacklevel=5,
        )
