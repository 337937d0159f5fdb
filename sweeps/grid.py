"""The runs of a grid: lists multiply, and values that belong together stay together.

A grid is a YAML file, ``--NAME VALUES…`` on the command line, or both; the command line wins:

    task_name: SST2                 # for every run
    learning_rate: [1e-6, 1e-7]     # two values
    seed: [0, 1]                    # times two
    method:                         # times two; a name of your own holds groups of arguments
      - {hessian_smooth_type: constant0}
      - {hessian_smooth_type: constant1e-8, hessian: lowrank}
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from command_line.config_files import NOTHING, Entry, Loader, read_yaml, typed
from command_line.contradictions import check_values
from command_line.reading import (
    OWN,
    Values,
    argument_name,
    explain_unknown,
    given_names,
    read_values,
)
from utils import InputError
from zeroth_order.config import smoothing_of

# Arguments by name, as the user types them.
Typed = dict[str, str]

# The sweep sets these for every run.
OF_THE_SWEEP = ("output_dir", "result_file", "tag", "predictions_file", "resume_from_checkpoint")
# With these run.py writes no result.
WITHOUT_RESULT = ("dry_run", "predict_file")
# File systems allow 255 bytes; a hash, a suffix and a temporary file's name are added.
LONGEST_NAME = 150


@dataclass(frozen=True)
class Run:
    """One run of a grid.

    ``name`` is the stem of its files in the sweep's folder, ``choice`` its values of the grid's
    lists, ``words`` its command line without the places of its files, ``values`` their meaning.
    """

    name: str
    choice: Typed
    words: tuple[str, ...]
    values: Values


@dataclass(frozen=True)
class Grid:
    """Arguments of every run, and the choices of each list; words that end every command line."""

    fixed: Typed
    axes: dict[str, list[Typed]]
    further: tuple[str, ...] = ()

    def runs(self) -> list[Run]:
        """Return every run; the last list changes fastest.

        Raises:
            InputError: an argument is in two lists, two runs are the same, or a value is invalid.
        """
        names = [*self.fixed, *(n for choices in self.axes.values() for n in _names_in(choices))]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"--{min(twice)} is in the grid twice: give it once")
        runs: list[Run] = []
        meanings: set[str] = set()
        taken: set[str] = set()
        for choices in itertools.product(*self.axes.values()):
            choice = {name: value for each in choices for name, value in each.items()}
            name = name_of(choice)
            words = (*words_of(self.fixed | choice), *self.further)
            try:
                values = read_values(words)
                check_values(values)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
            meaning = json.dumps(_meaning(values), sort_keys=True, default=repr)
            if meaning in meanings:
                raise InputError(f"the grid has the same run twice: {' '.join(words_of(choice))}")
            if name in taken:
                name = name_of(choice, hashed=True)
            meanings.add(meaning)
            taken.add(name)
            runs.append(Run(name, choice, words, values))
        return runs


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
    grid = _sort(read_yaml(file) if file else {})
    typed_lists = _sort({name: _entry(name, words) for name, words in lists.items()}).axes
    replaced = {*typed_lists, *(n for c in typed_lists.values() for n in _names_in(c))}
    for name in given_names(further):
        _refuse(name)
        if name in replaced:
            raise InputError(f"--{name} is in the grid and behind --: give it once")
        group = next((a for a, c in grid.axes.items() if a != name and name in _names_in(c)), None)
        if group:
            raise InputError(f"--{name} is in the grid, in {group}: leave it out behind --")
        replaced.add(name)
    fixed = {name: value for name, value in grid.fixed.items() if name not in replaced}
    axes = {name: choices for name, choices in grid.axes.items() if name not in replaced}
    if not axes | typed_lists:
        raise InputError(
            "the grid has no list: give one, as in --seed 0 1 2 before --, or seed: [0, 1, 2] in a "
            "file"
        )
    return Grid(fixed, axes | typed_lists, tuple(further))


def words_of(values: Typed) -> tuple[str, ...]:
    """Return arguments as words of a command line, without those that have no value."""
    given = {name: value for name, value in values.items() if value not in NOTHING}
    return tuple(word for name, value in given.items() for word in (f"--{name}", value))


def name_of(choice: Typed, hashed: bool = False) -> str:
    """Return a file name for a choice; a long one or an ambiguous one ends in a hash."""
    name = ",".join(f"{name}={_for_a_file(value)}" for name, value in choice.items())
    if hashed or len(name) > LONGEST_NAME:
        digest = hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()
        name = f"{name[:LONGEST_NAME]}-{digest[:8]}"
    return name


def _for_a_file(value: str) -> str:
    # The last part of a path or a Hub id says what it is.
    last = value.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]", "_", last, flags=re.ASCII).lstrip(".") or "none"


def _meaning(values: Values) -> dict[str, Any]:
    """Return what was given so that 1e-4 and 0.0001 are equal, constant1e-4 and constant0.0001."""
    meaning = dict(values.given)
    for name, value in values.given.items():
        if isinstance(value, str) and name not in OWN:  # transformers reads it
            with contextlib.suppress(ValueError):
                meaning[name] = float(value)
    if "hessian_smooth_type" in meaning:
        meaning["hessian_smooth_type"] = smoothing_of(values.hessian_smooth_type)
    return meaning


def _names_in(choices: Iterable[Typed]) -> list[str]:
    return list(dict.fromkeys(name for choice in choices for name in choice))


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
        problem = getattr(error, "problem", None) or "not YAML"
        raise InputError(
            f"--{name}: {problem}; write groups as '{{lora: True, zo_eps: 1e-2}}'"
        ) from error


def _sort(entries: Mapping[str, Entry]) -> Grid:
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
    return Grid(fixed, axes)


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
        raise InputError(
            f"--{name} in a sweep: every run has files of its own below the sweep's --output_dir; "
            "leave it out"
        )
