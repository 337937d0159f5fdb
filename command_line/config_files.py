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
DEEPEST = 20


class Loader(yaml.BaseLoader):
    """Reads every scalar as text; refuses names given twice, aliases, and deep nesting.

    Aliases of aliases and thousands of nested lists would take all memory, or end in a traceback.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node unless it is an alias or nested too deeply."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="aliases are not read", problem_mark=mark)
        if self.depth > DEEPEST:
            problem = f"nested more than {DEEPEST} times"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Make a dictionary unless it has a name twice."""
        names: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


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
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no file")  # to read a pipe might never end
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader)
        values = yaml.load(text, Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = getattr(error, "problem", None) or first_line(error)
        if not isinstance(error, yaml.composer.ComposerError | yaml.constructor.ConstructorError):
            problem = f"not YAML ({problem})"
        raise InputError(f"{place}: {problem}") from error
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: give arguments by name, as in learning_rate: 1e-6")
    return {
        key.value: Entry(f"{path}:{key.start_mark.line + 1}", values[key.value])
        for key, _ in root.value
    }


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


def words_of_config(path: Path) -> dict[str, tuple[str, str]]:
    """Return the arguments of a configuration file by name: the place, and the value as typed.

    Raises:
        InputError: as ``read_yaml`` and ``typed``.
    """
    words = {}
    for key, (place, value) in read_yaml(path).items():
        if key == "config":
            raise InputError(f"{place}: config in a file of --config; leave it out")
        text = typed(place, key, value)
        if text not in NOTHING:
            words[key] = (place, text)
    return words
