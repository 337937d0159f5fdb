"""What to tell a user whose model's numbers are not finite."""

from __future__ import annotations

import torch
from torch import nn

from language_model.adapters import without_adapter
from utils import InputError

OVERFLOW = (
    "float16 holds no number above 65504, and models that were trained in bfloat16 reach it; give "
    "--load_bfloat16 in place of --load_float16"
)


class NotFinite(InputError):
    """Scores, hidden states or logits are NaN or infinite, so that no answer follows from them."""


def not_finite(what: str, model: nn.Module) -> NotFinite:
    """Return the error to raise; ``what`` names the numbers that are not finite."""
    dtype = without_adapter(model).dtype
    remedy = (
        "its weights are damaged, or were trained with too large a step; load other weights, or "
        "train with a lower --learning_rate or --broadcast_rate"
    )
    return NotFinite(
        f"the model's {what} are not finite in {str(dtype).removeprefix('torch.')}: "
        f"{OVERFLOW if dtype == torch.float16 else remedy}"
    )


def advice_for_losses(model: nn.Module, from_the_start: bool, remedy: str) -> str:
    """Return what to change where training meets losses that are not finite."""
    if from_the_start and without_adapter(model).dtype == torch.float16:
        return f"{OVERFLOW}, or {remedy}"
    return remedy
