"""The user's own columns as prompt, options and answer: other names, templates, conversations."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from task_data.files import read_rows
from tasks import listed, shown, unexpected
from templates import Row
from utils import InputError

# More different labels than this are no classes.
MOST_LABELS = 100
# Nor are more different numbers, if most rows have one of their own.
MOST_SCORES = 10
# A list of {"role", "content"}, or as in ShareGPT of {"from", "value"}.
CONVERSATIONS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}
_FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Columns:
    """How rows of the user's own files become rows with prompt, answer and maybe options."""

    text: str | None = None  # the prompt's column; None: ``prompt``
    # The column of the classes, whose different values are the options; None: ``options``, if any.
    label: str | None = None
    template: str | None = None  # the prompt, with columns in braces
    answer: str | None = None  # the column of generated answers; None: ``answer``
    words: str | None = None  # what the model reads for each class, as in ``0=terrible,1=great``
    # What ``looked_up`` finds in the first file: labels with their words, which are the options;
    # whether a row may hold a label's number in place of its text; whether rows are conversations,
    # whose last turn is the answer.
    classes: Mapping[str, str] = field(default_factory=dict)
    by_number: bool = False
    from_messages: bool = False

    @property
    def of_prompt(self) -> tuple[str, ...]:
        """The columns that the prompt is made of."""
        if self.from_messages:
            return ("messages",)
        if self.template:
            return tuple(dict.fromkeys(_FIELD.findall(self.template)))
        return (self.text or "prompt",)

    @property
    def added(self) -> set[str]:
        """The columns that ``arranged`` adds to a row's own."""
        made = (("prompt", self.text or self.template), ("options", self.classes))
        return {name for name, of_it in made if of_it}

    def doubts(self) -> Iterator[str]:
        """Yield what is odd about the labels."""
        if self.classes and not self.words and _are_numbers(self.classes):
            words = ",".join(f"{label}=WORD" for label in [*self.classes][:2])
            numbers = f"the labels are numbers, {listed(self.classes, 5)}"
            yield f"{numbers}: --label_words {words} gives the model words"
        if len({label.casefold() for label in self.classes}) < len(self.classes):
            yield f"some labels differ in upper and lower case alone: {listed(self.classes)}"

    def looked_up(self, file: Path, row: Row, has_classes: bool) -> Columns:
        """Return the columns with what the first of the user's files, and its first row, say.

        Raises:
            InputError: a named column is not there, or the labels make no classes.
        """
        text, label, fields = self.text, self.label, _FIELD.findall(self.template or "")
        has_messages = any(column in row for column in CONVERSATIONS)
        if "text" in row and not (text or self.template or has_messages or "prompt" in row):
            text = "text"
        has_answers = label or self.answer or "answer" in row or "options" in row
        if "label" in row and has_classes and not has_answers:
            label = "label"
        if self.template and not fields:
            braces = f"name a column in braces, one of {listed(row)}"
            raise InputError(f"--prompt_template {shown(self.template)}: {braces}")
        if shows := {label, self.answer} & {*fields, text} - {None}:
            raise InputError(f"the prompt has the column {min(shows)!r}, which is its answer")
        for option, name in (
            *(("--text_column", text), ("--label_column", label)),
            *(("--answer_column", self.answer), *(("--prompt_template", name) for name in fields)),
        ):
            if name and name not in row:
                raise InputError(f"{file}: {option}: no column {name!r}; there are {listed(row)}")
        if label:
            names = _class_names(file, label)
            labels = names or _labels(file, label)
            if len(labels) == 1:
                only = f"all rows of {file} have {shown(*labels)} there"
                raise InputError(f"--label_column {label}: {only}")
            classes = _with_words(labels, self.words) if self.words else {n: n for n in labels}
            return replace(self, text=text, label=label, classes=classes, by_number=bool(names))
        if self.words:
            raise InputError(f"--label_words {self.words}: {file} has no --label_column")
        given = text or self.template or self.answer or "prompt" in row
        return replace(self, text=text, from_messages=has_messages and not given)

    def arranged(self, row: Row, with_answer: bool = True) -> Row:
        """Return a row with prompt, options and answer; without the answer any label will do."""
        if self.from_messages:
            return {**row, **_conversation(row)}
        arranged: dict[str, Any] = dict(row)
        try:
            if self.template:
                # A backslash and n, as a shell hands them over, are a newline.
                template = self.template.replace("\\n", "\n")
                arranged["prompt"] = _FIELD.sub(lambda field: as_text(row[field[1]]), template)
            elif self.text:
                arranged["prompt"] = row[self.text]
        except KeyError as error:
            raise InputError(f"no column {error}; there are {listed(row)}") from error
        if self.answer or self.classes:
            arranged.pop("answer", None)  # it is another column
        if self.answer in row:
            arranged["answer"] = row[self.answer]
        if self.classes:
            arranged["options"] = list(self.classes.values())
            if self.label in row and with_answer:
                arranged["answer"] = self._class_of(row[self.label])
        return arranged

    def _class_of(self, value: Any) -> str:
        """Return the class that a row's label is the text of, or with names the number of."""
        if self.by_number and isinstance(value, int | float) and value in range(len(self.classes)):
            return list(self.classes.values())[int(value)]
        label = _label(value)
        for name in (label, label.removesuffix(".0")):
            if name in self.classes:
                return self.classes[name]
        known = f"one of those in the first file, {shown(list(self.classes))}"
        raise unexpected("the label", value, known)


