"""Arguments in YAML files: ``--config``, and the grids of sweep.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils import InputError, first_line

# YAML's words for nothing: the argument is left out.
NOTHING = ("", "~", "null")


class Entry(NamedTuple):
    """A value of a file, and where it stands: ``path:line``."""

    place: str
    value: Any


def read_yaml(path: Path) -> dict[str, Entry]:
    """Return the entries of a YAML file.

    Every scalar is a text, as on a command line: ``1e-6`` and ``no`` mean what they say.

    Raises:
        InputError: it cannot be read, it is no YAML, or no mapping, or a name is there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        values = yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{place}: not YAML ({problem})") from error
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: give arguments by name, as in learning_rate: 1e-6")
    entries: dict[str, Entry] = {}
    for key, _ in root.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if key.value in entries:
            raise InputError(f"{place}: {key.value} is given twice")
        entries[key.value] = Entry(place, values[key.value])
    return entries


def typed(place: str, name: str, value: Any) -> str:
    """Return a value as it is typed on a command line; a dictionary as JSON.

    Raises:
        InputError: it is a list.
    """
    if isinstance(value, Mapping):
        return json.dumps({key: yaml.safe_load(str(each)) for key, each in value.items()})
    if isinstance(value, list):
        raise InputError(f"{place}: {name} is a list; give one value (sweep.py reads lists)")
    return str(value)


def words_of_config(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Return the words of a configuration file's arguments by name, each with its place.

    Raises:
        InputError: as ``read_yaml`` and ``typed``.
    """
    words = {}
    for key, (place, value) in read_yaml(path).items():
        if key == "config":
            raise InputError(f"{place}: config in a file of --config; leave it out")
        text = typed(place, key, value)
        if text not in NOTHING:
            words[key] = (place, [f"--{key}", text])
    return words
