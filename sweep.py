"""A grid of runs: done side by side, taken up again where they were, and the best of them chosen.

python sweep.py GRID.yaml
python sweep.py --learning_rate 1e-6 1e-7 --seed 0 1 2 -- ARGUMENTS OF run.py
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line.arguments import Arguments, parse_arguments
from command_line.checks import check
from command_line.settings import name_run, settle_dtype
from experiment.folders import locked
from experiment.options import options_of
from experiment.plan import Plan, make_plan, shown_time
from experiment.preparation import Prepared, prepare
from experiment.results import earlier_result, is_wanted_again, read_result
from experiment.telling import describe
from language_model.loading import leave_out_loading_bars
from sweeps.grid import Grid, Run, read_grid, words_of
from sweeps.jobs import Job
from sweeps.running import Display, Processes, Runner, follow
from sweeps.summary import Measured, Setting, best, group, shown_choice
from utils import InputError, Interrupted, exit_code, write_json

USAGE = """\
python sweep.py [GRID.yaml] [--NAME VALUES…]… [--output_dir DIR] [--jobs N] [--slurm OPTIONS]
                [--dry_run] [-- ARGUMENTS OF run.py]

  python sweep.py runs/grids/hizoo.yaml -- --model_name facebook/opt-13b --task_name CB
  python sweep.py --learning_rate 1e-6 1e-7 --seed 0 1 2 --jobs 2 -- --task_name SST2 …
  python sweep.py --method '{lora: True, zo_eps: 1e-2}' '{prefix_tuning: True, zo_eps: 1e-1}' -- …

  GRID.yaml     arguments of run.py: lists multiply; lists of {…} under a name of your own are
                values that belong together
  --NAME        a list of values of an argument; it replaces the file's
  --output_dir  folder of the runs. Default: result/<name of the file>, or result/sweep-<hash>
  --jobs        runs at a time, each with its share of the cores, or a GPU of its own. Default: 1
  --slurm       runs as a job array, with these options of sbatch, as in
                "--gres=gpu:1 --time=24:00:00"; needs submitit. --jobs then bounds the array
  --dry_run     print the commands, their forward passes and an estimate of the time
  --            what follows goes to every run, and replaces the file's values

  The same command again skips finished runs and goes on with others. Exit codes: 0 all runs have
  finished, 1 some failed, 2 bad input, 130 interrupted.
"""
RECORD = "sweep.json"
ROOT = Path(__file__).resolve().parent


@dataclass
class Options:
    """What the command line says beside the grid.

    Attributes:
        file: of the grid; None: the command line has all of it.
        lists: of the grid, by argument.
        further: arguments of every run.
        output_dir: of the runs; None: named after the grid.
        jobs: runs at a time; None: not given.
        slurm: sbatch's options; None: the runs are processes here.
        dry_run: whether only to tell.
    """

    file: Path | None = None
    lists: dict[str, list[str]] = field(default_factory=dict)
    further: list[str] = field(default_factory=list)
    output_dir: Path | None = None
    jobs: int | None = None
    slurm: str | None = None
    dry_run: bool = False

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read a command line.

        Raises:
            InputError: a value is missing, or there are two files.
        """
        words = list(argv)
        border = words.index("--") if "--" in words else len(words)
        options = cls(further=words[border + 1 :])
        words = words[:border]
        while words:
            word = words.pop(0)
            name, _, value = word.removeprefix("--").partition("=")
            if not word.startswith("--"):
                if options.file:
                    raise InputError(f"{word}: a second grid, beside {options.file}; give one")
                options.file = Path(word)
            elif name == "dry_run":
                options.dry_run = True
            elif name in ("output_dir", "jobs", "slurm"):
                # Options of sbatch begin with dashes, too.
                if not value and (not words or (name != "slurm" and words[0].startswith("--"))):
                    raise InputError(f"--{name}: its value is missing")
                options._set(name, value or words.pop(0))
            else:
                values = [value] if value else []
                while words and not words[0].startswith("--"):
                    values.append(words.pop(0))
                options.lists[name.replace("-", "_")] = values
        return options

    def _set(self, name: str, value: str) -> None:
        if name == "output_dir":
            self.output_dir = Path(value)
        elif name == "slurm":
            self.slurm = value
        elif not value.isdecimal() or int(value) < 1:
            raise InputError(f"--jobs {value}: must be a whole number, at least 1")
        else:
            self.jobs = int(value)


