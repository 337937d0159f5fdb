"""The command line of sweep.py, and the runs of a grid.

Lists multiply, and values that belong together stay together.

A grid is a YAML file, ``--NAME VALUES…`` on the command line, or both; the command line wins:

    task_name: SST2                 # for every run
    learning_rate: [1e-6, 1e-7]     # two values
    seed: [0, 1]                    # times two
    method:                         # times two; a name of your own holds groups of arguments
      - {hessian_smooth_type: constant0}
      - {hessian_smooth_type: constant1e-8, hessian: lowrank}
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from command_line.config_files import NO_VALUE, Entry, Loader, read_yaml, typed
from command_line.contradictions import check_values
from command_line.reading import (
    OWN,
    Values,
    argument_name,
    explain_unknown,
    given_names,
    read_values,
)
from utils import InputError, OneLineParser, exit_code
from zeroth_order.config import smoothing_of

# Arguments by name, as the user types them.
Typed = dict[str, str]

# The sweep sets these for every run.
OF_THE_SWEEP = ("output_dir", "result_file", "tag", "predictions_file", "resume_from_checkpoint")
# With these run.py writes no result.
WITHOUT_RESULT = ("dry_run", "predict_file")
# File systems allow 255 bytes; a hash, a suffix and a temporary file's name are added.
READABLE_NAME = 150


@dataclass(frozen=True)
class Run:
    """One run of a grid."""

    name: str  # the stem of its files in the sweep's folder
    choice: Typed  # its values of the grid's lists
    words: tuple[str, ...]  # its command line without the places of its files
    values: Values  # their meaning


@dataclass(frozen=True)
class Grid:
    """The runs that are asked for."""

    fixed: Typed  # arguments of every run
    axes: dict[str, list[Typed]]  # the choices of each list
    further: tuple[str, ...]  # words that end every command line

    def runs(self) -> list[Run]:
        """Return every run; the last list changes fastest.

        Raises:
            InputError: an argument is in two lists, two runs are the same, or a value is invalid.
        """
        names = [*self.fixed, *itertools.chain(*map(_names_in, self.axes.values()))]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"--{min(twice)} is in the grid twice: give it once")
        runs: dict[str, Run] = {}
        meanings: set[str] = set()
        for choices in itertools.product(*self.axes.values()):
            choice = {name: value for each in choices for name, value in each.items()}
            name = name_of(choice)
            words = (*words_of(self.fixed | choice), *self.further)
            try:
                values = read_values(words)
                check_values(values)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
            meaning = meaning_of(values)
            if meaning in meanings:
                raise InputError(f"the grid has the same run twice: {' '.join(words_of(choice))}")
            meanings.add(meaning)
            if name in runs:
                name = name_of(choice, hashed=True)
            runs[name] = Run(name, choice, words, values)
        return [*runs.values()]


def read_grid(
    file: Path | None, lists: Mapping[str, Sequence[str]], further: Sequence[str]
) -> Grid:
    """Read a grid from a YAML file and the command line, which wins.

    Args:
        file: None: there is none.
        lists: lists of the command line by name.
        further: arguments of run.py for every run.

    Raises:
        InputError: there is no such file or argument, or a list is empty or given twice.
    """
    fixed, axes = _sort(read_yaml(file) if file else {})
    _, typed_axes = _sort({name: _entry(name, words) for name, words in lists.items()})
    replaced = {*typed_axes, *itertools.chain(*map(_names_in, typed_axes.values()))}
    for name in given_names(further):
        _refuse(name)
        if name in replaced:
            raise InputError(f"--{name} is in the grid and behind --: give it once")
        for axis, choices in axes.items():
            if axis != name and name in _names_in(choices):
                raise InputError(f"--{name} is in the grid, in {axis}: leave it out behind --")
        replaced.add(name)
    fixed = {name: value for name, value in fixed.items() if name not in replaced}
    axes = {name: choices for name, choices in axes.items() if name not in replaced} | typed_axes
    if not axes:
        raise InputError("the grid has no list: give --seed 0 1 2, or seed: [0, 1, 2] in a file")
    return Grid(fixed, axes, tuple(further))


def words_of(values: Typed) -> tuple[str, ...]:
    """Return arguments as words of a command line, without those that have no value."""
    given = {name: value for name, value in values.items() if value not in NO_VALUE}
    return tuple(word for name, value in given.items() for word in (f"--{name}", value))


def name_of(choice: Typed, hashed: bool = False) -> str:
    """Return a file name for a choice; a long one or an ambiguous one ends in a hash."""
    name = ",".join(f"{name}={_for_a_file(value)}" for name, value in choice.items())
    if hashed or len(name) > READABLE_NAME:
        name = f"{name[:READABLE_NAME]}-{hash_of(json.dumps(choice, sort_keys=True))}"
    return name


def hash_of(text: str) -> str:
    """Return eight characters that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _for_a_file(value: str) -> str:
    # The last part of a path or a Hub id says what it is.
    last = value.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]", "_", last, flags=re.ASCII).lstrip(".") or "none"


