"""Small shared pieces: errors of the user's input, files that are written whole, signals."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InputError(ValueError):
    """Bad input: the message is one line that names the value and the way out; exit code 2."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: Exception) -> str:
    """Return an error's whole message in one line, or its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def check_writable(option: str, path: Path, is_folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written; leaves nothing behind.

    Raises:
        InputError: something else is in the place, or it cannot be written to.
    """
    folder = path if is_folder else path.parent
    if not is_folder and path.is_dir():
        raise InputError(f"{option} {path}: this is a folder; give the name of a file")
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(f"{option} {path}: {existing} is a file, no folder; give another place")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"{option} {path}: cannot write there ({error.strerror}); give another place"
        ) from error


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


@functools.cache
def leave_process_group_at_exit() -> None:
    """End the processes' connection before Python does: its threads would abort the process."""
    atexit.register(torch.distributed.destroy_process_group)


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
        if self._received_anywhere(args):
            # The losses since the last log entry are not in the checkpoint.
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _received_anywhere(self, args: TrainingArguments) -> str | None:
        """Return the signal; processes that train together stop after the same step."""
        if args.world_size > 1:
            number = signal.Signals[self.received] if self.received else 0
            shared = torch.tensor(int(number), device=args.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            if shared.item():
                self.received = signal.Signals(int(shared.item())).name
        return self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
