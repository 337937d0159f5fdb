"""Checkpoints of a training run on disk: written whole, and which one a run goes on from."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from language_model.adapters import adapter_file
from language_model.manifest import MANIFEST, damage, missing_file, write_manifest
from language_model.weight_names import saved_names, tied_weights
from utils import InputError, NotWritten, first_line, write_json

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


class RunSettings(TrainerCallback, ExportableState):
    """Writes what a run was started with, and its length, into its checkpoints' state."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves."""
        return {"args": {"settings": self.settings}, "attributes": {}}

    @staticmethod
    def read(checkpoint: str | Path) -> dict[str, Any]:
        """Return the settings in a checkpoint; none if another program wrote it."""
        saved = (read_trainer_state(checkpoint) or {}).get("stateful_callbacks", {})
        return saved.get("RunSettings", {}).get("args", {}).get("settings", {})


def find_checkpoint(
    output_dir: Path,
    model: PreTrainedModel | PeftModel,
    settings: Mapping[str, Any],
    *,
    length: Mapping[str, float],
    wanted: str | None,
    overwrite: bool,
    has_result: bool,
    has_journal: bool = False,
) -> Path | None:
    """Return the checkpoint to go on from, checked; None to start anew.

    Args:
        output_dir: the run's folder.
        model: the model as it is trained.
        settings: what decides the course of the run (``settings_of_a_checkpoint``).
        length: of the run: ``max_steps`` or ``num_train_epochs``.
        wanted: ``--resume_from_checkpoint``: a folder; true, which takes the newest one and needs
            one; false, which takes none. None takes the newest one, if there is one.
        overwrite: take none, unless one is wanted or the run itself began it and did not finish.
        has_result: whether the run's result is written.
        has_journal: whether the run may go on without a checkpoint.

    Raises:
        InputError: there is none where one is wanted, or it is not one of this run.
    """
    if wanted is not None and wanted.lower() not in ("true", "false"):
        checkpoint = named_checkpoint(wanted)
    elif wanted and wanted.lower() == "false":
        return None
    elif overwrite and not wanted:
        return unfinished_checkpoint(output_dir, model, {**settings, **length}, has_result)
    else:
        checkpoint = last_whole_checkpoint(output_dir)
        if checkpoint is None:
            if wanted and not has_journal:
                raise InputError(f"--resume_from_checkpoint: no whole checkpoint in {output_dir}")
            return None
    check_settings(checkpoint, RunSettings.read(checkpoint), settings)
    check_checkpoint(str(checkpoint), model)
    check_state_files(checkpoint)
    max_steps = length.get("max_steps")
    if max_steps and max_steps < read_trainer_state(checkpoint)["global_step"]:
        raise InputError(
            f"{checkpoint} has more than --max_steps {max_steps}: give another "
            "--output_dir, or --overwrite_output_dir to start anew"
        )
    return checkpoint


def unfinished_checkpoint(
    output_dir: Path,
    model: PreTrainedModel | PeftModel,
    settings: Mapping[str, Any],
    has_result: bool,
) -> Path | None:
    """Return the newest whole checkpoint if a run of these very settings began it and is not done.

    A run is done when its last step is taken and its result is written.
    """
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is None or RunSettings.read(checkpoint) != settings:
        return None
    state = read_trainer_state(checkpoint)
    if has_result and state["global_step"] >= state["max_steps"]:
        return None
    try:
        check_checkpoint(str(checkpoint), model)
        check_state_files(checkpoint)
    except InputError:
        return None
    return checkpoint


