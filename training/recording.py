"""Writes the losses of each step into the journal; on resume feeds them back in place of passes.

A resumed run is the Trainer's own loop, from the newest checkpoint or from the beginning. As long
as the journal has its steps, losses come from there. Batches, schedules, dev losses, the log and
checkpoints are what they are without it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerState

from hizoo import HiZOO
from training.journal import VERSION, Checksum, Group, Header, JournalFile, Row, Step
from training.optimizers import trained_weights
from utils import InputError
from zeroth_order import noise
from zeroth_order.blocks import blocks_of

logger = logging.getLogger(__name__)
Closure = Callable[[], Any]
Batch = tuple[Closure, float]  # returns its loss; what it counts beside the others
SomeRow = TypeVar("SomeRow", bound=Row)

# Steps between two checksums of the weights.
CHECK_EVERY = 1000
ANOTHER_FOLDER = "give another --output_dir, or --overwrite_output_dir to start anew"


def checksum_of(tensors: Iterable[Tensor]) -> str:
    """Return 64 bits of the SHA-256 of tensors' bytes, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:16]


def checksum_of_weights(model: nn.Module, weights: Iterable[nn.Parameter]) -> str:
    """Return the checksum of some weights; streamed ones are read once until they are updated."""
    blocks, weights = blocks_of(model), [*weights]
    key = tuple(map(id, weights))
    # An adapter's weights may be loaded without the blocks' knowledge.
    if not blocks or blocks.block_of.keys().isdisjoint(weights):
        return checksum_of(weights)
    if key not in blocks.checksums:
        blocks.checksums[key] = checksum_of(blocks.in_order(weights))
    return blocks.checksums[key]


def checksum_of_trained(model: nn.Module) -> str:
    """Return the checksum of the weights that are trained."""
    return checksum_of_weights(model, trained_weights(model).values())


class Recording:
    """Writes the journal of a run, and replays what is in it; the first process writes for all.

    Args:
        path: of the journal; None: nothing is written.
        rows: of the journal, behind the checkpoint that the run resumes from.
        begins_at: the byte behind which the journal is continued; None: a new one is begun.
        start: the checksum of the weights before the first of ``rows``, None if not known.
    """

    def __init__(
        self,
        path: Path | None = None,
        rows: Sequence[Row] = (),
        begins_at: int | None = None,
        start: str | None = None,
    ) -> None:
        self.path, self.begins_at, self.start = path, begins_at, start
        self.header: Mapping[str, Any] = {}  # what the trainer does not know: model and settings
        self.replayed_steps = sum(isinstance(row, Step) for row in rows)
        self.file: JournalFile | None = None
        self._rows = {(type(row), row.step): row for row in rows}
        # Of the step under way.
        self._step, self._weights = -1, ()
        self._recorded: Step | None = None

    def take(self, kind: type[SomeRow], step: int) -> SomeRow | None:
        """Return the row of a kind when so many steps are done, once; None if there is none."""
        return self._rows.pop((kind, step), None)

    def write(self, row: Row) -> None:
        """Append a row, where this process writes."""
        if self.file is not None:
            self.file.add(row)

    # ---- a step

    def of_batches(self, step: int, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the batches of a step; those of a recorded one return the losses in the journal.

        Here and in ``write_step`` InputError says that the recorded step is none of this run.
        """
        self._step, self._recorded = step, self.take(Step, step)
        self._weights = tuple(weight for _, weight in batches)
        if self._recorded is None:
            return batches
        if len(batches) != len(self._recorded.losses):
            raise self._unfit()
        return [*zip(map(replayed, self._recorded.losses), self._weights, strict=True)]

    def write_step(self, optimizer: HiZOO) -> None:
        """Write the step, just before the update; a replayed one takes its η from there."""
        losses = tuple(map(tuple, optimizer.losses))
        if self._recorded is not None:
            if [*map(len, losses)] != [*map(len, self._recorded.losses)]:
                raise self._unfit()
            for group in optimizer.param_groups:
                group["lr"] = self._recorded.lr
            return
        group = optimizer.param_groups[0]
        g, c, eta = optimizer.pending()
        self.write(Step(self._step, float(group["lr"]), losses, self._weights, g, c, eta))

    def _unfit(self) -> InputError:
        return InputError(
            f"{self.path}: step {self._step} has other batches or losses than this run takes; "
            f"{ANOTHER_FOLDER}"
        )

    # ---- the course of a run

    def begin(
        self, model: nn.Module, optimizer: HiZOO, groups: tuple[Group, ...], state: TrainerState
    ) -> None:
        """Open the journal; raises InputError if it begins with other weights."""
        if self.path is None:
            return
        start = checksum_of_trained(model)
        if self._rows and self.start not in (None, start):
            raise InputError(
                f"{self.path} begins with other weights: another model, adapter or version of the "
                f"libraries; {ANOTHER_FOLDER}"
            )
        if state.is_world_process_zero:
            header = Header(
                version=VERSION,
                noise=noise.VERSION,
                step=state.global_step,
                max_steps=state.max_steps,
                start=start,
                groups=groups,
                layerwise=optimizer.layers is not None,
                optimizer=optimizer.config,
                **self.header,
            )
            self.file = JournalFile(self.path, header, self.begins_at)

    def end_step(self, model: nn.Module, state: TrainerState) -> None:
        """Write a checksum of the weights now and then, or compare with the one that is there."""
        step = state.global_step
        if not self.path or (step % CHECK_EVERY and step < state.max_steps):
            return
        recorded, checksum = self.take(Checksum, step), checksum_of_trained(model)
        if recorded is None:
            self.write(Checksum(step, checksum))
        elif recorded.checksum != checksum:
            logger.warning(
                "after step %d of %s the weights are not, bit for bit, those of the run: another "
                "device, or another version of the libraries",
                step,
                self.path,
            )


def replayed(losses: Sequence[float]) -> Closure:
    """Return a closure that returns one recorded loss at each call.

    The first step of a run calls it once more than it has losses.
    """
    values = iter(losses)
    return lambda: next(values, losses[-1])
