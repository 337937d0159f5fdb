"""A grid of runs: start them side by side, resume them after a stop, and find the best setting.

python sweep.py GRID.yaml
python sweep.py --learning_rate 1e-6 1e-7 --seed 0 1 2 -- ARGUMENTS OF run.py
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import signal
import sys
from argparse import RawTextHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from command_line.arguments import Arguments, parse_arguments
from command_line.checks import check
from command_line.settings import changed_settings, name_run, settle_dtype
from experiment.folders import locked
from experiment.options import options_of
from experiment.plan import make_plan, shown_time
from experiment.preparation import Prepared, prepare
from experiment.results import USED, earlier_result, is_wanted_again
from language_model.loading import leave_out_loading_bars
from sweeps.grid import Grid, Run, read_grid, words_of
from sweeps.results import MISSING, RECORD, SEEDS, Outcome, name_data, read_outcomes, read_record
from sweeps.running import Job, Processes, follow
from sweeps.slurm import JobArray
from sweeps.tables import best, in_words
from utils import InputError, Interrupted, OneLineParser, exit_code, write_json

USAGE = "python sweep.py [GRID.yaml] [--NAME VALUES…]… [OPTIONS] [-- ARGUMENTS OF run.py]"
DESCRIPTION = """\
  python sweep.py runs/grids/hizoo.yaml -- --model_name facebook/opt-13b --task_name CB
  python sweep.py --learning_rate 1e-6 1e-7 --seed 0 1 2 --jobs 2 -- --task_name SST2 …
  python sweep.py --method '{lora: True, zo_eps: 1e-2}' '{prefix_tuning: True, zo_eps: 1e-1}' -- …

GRID.yaml holds arguments of run.py. Lists multiply; lists of {…} under a name of your own are
values that belong together. --NAME gives a list of values; it replaces the file's. What follows --
goes to every run, and replaces the file's values, too.

--slurm takes options of sbatch, as in "--gres=gpu:1 --time=24:00:00". It needs submitit; --jobs
then bounds the array.

