"""What streamed weights take (``--dry_run``): bytes that a step moves, disk space and memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from language_model.streaming import Offload
from utils import InputError
from zeroth_order.block_file import NoRoom, free_bytes
from zeroth_order.blocks import NoBlocks, block_modules, streamed_parameters
from zeroth_order.traffic import BUFFERS


@dataclass(frozen=True)
class OffloadPlan:
    """Bytes that streamed weights take.

    Attributes:
        blocks: how many there are.
        largest: the largest one, with its h.
        read, written: what a step with one batch moves.
        on_disk: the working file; None: there is none.
        in_memory: buffers, blocks that stay, and the weights outside of blocks, with their h.
    """

    blocks: int
    largest: int
    read: int
    written: int
    on_disk: int | None
    in_memory: int
    trains: bool

    def line(self) -> str:
        """Return the plan in words."""
        mib = {name: f"{(value or 0) / 2**20:,.0f} MiB" for name, value in vars(self).items()}
        moved = f"a forward pass reads {mib['read']}"
        if self.trains:
            moved = f"a step reads {mib['read']} and writes {mib['written']}"
        disk = "" if self.on_disk is None else f", {mib['on_disk']} on disk"
        largest = f"{self.blocks} blocks, the largest {mib['largest']}"
        return f"{largest}; {moved}; {mib['in_memory']} in memory{disk}"


def streamed_by_block(model: nn.Module) -> list[set[Tensor]]:
    """Return the parameters of each block of a model without an adapter.

    Raises:
        InputError: it cannot be streamed.
    """
    try:
        return [streamed_parameters(block, model) for block in block_modules(model)]
    except NoBlocks as error:
        raise InputError(f"--offload: {error}; leave it out") from error


def plan_of_offload(
    streamed: Sequence[Collection[Tensor]],
    model: nn.Module,
    offload: Offload,
    hessians: Mapping[Tensor, int],
    trains: bool,
) -> OffloadPlan:
    """Return what it takes to stream a model.

    Args:
        streamed: the parameters of each block.
        model: with its adapter, and with what is trained.
        offload: where blocks lie.
        hessians: the bytes of a number of h, of parameters that have a full one.
        trains: whether there is a training.

    Raises:
        InputError: the disk has no room.
    """
    sizes = [sum(_sizes(parameters, hessians)) for parameters in streamed]
    writes = trains and any(p.requires_grad for parameters in streamed for p in parameters)
    room, far = offload.memory, []
    for size in sizes:
        if size <= room:
            room -= size
        else:
            far.append(size)
    stays = offload.folder is None and offload.device.type == "cpu"
    far = [] if stays else far
    inside = {p for parameters in streamed for p in parameters}
    outside = sum(_sizes({p for p in model.parameters() if p not in inside}, hessians))
    buffers = min(BUFFERS, len(far)) * max(far, default=0) + max(sizes) * writes
    on_disk = sum(far) if offload.folder and writes else None
    if on_disk and free_bytes(offload.folder) < on_disk:
        reason = NoRoom.of(offload.folder, on_disk)
        raise InputError(f"--offload disk: {reason}; give another --offload_dir")
    return OffloadPlan(
        len(streamed),
        max(sizes),
        sum(far),
        sum(far) * writes,
        on_disk,
        outside + buffers + sum(sizes) - (0 if stays else sum(far)),
        trains,
    )


def _sizes(parameters: Iterable[Tensor], hessians: Mapping[Tensor, int]) -> Iterator[int]:
    """Yield the bytes of parameters, each with its h."""
    for parameter in parameters:
        yield parameter.numel() * (parameter.element_size() + hessians.get(parameter, 0))
