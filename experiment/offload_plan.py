"""What streamed weights take (``--dry_run``): bytes that a step moves, disk space and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from language_model.streaming import Offload
from utils import InputError
from zeroth_order.block_file import NoRoom, free_bytes
from zeroth_order.blocks import Blocks
from zeroth_order.traffic import BUFFERS, DISK, HOST


@dataclass(frozen=True)
class OffloadPlan:
    """Bytes that streamed weights take.

    Attributes:
        blocks: how many there are.
        largest: the largest one, with its h.
        read, written: what a step moves.
        on_disk: the working file; None: there is none.
        in_memory: buffers, perturbed copies, and with their h blocks that stay and other weights.
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


def plan_of_offload(
    blocks: Blocks,
    model: nn.Module,
    offload: Offload,
    states: Mapping[Tensor, tuple[str, torch.dtype]],
    trains: bool,
) -> OffloadPlan:
    """Return what it takes to stream a model.

    Args:
        blocks: of the model, on the meta device.
        model: with its adapter, and with what is trained.
        offload: where blocks lie.
        states: names and dtypes of the full h of parameters that have one.
        trains: whether there is a training.

    Raises:
        InputError: the disk has no room.
    """
    with torch.device("meta"):  # buffers take no memory
        blocks.lay_out(states)
    sizes = [block.region.size for block in blocks.blocks]
    home = DISK if offload.folder else HOST
    far = [block.region.size for block in blocks.blocks if block.home == home]
    writes = trains and any(p.requires_grad for p in blocks.block_of)
    inside = {p for block in blocks.blocks for p in block.module.parameters()}
    outside = [p for p in model.parameters() if p not in inside]
    resident = [p for p in model.parameters() if p not in blocks.block_of]
    kept = sum(p.nbytes for p in resident)
    kept += sum(p.numel() * states[p][1].itemsize for p in resident if p in states)
    # Perturbed copies are of a whole block, and of one weight outside of blocks.
    copies = max(_trained_bytes(block.module.parameters()) for block in blocks.blocks)
    copies += max((_trained_bytes([p]) for p in outside), default=0)
    buffers = min(BUFFERS, len(far)) * max(far, default=0)
    on_disk = blocks.traffic.size_on_disk(blocks.blocks) if offload.folder and writes else None
    if on_disk and free_bytes(offload.folder) < on_disk:
        reason = NoRoom.of(offload.folder, on_disk)
        raise InputError(f"--offload disk: {reason}; give another --offload_dir")
    return OffloadPlan(
        len(sizes),
        max(sizes),
        sum(far),
        sum(far) * writes,
        on_disk,
        kept + buffers + copies * trains + sum(sizes) - sum(far),
        trains,
    )


def _trained_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.nbytes for p in parameters if p.requires_grad)
