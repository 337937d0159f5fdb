"""Examples in batches of like length, smaller ones where memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


def run_in_batches(
    function: Callable[[list[int]], None],
    count: int,
    length: Callable[[int], int],
    batch_size: int,
    progress: str | None,
) -> None:
    """Call ``function`` with the numbers below ``count`` in batches, the longest examples first.

    So little is padded. A batch that does not fit into memory is halved until it does. Shows a
    progress bar with examples per second on a terminal, in one process, unless ``progress`` is
    None.
    """
    waiting = sorted(range(count), key=length, reverse=True)
    # None: tqdm hides the bar where there is no terminal.
    hidden = True if progress is None or process_index() > 0 else None
    with tqdm(total=count, desc=progress, unit="example", leave=False, disable=hidden) as bar:
        while waiting:
            indices = waiting[:batch_size]
            try:
                function(indices)
            except (RuntimeError, MemoryError) as error:
                if len(indices) == 1 or not is_lack_of_memory(error):
                    raise
            else:
                waiting = waiting[len(indices) :]
                bar.update(len(indices))
                continue
            # Only here does the error no longer hold the tensors of the batch that did not fit.
            batch_size = len(indices) // 2
            logger.warning(
                "%s: %d examples at a time, for lack of memory", progress or "loss", batch_size
            )
            clear_device_cache(garbage_collection=True)


def is_lack_of_memory(error: Exception) -> bool:
    """Tell whether a smaller batch might go through."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(
        error
    )


def process_index() -> int:
    """Return this process's number among those that ``torchrun`` started, 0 alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
