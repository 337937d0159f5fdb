"""The user's own columns as prompt, options and answer: other names, templates, conversations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from task_data.files import first_row, read_rows
from tasks import listed, shown
from templates import Row
from utils import InputError

# More different labels than this are no classes.
MOST_LABELS = 100
# A list of {"role", "content"}, or as in ShareGPT of {"from", "value"}.
CONVERSATIONS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Columns:
    """What the command line says about the columns of the user's own files.

    Attributes:
        text: the prompt's; None: ``prompt``.
        label: of the classes, whose different values are the options; None: ``options`` and
            ``answer``.
        template: the prompt, with columns in braces; None: the text as it is.
    """

    text: str | None = None
    label: str | None = None
    template: str | None = None

    @property
    def given(self) -> dict[str, list[str]]:
        """The columns that each argument names."""
        names = {
            "--text_column": [self.text] if self.text else [],
            "--label_column": [self.label] if self.label else [],
            "--prompt_template": re.findall(r"\{([^{}]+)\}", self.template or ""),
        }
        return {option: columns for option, columns in names.items() if columns}

    def check(self, row: Row, needs_label: bool = False) -> None:
        """Refuse a row without a column that is named; only the first file needs labels.

        Raises:
            InputError: names the argument and the column.
        """
        for option, names in self.given.items():
            for name in names if needs_label or option != "--label_column" else ():
                if name not in row:
                    raise InputError(f"{option}: no column {name!r}; there are {listed(row)}")


@dataclass(frozen=True)
class Arrangement:
    """How rows of a file become rows with prompt, answer and, to choose from, options.

    Attributes:
        columns: what the command line says.
        labels: the options, where a column has the label.
        labels_by_number: the column may hold the label's number in place of its text.
        from_messages: rows are conversations, whose last turn is the answer.
    """

    columns: Columns
    labels: tuple[str, ...] = ()
    labels_by_number: bool = False
    from_messages: bool = False

    @classmethod
    def of(cls, file: Path, columns: Columns) -> Arrangement:
        """Look into the first of the user's files.

        Raises:
            InputError: a column is not there, or its values are no classes.
        """
        row = first_row(file)
        if not columns.given:
            found = any(column in row for column in CONVERSATIONS)
            return cls(columns, from_messages=found and "prompt" not in row)
        try:
            columns.check(row, needs_label=True)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        if not columns.label:
            return cls(columns)
        names = _class_names(file, columns.label)
        return cls(columns, names or _labels(file, columns.label), labels_by_number=bool(names))

    def row(self, row: Row) -> Row:
        """Return a row with what it has of prompt, options and answer beside its own columns.

        Raises:
            InputError: a column is missing, or a value cannot be used.
        """
        if self.from_messages:
            return {**row, **_conversation(row)}
        self.columns.check(row)
        arranged: dict[str, Any] = dict(row)
        if self.columns.template:
            arranged["prompt"] = _filled(self.columns.template, row)
        elif self.columns.text:
            arranged["prompt"] = row[self.columns.text]
        if self.labels:
            arranged["options"] = list(self.labels)
            if self.columns.label in row:
                arranged["answer"] = self._label(row[self.columns.label])
        return arranged

    def _label(self, value: Any) -> str:
        if self.labels_by_number and isinstance(value, int):
            if not 0 <= value < len(self.labels):
                raise InputError(f"the label is {value}: expected 0 to {len(self.labels) - 1}")
            return self.labels[value]
        return _label(value)


def _class_names(file: Path, column: str) -> tuple[str, ...]:
    """Return the names that ``datasets`` keeps for a ClassLabel's numbers in a Parquet file."""
    if file.suffix.lower() != ".parquet":
        return ()
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    features = json.loads(metadata.get(b"huggingface", "{}")).get("info", {}).get("features", {})
    return tuple(features.get(column, {}).get("names", ()))


def _labels(file: Path, column: str) -> tuple[str, ...]:
    """Return the different values of a column, in the order of numbers or letters."""
    labels = set()
    for place, row in read_rows(file):
        try:
            labels.add(_label(row.get(column)))
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
    if not 2 <= len(labels) <= MOST_LABELS:
        raise InputError(
            f"--label_column {column}: {file} has {len(labels)} different values in it, 2 to "
            f"{MOST_LABELS} make classes; leave it out and call the column answer, and the answers "
            "are generated"
        )
    return tuple(_in_order(labels))


def _in_order(labels: Iterable[str]) -> list[str]:
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?", label) for label in labels):
        return sorted(labels, key=lambda label: (float(label), label))
    return sorted(labels)


def _label(value: Any) -> str:
    """Return a label as text; 1.0 is 1, which pandas writes so where a column has gaps."""
    text = str(_plain(value))
    if isinstance(value, float):
        text = text.removesuffix(".0")
    if not text.strip():
        raise InputError(f"the label is {shown(value)}: expected a text or a number")
    return text.strip()


def _plain(value: Any) -> Any:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    if missing or isinstance(value, list | dict):
        raise InputError(f"the value is {shown(value)}: expected a text or a number")
    return value


def _filled(template: str, row: Row) -> str:
    """Return a template with a row's values; backslash and n are a newline."""

    def value_of(match: re.Match[str]) -> str:
        return str(_plain(row[match[1]]))

    return re.sub(r"\{([^{}]+)\}", value_of, template.replace("\\n", "\n"))


def _conversation(row: Row) -> dict[str, Any]:
    """Return a conversation up to its answer, the answer, and as the prompt what was said last."""
    said = next((row[column] for column in CONVERSATIONS if column in row), None)
    turns = [_turn(turn) for turn in said] if isinstance(said, list) else []
    if not turns or None in turns:
        raise InputError(
            f"messages is {shown(said)}: expected a list of "
            '{"role": "user", "content": "…"} and the like'
        )
    answer = {"answer": turns.pop()["content"]} if turns[-1]["role"] == "assistant" else {}
    if not turns or turns[-1]["role"] != "user":
        raise InputError(
            f"messages is {shown(said)}: the last turns have to be the user's and the assistant's"
        )
    return {"messages": turns, "prompt": turns[-1]["content"], **answer}


def _turn(turn: Any) -> dict[str, str] | None:
    if not isinstance(turn, Mapping):
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": ROLES.get(role, role), "content": content}
