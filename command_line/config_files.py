"""Arguments in YAML files: ``--config``, and the grids of sweep.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils import InputError, first_line

# YAML's words for nothing: the argument is left out.
NO_VALUE = ("", "~", "null")
DEEPEST = 20


class Loader(yaml.BaseLoader):
    """Reads every scalar as text; refuses names given twice, aliases, tags and deep nesting.

    Aliases of aliases and thousands of nested lists would take all memory, or end in a traceback.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node unless it is an alias, has a tag, or is nested too deeply."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error("aliases are not read", event)
        if getattr(event, "tag", None):
            raise _error("tags are not read", event)
        if self.depth > DEEPEST:
            raise _error(f"nested more than {DEEPEST} times", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Make a dictionary unless it has a name twice."""
        made = super().construct_mapping(node, deep)
        names = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in names[:place]:
                raise _error(f"{key.value} is given twice", key)
        return made


def _error(problem: str, found: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=found.start_mark)


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
        loader = Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        values = loader.construct_document(root) if root else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, context = (getattr(error, name, None) for name in ("problem_mark", "context"))
        problem = getattr(error, "problem", None) or first_line(error)
        if context or not mark:
            problem = f"not YAML ({context + ', ' if context else ''}{problem})"
        raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''}: {problem}") from error
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: give arguments by name, as in learning_rate: 1e-6")
    return {
        key.value: Entry(f"{path}:{key.start_mark.line + 1}", values[key.value])
        for key, _ in root.value
    }


def typed(place: str, name: str, value: Any) -> str:
    """Return a value as it is typed on a command line, a dictionary as JSON; refuse a list."""
    if isinstance(value, dict):
        return json.dumps(_read_scalars(value))
    if isinstance(value, list):
        raise InputError(f"{place}: {name} is a list; give one value (sweep.py reads lists)")
    return value


def _read_scalars(value: Any) -> Any:
    """Return what JSON reads in the texts of nested lists and dictionaries, else the text."""
    if isinstance(value, dict):
        return {key: _read_scalars(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_read_scalars(each) for each in value]
    try:
        return json.loads({"True": "true", "False": "false", "~": "null"}.get(value, value))
    except (ValueError, RecursionError):
        return value


def words_of_config(path: Path) -> dict[str, tuple[str, str]]:
    """Return the arguments of a configuration file by name: the place, and the value as typed."""
    entries = read_yaml(path)
    if "config" in entries:
        raise InputError(f"{entries['config'].place}: config in a file of --config; leave it out")
    words = {key: (place, typed(place, key, value)) for key, (place, value) in entries.items()}
    return {key: (place, word) for key, (place, word) in words.items() if word not in NO_VALUE}
