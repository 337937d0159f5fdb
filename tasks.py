"""The eleven tasks: where their rows come from, and what counts as correct.

A twelfth task is one template in templates.py and one entry of ``TASKS``; a task of the user's own
files takes no code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import metrics
import templates
from task_data.columns import Arrangement
from task_data.files import (
    PlacedRow,
    Row,
    Table,
    no_rows,
    read_table,
    row_place,
    shown,
)
from task_data.rewards import Reward
from templates import Template
from utils import InputError, first_line


@dataclass(frozen=True)
class Sample:
    """One example.

    Attributes:
        id: the row's index in its split, from 0.
        row: the task's columns of the data set's row.
        candidates: labels or texts in the order of the options; empty for generation tasks.
        correct: the acceptable candidates, or the gold answer texts; the first is the one trained
            on and shown in demonstrations.
    """

    id: int
    row: Row
    candidates: tuple[Any, ...]
    correct: tuple[Any, ...]

    @property
    def has_correct_option(self) -> bool:
        """Whether a candidate is correct; a generated answer has no candidates, and always is."""
        return not self.candidates or any(choice in self.correct for choice in self.candidates)


@dataclass(frozen=True)
class Task(ABC):
    """A data set with its prompt and its metric.

    Attributes:
        name: as papers write it.
        template: how a row becomes text.
        hub_path: the data set's id on the Hugging Face Hub; None for the user's own files.
        hub_config: its configuration there, if it has several.
        text_columns: columns that must hold text.
        answer_columns: the columns that say which answers there are and which is correct.
        reward: how good a generated text is; None: the gold answers say so.
    """

    name: str
    template: Template
    hub_path: str | None
    hub_config: str | None
    text_columns: tuple[str, ...]
    answer_columns: tuple[str, ...]
    reward: Reward | None = field(default=None, kw_only=True)

    generation: ClassVar[bool] = False
    own_metric: ClassVar[str] = "accuracy"
    # Of the user's own files: train and validation, and how their columns are to be read.
    files: ClassVar[tuple[Path | None, Path] | None] = None
    arrangement: ClassVar[Arrangement | None] = None
    train_as_classification: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column a row must have."""
        return self.text_columns + self.answer_columns

    @property
    def stand_in(self) -> Row:
        """An answer for rows that have none, in the columns that would say which is correct."""
        (column,) = self.answer_columns
        return {column: "-"}

    @abstractmethod
    def _answers(self, row: Row) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return (candidates, correct); raise InputError where the row has no usable answer."""

    def sample(self, row: Row, index: int) -> Sample:
        """Turn row number ``index`` (from 0) of the data set into a ``Sample``.

        Raises:
            InputError: a column is missing, a text is not text, or the label or the answers are
                missing or unknown. Who knows where the row stands adds that.
        """
        self.check_columns(row)
        for column in self.text_columns:
            if not isinstance(row[column], str):
                raise InputError(f"{column} is {shown(row[column])}: expected a text")
        candidates, correct = self._answers(row)
        return Sample(index, {column: row[column] for column in self.columns}, candidates, correct)

    def check_columns(self, found: Iterable[str]) -> None:
        """Raise InputError if one of the task's columns is not among those found."""
        found = list(found)
        missing = [column for column in self.columns if column not in found]
        if missing:
            raise InputError(
                f"column {missing[0]!r} is missing: {self.name} needs {', '.join(self.columns)}; "
                f"found {', '.join(map(str, found)) or 'none'}"
            )

    def prompt(self, sample: Sample) -> str:
        """Return the text before the option."""
        return self.template.prompt(sample.row)

    def messages(self, prompt: str, sample: Sample) -> list[dict[str, str]]:
        """Return the prompt as the turns of a conversation, for a chat template."""
        return [{"role": "user", "content": prompt.strip()}]

    def option(self, sample: Sample, candidate: Any) -> str:
        """Return the text that is scored or generated for one candidate."""
        return self.template.option(sample.row, candidate)

    def content_free_prompt(self, sample: Sample) -> str:
        """Return the prompt of SFC calibration (arXiv 2104.08315).

        Raises:
            InputError: the task has none.
        """
        self._check_calibration()
        return self.template.content_free_prompt(sample.row)

    def content_free_option(self, sample: Sample, candidate: Any) -> str:
        """Return the option as it follows ``content_free_prompt``; raises as that does."""
        self._check_calibration()
        return self.template.content_free_option(sample.row, candidate)

    @property
    def metric_name(self) -> str:
        """The metric that comes first."""
        return "reward" if self.reward else self.own_metric

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that ``score`` returns."""
        names = ("f1", "em") if self.answer_columns else ()
        return (*(["reward"] if self.reward else []), *names) if self.generation else ("accuracy",)

    def rewards(self, texts: Sequence[str], samples: Sequence[Sample]) -> list[float]:
        """Return the reward of each sample's text.

        Raises:
            InputError: the function of ``reward`` fails.
        """
        prompts = [self.prompt(sample) for sample in samples]
        return self.reward(prompts, texts, [sample.row for sample in samples])

    def score(self, predictions: Sequence[Any], samples: Sequence[Sample]) -> dict[str, float]:
        """Return the task's metrics, fractions from 0 to 1, for one prediction per sample.

        Predictions are candidates for ``{"accuracy": ...}``, texts for ``{"f1": ..., "em": ...}``,
        of which ``metric_name`` is the first. With a reward its mean stands before them.

        Raises:
            ValueError: no samples, or not as many as predictions.
            InputError: the function of ``reward`` fails.
        """
        golds = [sample.correct for sample in samples]
        if not self.generation:
            return {"accuracy": metrics.accuracy(predictions, golds)}
        values: dict[str, float] = {}
        if self.reward:
            values["reward"] = metrics.mean(self.rewards(predictions, samples))
        if self.answer_columns:
            values["f1"] = metrics.mean_f1(predictions, golds)
            values["em"] = metrics.mean_exact_match(predictions, golds)
        return {self.metric_name: values[self.metric_name], **values}

    def _check_calibration(self) -> None:
        if not self.template.supports_calibration:
            raise InputError(
                f"{self.name} has no content-free prompt: run it without --sfc and --icl_sfc"
            )


class LabelTask(Task):
    """A task with fixed labels: its candidates are the keys of the template's verbalizer."""

    template: templates.LabelTemplate

    train_as_classification = True

    @property
    def stand_in(self) -> Row:
        """The first label."""
        return dict.fromkeys(self.answer_columns, next(iter(self.template.verbalizer)))

    def _answers(self, row: Row) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        candidates = tuple(self.template.verbalizer)
        (column,) = self.answer_columns
        return candidates, (_pick(candidates, row[column], column),)


