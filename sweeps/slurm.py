"""A sweep as a job array of Slurm, with submitit (pip install submitit)."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from sweeps.running import INTERRUPTED, SCRIPT, Job, start, tail
from utils import InputError, one_line, read_json, write_json

if TYPE_CHECKING:
    import submitit

# In the sweep's folder: the numbers of the jobs, and submitit's own files.
JOBS, FOLDER = "slurm.json", "slurm"
# Slurm requeues a job this many times after its time limit or a preemption.
RESTARTS = 1000
# A run saves its checkpoint this many seconds before its time limit.
NOTICE = 120
# Seconds between two looks at the queue.
BETWEEN = 30
# States of jobs that have ended.
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED"),
)
# sacct does not know a new or an old job, and a preempted one may wait again: the queue tells.
UNSURE = ("UNKNOWN", "PREEMPTED")
# States of jobs that somebody else ended.
STOPPED = ("CANCELLED", "PREEMPTED")


class RunOnNode:
    """Runs a command line on the node that Slurm allots."""

    process: subprocess.Popen | None = None

    def __call__(self, words: Sequence[str], log: Path) -> int:
        """Run to the end; returns the exit code."""
        self.process = start(words, log, os.environ | {"PYTHONUNBUFFERED": "1"})
        return self.process.wait()

    def checkpoint(self, words: Sequence[str], log: Path) -> submitit.helpers.DelayedSubmission:
        """Let the run save its checkpoint; returns what Slurm starts again."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGUSR2)
            self.process.wait()
        return submitit.helpers.DelayedSubmission(RunOnNode(), words, log)


class JobArray:
    """Runs the waiting jobs as a job array, and follows those of an earlier call of the sweep.

    ``options`` are sbatch's, as on its command line; ``number`` is that of jobs at a time, None: as
    many as Slurm allows.

    Raises:
        InputError: submitit is not installed, or Slurm takes no such job.
    """

    farewell = "the jobs stay with Slurm (scancel ends them); the same command follows them again"

    def __init__(self, jobs: Sequence[Job], options: str, folder: Path, number: int | None) -> None:
        self.jobs, file = [job for job in jobs if not job.is_over], folder / JOBS
        self.queue: set[str] | None = None
        self.asked = -math.inf  # when the queue was read
        parameters: dict[str, Any] = {"additional_parameters": read_options(options)}
        if number is not None:
            parameters["array_parallelism"] = number
        # The nodes import this module, not one of its name in the folder in which they start.
        os.environ["PYTHONSAFEPATH"] = "1"
        paths = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            executor = make_executor(folder.resolve() / FOLDER, parameters)
            numbers = read_json(file).items()
            earlier = {name: executor.job_class(executor.folder, n) for name, n in numbers}
            self.submitted = {n: j for n, j in earlier.items() if not self.has_ended(j)}
            new = [job for job in self.jobs if job.name not in self.submitted]
            words, logs = [job.words for job in new], [job.log for job in new]
            array = executor.map_array(RunOnNode(), words, logs) if new else []
        except ImportError as error:
            way_out = "pip install submitit, or use --jobs"
            raise InputError(f"--slurm needs submitit: {way_out}") from error
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            way_out = "correct the options, or use --jobs"
            raise InputError(f"--slurm {options}: {one_line(error)}; {way_out}") from error
        self.asked = -math.inf  # the queue has the new jobs now
        self.submitted |= {job.name: one for job, one in zip(new, array, strict=True)}
        write_json(file, {name: one.job_id for name, one in self.submitted.items()})

    def look(self) -> None:
        """Ask Slurm for the states of the jobs."""
        for job in self.jobs:
            submitted = self.submitted[job.name]
            if job.is_over:
                continue
            if self.has_ended(submitted):
                end(job, submitted)
            elif submitted.state == "RUNNING":
                job.state = "running"

    def has_ended(self, submitted: submitit.Job) -> bool:
        """Whether a job of Slurm neither waits nor runs."""
        state = submitted.state
        # The queue comes first: a job writes its result before it leaves the queue.
        has_left = state.startswith(UNSURE) and not self.is_queued(submitted.job_id)
        return has_left or state.startswith(ENDED) or submitted.paths.result_pickle.exists()

    def is_queued(self, number: str) -> bool:
        """Whether Slurm's queue has a job, as far as is known."""
        if monotonic() > self.asked + BETWEEN:
            self.queue, self.asked = read_queue(), monotonic()
        return self.queue is None or number in self.queue

    def stop(self) -> None:
        """Leave the jobs to Slurm."""


def read_queue() -> set[str] | None:
    """Return the numbers of the user's jobs that wait or run; None if Slurm does not say."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return {*done.stdout.split()}


def end(job: Job, submitted: submitit.Job) -> None:
    """Note how a job of Slurm has ended."""
    if submitted.state.startswith(UNSURE) and not submitted.done():
        # Its exception would wait for a result that never comes.
        said = f"job {submitted.job_id} has left Slurm's queue without a result"
    elif error := submitted.exception():
        said = reason(error)
    else:
        job.end(submitted.result())
        return
    job.end(INTERRUPTED if submitted.state.startswith(STOPPED) else 1)
    # The log may be that of an earlier job where run.py has not started in this one.
    if submitted.paths.result_pickle.exists() or not tail(job.log).strip():
        job.said = said


def reason(error: Exception) -> str:
    """Return in one line what submitit says of a failed job: the end of its trace if it has one."""
    _, *parts = re.split(r"^-{20,}$", str(error), flags=re.MULTILINE)
    lines = [line.strip() for line in "".join(parts[:1]).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("srun: error")] or lines
    return said[-1] if said else one_line(error)


def make_executor(folder: Path, parameters: dict[str, Any]) -> submitit.Executor:
    """Return what submits the jobs."""
    import submitit

    executor = submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
    executor.update_parameters(signal_delay_s=NOTICE, job_name="sweep", **parameters)
    return executor


def read_options(text: str) -> dict[str, str | bool]:
    """Return sbatch's options by name.

    Raises:
        InputError: a word is no option, or there is no time limit.
    """
    words = re.findall(r"--([\w-]+)(?:=(\S+))?(?=\s|$)", text)
    options = {name: value or True for name, value in words}
    if len(words) != len(text.split()) or "time" not in options:
        raise InputError(
            f"--slurm {text}: write sbatch's options as --name=value, with the longest time of a "
            'job, as in "--gres=gpu:1 --time=24:00:00"'
        )
    return options
