"""Where the files of a run go, and how they are kept from other runs."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from accelerate.utils import broadcast_object_list

from command_line.arguments import Arguments
from utils import InputError, check_writable

logger = logging.getLogger(__name__)


def set_names(arguments: Arguments) -> list[str]:
    """Return what each run's folder in output_dir is called: nothing where there is only one."""
    sets = arguments.num_train_sets or 1
    return [f"set{seed}" for seed in range(sets)] if sets > 1 else [""]


def run_folders(arguments: Arguments) -> list[Path]:
    """Return the folders of all runs, for their checkpoints and models."""
    return [Path(arguments.output_dir, name) for name in set_names(arguments)]


def predictions_files(arguments: Arguments) -> list[Path]:
    """Return where the predictions of each run go; none if they are not asked for."""
    if not arguments.predictions_file:
        return []
    path = Path(arguments.predictions_file)
    names = set_names(arguments)
    return [path.with_stem(f"{path.stem}-{name}") if name else path for name in names]


def has_all_files(arguments: Arguments) -> bool:
    """Whether the predictions and the model lie where they are asked for, beside a result."""
    predictions = all(path.is_file() for path in predictions_files(arguments))
    configs = ("config.json", "adapter_config.json")
    models = not arguments.save_model or all(
        any((folder / name).is_file() for name in configs) for folder in run_folders(arguments)
    )
    return predictions and models


@contextlib.contextmanager
def locked_places(arguments: Arguments) -> Iterator[None]:
    """Keep what all runs write from other jobs; the first process locks it for all.

    Raises:
        InputError: a place cannot be written to, or another job has it.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if arguments.process_index == 0:
            try:
                if arguments.trainer != "none":
                    for folder in run_folders(arguments):
                        stack.enter_context(locked("--output_dir", folder, is_folder=True))
                stack.enter_context(locked("--result_file", arguments.result_path))
                for path in predictions_files(arguments):
                    stack.enter_context(locked("--predictions_file", path))
            except InputError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal:
            raise InputError(refusal)
        yield


@contextlib.contextmanager
def locked(option: str, place: Path, is_folder: bool = False) -> Iterator[None]:
    """Keep a file or a folder from other processes that would lock it too.

    The lock is the operating system's on the file ``.lock`` in the folder, ``.NAME.lock`` beside a
    file: it ends with the process, however and on whichever host that ends. A file that a killed
    process left behind locks nothing. Folders that are made here are removed if they are empty at
    the end.

    Raises:
        InputError: the place cannot be written to, or another process has locked it.
    """
    check_writable(option, place, is_folder)
    folder = place if is_folder else place.parent
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / (".lock" if is_folder else f".{place.name}.lock")
    try:
        with _locked_file(f"{option} {place}", lock):
            yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it is not empty, or somebody has removed it
                each.rmdir()


@contextlib.contextmanager
def _locked_file(what: str, path: Path) -> Iterator[None]:
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:  # it is another user's, or the folder is gone again
        raise InputError(f"{what}: cannot open {path} ({error.strerror}); remove it") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{what} is used by {file.read().strip() or 'another run'}: wait for its end, or "
                "give another place"
            ) from error
        except OSError as error:
            # Some network file systems have no locks. A run need not fail for that.
            logger.warning("%s is not locked against a second run (%s)", what, error)
        if not _is_at(file, path):
            # Whoever held it has removed it since it was opened.
            with _locked_file(what, path):
                yield
            return
        with contextlib.suppress(OSError):  # on a full disk: the lock holds without its words
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