class CopaTask(Task):
    """Two choices that each example brings along."""

    template: templates.CopaTemplate

    @property
    def stand_in(self) -> Row:
        """The first choice."""
        return dict.fromkeys(self.answer_columns, 0)

    def _answers(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        _pick(tuple(self.template.conjunctions), row["question"], "question")
        candidates = (row["choice1"], row["choice2"])
        return candidates, (candidates[_pick((0, 1), row["label"], "label")],)


class ReCoRDTask(Task):
    """The passage's entities; any of several may be right."""

    @property
    def stand_in(self) -> Row:
        """No entity."""
        return {"answers": ["-"]}

    def _answers(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return _distinct_texts(row["entities"], "entities"), _distinct_texts(
            row["answers"], "answers"
        )


@dataclass(frozen=True)
class GenerationTask(Task):
    """Free text, compared with gold answers that lie in ``answer_field`` of the answer column."""

    answer_field: str

    generation = True
    own_metric = "f1"

    @property
    def stand_in(self) -> Row:
        """A text in the answers' form."""
        return {column: {self.answer_field: ["-"]} for column in self.answer_columns}

    def _answers(self, row: Row) -> tuple[tuple[()], tuple[str, ...]]:
        (column,) = self.answer_columns
        answers = row[column]
        texts = answers.get(self.answer_field) if isinstance(answers, Mapping) else None
        return (), _distinct_texts(texts, f"{column}.{self.answer_field}")


def _pick(known: tuple[Any, ...], value: Any, column: str) -> Any:
    """Return the known value equal to ``value`` (a file may write 1.0 for 1, or 1 for true)."""
    if value not in known:
        expected = " or ".join(repr(candidate) for candidate in known)
        raise InputError(f"{column} is {shown(value)}: expected {expected}")
    return known[known.index(value)]


def _distinct_texts(values: Any, column: str) -> tuple[str, ...]:
    """Return the texts in order, each once."""
    is_list = isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)
    if not is_list or not values:
        raise InputError(f"{column} is {shown(values)}: expected a list of at least one text")
    return tuple(dict.fromkeys(values))


_SUPER_GLUE = "aps/super_glue"
_LABEL = ("label",)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        LabelTask("SST2", templates.SST2Template(), "nyu-mll/glue", "sst2", ("sentence",), _LABEL),
        LabelTask(
            "RTE", templates.RTETemplate(), _SUPER_GLUE, "rte", ("premise", "hypothesis"), _LABEL
        ),
        LabelTask(
            "CB", templates.CBTemplate(), _SUPER_GLUE, "cb", ("premise", "hypothesis"), _LABEL
        ),
        LabelTask(
            "BoolQ",
            templates.BoolQTemplate(),
            "google/boolq",
            None,
            ("passage", "question"),
            ("answer",),
        ),
        LabelTask(
            "WSC",
            templates.WSCTemplate(),
            _SUPER_GLUE,
            "wsc.fixed",
            ("text", "span1_text", "span2_text"),
            _LABEL,
        ),
        LabelTask(
            "WIC",
            templates.WICTemplate(),
            _SUPER_GLUE,
            "wic",
            ("word", "sentence1", "sentence2"),
            _LABEL,
        ),
        LabelTask(
            "MultiRC",
            templates.MultiRCTemplate(),
            _SUPER_GLUE,
            "multirc",
            ("paragraph", "question", "answer"),
            _LABEL,
        ),
        CopaTask(
            "Copa",
            templates.CopaTemplate(),
            _SUPER_GLUE,
            "copa",
            ("premise", "choice1", "choice2", "question"),
            _LABEL,
        ),
        ReCoRDTask(
            "ReCoRD",
            templates.ReCoRDTemplate(),
            _SUPER_GLUE,
            "record",
            ("passage", "query"),
            ("entities", "answers"),
        ),
        GenerationTask(
            "SQuAD",
            templates.SQuADTemplate(),
            "rajpurkar/squad",
            None,
            ("title", "context", "question"),
            ("answers",),
            answer_field="text",
        ),
        GenerationTask(
            "DROP",
            templates.DROPTemplate(),
            "ucinlp/drop",
            None,
            ("passage", "question"),
            ("answers_spans",),
            answer_field="spans",
        ),
    )
}


