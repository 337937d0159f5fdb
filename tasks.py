"""The eleven tasks: where their rows come from, what counts as correct, and how rows are drawn.

A twelfth task is one template in templates.py and one entry of ``TASKS``.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import metrics
import templates
from templates import Template
from utils import InputError

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


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


@dataclass(frozen=True)
class Task(ABC):
    """A data set with its prompt and its metric.

    Attributes:
        name: as papers write it.
        template: how a row becomes text.
        hub_path: the data set's id on the Hugging Face Hub.
        hub_config: its configuration there, if it has several.
        text_columns: columns that must hold text.
        answer_columns: the columns that say which answers there are and which is correct.
    """

    name: str
    template: Template
    hub_path: str
    hub_config: str | None
    text_columns: tuple[str, ...]
    answer_columns: tuple[str, ...]

    generation: ClassVar[bool] = False
    metric_name: ClassVar[str] = "accuracy"
    train_as_classification: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column a row must have."""
        return self.text_columns + self.answer_columns

    @abstractmethod
    def _answers(self, row: Row) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return (candidates, correct); raise InputError where the row has no usable answer."""

    def sample(self, row: Row, index: int) -> Sample:
        """Turn row number ``index`` (from 0) of the data set into a ``Sample``.

        Raises:
            InputError: a column is missing, a text is not text, or the label or the answers are
                missing or unknown.
        """
        try:
            self.check_columns(row)
            for column in self.text_columns:
                if not isinstance(row[column], str):
                    raise InputError(f"{column} is {row[column]!r}: expected a text")
            candidates, correct = self._answers(row)
        except InputError as error:
            raise InputError(f"row {index} (the first is row 0): {error}") from error
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

    def score(self, predictions: Sequence[Any], samples: Sequence[Sample]) -> dict[str, float]:
        """Return the task's metrics, fractions from 0 to 1, for one prediction per sample.

        Predictions are candidates for ``{"accuracy": ...}``, texts for ``{"f1": ..., "em": ...}``.

        Raises:
            ValueError: no samples, or not as many as predictions.
        """
        golds = [sample.correct for sample in samples]
        if self.metric_name == "f1":
            return {
                "f1": metrics.mean_f1(predictions, golds),
                "em": metrics.mean_exact_match(predictions, golds),
            }
        return {"accuracy": metrics.accuracy(predictions, golds)}

    def _check_calibration(self) -> None:
        if not self.template.supports_calibration:
            raise InputError(
                f"{self.name} has no content-free prompt: run it without --sfc and --icl_sfc"
            )


class LabelTask(Task):
    """A task with fixed labels: its candidates are the keys of the template's verbalizer."""

    template: templates.LabelTemplate

    train_as_classification = True

    def _answers(self, row: Row) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        candidates = tuple(self.template.verbalizer)
        (column,) = self.answer_columns
        return candidates, (_pick(candidates, row[column], column),)


