"""Examples in batches of like length, smaller ones where memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from utils import process_index

logger = logging.getLogger(__name__)


def run_in_batches(
    function: Callable[[list[int]], None],
    count: int,
    length: Callable[[int], int],
    batch_size: int,
    progress: str | None,
) -> None:
    """Call ``function`` with the numbers below ``count`` in batches, the longest examples first.

    So little is padded. A batch that does not fit into memory is halved until it does; what is done
    is not done again. Shows a progress bar on a terminal, unless ``progress`` is None.
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
            # Not in the handler, whose error holds the tensors of the batch that did not fit.
            # (accelerate's find_executable_batch_size would empty the device's cache every time.)
            batch_size = len(indices) // 2
            logger.warning(
                "%s: %d examples at a time, for lack of memory", progress or "loss", batch_size
            )
            clear_device_cache(garbage_collection=True)


def is_lack_of_memory(error: Exception) -> bool:
    """Tell whether a smaller batch might fit."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or should_reduce_batch_size(error)
