"""What a run leaves behind: its result JSON, its rows of predictions, and what is printed.

A result tells by the hash of its settings which experiment it is of: what is there is not computed
a second time, and not written over by another one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from command_line.arguments import Arguments, plain_value
from command_line.settings import (
    NOT_OF_THE_RESULT,
    changed_settings,
    length_of_run,
)
from experiment.folders import has_all_files, predictions_files
from experiment.provenance import provenance
from language_model.encoding import Encoder
from language_model.prediction import Prediction
from task_data.sampling import ExampleSet
from tasks import Sample, Task
from utils import InputError, write_json, write_json_lines

VERSIONS = ("torch", "transformers", "accelerate", "peft", "numpy")
SHOWN_EXAMPLES = 3
KINDS_OF_METRICS = ("metric_before_training", "dev_metric", "metric")
# What a run's losses are called in the Trainer's log, and in the result.
LOSSES = {"loss": "loss", "eval_loss": "dev_loss"}
# What training had taken when they were measured.
COSTS = ("forward_passes", "backward_passes", "seconds")
# The settings that are what was used, and not what was asked for.
USED = ("num_train", "num_dev", "num_eval", "max_length", "hessian_dtype", "zo_perturbation")
# By as much they may rise by chance: a small batch can be hard, the dev examples are the same.
NOISE = {"loss": 1.0, "dev_loss": 0.1}
LOWER = "lower --learning_rate"


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
    """Return the rows of ``--predictions_file``: option index or text, and whether it is right.

    With a reward each text's own stands there too.
    """
    rows: list[dict[str, Any]] = []
    answers = replace(task, reward=None)
    for sample, prediction in zip(samples, predictions, strict=True):
        answer, scores = prediction.answer, prediction.scores
        right = None
        if task.answer_columns:
            metrics = answers.score([answer], [sample])
            right = (metrics["em"] if task.generation else metrics["accuracy"]) == 1.0
        rows.append(
            {
                "id": sample.id,
                "prediction": answer if scores is None else sample.candidates.index(answer),
                "correct": right,
                "scores": None if scores is None else list(scores),
            }
        )
    if task.reward:
        values = task.rewards([prediction.answer for prediction in predictions], samples)
        for row, value in zip(rows, values, strict=True):
            row["reward"] = value
    return rows


def history(
    log: Sequence[Mapping[str, Any]], metric: str | None = None
) -> dict[str, dict[str, float | None]]:
    """Return a run's losses, the means since the entry before, and dev losses, by their steps.

    What training had taken until then stands beside them.

    Args:
        log: ``log_history`` of the Trainer's state. A loss that is not finite becomes None.
        metric: of the dev set, that stands there too where it was measured.
    """
    losses = {
        name: {
            str(row["step"]): row[logged] if math.isfinite(row[logged]) else None
            for row in log
            if logged in row
        }
        for logged, name in LOSSES.items()
    }
    rows = [row for row in log if any(logged in row for logged in LOSSES)]
    further = {name: name for name in COSTS} | {f"eval_{metric}": "dev_metric"}
    found = {
        name: {str(row["step"]): row[logged] for row in rows if logged in row}
        for logged, name in further.items()
    }
    return losses | {name: values for name, values in found.items() if values}


def summarize(
    arguments: Arguments,
    runs: Sequence[dict[str, Any]],
    used: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the content of the result JSON: one run as it is, several with their mean.

    Args:
        arguments: of all runs.
        runs: what each of them gave.
        used: settings as they came to be, where they can differ from the arguments.
        seconds: of all runs together.
    """
    outcome = runs[0] if len(runs) == 1 else {**over_sets(runs), "runs": runs}
    return {
        "task": arguments.task.name,
        "model": arguments.model_name,
        "trainer": arguments.trainer,
        "experiment": arguments.experiment,
        **outcome,
        "seconds": round(seconds, 3),
        **provenance(arguments.device),
        "settings": changed_settings(arguments) | used,
        "versions": versions(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    libraries = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"python": platform.python_version(), **libraries}


def write_results(
    arguments: Arguments, result: Mapping[str, Any], predictions: Sequence[list[dict[str, Any]]]
) -> None:
    """Write the result JSON and each run's rows of predictions, and print what is left to say."""
    write_json(arguments.result_path, result)
    for path, rows in zip(predictions_files(arguments), predictions, strict=False):
        write_json_lines(path, rows)
    # Each metric of a single run is printed already.
    lines = result_lines if "runs" in result else last_lines
    table = closing_table(arguments, result) if "steps" in result else []
    print("\n".join([*table, *lines(arguments, result)]))


def closing_table(arguments: Arguments, result: Mapping[str, Any]) -> list[str]:
    """Return a training run at a glance: a line of names, and below each its value."""
    metric = arguments.task.metric_name
    titles = dict(zip(KINDS_OF_METRICS, ("before", "dev", "test"), strict=True))
    cells = {
        f"{title} {metric}": f"{result[kind][metric]:.4f}"
        for kind, title in titles.items()
        if kind in result
    }
    cells["steps"] = f"{result['steps']:,}"
    for name in ("forward_passes", "backward_passes"):
        if name in result:
            cells[name.replace("_", " ")] = f"{result[name]:,}"
    cells["training"] = f"{result['train_seconds']:.1f} s"
    cells["all"] = f"{result['seconds']:.1f} s"
    cells["memory"] = f"{result['peak_memory_mib']:,.0f} MiB"
    widths = [max(map(len, pair)) for pair in cells.items()]
    rows = (cells.keys(), cells.values())
    return ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]


