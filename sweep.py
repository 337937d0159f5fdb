"""A grid of runs: start them side by side, resume them after a stop, and find the best setting.

python sweep.py GRID.yaml
python sweep.py --learning_rate 1e-6 1e-7 --seed 0 1 2 -- ARGUMENTS OF run.py
"""

from __future__ import annotations

import os
import signal
import sys

from sweeps.grid import Grid, Run, begin, read_command_line, words_of

if __name__ == "__main__":
    # Before torch is imported, which takes seconds: Ctrl-C ends without a traceback, and what is
    # wrong is said.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    begin(sys.argv[1:])

import copy
import dataclasses
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from command_line.arguments import Arguments, check, parse_arguments
from command_line.settings import changed_settings, name_run, settle_dtype
from experiment.folders import locked
from experiment.options import options_of
from experiment.plan import make_plan
from experiment.preparation import Prepared, prepare
from experiment.results import USED, earlier_result, is_wanted_again
from language_model.loading import leave_out_loading_bars
from sweeps.results import (
    MISSING,
    SEEDS,
    read_outcomes,
    read_sweep,
    record,
    short_models,
    with_names,
    with_recorded_names,
)
from sweeps.running import SCRIPT, Job, Processes, follow
from sweeps.slurm import JobArray
from sweeps.tables import best, in_words
from utils import InputError, Interrupted, exit_code

# Decide which examples a run draws, and how they become tokens.
DRAWN = (
    *("data_dir", "num_train", "num_dev", "num_eval", "num_train_sets", "train_set_seed"),
    *("trainer", "max_length", "apply_chat_template", "system_prompt"),
)


class Sweep:
    """The runs of a grid, and their files in a folder.

    Raises:
        InputError: run.py would refuse a run.
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        self.runs = with_recorded_names(grid.runs(), folder)
        self.arguments: dict[str, Arguments] = {}
        for run in self.runs:
            try:
                self.arguments[run.name] = arguments = parse_arguments(self.words(run))
                check(arguments)
                settle_dtype(arguments)
            except InputError as error:
                raise InputError(f"{run.name}: {error}") from error
        for line in dict.fromkeys(each.warning for each in self.arguments.values()):
            if line:
                print(line, file=sys.stderr)

    def words(self, run: Run) -> tuple[str, ...]:
        """Return a run's whole command line."""
        places = {"result_file": f"{self.folder / run.name}.json"}
        if run.values.trainer != "none":  # only training writes checkpoints
            places["output_dir"] = str(self.folder / run.name)
        return (*run.words, *words_of(places))

    def job(self, run: Run) -> Job:
        """Return what is to be done for a run: nothing if its result is there.

        Raises:
            InputError: the result is one of another model or other data.
        """
        arguments, log = self.arguments[run.name], self.folder / f"{run.name}.log"
        job = Job(run.name, self.words(run), log, arguments.result_path)
        if job.result.is_file():
            name_run(arguments)
            options = options_of(arguments)
            if earlier_result(options) is not None and not is_wanted_again(options):
                job.state = "finished"
        return job

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return what the sweep's record says of each run."""
        entries = {}
        for run in self.runs:
            arguments = self.arguments[run.name]
            settings = changed_settings(arguments)
            # "auto" and None stand for a value that only the result tells.
            known = {n: v for n, v in settings.items() if n not in USED or v not in (None, "auto")}
            task = {"task": arguments.task.name, "metric": arguments.task.metric_name}
            entries[run.name] = {**task, "words": list(run.words), "settings": known}
        return entries


def command(words: Sequence[str]) -> str:
    """Return a run's command line for the folder in which this one was typed."""
    return shlex.join(["python", os.path.relpath(SCRIPT), *words])


