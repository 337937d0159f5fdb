"""Several processes of one run: how they meet, agree, and share a zeroth-order step.

Every process has the same weights and makes the same noise, so they exchange losses only. The
batches are those of one process, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from utils import InputError, Lost, NotWritten, one_line

Value = TypeVar("Value")

# The key of a padding batch: a borrowed example with weight 0.
BORROWED = "borrowed"


def join(cpu: bool, backend: str | None, seconds: int) -> None:
    """Wait for all processes that torchrun or srun has started; nothing where there is one.

    Raises:
        Lost: one of the others does not come, or this process is one too many.
    """
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if rank.isdecimal() and world.isdecimal() and int(rank) >= int(world):
        raise Lost(f"there are {world} processes (WORLD_SIZE), numbered from 0 (RANK)")
    if cpu and "LOCAL_RANK" in os.environ:
        # transformers hands --ddp_timeout on where there are GPUs only.
        with naming_lost_processes(seconds):
            PartialState(cpu=True, backend=backend, timeout=timedelta(seconds=seconds))


@contextlib.contextmanager
def naming_lost_processes(seconds: int) -> Iterator[None]:
    """Raise ``Lost``, which is one line, where torch finds that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        text = one_line(error)
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in text:
            raise
        # Without the line of C++, and what it thinks of the cause.
        text = text.split("] ", 1)[-1].split(". ")[0]
        if "timed out" in text.lower() or "timeout" in text.lower():
            reason = f"another process did not answer for {seconds} seconds (--ddp_timeout)"
        else:
            reason = f"another process has ended, its own last lines may say why ({text})"
        raise Lost(f"{reason}; the same command resumes") from error


def check_same(settings: Mapping[str, Any]) -> None:
    """Compare settings between the processes.

    Raises:
        InputError: in all processes; names what differs first.
    """
    of_all = gather_object([dict(settings)])
    for name in of_all[0]:
        values = [str(each.get(name)) for each in of_all]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise InputError(
                f"processes of one run differ: {name} is {values[0]} in rank 0 and "
                f"{values[other]} in rank {other}; give all of them the same command"
            )


def in_all_processes(do: Callable[[], Value]) -> Value:
    """Do something in every process; where one cannot, all of them raise its error.

    Raises:
        InputError, NotWritten: of the first process that raises one.
    """
    value = failure = None
    try:
        value = do()
    except (InputError, NotWritten) as error:
        failure = error
    failures = [each for each in gather_object([failure]) if each is not None]
    if failures:
        raise failures[0]
    return value


def from_first_process(compute: Callable[[], Value]) -> Value:
    """Return in every process what the first one computes.

    Raises:
        InputError, NotWritten: of the first process, in all of them.
    """
    is_first = PartialState().is_main_process
    value = in_all_processes(lambda: compute() if is_first else None)
    return broadcast_object_list([value])[0]


def own_part(collate: Callable[[list[Any]], dict[str, Any]], examples: list[Any]) -> dict[str, Any]:
    """Collate this process's part of a batch; parts differ by one example at most."""
    state = PartialState()
    own = (state.process_index, state.process_index + 1)
    start, end = (len(examples) * i // state.num_processes for i in own)
    if start == end:
        return collate(examples[:1]) | {BORROWED: True}
    return collate(examples[start:end])


def see_every_batch(loader: DataLoader) -> DataLoader:
    """Let each process see all batches of a loader, which accelerate would deal out."""
    sampler = loader.batch_sampler
    if hasattr(sampler, "process_index"):
        sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
    return loader


def rows_of_all(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the rows of all processes' matrices, in the order of the processes."""
    if PartialState().num_processes == 1:
        return tensor
    counts = gather_object([len(tensor)])
    padded = tensor.new_zeros(max(counts), tensor.shape[1]).to(device)
    padded[: len(tensor)] = tensor
    of_all = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(of_all, padded)
    return torch.cat([rows[:count] for rows, count in zip(of_all, counts, strict=True)])
