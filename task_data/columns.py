"""The user's own columns as prompt, options and answer: other names, templates, and messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from task_data.files import PlacedRow, Row, Table, read_table, shown
from utils import InputError

# More different labels than this are no classes.
MOST_LABELS = 100
MESSAGES = "messages"


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
    def given(self) -> bool:
        """Whether it says anything."""
        return bool(self.text or self.label or self.template)


@dataclass(frozen=True)
class Arrangement:
    """How rows of other columns become rows of prompt, options and answer.

    Attributes:
        columns: what the command line says.
        labels: the options, where a column has the label.
        from_messages: rows are conversations, whose last turn is the answer.
    """

    columns: Columns
    labels: tuple[str, ...] = ()
    from_messages: bool = False

    @classmethod
    def of(cls, file: Path, columns: Columns) -> Arrangement | None:
        """Look into the first file; None: its columns are used as they are.

        Raises:
            InputError: a column is not there, or its values are no classes.
        """
        found = read_table(file, ()).columns
        from_messages = MESSAGES in found and "prompt" not in found
        if not columns.given:
            return cls(columns, from_messages=True) if from_messages else None
        if from_messages:
            raise InputError(
                f"{file} has messages: leave --text_column, --label_column and --prompt_template "
                "out"
            )
        arrangement = cls(columns)
        arrangement.check(found, str(file))
        labels = _labels(file, columns.label) if columns.label else ()
        return cls(columns, labels)

    def check(self, found: Sequence[str], place: str, needs_label: bool = True) -> None:
        """Refuse a file without a column that is needed.

        Raises:
            InputError: names the column.
        """
        given = [("--text_column", self.columns.text)] if self.columns.text else []
        if self.columns.label and needs_label:
            given.append(("--label_column", self.columns.label))
        given += [("--prompt_template", name) for name in _fields(self.columns.template or "")]
        for option, name in given:
            if name not in found:
                raise InputError(
                    f"{option}: {place} has no column {name!r}; it has {', '.join(found)}"
                )

    def arrange(self, table: Table) -> Table:
        """Return a table with prompt, and options and answer or what there is of them."""
        self.check(table.columns, table.place, needs_label=False)
        new = ["prompt", *(["options"] if self.labels else [])]
        if self.from_messages or self.columns.label in table.columns:
            new.append("answer")
        columns = tuple(dict.fromkeys([*table.columns, *new]))
        return Table(table.place, columns, self._rows(table.rows))

    def _rows(self, rows: Iterator[PlacedRow]) -> Iterator[PlacedRow]:
        for place, row in rows:
            try:
                yield PlacedRow(place, self._row(row))
            except InputError as error:
                raise InputError(f"{place}: {error}") from error

    def _row(self, row: Row) -> Row:
        if self.from_messages:
            return {**row, **_conversation(row)}
        arranged: dict[str, Any] = dict(row)
        if self.columns.template:
            arranged["prompt"] = _filled(self.columns.template, row)
        elif self.columns.text:
            arranged["prompt"] = row.get(self.columns.text)
        if self.labels:
            arranged["options"] = list(self.labels)
            if self.columns.label in row:
                arranged["answer"] = _label(row[self.columns.label])
        return arranged


def _labels(file: Path, column: str) -> tuple[str, ...]:
    """Return the different values of a column, sorted."""
    labels = {_label(row.get(column)) for _, row in read_table(file, (column,)).rows}
    if not 2 <= len(labels) <= MOST_LABELS:
        raise InputError(
            f"--label_column {column}: {file} has {len(labels)} different values in it, 2 to "
            f"{MOST_LABELS} make classes; leave it out and call the column answer, and the answers "
            "are generated"
        )
    return tuple(sorted(labels))


def _label(value: Any) -> str:
    if value is None or isinstance(value, list | dict) or not str(value).strip():
        raise InputError(f"the label is {shown(value)}: expected a text or a number")
    return str(value).strip()


def _fields(template: str) -> list[str]:
    return re.findall(r"\{([^{}]+)\}", template)


def _filled(template: str, row: Mapping[str, Any]) -> str:
    """Return a template with a row's values; backslash and n are a newline."""

    def value_of(match: re.Match[str]) -> str:
        value = row.get(match[1])
        if value is None or isinstance(value, list | dict):
            raise InputError(f"{match[1]} is {shown(value)}: expected a text or a number")
        return str(value)

    return re.sub(r"\{([^{}]+)\}", value_of, template.replace("\\n", "\n"))


def _conversation(row: Row) -> dict[str, Any]:
    """Return a conversation up to its answer, the answer, and as the prompt what was said last."""
    messages = row.get(MESSAGES)
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(_is_message(message) for message in messages):
        raise InputError(
            f"messages is {shown(messages)}: expected a list of "
            '{"role": "user", "content": "…"} and the like'
        )
    *before, last = messages
    if last["role"] != "assistant":
        before, last = messages, None  # a row to be answered
    if not before or before[-1]["role"] != "user":
        raise InputError(
            f"messages is {shown(messages)}: the last turns have to be the user's and the "
            "assistant's"
        )
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in before]
    answer = {} if last is None else {"answer": last["content"]}
    return {MESSAGES: turns, "prompt": turns[-1]["content"], **answer}


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
