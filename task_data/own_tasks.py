"""Tasks of the user's own files, and which task the command line means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import templates
from task_data.columns import MESSAGES, Arrangement, Columns
from task_data.files import (
    SUFFIXES,
    Row,
    check_answers,
    check_choice,
    check_prompt,
    read_table,
    typed_answer,
    typed_choice,
)
from task_data.rewards import Reward
from tasks import Sample, Task, get_task
from utils import InputError


@dataclass(frozen=True)
class OwnTask(Task):
    """Examples of the user's own files: prompt, answer and, to choose from, options."""

    train_file: Path | None
    validation_file: Path
    arrangement: Arrangement | None = field(default=None, kw_only=True)

    @property
    def stand_in(self) -> Row:
        """The first option's number, or a text."""
        return {"answer": "-" if self.generation else 0}

    @property
    def files(self) -> tuple[Path | None, Path]:
        """The files of train, where there is one, and of validation."""
        return self.train_file, self.validation_file

    @property
    def first_file(self) -> Path:
        """The file whose first row says whether there are options."""
        return self.train_file or self.validation_file

    def check_columns(self, found: Iterable[str]) -> None:
        """Raise InputError if a column is missing, or if there are options in some rows only."""
        found = list(found)
        if ("options" in found) == self.generation:
            given, there = ("", "has none") if self.generation else ("no ", "has some")
            raise InputError(
                f"{given}options, but the first row of {self.first_file} {there}: give them in "
                "every row, or in none"
            )
        super().check_columns(found)

    def sample_of_cells(self, row: Row, index: int) -> Sample:
        """Turn a row of CSV, where everything is text, into a ``Sample``; raises as ``sample``."""
        arranged = self.arrangement
        if not self.answer_columns or (arranged and arranged.columns.label):
            return self.sample(row, index)
        return self.sample(typed_answer(row) if self.generation else typed_choice(row), index)


class OwnChoiceTask(OwnTask):
    """Options that each row brings along; the answer is one of them, or its number from 0."""

    train_as_classification = True

    def _answers(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        options, answer = check_choice(row)
        return options, (answer,)


@dataclass(frozen=True)
class OwnAnswerTask(OwnTask):
    """Free text, compared with an answer or a list of them."""

    metric: str

    generation = True

    @property
    def own_metric(self) -> str:
        """The metric that comes first, without a reward."""
        return self.metric

    def sample(self, row: Row, index: int) -> Sample:
        """Turn a row into a ``Sample``; a reward gets all of the row's columns."""
        sample = super().sample(row, index)
        whole = self.reward or MESSAGES in row
        return replace(sample, row=dict(row)) if whole else sample

    def messages(self, prompt: str, sample: Sample) -> list[dict[str, str]]:
        """Return the turns of a conversation before its answer."""
        return sample.row.get(MESSAGES) or super().messages(prompt, sample)

    def _answers(self, row: Row) -> tuple[tuple[()], tuple[str, ...]]:
        if not self.answer_columns:
            check_prompt(row)
            return (), ()
        return (), check_answers(row)


def choose_task(
    name: str | None,
    train_file: str | None,
    validation_file: str | None,
    metric: str | None,
    reward: str | None = None,
    columns: Columns | None = None,
) -> Task:
    """Return the named task, or that of the user's own files, which may be one or both.

    Args:
        name: of a task.
        train_file: the user's own.
        validation_file: the user's own.
        metric: the first one of the user's own files.
        reward: ``FILE.py:function``, which says how good generated answers are.
        columns: what is said about the columns of the user's own files.

    Raises:
        InputError: none is given, there is no such task, a file cannot be read, the metric or a
            reward does not fit, or the reward's file does not import.
    """
    task = _choose_task(
        name, train_file, validation_file, metric, reward is not None, columns or Columns()
    )
    if reward is None:
        return task
    if not task.generation:
        raise InputError(
            f"--reward {reward}: the answers of {task.name} are chosen from options; give a task "
            "whose answers are generated, or --non_diff"
        )
    return replace(task, reward=Reward.load(reward))


def _choose_task(
    name: str | None,
    train_file: str | None,
    validation_file: str | None,
    metric: str | None,
    has_reward: bool,
    columns: Columns,
) -> Task:
    if train_file or validation_file:
        return _own_task(train_file, validation_file, metric, has_reward, columns)
    if not name:
        raise InputError(
            "--task_name is missing: give a task, for instance --task_name SST2, or --train_file "
            "and --validation_file"
        )
    return get_task(name)


def _own_task(
    train_file: str | None,
    validation_file: str | None,
    metric: str | None,
    has_reward: bool,
    said: Columns,
) -> OwnTask:
    if not validation_file:
        raise InputError(
            f"--train_file {train_file} needs --validation_file: give the examples to report on"
        )
    train = own_file("--train_file", train_file) if train_file else None
    validation = own_file("--validation_file", validation_file)
    first = train or validation
    arrangement = Arrangement.of(first, said)
    table = read_table(first, ())
    columns = (arrangement.arrange(table) if arrangement else table).columns
    generation = "options" not in columns
    fitting = ("f1", "em") if generation else ("accuracy",)
    if metric is not None and metric not in fitting:
        kind = "generated" if generation else "chosen from options"
        raise InputError(
            f"--metric {metric}: the answers in {first} are {kind}; give {' or '.join(fitting)}"
        )
    shared = {
        "name": first.stem,
        "hub_path": None,
        "hub_config": None,
        "text_columns": ("prompt",),
        "train_file": train,
        "validation_file": validation,
        "arrangement": arrangement,
    }
    if generation:
        # A reward needs no answers.
        answers = () if has_reward and "answer" not in columns else ("answer",)
        shared |= {"template": templates.OwnAnswerTemplate(), "answer_columns": answers}
        return OwnAnswerTask(metric=metric or "f1", **shared)
    shared |= {"template": templates.OwnTemplate(), "answer_columns": ("options", "answer")}
    return OwnChoiceTask(**shared)


def own_file(option: str, name: str) -> Path:
    """Return a file of the user's own that can be read.

    Raises:
        InputError: it cannot, or its kind is not known.
    """
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        kind = f"files of kind {path.suffix}" if path.suffix else "files without a suffix"
        raise InputError(f"{option} {name}: {kind} are not read; give {', '.join(SUFFIXES)}")
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise InputError(f"{option} {name}: cannot be read ({error.strerror})") from error
