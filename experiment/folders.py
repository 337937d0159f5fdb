"""The files and folders of a run are locked: no other job writes there meanwhile."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from experiment.options import Options
from training.processes import from_first_process
from utils import InputError, check_writable


@contextlib.contextmanager
def locked_places(options: Options) -> Iterator[None]:
    """Lock what a command writes; the first process locks it for all.

    Raises:
        InputError: places cannot be written to, or other jobs have them.
    """
    places = [("--output_dir", folder, True) for folder in options.folders if options.trains]
    if not options.arguments.predict_file:
        places += [("--result_file", options.arguments.result_path, False)]
    places += [("--predictions_file", path, False) for path in options.predictions]
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            refusals = []
            for place in places:
                try:
                    stack.enter_context(locked(*place))
                except InputError as error:
                    refusals.append(str(error))
            if refusals:
                raise InputError("; ".join(refusals))

        from_first_process(lock)
        yield


@contextlib.contextmanager
def locked(option: str, place: Path, is_folder: bool = False) -> Iterator[None]:
    """Lock a file or a folder against other processes.

    The operating system's lock on the file ``.lock`` in the folder, or ``.NAME.lock`` beside the
    file, ends with the process. A file that a killed process left behind locks nothing. Folders
    that are made here are removed if they are empty at the end.

    Raises:
        InputError: the place cannot be written to, or another process has locked it.
    """
    check_writable(option, place, is_folder)
    folder = place if is_folder else place.parent
    path = folder / (".lock" if is_folder else f".{place.name}.lock")
    lock = FileLock(path, timeout=0)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for each in reversed(made):
            stack.callback(_remove_if_empty, each)
        try:
            lock.acquire()
        except Timeout as error:
            holder = "another run"
            with contextlib.suppress(OSError):
                holder = path.read_text(encoding="utf-8").strip() or holder
            raise InputError(
                f"{option} {place} is used by {holder}: wait for its end, or give another place"
            ) from error
        except OSError as error:  # it is another user's, or the folder is gone again
            raise InputError(f"{option} {place}: cannot lock {path} ({error.strerror})") from error
        stack.callback(lock.release)
        # Before the release: filelock does not take a file that is gone when the lock is free.
        stack.callback(path.unlink, missing_ok=True)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its words
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or somebody has removed it
        folder.rmdir()