def print_plans(sweep: Sweep) -> None:
    """Print what differs between the runs, and the steps and forward passes of each."""
    prepared: dict[str, Prepared] = {}
    rows = []
    for run in sweep.runs:
        arguments = copy.copy(sweep.arguments[run.name])
        arguments.seed = 0  # seeds change no number of a plan
        if arguments.train_set_seed is not None:
            arguments.train_set_seed = 0
        options = options_of(arguments)
        drawn = [getattr(arguments, name) for name in DRAWN]
        needed = repr((options.model, options.weights, options.generation, options.task, drawn))
        if needed not in prepared:
            prepared[needed] = prepare(options)
        plan = make_plan(options, prepared[needed])
        row = {"steps": f"{plan.steps:,}", "forward passes": f"{plan.forward_passes:,}"}
        state = "finished" if sweep.job(run).is_over else "left"
        rows.append({**run.choice, **row, "": state})
    table = pd.DataFrame(rows).fillna(MISSING)
    if "model_name" in table:
        table["model_name"] = table["model_name"].map(short_models(table["model_name"]))
    shared = [name for name in ("steps", "forward passes", "") if table[name].nunique() == 1]
    print("each run:", command((*words_of(sweep.grid.fixed), *sweep.grid.further)))
    if numbers := [f"{table[name].iloc[0]} {name}" for name in shared if name]:
        print("each run:", ", ".join(numbers))
    print(table.drop(columns=shared).to_string(index=False))
    print(f"{sum(row[''] == 'left' for row in rows)} of {len(rows)} runs are left")


def carry_out(sweep: Sweep, options: Namespace) -> list[Job]:
    """Do the runs that have not finished; returns all of them.

    Raises:
        InputError: the folder holds something else, or this machine cannot run so many at a time.
        Interrupted: a signal ended the sweep.
    """
    jobs = [sweep.job(run) for run in sweep.runs]
    record(sweep.folder, sweep.entries(), writes=True)
    done = sum(job.is_over for job in jobs)
    print(f"{len(jobs)} runs in {sweep.folder}" + (f", {done} finished before" if done else ""))
    if options.slurm is None:
        runner = Processes(jobs, options.jobs or 1)
    else:
        runner = JobArray(jobs, options.slurm, sweep.folder, options.jobs)
    try:
        follow(runner, jobs, lambda job: in_words(read_outcomes(job.result)))
    except KeyboardInterrupt as error:
        raise Interrupted("the same command resumes") from error
    return jobs


def closing_lines(sweep: Sweep, jobs: Sequence[Job]) -> Iterator[str]:
    """Yield the failures, a line each, and the best setting of every task."""
    for job in jobs:
        if job.state != "finished":
            yield f"{job.state}: {job.name}: {job.said} ({job.log})"
    found = read_sweep(sweep.folder)
    outcomes = [
        dataclasses.replace(each, is_finished=job.state == "finished")
        for job in jobs
        for each in found[job.result]
    ]
    runs = {job.result: run for run, job in zip(sweep.runs, jobs, strict=True)}
    bests = list(best(with_names(outcomes)))
    for task, chosen, words in bests:
        place = f"{task}: " if len(bests) > 1 else ""
        if not chosen:
            yield f"{place}no best setting: {words}"
            continue
        first, *others = (runs[path] for path in dict.fromkeys(each.path for each in chosen))
        models = short_models(run.choice.get("model_name", "") for run in sweep.runs)
        choice = {name: value for name, value in first.choice.items() if name not in SEEDS}
        if "model_name" in choice:
            choice["model_name"] = models[choice["model_name"]]
        setting = ", ".join(f"{name} {value}" for name, value in choice.items())
        yield f"{place}best on the dev set: {setting or 'the only setting'}"
        yield f"  {words}"
        yield f"  {command(first.words)}"
        for other in others:
            changed = {n: v for n, v in other.choice.items() if first.choice.get(n) != v}
            yield f"  and with {shlex.join(words_of(changed))}"
    report = os.path.relpath(SCRIPT.with_name("report.py"))
    yield "table: " + shlex.join(["python", report, str(sweep.folder)])


def sweep_command_line(argv: Sequence[str]) -> int:
    """Do what a command line says; returns 1 if a run has not finished."""
    options, grid = read_command_line(argv)
    sweep = Sweep(grid, options.output_dir)
    if options.dry_run:
        record(sweep.folder, sweep.entries(), writes=False)
        print_plans(sweep)
        return 0
    with locked("--output_dir", sweep.folder, is_folder=True):
        jobs = carry_out(sweep, options)
        print("\n".join(closing_lines(sweep, jobs)))
    return int(any(job.state != "finished" for job in jobs))


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (``sweeps.grid.DESCRIPTION``)."""
    leave_out_loading_bars()
    return exit_code(lambda: sweep_command_line(argv))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        # SIGTERM does what Ctrl-C does.
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