@dataclass(frozen=True)
class Sweep:
    """The runs of a grid, and where their files are.

    Attributes:
        runs: all of them.
        folder: of their files.
        arguments: of run.py, as it will read them, by the runs' names.
    """

    runs: list[Run]
    folder: Path
    arguments: dict[str, Arguments]

    @classmethod
    def of(cls, grid: Grid, folder: Path) -> Sweep:
        """Read every run's command line, and refuse what run.py would refuse.

        Raises:
            InputError: a run's arguments make no sense.
        """
        sweep = cls(grid.runs(), folder, {})
        for run in sweep.runs:
            try:
                arguments = parse_arguments((*run.words, *words_of(sweep._result_file(run))))
                sweep.arguments[run.name] = arguments
                check(arguments)
                settle_dtype(arguments)
            except InputError as error:
                raise InputError(f"{run.name}: {error}") from error
            arguments.output_dir = str(folder / run.name)
        return sweep

    def _result_file(self, run: Run) -> dict[str, str]:
        return {"result_file": f"{self.folder / run.name}.json"}

    def words(self, run: Run) -> tuple[str, ...]:
        """Return a run's whole command line."""
        places = self._result_file(run)
        if self.arguments[run.name].trainer != "none":  # nothing else has checkpoints
            places["output_dir"] = str(self.folder / run.name)
        return (*run.words, *words_of(places))

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return a run's result, None if it has not finished."""
        return read_result(self.arguments[run.name].result_path) or None

    def is_finished(self, run: Run) -> bool:
        """Whether the run has its result, and is not wanted anew.

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

    def check_record(self) -> None:
        """Refuse a folder that holds another grid; one that is a part of this one may grow.

        Raises:
            InputError: names a run that differs.
        """
        file = self.folder / RECORD
        if not file.is_file():
            return
        recorded = json.loads(file.read_text())["runs"]
        wanted = {run.name: list(run.words) for run in self.runs}
        shared = [name for name in wanted if wanted[name] == recorded.get(name)]
        if len(shared) < min(len(wanted), len(recorded)):
            other = next(name for name in recorded if name not in shared)
            raise InputError(
                f"--output_dir {self.folder} holds another grid, as {other} shows: give another "
                "--output_dir, or the same grid, which may grow"
            )

    def write_record(self) -> None:
        """Write which runs there are, those of an earlier and larger grid too."""
        file = self.folder / RECORD
        earlier = json.loads(file.read_text()) if file.is_file() else {"runs": {}, "choices": {}}
        runs = {run.name: list(run.words) for run in self.runs}
        choices = {run.name: run.choice for run in self.runs}
        record = {"runs": earlier["runs"] | runs, "choices": earlier["choices"] | choices}
        write_json(file, record)


def default_folder(options: Options, grid: Grid) -> Path:
    """Return where the runs go: a folder called after the grid's file, or after its content."""
    if options.file:
        return Path("result") / options.file.stem
    content = json.dumps([grid.fixed, grid.axes, grid.further])
    return Path("result") / f"sweep-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def command(words: Sequence[str]) -> str:
    """Return the command line of a run, to be pasted where this one was typed."""
    return shlex.join(["python", os.path.relpath(ROOT / "run.py"), *words])


# ---------------------------------------------------------------------------------- telling only


def tell(sweep: Sweep, jobs: int) -> None:
    """Print every run's command and forward passes, and the time of all that is left.

    The time of a forward pass comes from the runs that have finished, or else from the machine.
    """
    plans = make_plans(sweep)
    left, training, evaluation = 0.0, 0, 0
    speed = measured_speed(sweep, plans)
    for run in sweep.runs:
        plan = plans[run.name]
        print(command(sweep.words(run)))
        if sweep.is_finished(run):
            print("  has finished")
            continue
        print(f"  {next(plan.lines())}")
        training += plan.forward_passes
        evaluation += plan.evaluation_passes
        left += plan.seconds * speed
    source = "by the runs that have finished" if speed != 1 else "without any run to go by"
    print(
        f"{len(sweep.runs)} runs, {training:,} forward passes of training and {evaluation:,} of "
        f"evaluation are left: about {shown_time(left / jobs)}"
        f"{f' with --jobs {jobs}' if jobs > 1 else ''}, {source}"
    )


def make_plans(sweep: Sweep) -> dict[str, Plan]:
    """Return what each run takes; examples are read once for all runs that share them."""
    prepared: dict[tuple, Prepared] = {}
    plans = {}
    for name, arguments in sweep.arguments.items():
        words = ("task_name", "data_dir", "train_file", "validation_file", "model_name", "trainer")
        numbers = ("num_train", "num_dev", "num_eval", "num_train_sets", "max_length", "num_prefix")
        key = tuple(getattr(arguments, each) for each in (*words, *numbers, "max_new_tokens"))
        options = options_of(arguments)
        if key not in prepared:
            prepared[key] = prepare(options)
        plans[name] = make_plan(options, prepared[key])
    return plans


def measured_speed(sweep: Sweep, plans: dict[str, Plan]) -> float:
    """Return how many times as long as planned the finished runs took; 1 without any."""
    took, planned = 0.0, 0.0
    for run in sweep.runs:
        result = sweep.result(run)
        if result:
            took, planned = took + result["seconds"], planned + plans[run.name].seconds
    return took / planned if planned else 1.0


