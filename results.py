"""What a run leaves behind: its result JSON, its rows of predictions, and what is printed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from typing import Any

from command_line.arguments import Arguments, changed_settings
from language_model.encoding import Encoder
from language_model.prediction import Prediction
from sampling import ExampleSet
from tasks import Sample, Task

VERSIONS = ("torch", "transformers", "accelerate", "peft", "numpy")
SHOWN_EXAMPLES = 3


def describe(metrics: dict[str, float]) -> str:
    """Return metrics as text; the first one's name is said already."""
    values = [f"{name} {value:.4f}" for name, value in metrics.items()]
    return ", ".join([values[0].split()[-1], *values[1:]])


def example_lines(
    encoder: Encoder, examples: ExampleSet, predictions: Sequence[Prediction]
) -> Iterator[str]:
    """Yield the first prompts with their options and scores, or with the generated text."""
    shown = zip(examples.evaluation, examples.demonstrations, predictions, strict=True)
    for sample, demonstrations, prediction in list(shown)[:SHOWN_EXAMPLES]:
        yield f"--- example {sample.id}, correct: {' | '.join(map(str, sample.correct))}"
        yield encoder.tokenizer.decode(encoder.prompt(sample, demonstrations))
        if prediction.scores is None:
            yield f"  generated: {prediction.answer!r}"
            continue
        for candidate, score in zip(sample.candidates, prediction.scores, strict=True):
            yield f"  {encoder.task.option(sample, candidate)!r}: {score:.4f}"


def prediction_rows(
    task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]
) -> list[dict[str, Any]]:
    """Return the rows of ``--predictions_file``: option index or text, and whether it is right."""
    rows = []
    for sample, prediction in zip(samples, predictions, strict=True):
        answer, scores = prediction.answer, prediction.scores
        metrics = task.score([answer], [sample])
        rows.append(
            {
                "id": sample.id,
                "prediction": answer if scores is None else sample.candidates.index(answer),
                "correct": (metrics["em"] if task.generation else metrics["accuracy"]) == 1.0,
                "scores": None if scores is None else list(scores),
            }
        )
    return rows


def summarize(arguments: Arguments, runs: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the content of the result JSON: one run as it is, several with their mean."""
    if len(runs) == 1:
        outcome = runs[0]
    else:
        kinds = ("metric_before_training", "dev_metric", "metric")
        outcome = {kind: mean_metrics(runs, kind) for kind in kinds if kind in runs[0]}
        outcome["runs"] = runs
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {
        "task": arguments.task.name,
        "model": arguments.model_name,
        "trainer": arguments.trainer,
        **outcome,
        "seconds": round(seconds, 3),
        "settings": changed_settings(arguments),
        "versions": {"python": platform.python_version(), **versions},
    }


def mean_metrics(runs: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Return the mean over the runs of each metric of one kind."""
    return {name: sum(run[kind][name] for run in runs) / len(runs) for name in runs[0][kind]}
