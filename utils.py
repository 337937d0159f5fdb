"""Small shared pieces: errors of the user's input, JSON files, checkpoints on disk, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InputError(ValueError):
    """Bad input: the message is one line that names the value and the way out; exit code 2."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that, whenever the process is killed, it is whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text_atomically(path, "".join(lines))


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
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of an earlier run in ``output_dir``, and nothing else."""
    for folder in checkpoints(output_dir):
        shutil.rmtree(folder)


class SaveOnInterrupt(TrainerCallback):
    """Saves a checkpoint and stops after the current step when a signal arrives.

    SIGINT is Ctrl-C, SIGTERM and SIGUSR1 are what Slurm sends before a job's time is over
    (``sbatch --signal``).

    Attributes:
        received: the signal's name, None as long as none arrived.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen for the signals."""
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer for a checkpoint and an end, once a signal has arrived."""
        if self.received:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
