"""Tasks of the user's own files, and which task the command line means."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import templates
from task_data.columns import Columns, as_text
from task_data.files import PlacedRow, errors_name, own_file, read_rows
from task_data.rewards import Reward
from tasks import Sample, Task, get_task, listed, shown, unexpected
from templates import Row
from utils import InputError

# Columns as other programs write them, and the arguments that read them.
LAYOUTS = {
    ("instruction", "input", "output"): (
        "give --prompt_template '{instruction}\\n{input}' --answer_column output"
    ),
    ("instruction", "output"): "give --text_column instruction --answer_column output",
    ("prompt", "completion"): "give --answer_column completion",
    ("question", "answer"): "give --text_column question",
}
NAMED = (
    "name other columns with --text_column or --prompt_template, and with --label_column (classes) "
    "or --answer_column (generated answers)"
)


@dataclass(frozen=True)
class OwnTask(Task):
    """Examples of the user's own files: prompt, answer and, to choose from, options."""

    _: KW_ONLY
    train_file: Path | None
    validation_file: Path | None
    own_columns: Columns

    @property
    def first_file(self) -> Path:
        """The file whose first row says whether there are options."""
        return self.train_file or self.validation_file

    @property
    def train_as_classification(self) -> bool:
        """Whether there are options."""
        return not self.generation

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Columns of the user's file that the prompt is made of."""
        return self.own_columns.of_prompt

    def rows(self, path: Path, with_answers: bool = True) -> Iterator[PlacedRow]:
        """Yield the rows of a file, each with what it has of prompt, options and answer."""
        is_csv = path.suffix.lower() == ".csv"
        for place, row in read_rows(path):
            with errors_name(place):
                arranged = self.own_columns.arranged(row, with_answers)
                if is_csv and self.generation:
                    arranged = _with_a_list(arranged)
                if "prompt" in arranged:
                    _check_text(arranged["prompt"], " and ".join(self.prompt_columns))
            yield place, arranged

    def check_columns(self, row: Row, needed: Iterable[str]) -> None:
        """Refuse a row without a column, or with options where the first row has none."""
        if ("options" in row) == self.generation:
            given, there = ("", "has none") if self.generation else ("no ", "has some")
            first = f"the first row of {self.first_file} {there}"
            raise InputError(f"{given}options, but {first}: give them in every row, or in none")
        missing = next((column for column in needed if column not in row), None)
        if missing is None:
            return
        columns = self.own_columns
        if columns.from_messages:
            raise InputError("the last turn is not the assistant's answer")
        named = columns.label or columns.answer
        names = ("text", "prompt")
        if missing == "answer":
            names = (named or "answer",) if named or "options" in row else ("label", "answer")
        found = [name for name in row if name not in columns.added]
        ways_out = [f"rename {name!r}" for name in found if name.lower() in names][:1]
        if named not in names:
            known = (each for needed, each in LAYOUTS.items() if {*needed} <= {*found})
            ways_out.append(next(known, NAMED))
        expected = " (or ".join(names) + ")" * (len(names) - 1)
        way_out = f"; {', or '.join(ways_out)}" if ways_out else ""
        raise InputError(f"no column {expected}; found {listed(found)}{way_out}")

    def labels_of(self, options: Sequence[str]) -> list[str]:
        """Return the file's own labels in place of the words that the model reads for them."""
        labels = {word: label for label, word in self.own_columns.classes.items()}
        return [labels.get(option, option) for option in options]

    def messages(self, prompt: str, sample: Sample) -> list[dict[str, str]]:
        """Return the turns of a conversation before its answer."""
        # Another prompt is the one that calibrates scores: it says nothing of the row.
        is_own = self.own_columns.from_messages and prompt.strip() == self.prompt(sample).strip()
        return sample.row["messages"] if is_own else super().messages(prompt, sample)


def choose_task(
    name: str | None,
    train_file: str | None,
    validation_file: str | None,
    metric: str | None,
    reward: str | None = None,
    columns: Columns | None = None,
) -> Task:
    """Return the named task, or that of the user's own files with their metric and columns.

    ``reward`` is ``FILE.py:function``, which says how good generated answers are.

    Raises:
        InputError: there is no such task, file, column or reward, or they do not go together.
    """
    if train_file or validation_file:
        train = own_file("--train_file", train_file)
        validation = own_file("--validation_file", validation_file)
        task = _own_task(train, validation, columns or Columns(), metric, bool(reward))
    elif name:
        task = get_task(name)
    else:
        raise InputError("--task_name is missing: give a task, as SST2, or --train_file")
    if reward and not task.generation:
        options = f"the answers of {task.name} are chosen from options"
        raise InputError(f"--reward {reward}: {options}; leave it out")
    return replace(task, reward=Reward.load(reward)) if reward else task


