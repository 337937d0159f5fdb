"""Writes the losses of each step into the journal; on resume feeds them back in place of passes.

A resumed run is the Trainer's own loop, from the newest checkpoint or from the beginning. As long
as the journal has its steps, losses and dev metrics come from there. Batches, schedules, the log
and checkpoints are what they are without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerState

from hizoo import HiZOO
from training.journal import JournalFile
from training.optimizers import trained_weights
from training.processes import check_agreement
from training.rows import VERSION, Checksum, Group, Header, Row, Step
from utils import InputError
from zeroth_order import noise
from zeroth_order.blocks import in_order

logger = logging.getLogger(__name__)
Closure = Callable[[], Any]
SomeRow = TypeVar("SomeRow", bound=Row)

# Numbers that a checksum takes at a time.
PIECE = 1 << 20
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ODD = 0x9E3779B97F4A7C15 - (1 << 64)
ANOTHER_FOLDER = "give another --output_dir, or --overwrite_output_dir to start anew"


def checksum_of(tensors: Iterable[Tensor]) -> str:
    """Return 64 bits of tensors, in their order: one number that differs always changes them.

    It is the sum, modulo 2**64, of a hash of each number's bits and index; the order in which a
    device adds does not matter.
    """
    checksum = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        for start in range(0, len(flat), PIECE):
            bits = flat[start : start + PIECE].to(torch.int64, copy=True)
            index = torch.arange(start, start + len(bits), device=flat.device)
            bits.mul_((index * ODD).bitwise_or_(1))
            # High bits would stay high.
            total += bits.bitwise_xor_(bits >> 32).mul_(ODD).sum()
        checksum = noise.mix_seed(checksum, int(total))
    return f"{checksum:016x}"


def checksum_of_trained(model: nn.Module) -> str:
    """Return the checksum of the weights that are trained."""
    return checksum_of(in_order(model, trained_weights(model).values()))


@dataclass(frozen=True)
class Replay:
    """What a run takes from its journal: the rows behind the checkpoint that it resumes from."""

    rows: Sequence[Row] = ()
    # The byte behind which the journal is continued; None: a new one is begun.
    begins_at: int | None = None
    # The checksum of the weights before the first of the rows, None if not known.
    start: str | None = None

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return sum(isinstance(row, Step) for row in self.rows)


class Recording:
    """Writes the journal of a run, and replays what is in it.

    Without a path nothing is written. The first process writes for all.

    Args:
        path: of the journal.
        header: fields of ``Header`` that the trainer does not know: ``model``, ``settings`` and
            ``versions``.
        replay: what is in the journal already.
        check_every: steps between two checksums of the weights.
    """

    def __init__(
        self,
        path: Path | None = None,
        header: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
        check_every: int = 1000,
    ) -> None:
        self.path, self.header, self.replay = path, header or {}, replay or Replay()
        self.check_every = check_every
        self.file: JournalFile | None = None
        self._rows = {(type(row), row.step): row for row in self.replay.rows}
        self._step = -1
        self._recorded: Step | None = None
        self._losses: list[tuple[float, ...]] = []
        self._weights: list[float] = []

    def take(self, kind: type[SomeRow], step: int) -> SomeRow | None:
        """Return the row of a kind when so many steps are done, once; None if there is none."""
        return self._rows.pop((kind, step), None)

    def write(self, row: Row) -> None:
        """Append a row, where this process writes."""
        if self.file is not None:
            self.file.add(row)

    # ---- a step

    def step(self, step: int) -> Step | None:
        """Return the row of the step that is done now, None if it is not in the journal."""
        if step != self._step:
            self._step, self._losses, self._weights = step, [], []
            self._recorded = self.take(Step, step)
        return self._recorded

    def of_batch(self, closure: Closure) -> Closure:
        """Return what computes the losses of the step's next batch, or takes them back.

        Raises:
            InputError: the recorded step has fewer batches.
        """
        if self._recorded is None:
            return closure
        batch = len(self._losses)
        if batch == len(self._recorded.losses):
            raise self._unfit()
        return replayed(self._recorded.losses[batch])

    def note(self, losses: Sequence[float], weight: float) -> None:
        """Take the losses of a batch, and what it counts beside others of the step."""
        self._losses.append(tuple(losses))
        self._weights.append(weight)

    def write_step(self, optimizer: HiZOO) -> None:
        """Write the step, just before the update; a replayed one takes its η from there.

        Raises:
            InputError: what is recorded is not a step of this run.
        """
        if self._recorded is not None:
            if [*map(len, self._losses)] != [*map(len, self._recorded.losses)]:
                raise self._unfit()
            for group in optimizer.param_groups:
                group["lr"] = self._recorded.lr
            return
        group = optimizer.param_groups[0]
        g, c, eta = optimizer.pending()
        lr, alpha = float(group["lr"]), float(group["hessian_smooth"])
        losses, weights = tuple(self._losses), tuple(self._weights)
        self.write(Step(self._step, lr, alpha, losses, weights, g, c, eta))

    def _unfit(self) -> InputError:
        return InputError(
            f"{self.path}: step {self._step} has other batches or losses than this run takes; "
            f"{ANOTHER_FOLDER}"
        )

    # ---- the course of a run

    def begin(
        self, model: nn.Module, optimizer: HiZOO, groups: tuple[Group, ...], state: TrainerState
    ) -> None:
        """Check that the weights are those that the journal begins with, and open it.

        Raises:
            InputError: they are not.
        """
        if self.path is None:
            return
        start = checksum_of_trained(model)
        if self.replay.rows and self.replay.start not in (None, start):
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
            self.file = JournalFile(self.path, header, self.replay.begins_at)

    def end_step(self, model: nn.Module, state: TrainerState) -> None:
        """Write a checksum of the weights now and then, or compare with the one that is there.

        Raises:
            Disagreement: another process has other weights.
        """
        step = state.global_step
        if not self.path or (step % self.check_every and step < state.max_steps):
            return
        recorded, checksum = self.take(Checksum, step), checksum_of_trained(model)
        check_agreement(checksum, step)
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
