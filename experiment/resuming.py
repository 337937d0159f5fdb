"""What a run goes on from: a checkpoint, its journal, or both."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel

from experiment.options import Options
from language_model.saved_adapters import sums_of_weights
from training.checkpoints import (
    check_settings,
    find_checkpoint,
    from_first_process,
    read_trainer_state,
)
from training.journal import FILE, Journal, read_journal
from training.recording import Recording, Replay
from utils import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: what it loads; None: the pre-trained weights.
        journal: its journal.
        replay: the steps that come from the journal, then.
    """

    checkpoint: Path | None = None
    journal: Path | None = None
    replay: Replay = field(default_factory=Replay)

    @property
    def source(self) -> str | None:
        """What the run goes on from, by its name; None if it begins anew."""
        source = self.checkpoint or (self.journal if self.replay.steps else None)
        return str(source) if source else None

    def lines(self) -> list[str]:
        """Return it in words; none where the run begins anew."""
        steps = f"{self.replay.steps:,} steps of {self.journal}"
        if self.checkpoint:
            behind = f", and {steps}" if self.replay.steps else ""
            return [f"going on from {self.checkpoint}{behind}"]
        return [f"going on from {steps}"] if self.replay.steps else []


def find_start(
    options: Options,
    output_dir: Path,
    model: PreTrainedModel | PeftModel,
    has_result: bool,
) -> Start:
    """Return what a run goes on from, checked; an empty ``Start`` to begin anew.

    Raises:
        InputError: what is there, or what is asked for, does not belong to this run.
    """
    if options.weights.mode == "linear_probing":
        return Start()
    settings, length = options.identity.of_checkpoint, options.identity.length
    wanted, overwrite = options.files.resume_from, options.files.overwrite
    file, is_zo = output_dir / FILE, options.training.zeroth_order is not None
    journal = journal_of_first_process(file) if is_zo else None
    checkpoint = find_checkpoint(
        output_dir,
        model,
        settings,
        length=length,
        wanted=wanted,
        overwrite=overwrite,
        has_result=has_result,
        has_journal=journal is not None,
    )
    if not is_zo:
        return Start(checkpoint)
    if journal is None or (wanted and wanted.lower() == "false"):
        return Start(checkpoint, file)
    its_settings = journal.header["settings"]
    if wanted and wanted.lower() != "true":
        # Who names a checkpoint wants to go on from there.
        belongs = its_settings == {**its_settings, **settings}
        end = journal.end_of(read_trainer_state(checkpoint)["global_step"])
        replay = Replay(begins_at=end, before=journal.step_before(end)) if belongs else Replay()
        return Start(checkpoint, file, replay)
    if overwrite and not checkpoint:
        is_done = has_result and journal.steps >= journal.header["max_steps"]
        if is_done or its_settings != {**settings, **length}:
            return Start(None, file)
    if its_settings != {**its_settings, **settings}:
        if checkpoint is None:
            check_settings(file, its_settings, settings)
        return Start(checkpoint, file)
    return Start(checkpoint, file, replay_of(journal, checkpoint, length.get("max_steps")))


def replay_of(journal: Journal, checkpoint: Path | None, max_steps: float | None) -> Replay:
    """Return what a journal has behind a checkpoint, or behind the pre-trained weights.

    Raises:
        InputError: it has more than ``max_steps`` steps.
    """
    step = read_trainer_state(checkpoint)["global_step"] if checkpoint else 0
    first = journal.header["first_step"]
    if step < first:
        _warn(f"{journal.path} begins with step {first}, whose checkpoint is gone: it begins anew")
        return Replay()
    records, end = journal.after(step)
    start = journal.header["start"] if step == first else None
    found = Replay(records, end, start, journal.step_before(end))
    lost = journal.steps - step - found.steps
    if lost > 0:
        _warn(f"{journal.path} is damaged: {lost:,} of its steps are computed again")
    if max_steps and found.steps and step + found.steps > max_steps:
        raise InputError(
            f"{journal.path} has more than --max_steps {max_steps}: give another --output_dir, or "
            "--overwrite_output_dir to start anew"
        )
    return found


def recording_of(options: Options, start: Start) -> Recording | None:
    """Return what writes a run's journal, and replays it; None where there is none."""
    if start.journal is None:
        return None
    header: dict[str, Any] = {}
    if start.replay.begins_at is None and PartialState().is_main_process:
        name = options.model.name
        header = {
            "model": {"name": name, "sha256": sums_of_weights(name)},
            "settings": {**options.identity.of_checkpoint, **options.identity.length},
            "versions": {"torch": torch.__version__},
        }
    return Recording(start.journal, header, start.replay, options.training.check_every)


def journal_of_first_process(path: Path) -> Journal | None:
    """Return the journal that the first process finds.

    Raises:
        InputError: in all processes, where it cannot be read.
    """

    def read() -> Journal | str | None:
        try:
            return read_journal(path)
        except InputError as error:
            return str(error)

    found = from_first_process(read)
    if isinstance(found, str):
        raise InputError(f"{found}; give another --output_dir, or remove it")
    return found


def _warn(line: str) -> None:
    if PartialState().is_main_process:
        logger.warning(line)