def get_task(name: str) -> Task:
    """Return the task of that name, in any case.

    Raises:
        InputError: there is none.
    """
    for known, task in TASKS.items():
        if known.lower() == name.lower():
            return task
    raise InputError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")


# -------------------------------------------------------------------------------------- loading


def load_samples(
    task: Task, data_dir: str | None, with_validation: bool = True
) -> tuple[list[Sample], list[Sample]]:
    """Return all train and all validation samples; none of validation if they are not wanted.

    Those of the user's own files come from there; without a training file there are none. Others
    come from the Hub or its local cache, or with ``data_dir`` from ``DIR/<task>/train.jsonl`` and
    ``validation.jsonl`` (or ``.parquet``; ``.jsonl`` wins where both lie there) in the Hub's
    schema; the task folder's name may be in any case. The Hub's test splits have no labels and are
    never used.

    Raises:
        InputError: files are missing, empty or malformed, or the Hub cannot be reached.
    """
    files = split_files(task, data_dir)
    if files is None:
        return _load_hub(task)
    train, validation = files
    return (
        _load_file(task, train) if train else [],
        _load_file(task, validation) if with_validation else [],
    )


def split_files(task: Task, data_dir: str | None) -> tuple[Path | None, Path] | None:
    """Return the files of the train split, where there is one, and of validation; None: the Hub's.

    Raises:
        InputError: they are missing.
    """
    if task.files:
        return task.files
    if data_dir is None:
        return None
    folder = _task_folder(task, Path(data_dir))
    return _split_file(folder, "train"), _split_file(folder, "validation")


