"""Which runs a grid has: lists multiply, and values that belong together are one.

A grid is a YAML file, ``--NAME VALUES…`` on a command line, or both, where the command line wins:

    task_name: SST2                 # of every run
    learning_rate: [1e-6, 1e-7]     # two values
    seed: [0, 1]                    # times two
    method:                         # times two; a name of your own, its entries belong together
      - {hessian_smooth_type: constant0}
      - {hessian_smooth_type: constant1e-8, hessian: lowrank}
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from command_line.arguments import OneLineParser, command_line
from command_line.config_files import NOTHING, Entry, read_yaml, typed
from command_line.unknown import explain_unknown
from utils import InputError

# Arguments by their names, with their values as they are typed.
Values = dict[str, str]

# What a sweep gives every run itself.
OF_THE_SWEEP = ("output_dir", "result_file", "tag", "predictions_file", "resume_from_checkpoint")
# File systems allow 255 bytes; suffixes and a temporary file's name come on top.
LONGEST_NAME = 150


@dataclass(frozen=True)
class Run:
    """One run of a grid.

    Attributes:
        name: of its files in the sweep's folder.
        choice: what sets it apart from the grid's other runs.
        words: its whole command line, but for the places of its files.
    """

    name: str
    choice: Values
    words: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Arguments of every run, and lists of choices that multiply.

    Attributes:
        fixed: arguments of every run.
        axes: by name, the choices of one list: each has one argument or those of a group.
        further: words of a command line that come last.
    """

    fixed: Values
    axes: dict[str, list[Values]]
    further: tuple[str, ...] = ()

    def runs(self) -> list[Run]:
        """Return every run, in the order of the lists, the last of them changing fastest.

        Raises:
            InputError: an argument is in two lists, or two runs are the same.
        """
        self._check_axes()
        runs: dict[tuple[str, ...], Run] = {}
        for choices in itertools.product(*self.axes.values()):
            choice = {name: value for each in choices for name, value in each.items()}
            words = (*words_of(self.fixed | choice), *self.further)
            if words in runs:
                raise InputError(f"the grid has the same run twice: {words_of(choice)}")
            runs[words] = Run("", choice, words)
        names = _names([self._shown_choice(run.choice) for run in runs.values()])
        return [
            Run(name, run.choice, run.words) for name, run in zip(names, runs.values(), strict=True)
        ]

    def _check_axes(self) -> None:
        places: dict[str, str] = {}
        for axis, choices in self.axes.items():
            for name in dict.fromkeys(name for choice in choices for name in choice):
                if name in places:
                    raise InputError(
                        f"--{name} is in the grid twice, in {places[name]} and in {axis}: give it "
                        "once"
                    )
                places[name] = axis

    def _shown_choice(self, choice: Values) -> Values:
        """Return what of a choice tells runs apart: nothing that is the same in all of its list."""
        shown = {}
        for choices in self.axes.values():
            for name in dict.fromkeys(name for each in choices for name in each):
                values = {each.get(name) for each in choices}
                if name in choice and (len(values) > 1 or len(choices) == 1):
                    shown[name] = choice[name]
        return shown


def read_grid(
    file: Path | None, lists: Mapping[str, Sequence[str]], further: Sequence[str]
) -> Grid:
    """Read a grid: a file, lists of a command line, and arguments of every run.

    Args:
        file: in YAML; None: there is none.
        lists: by name, the values of a command line; those in braces are groups.
        further: arguments of run.py for every run. They replace the file's of the same name.

    Raises:
        InputError: there is no such file or no such argument, a list is empty, or something is
            given twice.
    """
    parser = command_line()
    grid = _sort_entries(parser, read_yaml(file) if file else {})
    words = {name: Entry("the command line", _read_words(name, v)) for name, v in lists.items()}
    typed_lists = _sort_entries(parser, words).axes
    fixed = {n: v for n, v in grid.fixed.items() if n not in _arguments_of(typed_lists)}
    axes = {n: v for n, v in grid.axes.items() if n not in _arguments_of(typed_lists)} | typed_lists
    for name in parser.read(further):
        if name in typed_lists:
            raise InputError(f"--{name} is in the grid and behind --: give it once")
        if name in OF_THE_SWEEP:
            raise _of_the_sweep(name)
        fixed.pop(name, None)
        axes.pop(name, None)
        for axis, choices in axes.items():
            if any(name in choice for choice in choices):
                raise InputError(f"--{name} is in the grid, in {axis}: leave it out behind --")
    if not axes:
        raise InputError(
            "the grid has no list: give one, as in --seed 0 1 2 before --, or seed: [0, 1, 2] in a "
            "file"
        )
    return Grid(fixed, axes, tuple(further))