The same command again skips finished runs and resumes the others. Exit codes: 0 all runs have
finished, 1 some failed, 2 bad input, 130 interrupted."""
SHARE = "each with its share of the cores or a GPU of its own"
ROOT = Path(__file__).resolve().parent
# Seconds in which a run imports its libraries and loads its model, beside what it plans.
START_UP = 10.0
# Runs that differ in nothing else have the same samples.
WITHOUT_EFFECT_ON_SAMPLES = {*SEEDS, "learning_rate", "hessian_smooth_type", "hessian", "zo_eps"}


def make_parser() -> OneLineParser:
    """Return the parser of the sweep's own options."""
    parser = OneLineParser(
        "sweep.py",
        USAGE,
        DESCRIPTION,
        formatter_class=RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add, folder = parser.add_argument, "result/<name of the file>, or result/sweep-<hash>"
    add("--output_dir", metavar="DIR", type=Path, help=f"folder of the runs. Default: {folder}")
    add("--jobs", metavar="N", type=at_least_one, help=f"runs at a time, {SHARE}. Default: 1")
    add("--slurm", metavar="OPTIONS", help="submit the runs as a job array; see above")
    add(
        "--dry_run", action="store_true", help="print what differs between the runs, and their cost"
    )
    return parser


def at_least_one(text: str) -> int:
    """Return a number of jobs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def read_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, Grid]:
    """Return the sweep's own options and its grid.

    Raises:
        InputError: a value is missing or wrong, or something is given twice.
    """
    words, further = list(argv), []
    if "--" in words:
        border = words.index("--")
        words, further = words[:border], words[border + 1 :]
    if "--slurm" in words[:-1]:  # its value begins with dashes, too
        at = words.index("--slurm")
        words[at : at + 2] = [f"--slurm={words[at + 1]}"]
    options, words = make_parser().parse_known_args(words)
    files, lists = [], {}
    values = files
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, _, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name in lists:
            raise InputError(f"--{name} is given twice: give all of its values once")
        values = lists[name] = [value] if value else []
    if len(files) > 1:
        raise InputError(f"{files[1]}: a second grid, beside {files[0]}; give one")
    if options.output_dir is None:
        content = hashlib.sha256(json.dumps([lists, further]).encode()).hexdigest()
        name = Path(files[0]).stem if files else f"sweep-{content[:8]}"
        options.output_dir = Path("result") / name
    return options, read_grid(Path(files[0]) if files else None, lists, further)


class Sweep:
    """The runs of a grid in a folder.

    Args:
        grid: of the runs.
        folder: of their files.

    Raises:
        InputError: run.py would refuse a run.
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.folder, self.runs = grid, folder, grid.runs()
        self.arguments: dict[str, Arguments] = {}
        for run in self.runs:
            try:
                self.arguments[run.name] = arguments = parse_arguments(self.words(run))
                check(arguments)
                settle_dtype(arguments)
            except InputError as error:
                raise InputError(f"{run.name}: {error}") from error

    def words(self, run: Run) -> tuple[str, ...]:
        """Return a run's whole command line."""
        places = {"result_file": f"{self.folder / run.name}.json"}
        if run.given.get("trainer", "none") != "none":  # only training writes checkpoints
            places["output_dir"] = str(self.folder / run.name)
        return (*run.words, *words_of(places))

    def is_finished(self, run: Run) -> bool:
        """Whether a run has its result and is not to be repeated.

        Raises:
            InputError: the result is one of another model or other data.
        """
        arguments = self.arguments[run.name]
        if not arguments.result_path.is_file():
            return False
        name_run(arguments)
        try:
            options = options_of(arguments)
            earlier = earlier_result(options.files, options.identity)
            return bool(earlier) and not is_wanted_again(options.files)
        except InputError as error:
            reason = str(error).partition(": give another")[0]
            raise InputError(
                f"{reason}: give another --output_dir, or --overwrite_output_dir behind --"
            ) from error

    def outcomes(self, run: Run) -> list[Outcome]:
        """Return the results of a run, with the grid's arguments as its settings."""
        path, settings = self.arguments[run.name].result_path, dict(run.given)
        task = self.arguments[run.name].task.name
        missing = Outcome.of(path, {"task": task, "settings": settings}, is_finished=False)
        found = read_outcomes(path) or [missing]
        return [dataclasses.replace(each, settings=settings) for each in found]

    def check_record(self) -> None:
        """Refuse a folder that holds another grid; the same grid may grow or shrink.

        Raises:
            InputError: names a run that differs.
        """
        recorded = {name: run.get("words") for name, run in read_record(self.folder).items()}
        wanted = {run.name: list(run.words) for run in self.runs}
        shared = [name for name in wanted if wanted[name] == recorded.get(name)]
        if len(shared) < min(len(wanted), len(recorded)):
            other = next(name for name in recorded if name not in shared)
            raise InputError(
                f"--output_dir {self.folder} holds another grid, as {other} shows: give another "
                "--output_dir, or the same grid, which may grow"
            )

    def write_record(self) -> None:
        """Write what the runs are; runs of an earlier and larger grid stay."""
        record = read_record(self.folder)
        for run in self.runs:
            arguments = self.arguments[run.name]
            settings = changed_settings(arguments)
            # "auto" and None stand for a value that only the result tells.
            known = {n: v for n, v in settings.items() if n not in USED or v not in (None, "auto")}
            task = {"task": arguments.task.name, "metric": arguments.task.metric_name}
            record[run.name] = {**task, "words": run.words, "settings": known}
        write_json(self.folder / RECORD, {"runs": record})


def command(words: Sequence[str]) -> str:
    """Return a run's command line for the folder in which this one was typed."""
    return shlex.join(["python", os.path.relpath(ROOT / "run.py"), *words])


def print_plans(sweep: Sweep, jobs: int) -> None:
    """Print what differs between the runs, their forward passes, and the time that is left."""
    prepared: dict[str, Prepared] = {}
    rows, plans, took = [], {}, {}
    for run in sweep.runs:
        arguments = sweep.arguments[run.name]
        samples = {n: v for n, v in run.given.items() if n not in WITHOUT_EFFECT_ON_SAMPLES}
        if repr(samples) not in prepared:
            prepared[repr(samples)] = prepare(options_of(arguments))
        plan = plans[run.name] = make_plan(options_of(arguments), prepared[repr(samples)])
        if sweep.is_finished(run):
            took[run.name] = sweep.outcomes(run)[0].numbers.get("seconds", 0.0)
        passes = {"training": plan.forward_passes, "evaluation": plan.evaluation_passes}
        passes = {f"forward passes of {name}": f"{number:,}" for name, number in passes.items()}
        state = "finished" if run.name in took else f"about {shown_time(plan.seconds + START_UP)}"
        rows.append({**run.choice, "steps": f"{plan.steps:,}", **passes, "": state})
    print("each run:", command((*words_of(sweep.grid.fixed), *sweep.grid.further)))
    print(pd.DataFrame(rows).fillna(MISSING).to_string(index=False))
    left = [plan for name, plan in plans.items() if name not in took]
    planned = sum(plans[name].seconds for name in took)
    # The finished runs tell how fast this machine is.
    speed = sum(took.values()) / planned if planned else 1.0
    seconds = sum(plan.seconds * speed + START_UP for plan in left) / jobs
    print(
        f"{len(left)} of {len(rows)} runs are left: about {shown_time(seconds)} with --jobs {jobs}"
    )


def carry_out(sweep: Sweep, options: argparse.Namespace) -> list[Job]:
    """Do the runs that have not finished; returns all of them.

    Raises:
        InputError: the folder holds something else, or this machine cannot run so many at a time.
        Interrupted: a signal ended the sweep.
    """
    sweep.check_record()
    jobs = [
        Job(
            run.name,
            sweep.words(run),
            sweep.folder / f"{run.name}.log",
            "finished" if sweep.is_finished(run) else "waiting",
        )
        for run in sweep.runs
    ]
    sweep.write_record()
    done = sum(job.is_over for job in jobs)
    print(f"{len(jobs)} runs in {sweep.folder}" + (f", {done} finished before" if done else ""))
    if options.slurm is None:
        runner = Processes(jobs, options.jobs or 1)
    else:
        runner = JobArray(jobs, options.slurm, sweep.folder, options.jobs)
    runs = {run.name: run for run in sweep.runs}
    try:
        follow(runner, jobs, lambda job: in_words(sweep.outcomes(runs[job.name])))
    except KeyboardInterrupt as error:
        raise Interrupted("the same command resumes") from error
    return jobs


def closing_lines(sweep: Sweep, jobs: Sequence[Job]) -> Iterator[str]:
    """Yield the failures, a line each, and the best setting of every task."""
    for job in jobs:
        if job.state in ("failed", "interrupted"):
            yield f"{job.state}: {job.name}: {job.said} ({job.log})"
    outcomes = [each for run in sweep.runs for each in sweep.outcomes(run)]
    runs = {sweep.arguments[run.name].result_path: run for run in sweep.runs}
    several = len({each.task for each in outcomes}) > 1
    for task, chosen, words in best(name_data(outcomes)):
        place = f"{task}: " if several else ""
        if not chosen:
            yield f"{place}no best setting: {words}"
            continue
        first, *others = (runs[path] for path in dict.fromkeys(each.path for each in chosen))
        setting = (f"{name} {value}" for name, value in first.choice.items() if name not in SEEDS)
        yield f"{place}best on the dev set: {', '.join(setting) or 'the only setting'}"
        yield f"  {words}"
        yield f"  {command(first.words)}"
        for other in others:
            changed = {n: v for n, v in other.choice.items() if first.choice.get(n) != v}
            yield f"  and with {shlex.join(words_of(changed))}"
    yield f"table: python {os.path.relpath(ROOT / 'report.py')} {shlex.quote(str(sweep.folder))}"


def sweep_command_line(argv: Sequence[str]) -> int:
    """Do what a command line says; returns 1 if a run has not finished."""
    options, grid = read_command_line(argv)
    sweep = Sweep(grid, options.output_dir)
    if options.dry_run:
        sweep.check_record()
        print_plans(sweep, options.jobs or 1)
        return 0
    with locked("--output_dir", sweep.folder, is_folder=True):
        jobs = carry_out(sweep, options)
        print("\n".join(closing_lines(sweep, jobs)))
    return int(any(job.state != "finished" for job in jobs))


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (``DESCRIPTION``)."""
    if not argv:
        make_parser().print_help()
        return 2
    leave_out_loading_bars()
    return exit_code(lambda: sweep_command_line(argv))


def raise_interrupt(*_: Any) -> None:
    """Let SIGTERM end a sweep as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, raise_interrupt)
    sys.exit(main(sys.argv[1:]))
