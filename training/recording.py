"""What a zeroth-order run writes into its journal, and what it takes from there again.

A run that goes on is the Trainer's own loop from the newest checkpoint on, or from the beginning:
as long as the journal has its steps, the losses come from there in place of forward passes, and so
do the dev losses. Batches, schedules, the log and checkpoints are what they are without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hizoo import HiZOO, mix_seed
from language_model.tensor_parallel import Parts, parts_of, whole_shape
from training.journal import (
    Checksum,
    Estimate,
    Evaluation,
    JournalFile,
    Record,
    Settings,
    Step,
)
from training.processes import check_agreement
from utils import InputError

logger = logging.getLogger(__name__)
Closure = Callable[[], Any]
SomeRecord = TypeVar("SomeRecord", bound=Record)

# How u comes about, should that ever change.
NOISE = "hash of seed, step, direction, parameter and index, version 3"
# Numbers that a checksum takes at a time.
TILE = 1 << 20
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ODD = 0x9E3779B97F4A7C15 - (1 << 64)


def checksum_of(tensors: Iterable[Tensor], parts: Parts | None = None) -> int:
    """Return 64 bits of tensors, in their order: one number that differs always changes them.

    It is the sum, modulo 2**64, of a hash of each number's bits and its place; the order in which a
    device adds does not matter. With ``parts`` it is that of the wholes.
    """
    totals, are_parts = [], []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
        place = parts.places.get(tensor) if parts else None
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        for start in range(0, len(flat), TILE):
            bits = flat[start : start + TILE].to(torch.int64, copy=True)
            stop = start + len(bits)
            if place:
                places = place.index(tensor, start, stop)
            else:
                places = torch.arange(start, stop, device=flat.device)
            bits.mul_((places * ODD).bitwise_or_(1))
            # Bits of high places would stay there.
            total += bits.bitwise_xor_(bits >> 32).mul_(ODD).sum()
        totals.append(total.cpu())
        are_parts.append(place is not None)
    if parts and totals:
        own = torch.stack(totals)
        totals = torch.where(torch.tensor(are_parts), parts.sum(own), own).unbind()
    checksum = 0
    for total in totals:
        checksum = mix_seed(checksum, int(total))
    return checksum


def checksum_of_trained(model: nn.Module) -> int:
    """Return the checksum of the weights that are trained, whole ones; all processes call it."""
    return checksum_of(trained_weights(model).values(), parts_of(model))


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by their names."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass
class Replay:
    """What a run takes from its journal.

    Attributes:
        records: those behind the checkpoint that the run goes on from.
        begins_at: the byte behind which the journal goes on; None: a new one is begun.
        start: the checksum of the weights before the first of the records, None if not known.
        before: the step before what is written next, if the journal has it.
    """

    records: Sequence[Record] = ()
    begins_at: int | None = None
    start: int | None = None
    before: Step | None = None
    _position: int = field(default=0, init=False)

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return sum(isinstance(record, Step) for record in self.records)

    def take(self, kind: type[SomeRecord], step: int) -> SomeRecord | None:
        """Return the next record of a kind when so many steps are done, None if there is none.

        What lies before it is passed over, but no step.
        """
        for index in range(self._position, len(self.records)):
            record = self.records[index]
            if isinstance(record, kind) and record.step == step:
                self._position = index + 1
                return record
            if record.step > step or isinstance(record, Step):
                break
        return None


class Recording(TrainerCallback):
    """Writes the journal of a run, and replays what is in it.

    Without a path nothing is written. The first process writes for all.

    Args:
        path: of the journal.
        header: what the run is known by: its model and its settings.
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
        self.path, self.header = path, dict(header or {})
        self.replay = replay or Replay()
        self.check_every = check_every
        self.file: JournalFile | None = None
        # Whether a forward pass gives a loss for each of its examples.
        self.by_example = False
        self._step = -1
        self._recorded: Step | None = None
        self._estimates: list[Estimate] = []

    # ---- what the trainer asks for

    def step(self, step: int) -> Step | None:
        """Return the record of the step that is done now, None if it is not in the journal."""
        if step != self._step:
            self._step, self._estimates = step, []
            self._recorded = self.replay.take(Step, step)
        return self._recorded

    @property
    def is_replaying(self) -> bool:
        """Whether the journal has the step that is done now."""
        return self._recorded is not None

    def note(self, losses: Sequence[float]) -> None:
        """Take the losses of the batch that is done now, of other processes too."""
        passes = tuple((loss,) for loss in losses)
        self._estimates[-1] = Estimate(passes, self._estimates[-1].weight)

    def watched(self, closure: Closure, weight: float, is_told: bool = False) -> Closure:
        """Return a closure for one batch of the step: it notes the losses, or takes them back.

        Args:
            closure: computes a loss.
            weight: of the batch beside others of the step.
            is_told: whether ``note`` is called with all losses instead.
        """
        number = len(self._estimates)
        if self._recorded is not None:
            recorded = self._recorded.estimates[number]
            self._estimates.append(recorded)
            return replayed(recorded, self.by_example)
        passes: list[tuple[float, ...]] = []
        self._estimates.append(Estimate((), weight))
        if is_told:
            return closure

        def noted() -> Any:
            loss = closure()
            passes.append(tuple(loss.tolist()) if self.by_example else (float(loss),))
            self._estimates[number] = Estimate(tuple(passes), weight)
            return loss

        return noted

    def end_step(self, optimizer: HiZOO) -> None:
        """Write the step's record, just before the update; a replayed one has its η from there."""
        if self._recorded is None:
            group = optimizer.param_groups[0]
            rate, smoothing = float(group["lr"]), float(group["hessian_smooth"])
            self.write(Step(self._step, tuple(self._estimates), rate, smoothing))
        elif self._recorded.rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self._recorded.rate

    def scales(self) -> dict[str, Any] | None:
        """Return the μ that were chosen before the first step, if the journal has them."""
        recorded = self.replay.take(Settings, 0)
        return None if recorded is None else dict(recorded.values)

    def note_scales(self, chosen: dict[str, Any]) -> None:
        """Write the μ that were chosen before the first step."""
        self.write(Settings(0, chosen))

    def evaluation(self, step: int) -> dict[str, float] | None:
        """Return the dev metrics that are in the journal."""
        recorded = self.replay.take(Evaluation, step)
        return None if recorded is None else dict(recorded.metrics)

    def write(self, record: Record) -> None:
        """Append a record, where this process writes."""
        if self.file is not None:
            self.file.add(record)

    # ---- what the Trainer calls

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: HiZOO,
        **kwargs: Any,
    ) -> None:
        """Check that the weights are those that the journal begins with, and open it."""
        self.by_example = optimizer.directions is not None
        if self.path is None:
            return
        start = checksum_of_trained(model)
        if self.replay.records and self.replay.start not in (None, start):
            raise InputError(
                f"{self.path} begins with other weights: another model, adapter or version of the "
                "libraries; give another --output_dir, or --overwrite_output_dir to start anew"
            )
        if state.is_world_process_zero:
            header = self.header | described(model, optimizer)
            header |= {
                "first_step": state.global_step,
                "max_steps": state.max_steps,
                "start": start,
            }
            replay = self.replay
            self.file = JournalFile(self.path, header, replay.begins_at, replay.before)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Leave a checksum of the weights; those of all processes have to be the same."""
        step = state.global_step
        if step % self.check_every == 0 or step >= state.max_steps:
            self.leave_checksum(step, model)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Wait for the disk, as a checkpoint does."""
        if self.file is not None:
            self.file.sync()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the journal."""
        if self.file is not None:
            self.file.close()

    def leave_checksum(self, step: int, model: nn.Module) -> None:
        """Write a checksum of the weights, or compare with the one that is there."""
        if self.path is None:
            return
        recorded = self.replay.take(Checksum, step)
        checksum = checksum_of_trained(model)
        check_agreement(checksum, step)
        if recorded is None:
            self.write(Checksum(step, checksum))
        elif recorded.value != checksum:
            logger.warning(
                "the weights that %s gives after step %d are not, bit for bit, those of the run: "
                "another device, or another version of the libraries",
                self.path,
                step,
            )


def replayed(recorded: Estimate, by_example: bool) -> Closure:
    """Return a closure that gives recorded losses, one pass's at each call, or its examples'.

    The optimizer's first step takes its last loss a second time.
    """
    passes = iter(recorded.passes)

    def loss() -> Any:
        values = next(passes, recorded.passes[-1])
        return torch.tensor(values, dtype=torch.float64) if by_example else values[0]

    return loss


def described(model: nn.Module, optimizer: HiZOO) -> dict[str, Any]:
    """Return what a journal's header says about the weights and the optimizer."""
    trained = trained_weights(model)
    names = {id(parameter): name for name, parameter in trained.items()}
    kept = ("lr", "eps", "hessian_smooth", "weight_decay", "curvature_eps")
    groups = [
        {name: group[name] for name in kept}
        | {"parameters": [names[id(p)] for p in group["params"] if id(p) in names]}
        for group in optimizer.param_groups
    ]
    first = optimizer.param_groups[0]
    hessian_dtype = optimizer.hessian_dtype
    return {
        "rate": float(first["lr"]),
        "smoothing": float(first["hessian_smooth"]),
        "seed": first["seed"],
        "noise": NOISE,
        "parameters": {
            name: [short(parameter.dtype), *whole_shape(model, parameter)]
            for name, parameter in trained.items()
        },
        "tied": dict(getattr(model, "all_tied_weights_keys", None) or {}),
        "optimizer": {
            "hessian": optimizer.hessian,
            "hessian_dtype": None if hessian_dtype is None else short(hessian_dtype),
            "num_samples": optimizer.num_samples,
            "step_size": optimizer.step_size,
            "curvature_every": optimizer.curvature_every,
            "clip": optimizer.clip,
            "layerwise": optimizer.layers is not None,
            "by_example": optimizer.directions is not None,
            "normalize": optimizer.normalize,
            "groups": groups,
        },
    }


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without torch's."""
    return str(dtype).removeprefix("torch.")