def _task_folder(task: Task, data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    folders = sorted(path for path in data_dir.iterdir() if path.is_dir())
    for folder in folders:
        if folder.name.lower() == task.name.lower():
            return folder
    found = ", ".join(folder.name for folder in folders) or "none"
    raise InputError(f"--data_dir {data_dir}: no folder for {task.name}; folders found: {found}")


def _split_file(folder: Path, split: str) -> Path:
    for suffix in (".jsonl", ".parquet"):
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return path
    raise InputError(f"{folder}: neither {split}.jsonl nor {split}.parquet is there")


def load_questions(task: Task, path: Path) -> list[Sample]:
    """Return the rows of a file, which need no answers, in their order.

    Raises:
        InputError: the file cannot be read, is empty or malformed, or lacks a column.
    """
    answered = [
        PlacedRow(place, {**row, **task.stand_in}) for place, row in _table(task, path).rows
    ]
    if not answered:
        raise no_rows(path)
    _check_source(task, answered[0].row, path)
    samples = _to_samples(_reader(task, path), answered, path)
    return [replace(sample, correct=()) for sample in samples]


def _load_file(task: Task, path: Path) -> list[Sample]:
    table = _table(task, path)
    _check_source(task, table.columns, table.place)
    return _to_samples(_reader(task, path), table.rows, path)


def _table(task: Task, path: Path) -> Table:
    """Open a file of a task, its columns as the task has them."""
    arrangement = task.arrangement
    # A reward may look at every column, a template may name any.
    table = read_table(path, None if task.reward or arrangement else task.columns)
    return arrangement.arrange(table) if arrangement else table


def _reader(task: Task, path: Path) -> Callable[[Row, int], Sample]:
    cells = task.files and path.suffix.lower() == ".csv"
    return task.sample_of_cells if cells else task.sample


def _to_samples(
    make: Callable[[Row, int], Sample], rows: Iterable[PlacedRow], source: object
) -> list[Sample]:
    samples = []
    for index, (place, row) in enumerate(rows):
        try:
            samples.append(make(row, index))
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
    if not samples:
        raise no_rows(source)
    return samples


def _load_hub(task: Task) -> tuple[list[Sample], list[Sample]]:
    import datasets  # takes a second to import, and runs with --data_dir do without it

    hub_id = _hub_id(task)
    try:
        splits = datasets.load_dataset(
            task.hub_path, task.hub_config, split=["train", "validation"]
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"cannot load {hub_id} from the Hub ({first_line(error)}): "
            f"give the files with --data_dir DIR, in DIR/{task.name}"
        ) from error
    loaded = []
    for name, split in zip(("train", "validation"), splits, strict=True):
        _check_source(task, split.column_names, hub_id)
        source = f"{hub_id} {name}"
        rows = enumerate(split.select_columns(list(task.columns)).to_list())
        placed = (PlacedRow(row_place(source, index), row) for index, row in rows)
        loaded.append(_to_samples(task.sample, placed, source))
    train, validation = loaded
    return train, validation


def _check_source(task: Task, found: Iterable[str], source: object) -> None:
    try:
        task.check_columns(found)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _hub_id(task: Task) -> str:
    return f"{task.hub_path} ({task.hub_config})" if task.hub_config else task.hub_path
