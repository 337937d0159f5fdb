"""Checkpoints of a training run: written whole or not at all, and which one a run resumes from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from training.processes import from_first_process, in_all_processes
from utils import InputError, NotWritten, read_json, write_json

logger = logging.getLogger(__name__)

# Within the output folder; a checkpoint is written here and moved when it is whole.
UNFINISHED = ".unfinished"
STATE = "trainer_state.json"
# In each checkpoint; the SHA-256 of its other files.
MANIFEST = "manifest.json"
# Within the output folder; holds the number of the last step that is done.
LAST_STEP = "last_step"
# Counts changes of what a checkpoint holds, of the noise u among it.
CHECKPOINT_VERSION = 5
ANOTHER = "give another one, or --overwrite_output_dir to start anew"


def write_checkpoint(folder: Path, write: Callable[[], None], *, writes_manifest: bool) -> None:
    """Write a checkpoint beside its place, and move it there when it is whole.

    Every process calls it: ``write`` writes its files into the folder ``UNFINISHED`` beside
    ``folder``, and one of them ``writes_manifest``. A checkpoint of the same step is replaced.

    Raises:
        NotWritten: in all processes, where one could not write; names the checkpoint before.
    """
    unfinished = folder.parent / UNFINISHED

    def clear() -> None:
        if writes_manifest:
            shutil.rmtree(unfinished, ignore_errors=True)

    def complete() -> None:
        if writes_manifest:
            written = unfinished / folder.name
            # The best checkpoint is found by its step: a path would not outlast a renamed folder.
            state = read_trainer_state(written) | {"best_model_checkpoint": None}
            write_json(written / STATE, state)
            write_manifest(written)
            if folder.exists():
                os.replace(folder, unfinished / "before")
            os.replace(written, folder)
            flush(folder.parent)
            clear()

    try:
        for part in (clear, write, complete):
            write_together(folder, part)
    except NotWritten as error:
        clear()
        before = last_checkpoint(folder.parent) or "its start"
        raise NotWritten(f"{error}; the same command resumes from {before}") from error


def write_together(place: Path, write: Callable[[], None]) -> None:
    """Let every process write, and wait for all of them.

    Raises:
        NotWritten: in all processes, where one could not write, as on a full disk.
    """

    def written() -> None:
        try:
            write()
        except NotWritten:
            raise
        except (OSError, SafetensorError) as error:
            raise NotWritten.of(place, error) from error
        except RuntimeError as error:
            # torch.save has no type of its own for files that it could not write.
            if "inline_container" not in str(error):
                raise
            reason = OSError("torch.save could not write a file")
            raise NotWritten.of(place, reason) from error

    in_all_processes(written)


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 sums of a folder's files into its manifest, and wait for the disk."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    names = [str(path.relative_to(folder)) for path in files]
    for path in {*files, *(file.parent for file in files)}:
        flush(path)
    write_json(folder / MANIFEST, {"sha256": dict(zip(names, sha256_of(files), strict=True))})
    flush(folder)


def sha256_of(files: list[Path]) -> list[str]:
    """Return the SHA-256 sums of files in hexadecimal digits; several are read at a time."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, files))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoveEarlierCheckpoints(TrainerCallback):
    """Deletes an earlier run's checkpoints after the first step: bad input deletes nothing."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Delete the checkpoints there are before the first one of this run."""
        if state.global_step == 1 and state.is_world_process_zero:
            for folder in checkpoints(args.output_dir):
                shutil.rmtree(folder)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the ``checkpoint-<step>`` folders of a training run, oldest step first."""
    steps = {
        folder: int(match[1])
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(r".*-(\d+)", folder.name)) and folder.is_dir()
    }
    return sorted(steps, key=steps.get)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint, None if there is none; its files are not read."""
    return next(reversed(checkpoints(output_dir)), None)


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written, None if there is none.

    A line is logged for each one that is passed over. The first process reads for all.
    """

    def find() -> Path | None:
        for folder in reversed(checkpoints(output_dir)):
            reason = damage(folder)
            if reason is None:
                return folder
            logger.warning("%s is damaged and is passed over: %s", folder, reason)
        return None

    return from_first_process(find)


def damage(folder: Path) -> str | None:
    """Return why a folder is not as it was written, None if it is. Reads every file in full."""
    written = read_json(folder / MANIFEST).get("sha256")
    if not isinstance(written, dict):
        return f"{MANIFEST} is missing or cut off"
    try:
        sums = sha256_of([folder / name for name in written])
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    for name, found in zip(written, sums, strict=True):
        if found != written[name]:
            return f"{name} is not what was written (SHA-256)"
    return None


def note_step(output_dir: str | Path, step: int | None) -> None:
    """Write down that a step is done; None: all of them."""
    path = Path(output_dir, LAST_STEP)
    path.unlink(missing_ok=True)
    if step is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(step), encoding="utf-8")


def noted_step(output_dir: str | Path) -> int:
    """Return the last step that was done, 0 if it is not known."""
    try:
        return int(Path(output_dir, LAST_STEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # killed within the writing
        return 0


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state that the Trainer wrote into a checkpoint; raise InputError without one."""
    if not (checkpoint / STATE).is_file():
        raise InputError(f"{checkpoint} has no {STATE}; {ANOTHER}")
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has what a further step needs; with ``--save_only_model`` it has not."""
    return any(checkpoint.glob("optimizer*")) and (checkpoint / "scheduler.pt").is_file()


def check_version(checkpoint: str | Path, kept: Mapping[str, Any]) -> None:
    """Raise InputError if ``kept`` (by ``RunState``) is another version's, or another program's."""
    if kept.get("version") != CHECKPOINT_VERSION:
        raise InputError(f"{checkpoint}: another version of this program wrote it; {ANOTHER}")