class CopaTask(Task):
    """Two choices that each example brings along."""

    template: templates.CopaTemplate

    def _answers(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        _pick(tuple(self.template.conjunctions), row["question"], "question")
        candidates = (row["choice1"], row["choice2"])
        return candidates, (candidates[_pick((0, 1), row["label"], "label")],)


class ReCoRDTask(Task):
    """The passage's entities; any of several may be right."""

    def _answers(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return _distinct_texts(row["entities"], "entities"), _distinct_texts(
            row["answers"], "answers"
        )


@dataclass(frozen=True)
class GenerationTask(Task):
    """Free text, compared with gold answers that lie in ``answer_field`` of the answer column."""

    answer_field: str

    generation = True
    metric_name = "f1"

    def _answers(self, row: Row) -> tuple[tuple[()], tuple[str, ...]]:
        (column,) = self.answer_columns
        answers = row[column]
        texts = answers.get(self.answer_field) if isinstance(answers, Mapping) else None
        return (), _distinct_texts(texts, f"{column}.{self.answer_field}")


def _pick(known: tuple[Any, ...], value: Any, column: str) -> Any:
    """Return the known value equal to ``value`` (a file may write 1.0 for 1, or 1 for true)."""
    if value not in known:
        expected = " or ".join(repr(candidate) for candidate in known)
        raise InputError(f"{column} is {value!r}: expected {expected}")
    return known[known.index(value)]


def _distinct_texts(values: Any, column: str) -> tuple[str, ...]:
    """Return the texts in order, each once."""
    is_list = isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)
    if not is_list or not values:
        raise InputError(f"{column} is {values!r}: expected a list of at least one text")
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


def choose_task(
    name: str | None, train_file: str | None, validation_file: str | None, metric: str | None
) -> Task:
    """Return the named task, or that of the user's own files, which may be one or both.

    Raises:
        InputError: none is given, or there is no such task.
    """
    if not name:
        raise InputError("--task_name is missing: give a task, for instance --task_name SST2")
    return get_task(name)


# -------------------------------------------------------------------------------------- loading


def load_samples(task: Task, data_dir: str | None) -> tuple[list[Sample], list[Sample]]:
    """Return all train and all validation samples.

    Without ``data_dir`` they come from the Hub or its local cache. With it, they come from
    ``DIR/<task>/train.jsonl`` and ``validation.jsonl`` (or ``.parquet``; ``.jsonl`` wins where both
    lie there) in the Hub's schema; the task folder's name may be in any case. The Hub's test splits
    have no labels and are never used.

    Raises:
        InputError: files are missing, empty or malformed, or the Hub cannot be reached.
    """
    if data_dir is None:
        train, validation = _read_hub(task)
        hub_id = _hub_id(task)
        return (
            _to_samples(task, train, f"{hub_id} train"),
            _to_samples(task, validation, f"{hub_id} validation"),
        )
    folder = _task_folder(task, Path(data_dir))
    train, validation = (_load_file(task, folder, split) for split in ("train", "validation"))
    return train, validation


def _task_folder(task: Task, data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    folders = sorted(path for path in data_dir.iterdir() if path.is_dir())
    for folder in folders:
        if folder.name.lower() == task.name.lower():
            return folder
    found = ", ".join(folder.name for folder in folders) or "none"
    raise InputError(f"--data_dir {data_dir}: no folder for {task.name}; folders found: {found}")


def _load_file(task: Task, folder: Path, split: str) -> list[Sample]:
    for suffix, read in ((".jsonl", _read_jsonl), (".parquet", _read_parquet)):
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return _to_samples(task, read(task, path), str(path))
    raise InputError(f"{folder}: neither {split}.jsonl nor {split}.parquet is there")


def _to_samples(task: Task, rows: Sequence[Row], source: str) -> list[Sample]:
    if not rows:
        raise InputError(f"{source} has no rows: give at least one example")
    try:
        return [task.sample(row, index) for index, row in enumerate(rows)]
    except InputError as error:
        raise InputError(f"{source}, {error}") from error


# Files are read with json and pyarrow, the reader inside datasets, and not with load_dataset: that
# takes a second more for 700 rows (its import and its conversion) and writes a copy into a cache.


def _read_jsonl(task: Task, path: Path) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number}: expected a JSON object, one on each line")
                rows.append(row)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return rows


def _read_parquet(task: Task, path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_source(task, file.schema_arrow.names, path)
            return file.read(columns=list(task.columns)).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file ({_first_line(error)})") from error


def _read_hub(task: Task) -> tuple[list[Row], list[Row]]:
    import datasets  # takes a second to import, and runs with --data_dir do without it

    hub_id = _hub_id(task)
    try:
        splits = datasets.load_dataset(
            task.hub_path, task.hub_config, split=["train", "validation"]
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"cannot load {hub_id} from the Hub ({_first_line(error)}): "
            f"give the files with --data_dir DIR, in DIR/{task.name}"
        ) from error
    for split in splits:
        _check_source(task, split.column_names, hub_id)
    train, validation = (split.select_columns(list(task.columns)).to_list() for split in splits)
    return train, validation


def _check_source(task: Task, found: Iterable[str], source: object) -> None:
    try:
        task.check_columns(found)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _hub_id(task: Task) -> str:
    return f"{task.hub_path} ({task.hub_config})" if task.hub_config else task.hub_path


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# ------------------------------------------------------------------------------------- sampling


def permutation_subset(samples: Sequence[Sample], k: int, seed: int) -> list[Sample]:
    """Return k samples drawn without replacement: all n of them, permuted, if k is n or more.

    The draw is ``numpy.random.RandomState(seed).permutation(n)[:k]``, that of MeZO's experiments
    (Malladi et al. 2023, arXiv 2305.17333), so that a seed means the same rows there and here.

    Raises:
        InputError: k is negative.
    """
    if k < 0:
        raise InputError(f"cannot draw {k} examples: give 0 or more")
    order = np.random.RandomState(seed).permutation(len(samples))[:k]
    return [samples[index] for index in order]


def sample_train_dev(
    samples: Sequence[Sample], num_train: int, num_dev: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Return train and dev samples: one draw of num_train + num_dev, whose last num_dev are dev.

    Asking for more than there is takes all there is, with a warning: dev stays whole and train is
    shorter.

    Raises:
        InputError: a number is negative, or dev would leave no training example.
    """
    if num_train < 0 or num_dev < 0:
        raise InputError(
            f"cannot draw {num_train} train and {num_dev} dev examples: give 0 or more"
        )
    wanted, available = num_train + num_dev, len(samples)
    if wanted > available:
        if num_dev >= available:
            raise InputError(
                f"{num_dev} dev examples leave none to train on, of {available}: lower --num_dev"
            )
        logger.warning(
            "only %d examples for %d train + %d dev: training on %d",
            available,
            num_train,
            num_dev,
            available - num_dev,
        )
    drawn = permutation_subset(samples, wanted, seed)
    split = len(drawn) - num_dev
    return drawn[:split], drawn[split:]


def demonstration_seeds(num_eval: int) -> list[int]:
    """Return the seed of each evaluation example's own demonstrations, as MeZO draws them."""
    return np.random.RandomState(0).randint(0, 10000, num_eval).tolist()
