"""Checkpoints of a training run on disk: which are whole, and which one a run goes on from."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

from language_model.adapters import adapter_file
from language_model.loading import saved_names, tied_weights
from utils import InputError, first_line


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

    Raises:
        InputError: there is none where one is wanted, or it is not one of this run.
    """
    if wanted is not None and wanted.lower() not in ("true", "false"):
        checkpoint = Path(wanted)
    elif wanted and wanted.lower() == "false":
        return None
    elif overwrite and not wanted:
        return unfinished_checkpoint(output_dir, model, {**settings, **length}, has_result)
    else:
        checkpoint = last_whole_checkpoint(output_dir)
        if checkpoint is None:
            if wanted:
                raise InputError(f"--resume_from_checkpoint: no whole checkpoint in {output_dir}")
            return None
    check_settings(checkpoint, settings)
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


def check_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings than it was started with.

    The state of optimizer and scheduler would bring the old ones back, without a word.

    Raises:
        InputError: a setting differs.
    """
    for name, then in RunSettings.read(checkpoint).items():
        if name in settings and settings[name] != then:
            raise InputError(
                f"{checkpoint} comes from a run with --{name} {then}, not {settings[name]}: give "
                "another --output_dir, or --overwrite_output_dir to start anew"
            )


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the ``checkpoint-<step>`` folders of a training run, oldest step first."""
    folders = Path(output_dir).glob("checkpoint-*")
    numbered = [
        (int(match[1]), folder)
        for folder in folders
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
    ]
    return [folder for _, folder in sorted(numbered)]


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, None if there is none.

    The Trainer writes ``trainer_state.json`` last: a checkpoint that a dying node left behind half
    written has none, or one that cannot be read.
    """
    for folder in reversed(checkpoints(output_dir)):
        if read_trainer_state(folder) is not None:
            return folder
    return None


def read_trainer_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return the state that the Trainer wrote into a checkpoint, None if it is missing or cut."""
    try:
        return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_state_files(checkpoint: str | Path) -> None:
    """Check that a checkpoint holds the states of the optimizer and the scheduler.

    Without them the Trainer goes on all the same, with new ones.

    Raises:
        InputError: one of them is missing or cut off.
    """
    folder = Path(checkpoint)
    # The state of sharded weights is in files of another name.
    sharded = any(path.name != "optimizer.pt" for path in folder.glob("optimizer*"))
    for name in ("scheduler.pt",) if sharded else ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(folder / name):
            raise InputError(
                f"{checkpoint} is no whole checkpoint: {name} is missing or cut off; give another "
                "one, or --overwrite_output_dir to start anew"
            )


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
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    return {name: shape for file in files for name, shape in shapes_in(folder / file).items()}


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
            "delete this folder to go on from the one before"
        ) from error
