"""How processes share a zeroth-order step: its batch, or its directions; what they exchange.

Every process has the same weights and makes the same noise, so that losses are all that they have
to tell one another. The batches are those of one process, whatever the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from hizoo import Losses, Point
from utils import Disagreement

# The key of a batch that has no example for this process: one of another's stands in, and counts 0.
NOTHING = "nothing"
WAYS = ("batch", "directions")


def own_part(collate: Callable[[list[Any]], dict[str, Any]], examples: list[Any]) -> dict[str, Any]:
    """Collate this process's part of a batch: as many examples as the others', or one more."""
    state = PartialState()
    bounds = [len(examples) * i // state.num_processes for i in range(state.num_processes + 1)]
    start, end = bounds[state.process_index : state.process_index + 2]
    if start == end:
        return collate(examples[:1]) | {NOTHING: True}
    return collate(examples[start:end])


def let_all_have_every_batch(loader: DataLoader) -> DataLoader:
    """Let each process have all batches of a loader, which accelerate would deal out."""
    sampler = loader.batch_sampler
    if hasattr(sampler, "process_index"):
        sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
    return loader


class Exchange:
    """Sums over the processes, and how many bytes each of them has sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors; one process has nothing to exchange."""
        if PartialState().num_processes > 1:
            tensor = tensor.to(self.device, copy=True)
            torch.distributed.all_reduce(tensor)
            self.bytes += tensor.nbytes
        return tensor

    def of_first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor in all of them; it alone sends something."""
        state = PartialState()
        if state.num_processes > 1:
            tensor = tensor.to(self.device, copy=True)
            torch.distributed.broadcast(tensor, 0)
            self.bytes += tensor.nbytes if state.process_index == 0 else 0
        return tensor


class SharedDirections:
    """Some of a step's directions for each process, for ``HiZOO.shares``.

    Args:
        directions: of a step.
        exchange: with the other processes.
        knows_all: whether the losses are known without any process's forward passes.
        note: called with the losses of a batch, in the order in which they are asked for.
    """

    def __init__(
        self,
        directions: int,
        exchange: Exchange,
        knows_all: Callable[[], bool],
        note: Callable[[Sequence[Losses]], None],
    ) -> None:
        self.directions, self.exchange = directions, exchange
        self.knows_all, self.note = knows_all, note

    def owns(self, point: Point | None) -> bool:
        """Whether this process runs the forward pass at a point, None for θ itself."""
        state = PartialState()
        # The process with the fewest directions, if not all have as many, takes θ.
        direction = self.directions if point is None else point[0]
        return self.knows_all() or direction % state.num_processes == state.process_index

    def exchanged(self, losses: dict[Point | None, Losses]) -> dict[Point | None, Losses]:
        """Return the losses of all processes, bit for bit as they computed them."""
        if self.knows_all():
            return losses
        own = [float(loss) if self.owns(point) else 0.0 for point, loss in losses.items()]
        of_all = self.exchange.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        self.note(of_all)
        return dict(zip(losses, of_all, strict=True))


def check_agreement(checksum: int, step: int) -> None:
    """Compare a checksum of the weights between the processes.

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
            f"after step {step} the weights of rank {', '.join(ranks)} are not those of the others "
            "(a fault of the machine, or devices that round differently); the same command goes "
            "on from the last checkpoint and the journal"
        )