def _own_task(
    train: Path | None,
    validation: Path | None,
    columns: Columns,
    metric: str | None,
    has_reward: bool,
) -> OwnTask:
    first = train or validation
    _, row = next(read_rows(first))
    columns = columns.looked_up(first, row, has_classes=not has_reward)
    chosen = "options" in row or bool(columns.classes)
    kind = "chosen from options" if chosen else "generated"
    fitting = ("accuracy",) if chosen else ("f1", "em")
    if metric not in (None, *fitting):
        answers = f"the answers in {first} are {kind}"
        raise InputError(f"--metric {metric}: {answers}; give {' or '.join(fitting)}")
    # A reward needs no answers.
    has_answers = not has_reward or "answer" in columns.arranged(row)
    return OwnTask(
        name=first.stem,
        template=templates.OWN_CHOICE if chosen else templates.OWN_ANSWER,
        answer_column="answer" if has_answers else None,
        candidates=_options if chosen else None,
        correct=_right_option if chosen else _answers,
        option_columns=("options",) if chosen else (),
        answer_metric="em" if metric == "em" else "f1",
        train_file=train,
        validation_file=validation,
        own_columns=columns,
    )


def _options(row: Row) -> tuple[str, ...]:
    options = row["options"]
    if isinstance(options, str):
        options = _list_in(options)
    if not isinstance(options, list) or len(options) < 2:
        raise unexpected("options", row["options"], 'a list of at least 2 texts: ["yes", "no"]')
    options = tuple(as_text(option, "one of the options") for option in options)
    for option in options:
        _check_text(option, "one of the options")
    # Spaces around an option are not always part of what is scored.
    if len({option.strip() for option in options}) < len(options):
        raise InputError(f"options is {shown(list(options))}: the same text twice; leave one out")
    return options


def _right_option(row: Row, options: tuple[str, ...]) -> tuple[str]:
    """Return the option that the answer names by its text, or else by its number from 0."""
    answer = row["answer"]
    by_name = {str(number): option for number, option in enumerate(options)}
    by_name |= {option.strip(): option for option in options}
    if isinstance(answer, str | int | float) and not isinstance(answer, bool):
        text = str(answer).strip()
        # pandas writes 1 as 1.0 where a column has gaps.
        for name in (text, text.removesuffix(".0")):
            if name in by_name:
                return (by_name[name],)
    numbers = f"its number from 0 to {len(options) - 1}"
    raise unexpected("answer", answer, f"one of the options {shown(list(options))}, or {numbers}")


def _answers(row: Row, _: tuple[()]) -> tuple[str, ...]:
    """Return the acceptable answers, each once: a text, a list, or SQuAD's ``{"text": list}``."""
    answers = row["answer"]
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers:
        numbers = "the number of an option needs the column options"
        raise unexpected("answer", answers, f"a text or a list of texts ({numbers})")
    for answer in answers:
        _check_text(answer, "answer")
    return tuple(dict.fromkeys(answers))


def _with_a_list(cells: Row) -> Row:
    """Read an answer of CSV, where every cell is text, as the list of texts that it holds."""
    answers = _list_in(cells.get("answer"))
    # Numbers alone are rather the output of a program.
    is_list = answers == [] or any(isinstance(answer, str) for answer in answers or ())
    return {**cells, "answer": answers} if is_list else cells


def _list_in(cell: Any) -> list[Any] | None:
    """Return the list that a text holds, as JSON or as pandas writes it, or None."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{", "array(")):
        return None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        if re.search(r"""array\(|['"]\s+['"]""", cell):
            # Python would read ['a' 'b'] as the one text 'ab'.
            raise InputError(f"{shown(cell)} is a NumPy array's text: give a JSON list") from None
        try:
            value = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    if isinstance(value, dict) and value.keys() <= {"text", "answer_start"}:  # of SQuAD
        value = [text] if isinstance(text := value.get("text"), str) else text
    return value if isinstance(value, list) else None


def _check_text(value: Any, column: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise unexpected(column, value, "a text that is not empty")
    # JSON may have half of a character, as in "\ud83d"; a tokenizer takes whole ones.
    if value != value.encode(errors="ignore").decode():
        raise unexpected(column, value, "whole characters, not half of one")
