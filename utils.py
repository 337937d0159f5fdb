"""Small shared pieces: errors of the user's input, files written whole, fingerprints."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of files beyond this many bytes, fingerprints take so many samples of so many bytes.
WHOLLY_READ = 2**28
SAMPLES, SAMPLE_SIZE = 64, 2**16
# What CUDA_VISIBLE_DEVICES holds where a job has no GPU.
NO_GPU = ("", "-1", "NoDevFiles")


class InputError(ValueError):
    """Bad input: the message is one line that names the value and the way out; exit code 2."""


class Interrupted(Exception):
    """A signal ended the training after a checkpoint was saved."""


class Diverged(Exception):
    """Too many steps in a row had no finite loss, or a far too large one; there is a checkpoint."""


class Lost(Exception):
    """Another process of the run is gone or never came; exit code 1."""


class NotWritten(OSError):
    """A file could not be written: the message is one line that names it; exit code 1."""

    @classmethod
    def of(cls, place: Path, error: Exception) -> NotWritten:
        """Make one of what a library raised, with the room that the disk has left."""
        existing = next(each for each in (place, *place.absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free / 2**20
        return cls(f"{place} could not be written: {one_line(error)} ({free:,.0f} MiB are free)")


class OneLineParser(argparse.ArgumentParser):
    """Raises InputError where a command line is wrong, in the words of run.py."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        message = message.removeprefix("argument ")
        message = message.replace("unrecognized arguments:", "unknown argument")
        message = message.replace("the following arguments are required:", "missing:")
        raise InputError(f"{message} (python {self.prog} --help explains the arguments)")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: Exception) -> str:
    """Return an error's whole message in one line, or its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def speaks_for_all() -> bool:
    """Whether this process is the first of those that torchrun or srun has started, or alone."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def say_last(line: str) -> None:
    """Print the line in which a command fails, once for all processes."""
    if speaks_for_all():
        print(line, file=sys.stderr)


def exit_code(command: Callable[[], int | None]) -> int:
    """Do a command; returns its exit code, and says in one line why it fails.

    0 or what the command returns: done. 1: diverged, a lost process, or a file that could not be
    written. 2: bad input. 130: interrupted. 141: nobody reads the output any more.
    """
    try:
        code = command() or 0
        sys.stdout.flush()  # here, not when Python ends: a reader may have gone, as head does
        return code
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        raise  # it was another pipe
    except InputError as error:
        say_last(f"error: {error}")
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        say_last(f"interrupted: {error}" if str(error) else "interrupted")
        return 130
    except (Diverged, NotWritten) as error:
        say_last(f"stopped: {error}")
        return 1
    except Lost as error:
        # The first process may be the one that is gone.
        print(f"stopped: rank {os.environ.get('RANK')}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EACCES) or not error.filename:
            raise
        say_last(f"error: {error.filename}: {error.strerror}; give another place")
        return 2


def check_writable(option: str, path: Path, is_folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written; leaves nothing behind.

    Raises:
        InputError: something else is in the place, or it cannot be written to.
    """
    folder, problem = path if is_folder else path.parent, None
    try:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not is_folder and path.exists() and not path.is_file():  # /dev/null would be replaced
            kind = "folder" if path.is_dir() else "device"
            problem = f"this is a {kind}; give the name of a file"
        elif not existing.is_dir():
            problem = f"{existing} is a file; give another place"
        else:
            tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        problem = f"cannot write there ({error.strerror}); give another place"
    if problem:
        raise InputError(f"{option} {path}: {problem}")


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that, whenever the process is killed, it is whole or as it was before.

    Raises:
        NotWritten: the disk is full, or the place cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In JSON a replaced surrogate, of a file name that is no UTF-8, is an escape.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise NotWritten.of(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is in its place, or was never made
            temporary.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty dictionary if it holds no JSON object."""
    try:
        # A pipe would never end.
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically; NaN and infinity become null, a day its text."""
    how = {"ensure_ascii": False, "allow_nan": False, "default": str}
    lines = (json.dumps(_finite(row), **how) for row in rows)
    write_text_atomically(path, "".join(f"{line}\n" for line in lines))


def _finite(value: Any) -> Any:
    """Return what JSON can hold: None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def process_index() -> int:
    """Return this process's number among those that train together, 0 alone."""
    import torch  # Not above: those who only read data files would wait for it.

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@functools.cache
def leave_process_group_at_exit() -> None:
    """End the processes' connection before Python does: its threads would abort the process."""
    import torch

    if torch.distributed.is_initialized():
        atexit.register(torch.distributed.destroy_process_group)


def fingerprint(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files' contents, in their order; large files are sampled."""
    digest = hashlib.sha256()
    for path in paths:
        size, starts, length = path.stat().st_size, [0], -1
        if size > WHOLLY_READ:
            starts, length = range(0, size, size // SAMPLES), SAMPLE_SIZE
        digest.update(size.to_bytes(8, "big"))
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def new_figure(path: Path, size: tuple[float, float]) -> Figure:
    """Return an empty figure for a picture file; ``size`` in inches.

    Raises:
        InputError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"--plot {path}: install matplotlib, or leave --plot out") from error
    # A figure of its own, not pyplot's: that would choose a window system for the whole process.
    figure = Figure(figsize=size, layout="constrained")
    if path.suffix.removeprefix(".").lower() not in figure.canvas.get_supported_filetypes():
        raise InputError(f"--plot {path}: give a name that ends in .png, .pdf or .svg")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure and make its folder.

    Raises:
        NotWritten: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise NotWritten.of(path, error) from error


def share_of_run(steps: float, steps_of_run: int) -> int:
    """Return a number of steps that is given as such, or below 1 as a fraction of the run."""
    return int(steps if steps >= 1 else steps * steps_of_run)