def show_again(arguments: Arguments, result: Mapping[str, Any]) -> None:
    """Print a result that is there already, from one process only."""
    if arguments.process_index == 0:
        print("these settings have a result already (--overwrite_output_dir makes it anew)")
        print("\n".join(result_lines(arguments, result)))


def over_sets(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and sample standard deviation over at least 2 runs of the metrics they have."""
    outcome = {}
    for kind in (kind for kind in KINDS_OF_METRICS if kind in runs[0]):
        values = {name: [run[kind][name] for run in runs] for name in runs[0][kind]}
        outcome[kind] = {name: statistics.fmean(numbers) for name, numbers in values.items()}
        outcome[f"{kind}_std"] = {
            name: statistics.stdev(numbers) for name, numbers in values.items()
        }
    return outcome


def used_settings(examples: ExampleSet, max_length: int) -> dict[str, int]:
    """Return how many examples there really were, and tokens of a text at most."""
    shown = len(examples.demonstrations[0]) if examples.demonstrations else 0
    return {
        "num_train": len(examples.train) or shown,
        "num_dev": len(examples.dev),
        "num_eval": len(examples.evaluation),
        "max_length": max_length,
    }


def metric_names(arguments: Arguments) -> dict[str, str]:
    """Return how the metrics of a run are called in the lines that are printed, by their kinds."""
    zero_shot, after = "zero-shot", "test"
    if arguments.trainer == "none":
        after = "in-context" if arguments.num_train else zero_shot
    metric = arguments.task.metric_name
    return {
        kind: f"{words} {metric}"
        for kind, words in zip(KINDS_OF_METRICS, (zero_shot, "dev", after), strict=True)
    }


def result_lines(arguments: Arguments, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a whole result in words: its metrics, what is wrong with it, and where it lies."""
    names = metric_names(arguments)
    for kind in (kind for kind in KINDS_OF_METRICS if kind in result):
        line = f"{names[kind]}: {describe(result[kind])}"
        if f"{kind}_std" in result:
            line += f" (mean of {len(result['runs'])} sets, standard deviation "
            line += f"{describe(result[f'{kind}_std'])})"
        yield line
    yield from last_lines(arguments, result)


def last_lines(arguments: Arguments, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a result, of several sets with the set's name, and where it lies."""
    for run in result.get("runs", [result]):
        for line in concerns(run):
            yield f"set {run['train_set_seed']}: {line}" if "runs" in result else line
    yield f"result: {arguments.result_path}"


def concerns(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for everything that speaks against a run: it diverged, or did only harm.

    Dev losses count where there are any, training losses otherwise. They diverged if they end above
    the first by more than the first itself, and by more than ``NOISE``.
    """
    losses = result.get("history", {})
    name, values = next(
        ((name, [*losses[name].values()]) for name in ("dev_loss", "loss") if losses.get(name)),
        ("", []),
    )
    if len(values) > 1 and values[0] is not None:
        first, last = values[0], values[-1]
        words = name.replace("_", " ")
        if last is None:
            yield f"warning: the last {words} is not finite (the first: {first:.4g}); {LOWER}"
        elif last - first > max(abs(first), NOISE[name]):
            yield f"warning: the {words} went up from {first:.4g} to {last:.4g}; {LOWER}"
    before, after = result.get("metric_before_training"), result.get("metric")
    if before and after:
        metric = next(iter(before))
        if after[metric] < before[metric]:
            yield (
                f"warning: the {metric} of {after[metric]:.4f} is below that before training, "
                f"{before[metric]:.4f}; {LOWER}"
            )


def earlier_result(arguments: Arguments) -> dict[str, Any] | None:
    """Return what the very same experiment has written as its result, None if it has not.

    Raises:
        InputError: something else is in the place, and is not to be written over.
    """
    path = arguments.result_path
    if not path.is_file():
        if not arguments.overwrite_output_dir:
            _keep_predictions(arguments)
        return None
    result = read_result(path)
    if result.get("experiment") == arguments.experiment:
        length = length_of_run(arguments)
        then = {name: result["settings"].get(name) for name in length}
        if then == length:
            return result
        # A longer run goes on from this one.
        if all(then[name] and then[name] < length[name] for name in length):
            return None
    if arguments.overwrite_output_dir:
        return None
    option = "--result_file" if arguments.result_file else "--tag"
    raise InputError(
        f"{path} is {_other_content(arguments, result)}: give another {option}, or "
        "--overwrite_output_dir to replace it"
    )


def _other_content(arguments: Arguments, result: Mapping[str, Any]) -> str:
    """Return what is in the place of this experiment's result, by a setting if one is known."""
    if not result:
        return "no result of a run"
    defaults = {field.name: plain_value(field.default) for field in dataclasses.fields(arguments)}
    written, changed = result["settings"], changed_settings(arguments)
    # What is not written down has its default.
    then, now = defaults | written, defaults | changed
    names = [name for name in {**written, **changed} if name not in NOT_OF_THE_RESULT]
    # What was used can differ from what was asked for, and a longer run of the same settings goes
    # on: these say the least.
    names.sort(key=lambda name: (name in length_of_run(arguments), name in USED))
    if result.get("trainer") != arguments.trainer:
        return f"of a run with --trainer {result.get('trainer')}, not {arguments.trainer}"
    for name in names:
        asked_for = name not in USED or now[name] not in (None, "auto")
        if asked_for and then[name] != now[name]:
            return f"of a run with --{name} {then[name]}, not {now[name]}"
    return "of a run with other settings, another model or other data"


def is_wanted_again(arguments: Arguments) -> bool:
    """Whether a result that is there is to be made all the same, or other files are missing."""
    asked = arguments.overwrite_output_dir or arguments.resume_from_checkpoint
    return bool(asked) or not has_all_files(arguments)


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a result JSON, nothing if the file is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) and "settings" in result else {}


def _keep_predictions(arguments: Arguments) -> None:
    """Refuse to write over predictions whose result is not there: nobody knows whose they are."""
    for path in predictions_files(arguments):
        if path.is_file():
            raise InputError(
                f"--predictions_file {path}: it is there already, and its result is not; give "
                "another name, or --overwrite_output_dir to replace it"
            )
