"""The eleven tasks: prompt, columns, which answers there are and which counts as correct.

A twelfth one is a template in templates.py and an entry of ``TASKS``. A task of the user's own
files takes no code (task_data/own_tasks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import metrics
import templates
from templates import Row, Template
from utils import InputError

METRICS = {"accuracy": metrics.accuracy, "f1": metrics.f1, "em": metrics.exact_match}


@dataclass(frozen=True)
class Sample:
    """One example."""

    id: int  # the row's index in its split, from 0
    row: Row
    # Labels or texts in the order of the options; empty where answers are generated.
    candidates: tuple[Any, ...]
    # The acceptable candidates, or the gold answers; training and demonstrations take the first.
    correct: tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """A data set with its prompt and its metric."""

    name: str  # as papers write it
    template: Template
    hub_path: str | None = None  # the data set's id on the Hub; None for the user's own files
    hub_config: str | None = None  # its configuration there, if it has several
    answer_column: str | None = "label"  # says which answer is correct; None: a reward does
    _: KW_ONLY
    # A row -> the answers to choose from; None: the template's labels. Without either answers are
    # generated.
    candidates: Callable[[Row], tuple[Any, ...]] | None = None
    # (A row, its candidates) -> the acceptable answers; None: what the answer's column holds.
    correct: Callable[[Row, tuple[Any, ...]], tuple[Any, ...]] | None = None
    more_text_columns: tuple[str, ...] = ()  # beside those of the prompt
    option_columns: tuple[str, ...] = ()  # hold no text; ``candidates`` needs them
    answer_metric: str = "f1"  # the first metric of generated answers: f1 or em
    reward: Any = None  # a task_data.rewards.Reward: how good a text is; None: the answers say so

    @property
    def generation(self) -> bool:
        """Whether answers are generated, not chosen from options."""
        return self.candidates is None and not self.template.labels

    @property
    def train_as_classification(self) -> bool:
        """Whether published runs train with the cross-entropy over the options."""
        return bool(self.template.labels)

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Columns that the prompt is made of."""
        return self.template.columns

    def sample(self, row: Row, index: int, with_answer: bool = True) -> Sample:
        """Turn row number ``index`` (from 0) into a ``Sample``; a question has no answer yet."""
        texts = self.template.columns + self.more_text_columns
        answer = [self.answer_column] if with_answer and self.answer_column else []
        self.check_columns(row, [*texts, *self.option_columns, *answer])
        for column in texts:
            if not isinstance(row[column], str):
                raise unexpected(column, row[column], "a text")
        candidates = self.candidates(row) if self.candidates else tuple(self.template.labels)
        correct: tuple[Any, ...] = ()
        if answer and self.correct:
            correct = self.correct(row, candidates)
        elif answer:
            correct = (_pick(candidates, row, self.answer_column),)
        return Sample(index, row, candidates, correct)

    def check_columns(self, row: Row, needed: Iterable[str]) -> None:
        """Refuse a row without one of the columns."""
        missing = [column for column in needed if column not in row]
        if missing:
            found = f"{self.name} needs {listed(needed)}; found {listed(row) or 'none'}"
            raise InputError(f"column {missing[0]!r} is missing: {found}")

    def prompt(self, sample: Sample) -> str:
        """Return the text before the option."""
        return self.template.prompt(sample.row)

    def messages(self, prompt: str, sample: Sample) -> list[dict[str, str]]:
        """Return the prompt as the turns of a conversation, for a chat template."""
        return [{"role": "user", "content": prompt.strip()}]

    def option(self, sample: Sample, candidate: Any) -> str:
        """Return the text that is scored or generated for one candidate."""
        return self.template.option(sample.row, candidate)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that ``score`` returns, the one to look at first."""
        if not self.generation:
            return ("accuracy",)
        of_answers = ("em", "f1") if self.answer_metric == "em" else ("f1", "em")
        return (*(["reward"] if self.reward else []), *(of_answers if self.answer_column else []))

    @property
    def metric_name(self) -> str:
        """The metric that comes first."""
        return self.metric_names[0]

    def rewards(self, texts: Sequence[str], samples: Sequence[Sample]) -> list[float]:
        """Return the reward of each sample's text."""
        prompts = [self.prompt(sample) for sample in samples]
        return self.reward(prompts, texts, [sample.row for sample in samples])

    def scores(
        self, predictions: Sequence[Any], samples: Sequence[Sample]
    ) -> dict[str, list[float]]:
        """Return ``metric_names`` with the values of all samples' predictions."""
        scores = {"reward": self.rewards(predictions, samples)} if self.reward else {}
        pairs = [(p, sample.correct) for p, sample in zip(predictions, samples, strict=True)]
        for name in self.metric_names:
            if name in METRICS:
                scores[name] = [METRICS[name](*pair) for pair in pairs]
        return scores

    def score(self, predictions: Sequence[Any], samples: Sequence[Sample]) -> dict[str, float]:
        """Return ``metric_names`` with the means over the samples."""
        scores = self.scores(predictions, samples)
        return {name: metrics.mean(values) for name, values in scores.items()}


