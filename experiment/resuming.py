"""Where a run begins: at a checkpoint, in its journal, or with the pre-trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedModel

from experiment.options import Options
from language_model.manifest import damage
from language_model.saved_adapters import sums_of_weights
from training.callbacks import run_state
from training.checkpoints import (
    ANOTHER,
    check_version,
    last_whole_checkpoint,
    read_trainer_state,
)
from training.journal import FILE, Journal, read_journal
from training.optimizers import shapes_of
from training.processes import from_first_process
from training.recording import ANOTHER_FOLDER, Recording, Replay
from utils import InputError
from zeroth_order import noise

logger = get_logger(__name__)  # of the first process
JOURNAL_OF_BEFORE = "journal.bin"


@dataclass(frozen=True)
class Start:
    """Where a run begins: a checkpoint or the pre-trained weights, then a replay of a journal."""

    checkpoint: Path | None = None
    journal: Path | None = None
    replay: Replay = field(default_factory=Replay)

    @property
    def source(self) -> str | None:
        """What the run resumes from, by its name; None if it begins anew."""
        source = self.checkpoint or (self.journal if self.replay.steps else None)
        return str(source) if source else None

    def lines(self) -> list[str]:
        """Return it in words; none where the run begins anew."""
        steps = [f"{self.replay.steps:,} steps of {self.journal}"] if self.replay.steps else []
        sources = [str(self.checkpoint)] if self.checkpoint else []
        return [f"resuming from {', and '.join(sources + steps)}"] if sources + steps else []


def find_start(
    options: Options,
    output_dir: Path,
    model: PreTrainedModel | PeftModel,
    has_result: bool,
) -> Start:
    """Return where a run begins; an empty ``Start`` to begin anew.

    Raises:
        InputError: what is there, or what is asked for, does not belong to this run.
    """
    if options.weights.mode == "linear_probing":
        return Start()
    is_zo = options.training.zeroth_order is not None
    file, wanted = output_dir / FILE, options.files.resume_from
    if wanted == "false":
        return Start(None, file if is_zo else None)
    journal = journal_of_first_process(file) if is_zo else None
    checkpoint = find_checkpoint(options, output_dir, model, has_result)
    if checkpoint is None and wanted == "true" and journal is None:
        raise InputError(f"--resume_from_checkpoint: no whole checkpoint in {output_dir}")
    if not is_zo:
        return Start(checkpoint)
    if journal is None:
        if (output_dir / JOURNAL_OF_BEFORE).exists() and not options.files.overwrite:
            raise InputError(
                f"{output_dir / JOURNAL_OF_BEFORE} is the journal of an earlier version, which "
                f"cannot be resumed; {ANOTHER_FOLDER}"
            )
        return Start(checkpoint, file)
    return Start(checkpoint, file, find_replay(options, journal, checkpoint, has_result))


def find_checkpoint(
    options: Options, output_dir: Path, model: PreTrainedModel | PeftModel, has_result: bool
) -> Path | None:
    """Return the checkpoint to resume from, checked; None: there is none, or it is not wanted.

    ``--overwrite_output_dir`` takes only one that the very same run began and did not finish.

    Raises:
        InputError: it is damaged, or belongs to another run.
    """
    wanted, identity = options.files.resume_from, options.identity
    if wanted in (None, "true"):
        checkpoint = last_whole_checkpoint(output_dir)
    else:
        checkpoint = Path(wanted)
        if reason := from_first_process(lambda: damage(checkpoint)):
            raise InputError(
                f"--resume_from_checkpoint {wanted} is damaged: {reason}; give another one, or "
                "leave it out to resume from the newest whole one"
            )
    if checkpoint is None:
        return None
    state = read_trainer_state(checkpoint)
    settings = run_state(state).get("settings", {})
    if options.files.overwrite and not wanted:
        is_done = has_result and state["global_step"] >= state["max_steps"]
        if is_done or settings != identity.of_run:
            return None
    check_settings(checkpoint, settings, identity.of_checkpoint)
    check_model(checkpoint, model)
    check_length(checkpoint, state["global_step"], identity.length)
    return checkpoint


def find_replay(
    options: Options, journal: Journal, checkpoint: Path | None, has_result: bool
) -> Replay:
    """Return what a run takes from its journal; an empty ``Replay`` begins a new journal.

    Raises:
        InputError: the journal belongs to another run, and there is no checkpoint of this one.
    """
    header, identity = journal.header, options.identity
    if options.files.overwrite and not checkpoint:
        is_done = has_result and journal.steps >= header.max_steps
        if is_done or header.settings != identity.of_run:
            return Replay()
    belongs = (
        header.noise == noise.VERSION
        and header.settings == header.settings | identity.of_checkpoint
    )
    if not belongs:
        if checkpoint is None:
            check_settings(journal.path, header.settings, identity.of_checkpoint)
            raise InputError(f"{journal.path} has another version's noise; {ANOTHER_FOLDER}")
        return Replay()
    step = read_trainer_state(checkpoint)["global_step"] if checkpoint else 0
    if options.files.resume_from not in (None, "true"):
        # Who names a checkpoint wants to resume there.
        return Replay(begins_at=journal.end_of(step))
    if step < header.step:
        logger.warning(
            f"{journal.path} begins with step {header.step}, whose checkpoint is gone: a new one"
        )
        return Replay()
    rows, end = journal.after(step)
    replay = Replay(rows, end, header.start if step == header.step else None)
    if replay.steps:
        check_length(journal.path, step + replay.steps, identity.length)
    if end < journal.ends[-1]:
        after = step + replay.steps
        logger.warning(
            f"{journal.path} is damaged after step {after}: what follows is computed again"
        )
    return replay


def check_settings(place: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings than it was started with.

    The state of optimizer and scheduler would bring the old ones back, without a word.

    Raises:
        InputError: a setting differs.
    """
    for name, then in saved.items():
        if name in settings and settings[name] != then:
            raise InputError(
                f"{place} comes from a run with --{name} {then}, not {settings[name]}: "
                f"{ANOTHER_FOLDER}"
            )


