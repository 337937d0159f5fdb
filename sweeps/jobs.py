"""One run of a sweep: its process, and what it has printed. Needs nothing but Python."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "run.py"
# Bytes of a run's output that its newest line is looked for in.
TAIL = 8192
STEP = re.compile(r"step (\d+) of (\d+)(?:: ([^\r\n]*))?")
# What run.py writes last where it fails.
LAST_WORDS = ("error: ", "stopped: ", "interrupted")
INTERRUPTED = 130


@dataclass
class Job:
    """A run in the sweep.

    Attributes:
        name: of the run.
        words: run.py's whole command line, the places of its files included.
        log: the file of what it prints.
        state: "waiting", "running", "finished", "failed" or "interrupted".
        said: how a failed run ended, in one line.
        seconds: that the run took in this sweep; None if it did not.
        started: on this process's clock.
    """

    name: str
    words: tuple[str, ...]
    log: Path
    state: str = "waiting"
    said: str = ""
    seconds: float | None = None
    started: float = 0.0

    def begin(self) -> None:
        """Note that it runs."""
        self.state, self.started = "running", time.monotonic()

    def end(self, code: int) -> None:
        """Note that it has ended, with an exit code."""
        self.seconds = time.monotonic() - self.started
        self.state = {0: "finished", INTERRUPTED: "interrupted"}.get(code, "failed")
        self.said = "" if code == 0 else last_words(self.log, code)

    def progress(self) -> tuple[int, int, str]:
        """Return the newest step in what it prints, the steps of the run, and its values."""
        found = STEP.findall(tail(self.log))
        step, steps, values = found[-1] if found else (0, 0, "")
        return int(step), int(steps), values


def start(
    script: Path, words: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    """Start run.py, its output into a file; it saves a checkpoint and ends if this process dies."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(script), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # Ctrl-C in a terminal goes to the sweep, which passes it on once.
            process_group=0,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent ends, however it does (prctl, PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def tail(path: Path, size: int = TAIL) -> str:
    """Return the end of a text file, nothing if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def last_words(log: Path, code: int) -> str:
    """Return in one line how a run ended: what it said last, or the signal that ended it."""
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith(LAST_WORDS)), None)
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return said or (lines[-1] if lines else f"exit code {code}")