def meaning_of(values: Values) -> str:
    """Return what was given, the same for 1e-4 and 0.0001, for constant1e-4 and constant0.0001."""
    meaning = dict(values.given)
    for name, value in values.given.items():
        if isinstance(value, str) and name not in OWN:  # transformers reads it
            with contextlib.suppress(ValueError):
                meaning[name] = float(value)
    if "hessian_smooth_type" in meaning:
        meaning["hessian_smooth_type"] = smoothing_of(values.hessian_smooth_type)
    return json.dumps(meaning, sort_keys=True, default=repr)


def _names_in(choices: Iterable[Typed]) -> set[str]:
    return {name for choice in choices for name in choice}


def _entry(name: str, words: Sequence[str]) -> Entry:
    """Return a list of the command line; under a name of the user's own it holds groups."""
    if not words:
        raise InputError(f"--{name}: give the values that the grid has, or put it behind --")
    # The values of an argument may begin with a brace, as --prompt_template '{text}' does.
    if argument_name(f"--{name}"):
        return Entry("the command line", list(words))
    try:
        return Entry("the command line", [yaml.load(word, Loader) for word in words])
    except yaml.YAMLError as error:
        problem, example = getattr(error, "problem", None), "'{lora: True, zo_eps: 1e-2}'"
        raise InputError(f"--{name}: {problem or 'not YAML'}; write groups as {example}") from error


def _sort(entries: Mapping[str, Entry]) -> tuple[Typed, dict[str, list[Typed]]]:
    """Part entries into arguments of every run and lists of choices."""
    fixed: Typed = {}
    axes: dict[str, list[Typed]] = {}
    for key, (place, value) in entries.items():
        values = value if isinstance(value, list) else [value]
        if not values:
            raise InputError(f"{place}: {key} is an empty list: give at least one value")
        name = argument_name(f"--{key}")
        if name is None and all(isinstance(group, dict) and group for group in values):
            axes[key] = [_typed(f"{place}: in {key}", group) for group in values]
            continue
        choices = [_typed(place, {key: each}) for each in values]
        if name in fixed or name in axes:
            raise InputError(f"{place}: --{name} is in the grid twice: give it once")
        if isinstance(value, list):
            axes[str(name)] = choices
        else:
            fixed |= choices[0]
    return fixed, axes


def _typed(place: str, group: Mapping[str, Any]) -> Typed:
    """Return arguments by their names in run.py, with their values as the user types them."""
    found: Typed = {}
    for word, value in group.items():
        name = argument_name(f"--{word}")
        if name is None:
            raise InputError(f"{place}: {explain_unknown(f'--{word}')}")
        _refuse(name)
        if name in found:
            raise InputError(f"{place}: --{name} is given twice: give it once")
        found[name] = typed(place, word, value)
    return found


def _refuse(name: str) -> None:
    """Refuse an argument that no run of a sweep has."""
    if name in WITHOUT_RESULT:
        raise InputError(f"--{name} of the runs of a sweep: they write no result; leave it out")
    if name in OF_THE_SWEEP:
        raise InputError(f"--{name} in a sweep: every run has files of its own; leave it out")


# ---- the command line

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
SHARE = "each with its share of the cores and of the GPUs"


def make_parser() -> OneLineParser:
    """Return the parser of the sweep's own options."""
    raw = argparse.RawTextHelpFormatter
    parser = OneLineParser("sweep.py", USAGE, DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    add, folder = parser.add_argument, "result/<name of the file>, or result/sweep-<hash>"
    add("--output_dir", metavar="DIR", type=Path, help=f"folder of the runs. Default: {folder}")
    add("--jobs", metavar="N", type=at_least_one, help=f"runs at a time, {SHARE}. Default: 1")
    add("--slurm", metavar="OPTIONS", help="submit the runs as a job array; see above")
    add("--dry_run", action="store_true", help="print the runs and their passes, and do nothing")
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
    border = argv.index("--") if "--" in argv else len(argv)
    words, further = list(argv[:border]), list(argv[border + 1 :])
    if "--slurm" in words[:-1]:  # its value begins with dashes, too
        at = words.index("--slurm")
        words[at : at + 2] = [f"--slurm={words[at + 1]}"]
    options, words = make_parser().parse_known_args(map(_with_underscores, words))
    files: list[str] = []
    lists: dict[str, list[str]] = {}
    values = files
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, _, value = word.removeprefix("--").partition("=")
        if name in lists:
            raise InputError(f"--{name} is given twice: give all of its values once")
        values = lists[name] = [value] if value else []
    if len(files) > 1:
        raise InputError(f"{files[1]}: a second grid, beside {files[0]}; give one")
    file = Path(files[0]) if files else None
    if options.output_dir is None:
        name = file.stem if file else f"sweep-{hash_of(json.dumps([lists, further]))}"
        options.output_dir = Path("result", name)
    return options, read_grid(file, lists, further)


def _with_underscores(word: str) -> str:
    """Return a word with an option's name as it is declared; run.py too reads ``--dry-run``."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def begin(argv: Sequence[str]) -> None:
    """Refuse a command line that makes no sense before torch is imported, and print the help.

    Raises:
        SystemExit: it makes no sense, or only help is wanted.
    """
    if not argv:
        make_parser().print_help()
        sys.exit(2)
    if code := exit_code(lambda: int(not read_command_line(argv)[1].runs())):
        sys.exit(code)
