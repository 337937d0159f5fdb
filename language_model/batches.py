"""Many examples through a model: smaller batches where memory is short, numbers not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm

from language_model.adapters import without_adapter
from utils import InputError, process_index

logger = logging.getLogger(__name__)

OVERFLOW = (
    "float16 holds no number above 65504, and models that were trained in bfloat16 reach it; give "
    "--load_bfloat16 in place of --load_float16"
)


def run_in_batches(
    function: Callable[[list[int]], None],
    lengths: Sequence[int],
    batch_size: int,
    progress: str | None,
) -> None:
    """Call ``function`` with the numbers of examples in batches, the longest first: less padding.

    A batch that does not fit into memory is halved until it does; what is done is not done again.
    Shows a progress bar on a terminal, unless ``progress`` is None.
    """
    count = len(lengths)
    waiting = sorted(range(count), key=lengths.__getitem__, reverse=True)
    # None: tqdm hides the bar where there is no terminal.
    hidden = True if progress is None or process_index() > 0 else None
    with tqdm(total=count, desc=progress, unit="example", leave=False, disable=hidden) as bar:
        while waiting:
            indices = waiting[:batch_size]
            try:
                function(indices)
            except (RuntimeError, MemoryError) as error:
                no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
                if len(indices) == 1 or not (no_memory or should_reduce_batch_size(error)):
                    raise
            else:
                waiting = waiting[len(indices) :]
                bar.update(len(indices))
                continue
            # Not in the handler, whose error holds the tensors of the batch that did not fit.
            # (accelerate's find_executable_batch_size would empty the device's cache every time.)
            batch_size = len(indices) // 2
            logger.warning(
                "%s: %d examples at a time, for lack of memory", progress or "loss", batch_size
            )
            clear_device_cache(garbage_collection=True)


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