def shown(value: Any) -> str:
    """Return a value as an error's one line shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def unexpected(what: str, value: Any, expected: str) -> InputError:
    """Return the error of a value that is of another kind than it should be."""
    return InputError(f"{what} is {shown(value)}: expected {expected}")


def listed(names: Iterable[Any], most: int = 20) -> str:
    """Return names as an error's one line lists them."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


# ----------------------------------------------------------------------- candidates and answers
# Functions and partials, no closures: a checkpoint keeps its task among its arguments.


def _texts(place: str, row: Row, *_: Any) -> tuple[str, ...]:
    """Return the texts of a column, or as in ``answers.text`` of its field, each once."""
    column, _, name = place.partition(".")
    values = row[column]
    if name:
        values = values.get(name) if isinstance(values, Mapping) else None
    is_list = isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)
    if not is_list or not values:
        raise unexpected(place, values, "a list of at least one text")
    return tuple(dict.fromkeys(values))


def _choices(row: Row) -> tuple[str, str]:
    _pick(templates.CONJUNCTIONS, row, "question")
    return row["choice1"], row["choice2"]


def _choice(row: Row, choices: tuple[str, ...]) -> tuple[str]:
    return (choices[_pick((0, 1), row, "label")],)


def _pick(known: Iterable[Any], row: Row, column: str) -> Any:
    """Return the known value equal to the row's (a file may write 1.0 for 1, or 1 for true)."""
    known = tuple(known)
    if row[column] not in known:
        raise unexpected(column, row[column], " or ".join(map(repr, known)))
    return known[known.index(row[column])]


_SUPER_GLUE = "aps/super_glue"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("SST2", templates.SST2, "nyu-mll/glue", "sst2"),
        Task("RTE", templates.RTE, _SUPER_GLUE, "rte"),
        Task("CB", templates.CB, _SUPER_GLUE, "cb"),
        Task("BoolQ", templates.BoolQ, "google/boolq", None, "answer"),
        Task("WSC", templates.WSC, _SUPER_GLUE, "wsc.fixed"),
        Task("WIC", templates.WIC, _SUPER_GLUE, "wic"),
        Task("MultiRC", templates.MultiRC, _SUPER_GLUE, "multirc"),
        Task(
            *("Copa", templates.Copa, _SUPER_GLUE, "copa"),
            candidates=_choices,
            correct=_choice,
            more_text_columns=("choice1", "choice2"),
        ),
        Task(
            *("ReCoRD", templates.ReCoRD, _SUPER_GLUE, "record", "answers"),
            candidates=partial(_texts, "entities"),
            correct=partial(_texts, "answers"),
            more_text_columns=("query",),
            option_columns=("entities",),
        ),
        Task(
            *("SQuAD", templates.SQuAD, "rajpurkar/squad", None, "answers"),
            correct=partial(_texts, "answers.text"),
        ),
        Task(
            *("DROP", templates.DROP, "ucinlp/drop", None, "answers_spans"),
            correct=partial(_texts, "answers_spans.spans"),
        ),
    )
}


def get_task(name: str) -> Task:
    """Return the task of that name, in any case."""
    for known, task in TASKS.items():
        if known.lower() == name.lower():
            return task
    raise InputError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
