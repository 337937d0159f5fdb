"""A sweep as a job array of Slurm, with submitit (pip install submitit)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.running import INTERRUPTED, SCRIPT, Job, start
from utils import InputError, one_line, read_json, write_json

if TYPE_CHECKING:
    import submitit

# In the sweep's folder: the numbers of the jobs, and submitit's own files.
JOBS, FOLDER = "slurm.json", "slurm"
# Slurm requeues a job this many times after its time limit or a preemption.
RESTARTS = 1000
# A run saves its checkpoint this many seconds before its time limit.
NOTICE = 120
# States of jobs that have ended. sacct may not know a new job yet.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


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
        parameters: dict[str, Any] = {"additional_parameters": read_options(options)}
        if number is not None:
            parameters["array_parallelism"] = number
        # The nodes import this module.
        paths = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            executor = make_executor(folder.resolve() / FOLDER, parameters)
            numbers = read_json(file).items()
            earlier = {name: executor.job_class(executor.folder, n) for name, n in numbers}
            self.submitted = {n: j for n, j in earlier.items() if not j.state.startswith(ENDED)}
            new = [job for job in self.jobs if job.name not in self.submitted]
            words, logs = [job.words for job in new], [job.log for job in new]
            array = executor.map_array(RunOnNode(), words, logs) if new else []
        except ImportError as error:
            way_out = "pip install submitit, or use --jobs"
            raise InputError(f"--slurm needs submitit: {way_out}") from error
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            way_out = "correct the options, or use --jobs"
            raise InputError(f"--slurm {options}: {one_line(error)}; {way_out}") from error
        self.submitted |= {job.name: one for job, one in zip(new, array, strict=True)}
        write_json(file, {name: one.job_id for name, one in self.submitted.items()})

    def look(self) -> None:
        """Ask Slurm for the states of the jobs."""
        for job in self.jobs:
            submitted = self.submitted[job.name]
            if job.is_over:
                continue
            if not submitted.done():
                job.state = "running" if submitted.state == "RUNNING" else job.state
            elif submitted.exception() is None:
                job.end(submitted.result())
            else:
                job.end(INTERRUPTED if submitted.state.startswith("CANCELLED") else 1)

    def stop(self) -> None:
        """Leave the jobs to Slurm."""


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
