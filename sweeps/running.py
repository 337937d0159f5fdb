"""Runs in processes of their own, several at a time, and what is shown of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

import torch

from experiment.plan import shown_time
from sweeps import jobs
from sweeps.jobs import Job
from utils import InputError

# Seconds between two looks at the runs.
PAUSE = 0.2


class Runner(Protocol):
    """What runs jobs: processes here, or a cluster."""

    def look(self) -> None:
        """Bring the states of the jobs up to date, and start what can be started."""

    def stop(self) -> None:
        """End what runs; return when it has ended."""


class Processes:
    """Runs jobs on this machine, so many at a time.

    Args:
        jobs: the runs, in their order.
        number: processes at a time. Each has its share of the cores, and one GPU if there are any.

    Raises:
        InputError: there are fewer GPUs than processes.
    """

    def __init__(self, jobs: Sequence[Job], number: int) -> None:
        gpus = visible_gpus()
        if gpus and number > len(gpus):
            raise InputError(
                f"--jobs {number}: each run has a GPU of its own, and there are {len(gpus)}; give "
                f"{len(gpus)} at most"
            )
        self.jobs = jobs
        # Which slot a job has: a GPU's name, or a number.
        self.free = gpus[:number] or [str(slot) for slot in range(number)]
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.has_gpus = bool(gpus)
        cores = len(os.sched_getaffinity(0))
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // number)))
        self.running: dict[str, tuple[subprocess.Popen, str]] = {}
        self.stopped = False

    def look(self) -> None:
        """Bring the states of the jobs up to date, and start what can be started."""
        for job in self.jobs:
            if job.state == "running":
                process, slot = self.running[job.name]
                if (code := process.poll()) is not None:
                    job.end(code)
                    del self.running[job.name]
                    self.free.append(slot)
            elif job.state == "waiting" and self.free and not self.stopped:
                slot = self.free.pop(0)
                gpu = {"CUDA_VISIBLE_DEVICES": slot} if self.has_gpus else {}
                process = jobs.start(jobs.SCRIPT, job.words, job.log, self.environment | gpu)
                self.running[job.name] = (process, slot)
                job.begin()

    def stop(self) -> None:
        """Let the runs save their checkpoints and end; a second Ctrl-C ends them at once."""
        self.stopped = True
        try:
            for process, _ in self.running.values():
                process.send_signal(signal.SIGINT)
            for process, _ in self.running.values():
                process.wait()
        except KeyboardInterrupt:
            for process, _ in self.running.values():
                process.kill()
                process.wait()
        self.look()


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES tells this machine's GPUs apart."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


class Display:
    """Shows a sweep: on a terminal every run that is on its way, elsewhere a line for each event.

    Args:
        jobs: all runs of the sweep.
        at_a_time: how many of them run side by side.
        describe: what is said of a finished run.
        file: where it is written.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        at_a_time: int,
        describe: Callable[[Job], str],
        file: TextIO = sys.stdout,
    ) -> None:
        self.jobs, self.at_a_time, self.describe, self.file = jobs, at_a_time, describe, file
        self.on_terminal = file.isatty()
        self.known = {job.name: job.state for job in jobs}
        self.drawn = 0

    def update(self) -> None:
        """Show what is new."""
        events = []
        for job in self.jobs:
            if job.state != self.known[job.name]:
                self.known[job.name] = job.state
                said = {"failed": job.said, "finished": self.describe(job)}.get(job.state, "")
                if job.state != "running":
                    events.append(f"{job.state}: {job.name}{said and ': '}{said}")
                elif not self.on_terminal:
                    events.append(f"started: {job.name} ({self.summary()})")
        self.clear()
        for line in events:
            print(line, file=self.file, flush=True)
        if self.on_terminal:
            self._draw()

    def clear(self) -> None:
        """Take away what is redrawn."""
        if self.drawn:
            self.file.write(f"\x1b[{self.drawn}F\x1b[J")
            self.drawn = 0

    def summary(self) -> str:
        """Return how many runs are in which state, and the time left."""
        counts = Counter(job.state for job in self.jobs)
        words = [f"{counts['finished']} of {len(self.jobs)} finished"]
        words += [f"{counts[state]} {state}" for state in ("running", "failed") if counts[state]]
        left = self.seconds_left()
        return ", ".join([*words, *([] if left is None else [f"about {shown_time(left)} left"])])

    def seconds_left(self) -> float | None:
        """Return an estimate from the runs that have finished here; None before the first."""
        measured = [job.seconds for job in self.jobs if job.state == "finished" and job.seconds]
        if not measured:
            return None
        mean = sum(measured) / len(measured)
        now = time.monotonic()
        running = [max(0.0, mean - (now - j.started)) for j in self.jobs if j.state == "running"]
        waiting = sum(job.state == "waiting" for job in self.jobs)
        return max([*running, (sum(running) + waiting * mean) / self.at_a_time])

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        lines = [self.summary()]
        for job in self.jobs:
            if job.state == "running":
                step, steps, values = job.progress()
                part = f"{step:,} of {steps:,} {values}" if steps else "starts"
                lines.append(f"  {job.name}: {part}")
        for line in lines:
            self.file.write(f"{line[:width]}\n")
        self.file.flush()
        self.drawn = len(lines)


def follow(runner: Runner, jobs: Sequence[Job], display: Display) -> None:
    """Let a runner work until no job is left, and show it.

    Raises:
        KeyboardInterrupt: a signal arrived; the runner has stopped.
    """
    try:
        while any(job.state in ("waiting", "running") for job in jobs):
            runner.look()
            display.update()
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        display.clear()
        print("interrupted: the runs save their checkpoints", file=display.file, flush=True)
        runner.stop()
        raise