def as_text(value: Any, what: str = "the value") -> str:
    """Return a text or a number as text; pandas writes 1 as 1.0 where a column has gaps."""
    is_float = isinstance(value, float)
    no_text = value is None or isinstance(value, list | dict | bytes)
    if no_text or (is_float and not math.isfinite(value)):
        raise unexpected(what, value, "a text or a number")
    return str(value).removesuffix(".0") if is_float else str(value)


def _class_names(file: Path, column: str) -> tuple[str, ...]:
    """Return the names that ``datasets`` keeps for a ClassLabel's numbers in a Parquet file."""
    if file.suffix.lower() != ".parquet":
        return ()
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, TypeError, ValueError):  # no names, or metadata of another program
        return ()


def _labels(file: Path, column: str) -> tuple[str, ...]:
    """Return the different values of a column, in the order of numbers or letters."""
    labels, unlabelled, rows = set(), [], list(read_rows(file))
    for place, row in rows:
        try:
            labels.add(_label(row.get(column)))
        except InputError as error:
            unlabelled.append((place, error))
    if unlabelled:
        places = [place for place, _ in unlabelled]
        count = f" ({len(places)} rows: {listed(places, 3)})" if len(places) > 1 else ""
        raise InputError(f"{places[0]}: {unlabelled[0][1]}{count}")
    numbers = _are_numbers(labels)
    most = min(MOST_LABELS, max(MOST_SCORES, len(rows) / 2)) if numbers else MOST_LABELS
    if len(labels) > most:
        different = f"{len(labels)} different {'numbers' if numbers else 'texts'}"
        raise InputError(
            f"--label_column {column}: {different} in the {len(rows)} rows of {file}, but a label "
            f"is a class: write one of a few; --answer_column {column} is for generated answers"
        )
    return tuple(sorted(labels, key=lambda label: (float(label) if numbers else 0, label)))


def _are_numbers(labels: Iterable[str]) -> bool:
    return all(re.fullmatch(r"[-+]?\d+(\.\d+)?", label) for label in labels)


def _with_words(labels: tuple[str, ...], words: str) -> dict[str, str]:
    """Return the labels, in their order, with the word of each."""
    pairs = [pair.partition("=") for pair in words.split(",")]
    found = {label.strip(): word.strip() for label, _, word in pairs}
    if {*found} != {*labels} or len({*found.values()} - {""}) < len(pairs):
        expected = ",".join(f"{label}=…" for label in labels)
        raise InputError(f"--label_words {words}: give each label a word of its own, {expected}")
    return {label: found[label] for label in labels}


def _label(value: Any) -> str:
    with contextlib.suppress(InputError):
        if text := as_text(value).strip():
            return text
    raise unexpected("the label", value, "a text or a number; fill it in, or delete the row")


def _conversation(row: Row) -> dict[str, Any]:
    """Return a conversation up to its answer, the answer, and as the prompt what was said last."""
    column = next((column for column in CONVERSATIONS if column in row), "messages")
    said = row.get(column)
    turns = [_turn(turn) for turn in said] if isinstance(said, list) else []
    if not turns or None in turns:
        raise unexpected(column, said, 'a list of {"role": "user", "content": "…"} and the like')
    answer = {"answer": turns.pop()["content"]} if turns[-1]["role"] == "assistant" else {}
    if not turns or turns[-1]["role"] != "user":
        raise InputError(f"{column}: the last turns have to be the user's and the assistant's")
    return {"messages": turns, "prompt": turns[-1]["content"], **answer}


def _turn(turn: Any) -> dict[str, str] | None:
    """Return a turn with role and content; None if it is none."""
    if not isinstance(turn, Mapping):
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    is_turn = isinstance(role, str) and isinstance(content, str)
    return {"role": ROLES.get(role, role), "content": content} if is_turn else None