def words_of(values: Values) -> tuple[str, ...]:
    """Return arguments as words of a command line; those without a value are left out."""
    given = {name: value for name, value in values.items() if value not in NOTHING}
    return tuple(word for name, value in given.items() for word in (f"--{name}", value))


def _read_words(name: str, words: Sequence[str]) -> list[Any]:
    """Return the values of a list of the command line; words in braces are groups."""
    if not words:
        raise InputError(f"--{name}: give the values that the grid has, or put it behind --")
    try:
        return [yaml.load(w, yaml.BaseLoader) if w.startswith("{") else w for w in words]
    except yaml.YAMLError as error:
        raise InputError(
            f"--{name} {' '.join(words)}: not YAML; give groups as '{{lora: True, zo_eps: 1e-2}}'"
        ) from error


def _sort_entries(parser: OneLineParser, entries: Mapping[str, Entry]) -> Grid:
    """Part entries into arguments of every run, and lists of choices."""
    fixed: Values = {}
    axes: dict[str, list[Values]] = {}
    for key, (place, value) in entries.items():
        name = parser.name_of(f"--{key}")
        groups = value if isinstance(value, list) else [value]
        if not groups:
            raise InputError(f"{place}: {key} is an empty list: give at least one value")
        if name is None and all(isinstance(group, dict) and group for group in groups):
            axes[key] = [_group(parser, place, key, group) for group in groups]
        elif name is None:
            raise InputError(f"{place}: {explain_unknown(f'--{key}', parser.options())}")
        elif name in OF_THE_SWEEP:
            raise _of_the_sweep(name)
        elif name in fixed or name in axes:
            raise InputError(f"{place}: --{name} is in the grid twice: give it once")
        elif isinstance(value, list):
            axes[name] = [{name: typed(place, key, each)} for each in value]
        else:
            fixed[name] = typed(place, key, value)
    return Grid(fixed, axes)


def _group(parser: OneLineParser, place: str, key: str, group: Mapping[str, Any]) -> Values:
    values = {}
    for word, value in group.items():
        name = parser.name_of(f"--{word}")
        if name is None:
            said = explain_unknown(f"--{word}", parser.options())
            raise InputError(f"{place}: in {key}: {said}")
        if name in OF_THE_SWEEP:
            raise _of_the_sweep(name)
        values[name] = typed(place, word, value)
    return values


def _of_the_sweep(name: str) -> InputError:
    return InputError(
        f"--{name} in a sweep: every run has files of its own; give --output_dir before -- for the "
        "folder of them all"
    )


def _arguments_of(axes: Mapping[str, list[Values]]) -> set[str]:
    return {*axes, *(name for choices in axes.values() for choice in choices for name in choice)}


def _names(choices: Iterable[Values]) -> list[str]:
    """Return a name for each choice, fit for a file, in which no two are alike."""
    choices = list(choices)
    readable = [
        ",".join(f"{name}={_for_a_file(value)}" for name, value in choice.items())
        for choice in choices
    ]
    names = []
    for choice, name in zip(choices, readable, strict=True):
        if len(name) > LONGEST_NAME or readable.count(name) > 1:
            text = json.dumps(choice, sort_keys=True)
            name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        names.append(name)
    return names


def _for_a_file(value: str) -> str:
    # Of a path or a Hub id the last part says what it is.
    return re.sub(r"[^\w.+-]", "_", value.rstrip("/").rpartition("/")[2]).lstrip(".") or "none"