def check_settings(place: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings than it was started with.

    The state of optimizer and scheduler would bring the old ones back, without a word.

    Args:
        place: the checkpoint or the journal.
        saved: the settings there.
        settings: those of this run.

    Raises:
        InputError: a setting differs.
    """
    for name, then in saved.items():
        if name in settings and settings[name] != then:
            raise InputError(
                f"{place} comes from a run with --{name} {then}, not {settings[name]}: give "
                "another --output_dir, or --overwrite_output_dir to start anew"
            )


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the ``checkpoint-<step>`` folders of a training run, oldest step first."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [
        (int(match[1]), folder)
        for folder in folders
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and folder.is_dir()
    ]
    return [folder for _, folder in sorted(numbered)]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, None if there is none."""
    written = (folder for folder in reversed(checkpoints(output_dir)) if not missing_file(folder))
    return next(written, None)


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written, None if there is none.

    A line is logged for each one that is passed over. The first process reads for all.
    """

    def find() -> Path | None:
        for folder in reversed(checkpoints(output_dir)):
            reason = damage(folder)
            if reason is None:
                return folder
            logger.warning("%s is not whole and is passed over: %s", folder, reason)
        return None

    return from_first_process(find)


def named_checkpoint(wanted: str) -> Path:
    """Return the checkpoint that ``--resume_from_checkpoint`` names.

    One of an earlier version has no manifest. Who names it may go on from it, told so by a line.

    Raises:
        InputError: its files are not as they were written.
    """
    folder = Path(wanted)
    if not (folder / MANIFEST).exists():
        if read_trainer_state(folder) is not None and PartialState().is_main_process:
            logger.warning("%s has no %s: its files are taken as they are", folder, MANIFEST)
    elif reason := from_first_process(lambda: damage(folder)):
        raise InputError(
            f"--resume_from_checkpoint {wanted} is no whole checkpoint: {reason}; give another "
            "one, or leave it out to go on from the newest whole one"
        )
    return folder


def from_first_process(compute: Callable[[], Value]) -> Value:
    """Return in every process what the first one computes, which must not raise."""
    values = [compute() if PartialState().is_main_process else None]
    return broadcast_object_list(values)[0]


def best_checkpoint(resumed: Path, step: int | None) -> str | None:
    """Return the best checkpoint of a run that goes on; it lies beside the one gone on from.

    Args:
        resumed: the checkpoint that the run goes on from, wherever its folder is now.
        step: of the best checkpoint, None if there is none yet.
    """
    if step is None:
        return None
    best = resumed.parent / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if not best.is_dir():
        logger.warning("the best checkpoint, %s, is not there any more", best)
        return None
    return str(best)


def write_checkpoint(folder: Path, write: Callable[[], None], *, writes_manifest: bool) -> None:
    """Write a checkpoint to its end, or leave nothing of it behind.

    Args:
        folder: of the checkpoint; one of the same step is replaced.
        write: writes the files of this process; all processes call it.
        writes_manifest: whether this process writes what belongs to all of them.

    Raises:
        NotWritten: in all processes, where one could not write; names the checkpoint before.
    """

    def remove() -> None:
        if writes_manifest and folder.exists():
            shutil.rmtree(folder)

    def complete() -> None:
        if writes_manifest:
            # The best checkpoint is found by its step: a path would not outlast a renamed folder.
            state = read_trainer_state(folder) | {"best_model_checkpoint": None}
            write_json(folder / "trainer_state.json", state)
            write_manifest(folder)

    try:
        for part in (remove, write, complete):
            write_together(folder, part)
    except NotWritten as error:
        if writes_manifest:
            shutil.rmtree(folder, ignore_errors=True)
        before = last_checkpoint(folder.parent)
        way_out = (
            f"{before} is whole, the same command goes on from there"
            if before
            else "there is no checkpoint before it"
        )
        raise NotWritten(f"{error}; {way_out}") from error


def write_together(place: Path, write: Callable[[], None]) -> None:
    """Let every process write, and wait for all of them.

    Raises:
        NotWritten: in all processes, where one could not write, as on a full disk.
    """
    failure = None
    try:
        write()
    except NotWritten as error:
        failure = str(error)
    except (OSError, SafetensorError) as error:
        failure = str(NotWritten.of(place, error))
    except RuntimeError as error:
        # By this, and no type of its own, torch.save tells that it could not write.
        if "inline_container" not in str(error):
            raise
        failure = str(NotWritten.of(place, OSError("torch.save could not write a file")))
    failures = [each for each in gather_object([failure]) if each is not None]
    if failures:
        raise NotWritten(failures[0])


def remove_older_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete checkpoints before the newest, the oldest first, until ``limit`` are left.

    Args:
        newest: the checkpoint that was written last; it stays. Those of later steps, from which
            the run did not go on, are not counted.
        limit: ``--save_total_limit``; None keeps all.
        best: the best checkpoint, which stays too.
    """
    if limit is None:
        return
    folders = checkpoints(newest.parent)
    up_to_newest = folders[: folders.index(newest) + 1]
    kept = {newest, Path(best) if best else newest}
    older = [folder for folder in up_to_newest if folder not in kept]
    for folder in older[: max(0, len(up_to_newest) - max(limit, len(kept)))]:
        shutil.rmtree(folder, ignore_errors=True)


def read_trainer_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return the state that the Trainer wrote into a checkpoint, None if it is missing or cut."""
    try:
        return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_state_files(checkpoint: str | Path) -> None:
    """Check that the states of the optimizer, the scheduler and the random numbers can be loaded.

    Without the first two the Trainer goes on all the same, with new ones. No code in a file is run.

    Raises:
        InputError: one of them is missing, cut off, or holds more than tensors and numbers.
    """
    folder = Path(checkpoint)
    # The state of sharded weights is in files of another name.
    sharded = any(path.name != "optimizer.pt" for path in folder.glob("optimizer*"))
    needed = ("scheduler.pt",) if sharded else ("optimizer.pt", "scheduler.pt")
    for file in (*(folder / name for name in needed), *sorted(folder.glob("rng_state*.pth"))):
        if not file.is_file():
            raise InputError(
                f"{checkpoint} is no whole checkpoint: {file.name} is missing; give another one, "
                "or --overwrite_output_dir to start anew"
            )
        try:
            with safe_globals():
                # Tensors are left on the disk: only what is around them is read.
                torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # a damaged pickle may raise anything
            raise InputError(
                f"{checkpoint} cannot be gone on from: torch refuses {file.name} "
                f"({type(error).__name__}); give another one, or --overwrite_output_dir to start "
                "anew"
            ) from error


class RemoveEarlierCheckpoints(TrainerCallback):
    """Deletes an earlier run's checkpoints after the first step: bad input deletes nothing."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delete the checkpoints there are before the first one of this run."""
        if state.global_step == 1 and state.is_world_process_zero:
            remove_checkpoints(args.output_dir)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of an earlier run in ``output_dir``, and nothing else."""
    for folder in checkpoints(output_dir):
        shutil.rmtree(folder)


def check_checkpoint(checkpoint: str, model: PreTrainedModel | PeftModel) -> None:
    """Check that a checkpoint's weights have the names and shapes of ``model``'s.

    Raises:
        InputError: the folder holds no checkpoint of a training run, or one of another model.
    """
    folder = Path(checkpoint)
    if read_trainer_state(folder) is None:
        raise InputError(
            f"{checkpoint} is no whole checkpoint: trainer_state.json is missing or cut off; give "
            "another one"
        )
    if isinstance(model, PeftModel):
        file, tensors = adapter_file(model)
        shapes, unsaved = shapes_in(folder / file), set()
    else:
        tensors, shapes = saved_names(model), saved_shapes(folder)
        # Weights that are tied to others are not saved a second time.
        unsaved = tensors.keys() & tied_weights(model)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(shapes.keys() | expected.keys() - unsaved):
        if expected.get(name) != shapes.get(name):
            raise InputError(
                f"{checkpoint} is a checkpoint of another model: {name} is "
                f"{shapes.get(name, 'missing')} there and {expected.get(name, 'missing')} in this "
                "model; give its own checkpoint, or --overwrite_output_dir to start anew"
            )


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a checkpoint's safetensors files."""
    files = weight_files(folder)
    return {name: shape for file in files for name, shape in shapes_in(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files, by name."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = set(json.loads(index.read_text())["weight_map"].values())
    return [folder / name for name in sorted(names)]


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a safetensors file of a checkpoint."""
    folder = file.parent
    if not file.is_file():
        raise InputError(f"{folder} is no whole checkpoint: {file.name} is missing")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {
                name: tuple(tensors.get_slice(name).get_shape())
                for name in tensors.keys()  # noqa: SIM118 - safe_open is no mapping
            }
    except SafetensorError as error:
        raise InputError(
            f"{folder} is no whole checkpoint: {file.name} is damaged ({first_line(error)}); "
            "give another one"
        ) from error