def check_model(checkpoint: Path, model: PreTrainedModel | PeftModel) -> None:
    """Refuse a checkpoint of another version or model, or without a state.

    Raises:
        InputError: it is one.
    """
    kept = run_state(read_trainer_state(checkpoint))
    check_version(checkpoint, kept)
    if not any(checkpoint.glob("optimizer*")) or not (checkpoint / "scheduler.pt").is_file():
        raise InputError(f"{checkpoint} has no state of an optimizer and a scheduler; {ANOTHER}")
    saved, here = kept["parameters"], shapes_of(model)
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            raise InputError(
                f"{checkpoint} is a checkpoint of another model: {name} is "
                f"{saved.get(name, 'missing')} there and {here.get(name, 'missing')} in this "
                f"model; {ANOTHER}"
            )


def check_length(place: Path, steps: int, length: Mapping[str, float]) -> None:
    """Raise InputError if a checkpoint or a journal has more steps than the run."""
    max_steps = length.get("max_steps")
    if max_steps and steps > max_steps:
        raise InputError(f"{place} has more than --max_steps {max_steps}: {ANOTHER_FOLDER}")


def recording_of(options: Options, start: Start) -> Recording | None:
    """Return what writes a run's journal, and replays it; None where there is none."""
    if start.journal is None:
        return None
    header: dict[str, Any] = {}
    if start.replay.begins_at is None and PartialState().is_main_process:
        model, identity = options.model, options.identity
        header = {
            "model": {"name": model.name, "sha256": sums_of_weights(model.name)},
            "settings": identity.of_run,
            "versions": {"torch": torch.__version__},
        }
    return Recording(start.journal, header, start.replay, options.training.check_every)


def journal_of_first_process(path: Path) -> Journal | None:
    """Return the journal that the first process finds.

    Raises:
        InputError: in all processes, where it cannot be read.
    """
    try:
        return from_first_process(lambda: read_journal(path))
    except InputError as error:
        raise InputError(f"{error}; give another --output_dir, or remove it") from error
