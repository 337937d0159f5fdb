"""Runs in processes of their own, several at a time, and what the user sees of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep

from tqdm import tqdm

from utils import NO_GPU, InputError, NotWritten

SCRIPT = Path(__file__).resolve().parent.parent / "run.py"
# Seconds between two looks at the runs.
PAUSE = 0.2
# Bytes at the end of a log in which the newest step is searched.
TAIL = 8192
STEP = re.compile(r"step (\d+ of \d+)")
# The last line that run.py writes when it fails begins with one of these.
LAST_WORDS = ("error: ", "stopped: ", "interrupted")
INTERRUPTED = 130


@dataclass
class Job:
    """A run of the sweep: its command line, where its output and its result go, its state."""

    name: str
    words: tuple[str, ...]
    log: Path
    result: Path
    state: str = "waiting"  # then "running", and "finished", "failed" or "interrupted"
    said: str = ""  # how a failed run ended, in one line

    @property
    def is_over(self) -> bool:
        """Whether it neither waits nor runs."""
        return self.state not in ("waiting", "running")

    def end(self, code: int) -> None:
        """Note its exit code; without a result it has not finished."""
        self.state = "interrupted" if code == INTERRUPTED else "failed"
        if code:
            self.said = last_words(self.log, code)
        elif self.result.is_file():
            self.state = "finished"
        else:
            self.said = f"exit code 0, but no {self.result.name}"


class Processes:
    """Runs the waiting jobs on this machine, ``number`` at a time, in their order.

    Each has its share of the cores and of the GPUs, all of them if ``number`` is 1.

    Raises:
        InputError: there are fewer GPUs than jobs at a time.
    """

    farewell = "interrupted: the runs save their checkpoints"

    def __init__(self, jobs: Sequence[Job], number: int) -> None:
        gpus = visible_gpus()
        if gpus and number > len(gpus):
            there_are = f"each run has a GPU of its own, and there are {len(gpus)}"
            raise InputError(f"--jobs {number}: {there_are}; give {len(gpus)} at most")
        self.jobs = jobs
        size = len(gpus) // number
        shares = [",".join(gpus[size * n : size * (n + 1)]) for n in range(number)]
        self.free: list[str | None] = [share or None for share in shares]
        self.running: list[tuple[Job, subprocess.Popen, str | None]] = []
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        cores = len(os.sched_getaffinity(0))
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // number)))

    def look(self) -> None:
        """Note which runs have ended, and start others in their places."""
        for each in list(self.running):
            job, process, gpus = each
            if (code := process.poll()) is not None:
                job.end(code)
                self.running.remove(each)
                self.free.append(gpus)
        waiting = [job for job in self.jobs if job.state == "waiting"]
        for job in waiting[: len(self.free)]:
            gpus = self.free.pop(0)
            environment = self.environment | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
            self.running.append((job, start(job.words, job.log, environment), gpus))
            job.state = "running"

    def stop(self) -> None:
        """Let the runs save their checkpoints and end; a second Ctrl-C kills them."""
        for number in (signal.SIGINT, signal.SIGKILL):
            for _, process, _ in self.running:
                process.send_signal(number)
            with contextlib.suppress(KeyboardInterrupt):
                while self.running:
                    job, process, _ = self.running[-1]
                    job.end(process.wait())
                    self.running.pop()


def visible_gpus() -> list[str]:
    """Return the names of this machine's GPUs in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in NO_GPU]
    import torch  # Slurm's nodes read this module too, and need no torch for it.

    return [str(number) for number in range(torch.cuda.device_count())]


# Loaded here: between fork and exec nothing may be imported.
_prctl = getattr(ctypes.CDLL(None), "prctl", None)
PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies, even by ``kill -9``."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start run.py and append its output to a file; it saves and ends if this process dies.

    Raises:
        NotWritten: the file cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    except OSError as error:
        raise NotWritten.of(log, error) from error
    with file:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # The terminal sends Ctrl-C to the sweep alone, which passes it on once.
            process_group=0,
            preexec_fn=_end_with_parent,
        )


def tail(path: Path) -> str:
    """Return the end of a text file; an empty text if there is no such file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        return file.read().decode(errors="replace")
    return ""


def last_words(log: Path, code: int) -> str:
    """Return how a run ended in one line: its last message, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(LAST_WORDS)] or lines
    return said[-1] if said else f"exit code {code}"


def follow(runner: Processes, jobs: Sequence[Job], describe: Callable[[Job], str]) -> None:
    """Wait until all jobs are over; print their starts and ends, and show a bar on a terminal.

    ``describe`` returns the result of a finished run as text.

    Raises:
        KeyboardInterrupt: a signal arrived; the runner has stopped.
    """
    known = {job.name: job.state for job in jobs}
    done = sum(job.is_over for job in jobs)
    with tqdm(total=len(jobs), initial=done, unit="run", disable=None, dynamic_ncols=True) as bar:
        try:
            while True:
                runner.look()
                for job in jobs:
                    if job.state != known[job.name]:
                        known[job.name] = job.state
                        bar.write(_news(job, describe))
                        bar.update(job.is_over)
                if not bar.disable:  # to read the logs of many runs takes a while
                    running = [job for job in jobs if job.state == "running"]
                    bar.set_postfix_str("; ".join(map(_progress, running)))
                if all(job.is_over for job in jobs):
                    return
                sleep(PAUSE)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                bar.write(runner.farewell)
            runner.stop()
            raise


def _news(job: Job, describe: Callable[[Job], str]) -> str:
    if job.state == "running":
        return f"started: {job.name}"
    said = describe(job) if job.state == "finished" else job.said
    return f"{job.state}: {job.name}{': ' if said else ''}{said}"


def _progress(job: Job) -> str:
    steps = STEP.findall(tail(job.log))
    return f"{job.name}: {steps[-1] if steps else 'starts'}"
