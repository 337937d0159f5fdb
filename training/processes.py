"""How processes share a zeroth-order step: its batch, or its directions.

Every process has the same weights and makes the same noise, so they exchange losses only. The
batches are those of one process, whatever the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from utils import Disagreement, InputError

Value = TypeVar("Value")
# Where a loss is taken: a direction and a multiple of μ; None: at θ.
Shift = tuple[int, float] | None

# The key of a padding batch: a borrowed example with weight 0.
BORROWED = "borrowed"


def own_part(collate: Callable[[list[Any]], dict[str, Any]], examples: list[Any]) -> dict[str, Any]:
    """Collate this process's part of a batch; parts differ by one example at most."""
    state = PartialState()
    bounds = [len(examples) * i // state.num_processes for i in range(state.num_processes + 1)]
    start, end = bounds[state.process_index : state.process_index + 2]
    if start == end:
        return collate(examples[:1]) | {BORROWED: True}
    return collate(examples[start:end])


def see_every_batch(loader: DataLoader) -> DataLoader:
    """Let each process see all batches of a loader, which accelerate would deal out."""
    sampler = loader.batch_sampler
    if hasattr(sampler, "process_index"):
        sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
    return loader


def from_first_process(compute: Callable[[], Value]) -> Value:
    """Return in every process what the first one computes, or raise its ``InputError``."""
    value, refusal = None, None
    if PartialState().is_main_process:
        try:
            value = compute()
        except InputError as error:
            refusal = str(error)
    value, refusal = broadcast_object_list([value, refusal])
    if refusal is not None:
        raise InputError(refusal)
    return value


class Exchange:
    """Sums over the processes, and counts the bytes that each of them has sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors."""
        if PartialState().num_processes > 1:
            tensor = tensor.to(self.device, copy=True)
            torch.distributed.all_reduce(tensor)
            self.bytes += tensor.nbytes
        return tensor


class SharedDirections:
    """Deals a step's directions out to the processes; ``HiZOO.shares``."""

    def __init__(self, directions: int, exchange: Exchange) -> None:
        self.directions, self.exchange = directions, exchange

    def owns(self, shift: Shift) -> bool:
        """Whether this process runs the forward pass at a shift."""
        state = PartialState()
        # A process with fewer directions than others, if there is one, takes θ.
        direction = self.directions if shift is None else shift[0]
        return direction % state.num_processes == state.process_index

    def exchanged(self, losses: dict[Shift, float]) -> dict[Shift, float]:
        """Return the losses of all processes, bit for bit as they were computed."""
        own = [float(loss) if self.owns(shift) else 0.0 for shift, loss in losses.items()]
        of_all = self.exchange.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        return dict(zip(losses, of_all, strict=True))


def check_agreement(checksum: str, step: int) -> None:
    """Compare the checksum of the weights between the processes.

    Raises:
        Disagreement: in all processes; names those whose weights are not the most frequent.
    """
    if PartialState().num_processes == 1:
        return
    found = gather_object([checksum])
    (usual, count), *others = Counter(found).most_common()
    if others:
        ranks = [str(rank) for rank, value in enumerate(found) if value != usual or count == 1]
        raise Disagreement(
            f"after step {step} the weights of rank {', '.join(ranks)} differ from the others "
            "(a fault of the machine, or devices that round differently); the same command "
            "resumes from the last checkpoint and the journal"
        )