# ------------------------------------------------------------------------------------------ doing


def carry_out(sweep: Sweep, options: Options) -> list[Job]:
    """Do every run that has not finished; returns all of them in their last state.

    Raises:
        InputError: the folder holds something else, or the machine cannot do it.
        Interrupted: a signal ended it.
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
    number = options.jobs or 1
    runner = make_runner(jobs, options, sweep.folder)
    sweep.write_record()
    done = sum(job.state == "finished" for job in jobs)
    print(f"{len(jobs)} runs in {sweep.folder}" + (f", {done} finished before" if done else ""))
    runs = {run.name: run for run in sweep.runs}

    def describe_result(job: Job) -> str:
        result = sweep.result(runs[job.name]) or {}
        kinds = {"dev_metric": "dev", "metric": "test"}
        return ", ".join(
            f"{words} {next(iter(result[kind]))} {describe(result[kind])}"
            for kind, words in kinds.items()
            if kind in result
        )

    at_a_time = len(jobs) if options.slurm and not options.jobs else number
    display = Display(jobs, at_a_time, describe_result)
    try:
        follow(runner, jobs, display)
    except KeyboardInterrupt as error:
        raise Interrupted("the same command goes on") from error
    display.clear()
    return jobs


def make_runner(jobs: Sequence[Job], options: Options, folder: Path) -> Runner:
    """Return what runs the jobs: processes here, or a job array."""
    if options.slurm is None:
        return Processes(jobs, options.jobs or 1)
    from sweeps.slurm import JobArray

    return JobArray(jobs, options.slurm, folder, options.jobs)


# --------------------------------------------------------------------------------------- the best


def closing_lines(sweep: Sweep, jobs: Sequence[Job]) -> Iterator[str]:
    """Yield failures, a line each, and for every problem what is best on its dev set."""
    for job in jobs:
        if job.state in ("failed", "interrupted"):
            yield f"{job.state}: {job.name}: {job.said} ({job.log})"
    runs = {run.name: run for run in sweep.runs}
    problems = group((run.name, run.choice, sweep.result(run)) for run in sweep.runs)
    for problem, settings in problems.items():
        place = f"{', '.join(problem)}: " if problem else ""
        chosen = best(settings)
        if chosen is None:
            whole = any(setting.is_whole for setting in settings)
            reason = (
                "no run has a dev set (--num_dev), by which one would be chosen"
                if whole
                else "no setting has finished with all of its seeds"
            )
            yield f"{place}no best setting: {reason}"
            continue
        yield f"{place}best on the dev set: {shown_choice(chosen.choice)}"
        yield f"  {', '.join(chosen_metrics(chosen))}"
        first, *others = (runs[name] for name in chosen.names)
        yield f"  {command(first.words)}"
        if others:
            yield f"  and with {', '.join(difference(first, other) for other in others)}"
        partial = [setting for setting in settings if not setting.is_whole]
        if partial:
            yield f"  of {len(settings)} settings, {len(partial)} without all of their runs"
    yield f"table: python {os.path.relpath(ROOT / 'report.py')} {shlex.quote(str(sweep.folder))}"


def difference(first: Run, other: Run) -> str:
    """Return the arguments in which one run differs from another."""
    changed = {n: value for n, value in other.choice.items() if first.choice.get(n) != value}
    return shlex.join(words_of(changed))


def chosen_metrics(setting: Setting) -> Iterator[str]:
    """Yield the metrics of a setting, means over its runs."""
    for kind, words in (("dev_metric", "dev"), ("metric", "test")):
        if found := setting.metric(kind):
            yield f"{words} {found[0]} {found[1].text()}"
    loss: Measured | None = setting.dev_loss()
    if loss:
        yield f"dev loss {loss.text()}"
    yield f"{len(setting.names)} runs" if len(setting.names) > 1 else "1 run"


def sweep_command_line(argv: Sequence[str]) -> int:
    """Read the command line, do its runs or tell them; returns whether one has not finished."""
    options = Options.read(argv)
    grid = read_grid(options.file, options.lists, options.further)
    sweep = Sweep.of(grid, options.output_dir or default_folder(options, grid))
    if options.dry_run:
        sweep.check_record()
        tell(sweep, options.jobs or 1)
        return 0
    with locked("--output_dir", sweep.folder, is_folder=True):
        jobs = carry_out(sweep, options)
    print("\n".join(closing_lines(sweep, jobs)))
    return int(any(job.state != "finished" for job in jobs))


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code: see ``USAGE``."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE)
        return 0 if argv else 2
    leave_out_loading_bars()
    return exit_code(lambda: sweep_command_line(argv))


def raise_interrupt(*_: Any) -> None:
    """Let SIGTERM end a sweep as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, raise_interrupt)
    sys.exit(main(sys.argv[1:]))
