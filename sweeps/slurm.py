"""A sweep as a job array of Slurm, with submitit (pip install submitit)."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.running import INTERRUPTED, SCRIPT, Job, start
from utils import InputError, one_line, write_json

if TYPE_CHECKING:
    import submitit

# In the sweep's folder: the numbers of the jobs, and submitit's own files.
JOBS, FOLDER = "slurm.json", "slurm"
# Slurm requeues a job this many times after its time limit or a preemption.
RESTARTS = 1000
# A run saves its checkpoint this many seconds before its time limit.
NOTICE = 120
# States of jobs that Slurm will still run; sacct may not know a new job yet.
UNFINISHED = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED"}
UNFINISHED |= {"UNKNOWN", "PREEMPTED", "READY"}


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
    """Runs jobs as a job array, and follows those that an earlier sweep has submitted.

    Args:
        jobs: those that wait are submitted.
        options: sbatch's, as on its command line.
        folder: of the sweep.
        number: jobs at a time; None: as many as Slurm allows.

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or an option is invalid.
    """

    farewell = "the jobs stay with Slurm (scancel ends them); the same command follows them again"

    def __init__(self, jobs: Sequence[Job], options: str, folder: Path, number: int | None) -> None:
        self.jobs = jobs
        parameters = read_options(options)
        if number is not None:
            parameters["array_parallelism"] = number
        # The nodes import this module.
        paths = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        executor = make_executor(folder.resolve() / FOLDER, parameters)
        file = folder / JOBS
        numbers = json.loads(file.read_text()) if file.is_file() else {}
        earlier = {
            name: executor.job_class(executor.folder, number) for name, number in numbers.items()
        }
        self.submitted = {name: job for name, job in earlier.items() if job.state in UNFINISHED}
        waiting = [j for j in jobs if j.state == "waiting" and j.name not in self.submitted]
        if waiting:
            lines, logs = [job.words for job in waiting], [job.log for job in waiting]
            array = executor.map_array(RunOnNode(), lines, logs)
            self.submitted |= {job.name: one for job, one in zip(waiting, array, strict=True)}
            write_json(file, {name: one.job_id for name, one in self.submitted.items()})

    def look(self) -> None:
        """Ask Slurm for the states of the jobs."""
        for job in self.jobs:
            if job.is_over:
                continue
            submitted = self.submitted[job.name]
            if submitted.done():
                job.end(_exit_code(submitted))
            elif submitted.state == "RUNNING":
                job.state = "running"

    def stop(self) -> None:
        """Leave the jobs to Slurm."""


def _exit_code(submitted: Any) -> int:
    if submitted.exception() is None:
        return submitted.result()
    return INTERRUPTED if submitted.state.startswith("CANCELLED") else 1


def make_executor(folder: Path, parameters: dict[str, Any]) -> submitit.Executor:
    """Return submitit's executor.

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or an option is invalid.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("--slurm needs submitit: pip install submitit, or use --jobs") from error
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
        executor.update_parameters(signal_delay_s=NOTICE, job_name="sweep", **parameters)
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise InputError(
            f"--slurm: {one_line(error)}; install Slurm's sbatch, or use --jobs"
        ) from error
    return executor


def read_options(text: str) -> dict[str, Any]:
    """Return sbatch's options as submitit takes them: the time in minutes, the others unchanged.

    Raises:
        InputError: a word is no option, or there is no valid time.
    """
    options: dict[str, Any] = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--slurm {text}: {one_line(error)}; close the quotation") from error
    for word in words:
        match = re.fullmatch(r"--([\w-]+)(?:=(.+))?", word)
        if not match:
            raise InputError(
                f"--slurm {text}: {word} is no option of sbatch; write --name=value, as in "
                '"--gres=gpu:1 --time=24:00:00"'
            )
        options[match[1]] = match[2] or True
    if "time" not in options:
        raise InputError(f"--slurm {text}: give the longest time of a job, as in --time=24:00:00")
    return {"time": minutes(str(options.pop("time"))), "additional_parameters": options}


def minutes(text: str) -> int:
    """Return Slurm's time in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise InputError(f"--slurm --time={text}: give a time as in 24:00:00 or 2-12:00:00")
    days, *parts = match.groups(default="0")
    if match[1] is None and match[4] is None:
        parts = ["0", *parts[:2]]  # M or M:S
    hours, whole, seconds = map(int, parts)
    return max(1, int(days) * 1440 + hours * 60 + whole + (seconds > 0))
