"""A sweep as a job array of Slurm, by submitit (pip install submitit)."""

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

from sweeps.jobs import INTERRUPTED, SCRIPT, Job, start
from utils import InputError, one_line, write_json

if TYPE_CHECKING:
    import submitit

# Beside the runs: the numbers of their jobs, and what submitit keeps.
JOBS, FOLDER = "slurm.json", "slurm"
# A job that is cut off by its time limit, or preempted, is put into the queue again so many times.
RESTARTS = 1000
# Seconds before the end in which a run saves its checkpoint.
NOTICE = 120
# States in which Slurm has not done with a job; sacct may not know a new one yet.
UNFINISHED = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED"}
UNFINISHED |= {"UNKNOWN", "PREEMPTED", "READY"}


class RunOnNode:
    """Runs a job's command line on the node that Slurm gives it; goes on after a preemption."""

    def __init__(self, script: Path, words: Sequence[str], log: Path) -> None:
        self.script, self.words, self.log = script, list(words), log
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run to the end; returns the exit code."""
        self.process = start(
            self.script, self.words, self.log, os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        return self.process.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the run save its checkpoint; returns what Slurm is to start again."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGUSR2)
            self.process.wait()
        return submitit.helpers.DelayedSubmission(RunOnNode(self.script, self.words, self.log))


class JobArray:
    """Runs jobs as an array, and looks after those that an earlier sweep has sent.

    Args:
        jobs: the runs, in their order.
        options: sbatch's, as on its command line.
        folder: of the sweep.
        number: jobs at a time; None: as many as Slurm allows.

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or an option makes no sense.
    """

    def __init__(self, jobs: Sequence[Job], options: str, folder: Path, number: int | None) -> None:
        self.jobs, self.file = jobs, folder / JOBS
        parameters = read_options(options)
        if number is not None:
            parameters["array_parallelism"] = number
        # The jobs read this module.
        paths = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self.executor = make_executor(folder.resolve() / FOLDER, parameters)
        self.sent: dict[str, Any] = {}
        for name, number_of_job in self._earlier().items():
            known = self.executor.job_class(self.executor.folder, number_of_job)
            if known.state in UNFINISHED:
                self.sent[name] = known

    def look(self) -> None:
        """Send what waits, and ask Slurm for the states of the others."""
        waiting = [job for job in self.jobs if job.state == "waiting" and job.name not in self.sent]
        if waiting:
            with self.executor.batch():
                sent = [
                    self.executor.submit(RunOnNode(SCRIPT, job.words, job.log)) for job in waiting
                ]
            self.sent |= {job.name: one for job, one in zip(waiting, sent, strict=True)}
            write_json(self.file, {name: one.job_id for name, one in self.sent.items()})
        for job in self.jobs:
            if job.state in ("waiting", "running") and job.name in self.sent:
                self._look_at(job)

    def stop(self) -> None:
        """Leave the jobs to Slurm."""
        print("the jobs stay with Slurm (scancel ends them); the same command looks after them")

    def _look_at(self, job: Job) -> None:
        sent = self.sent[job.name]
        if sent.done():
            if job.state == "waiting":
                job.begin()
            job.end(self._exit_code(sent))
        elif sent.state == "RUNNING" and job.state == "waiting":
            job.begin()

    @staticmethod
    def _exit_code(sent: Any) -> int:
        error = sent.exception()
        if error is None:
            return sent.result()
        return INTERRUPTED if sent.state.startswith("CANCELLED") else 1

    def _earlier(self) -> dict[str, str]:
        return json.loads(self.file.read_text()) if self.file.is_file() else {}


def make_executor(folder: Path, parameters: dict[str, Any]) -> submitit.Executor:
    """Return what sends jobs to Slurm.

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or an option makes no sense.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("--slurm needs submitit: pip install submitit, or use --jobs") from error
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
        executor.update_parameters(signal_delay_s=NOTICE, job_name="sweep", **parameters)
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        reason = one_line(error)
        raise InputError(f"--slurm: {reason}; sbatch has to be there, or use --jobs") from error
    return executor


def read_options(text: str) -> dict[str, Any]:
    """Return sbatch's options as submitit takes them: the time in minutes, others as they are.

    Raises:
        InputError: a word is no option, or there is no time.
    """
    options: dict[str, Any] = {}
    for word in shlex.split(text):
        match = re.fullmatch(r"--([\w-]+)(?:=(.+))?", word)
        if not match:
            raise InputError(
                f"--slurm {text}: {word} is no option of sbatch; write --name=value, as in "
                '"--gres=gpu:1 --time=24:00:00"'
            )
        options[match[1]] = True if match[2] is None else match[2]
    if "time" not in options:
        raise InputError(f"--slurm {text}: give the longest time of a job, as in --time=24:00:00")
    return {"time": minutes(options.pop("time")), "additional_parameters": options}


def minutes(text: str | bool) -> int:
    """Return Slurm's time in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(text))
    if not match:
        raise InputError(f"--slurm --time={text}: give a time as in 24:00:00 or 2-12:00:00")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None or len(numbers) == 3:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (mins, seconds) = 0, [*numbers, 0][:2]
    whole = int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)
    return max(1, whole)
