"""A model's answers, their rows, and the result JSON.

A result holds the hash of its experiment. The same experiment is not computed a second time, and
another one does not write over it.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import math
import platform
import re
import resource
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from command_line.arguments import Arguments, plain_value
from command_line.settings import NOT_OF_THE_RESULT
from experiment.options import Options
from language_model.encoding import Encoder
from language_model.scoring import Prediction, predict
from task_data.loading import split_files
from task_data.own_tasks import OwnTask
from task_data.sampling import ExampleSet
from tasks import Sample, Task
from utils import InputError, fingerprint, read_json, write_json_lines, write_text_atomically

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("torch", "transformers", "accelerate", "peft", "numpy")
KINDS_OF_METRICS = ("metric_before_training", "dev_metric", "metric")
# Settings that hold what was used, which can differ from what was asked for.
USED = ("num_train", "num_dev", "num_eval", "max_length", "zo_perturbation")


def answers(
    options: Options,
    encoder: Encoder,
    model: PreTrainedModel | PeftModel,
    samples: list[Sample],
    shown: list[list[Sample]],
    label: str,
) -> list[Prediction]:
    """Return a model's answers; ``shown`` before each sample, ``label`` beside the bar."""
    size, calibration = options.arguments.per_device_eval_batch_size, options.arguments.calibration
    how = {"generation": options.generation, "progress": label}
    return predict(model, encoder, samples, shown, size, calibration, **how)


def prediction_rows(
    task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]
) -> list[dict[str, Any]]:
    """Return the rows of ``--predictions_file``.

    Each has its file's own ``id`` (or its number), the prompt's columns, and options with scores
    or the generated text.
    """
    answers = [prediction.answer for prediction in predictions]
    rewards = task.rewards(answers, samples) if task.reward else [None] * len(answers)
    scored = dataclasses.replace(task, reward=None)
    rows = []
    for sample, prediction, reward in zip(samples, predictions, rewards, strict=True):
        row = {"id": sample.row.get("id", sample.id)}
        row |= {name: sample.row[name] for name in task.prompt_columns if name != "id"}
        row["prediction"] = prediction.answer
        if prediction.scores is not None:
            options = [task.option(sample, each).strip() for each in sample.candidates]
            if isinstance(task, OwnTask):
                options = task.labels_of(options)
            chosen = options[sample.candidates.index(prediction.answer)]
            row |= {"prediction": chosen, "options": options, "scores": list(prediction.scores)}
        if sample.correct:
            metrics = scored.score([prediction.answer], [sample])
            row["correct"] = metrics["em" if task.generation else "accuracy"] == 1.0
        rows.append(row if reward is None else row | {"reward": reward})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV or JSON Lines, as the file's name ends; a list in a cell is JSON."""
    if path.suffix.lower() != ".csv":
        write_json_lines(path, rows)
        return

    def cell(value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value

    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    write_text_atomically(path, text.getvalue())


def history(log: Sequence[Mapping[str, Any]], metric: str = "") -> dict[str, dict[str, Any]]:
    """Return the losses and costs of the Trainer's ``log_history`` by their steps.

    A training loss is the mean since the entry before; one that is not finite becomes None.
    """
    costs = {name: name for name in ("forward_passes", "backward_passes", "seconds")}
    names = {"loss": "loss", "eval_loss": "dev_loss", **costs, f"eval_{metric}": "dev_metric"}
    found: dict[str, dict[str, Any]] = {"loss": {}, "dev_loss": {}}
    for row in (row for row in log if "loss" in row or "eval_loss" in row):
        for logged, name in names.items():
            if logged in row:
                # A checkpoint keeps None for a loss that is not finite.
                value = row[logged] if math.isfinite(row[logged] or 0) else None
                found.setdefault(name, {})[str(row["step"])] = value
    return found


def summarize(
    options: Options,
    encoder: Encoder,
    examples: ExampleSet,
    runs: Sequence[dict[str, Any]],
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the result JSON: one run as it is, several with their mean.

    ``examples`` are those of one of them, ``chosen`` is what "auto" has come to be.
    """
    shown = len(examples.demonstrations[0]) if examples.demonstrations else 0
    files = split_files(options.task, options.arguments.data_dir)
    used = {
        "num_train": len(examples.train) or shown,
        "num_dev": len(examples.dev),
        "num_eval": len(examples.evaluation),
        "max_length": encoder.max_length,
    }
    outcome = runs[0] if len(runs) == 1 else {**over_sets(runs), "runs": runs}
    return {
        "task": options.task.name,
        "model": options.model.name,
        "trainer": options.arguments.trainer,
        "experiment": options.arguments.experiment,
        "data": fingerprint(filter(None, files or ()))[:8],
        **outcome,
        # MeZO's names of the metrics.
        **outcome.get("metric", {}),
        **{f"dev_{name}": value for name, value in outcome.get("dev_metric", {}).items()},
        **provenance(options.model.device),
        "settings": {**options.settings, **used, **chosen},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def provenance(device: torch.device | None) -> dict[str, Any]:
    """Return what a result on a device says about its origin; None: on all GPUs.

    ``peak_memory_mib`` is what torch has allocated at most on this process's GPUs, or all of this
    process's memory without a GPU.
    """
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        gpus = range(torch.cuda.device_count())
        name = f"{len(gpus)} x {torch.cuda.get_device_name()}".removeprefix("1 x ")
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    else:
        info = Path("/proc/cpuinfo")
        known = info.is_file() and re.search(r"model name\s*: (.*)", info.read_text("utf-8"))
        name = known[1] if known else platform.processor() or platform.machine()
        unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": name, "peak_memory_mib": round(peak / 2**20, 1), "commit": commit(ROOT)}


def commit(folder: Path) -> str | None:
    """Return the commit of a repository, with + where files differ from it; None without git."""
    if not (folder / ".git").exists():
        return None  # a folder inside another repository is none
    words = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def over_sets(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and sample standard deviation over at least 2 runs of the metrics they have."""
    outcome = {}
    for kind in (kind for kind in KINDS_OF_METRICS if kind in runs[0]):
        values = {name: [run[kind][name] for run in runs] for name in runs[0][kind]}
        outcome[kind] = {name: float(np.mean(numbers)) for name, numbers in values.items()}
        outcome[f"{kind}_std"] = {n: float(np.std(each, ddof=1)) for n, each in values.items()}
    return outcome


def earlier_result(options: Options) -> dict[str, Any] | None:
    """Return what the very same experiment has written as its result, None if it has not.

    Raises:
        InputError: something else is in the place, and is not to be written over.
    """
    path, length = options.arguments.result_path, options.length
    if not path.is_file():
        check_predictions(options)
        return None
    result = read_json(path)
    settings = result.get("settings")
    if isinstance(settings, dict) and result.get("experiment") == options.arguments.experiment:
        then = {name: settings.get(name) for name in length}
        if then == length:
            return result
        # A longer run resumes this one.
        if all(isinstance(then[n], int | float) and then[n] < length[n] for n in length):
            return None
    if options.arguments.overwrite_output_dir:
        return None
    raise InputError(
        f"{path} is {_other_content(options, settings)}: give another place (--result_file, --tag "
        "or a sweep's --output_dir), or --overwrite_output_dir to replace it"
    )


def _other_content(options: Options, settings: object) -> str:
    """Return what is in the place of this experiment's result, by a setting if one is known."""
    if not isinstance(settings, dict) or not settings:
        return "no result of a run"
    # A setting that is not written down has its default.
    defaults = {field.name: plain_value(field.default) for field in dataclasses.fields(Arguments)}
    then, now = {**defaults, **settings}, {**defaults, **options.settings}
    names = {*settings, *options.settings} - NOT_OF_THE_RESULT
    # The used values and the length say the least.
    last = (*options.length, *USED)
    for name in sorted(names, key=lambda n: (n != "trainer", n in last, n)):
        asked_for = name not in USED or now.get(name) not in (None, "auto")
        if asked_for and then.get(name) != now.get(name):
            return f"of a run with --{name} {then.get(name)}, not {now.get(name)}"
    return "of a run with other settings, another model or other data"


def is_wanted_again(options: Options) -> bool:
    """Whether a run is wanted though its result is there: other files may be missing."""
    arguments = options.arguments
    kinds = ("config.json",) if arguments.merge_adapter else ("config.json", "adapter_config.json")
    has_all = all(path.is_file() for path in options.predictions)
    for folder in options.folders if arguments.save_model else ():
        has_all &= any((folder / name).is_file() for name in kinds)
    return arguments.overwrite_output_dir or bool(options.resume_from) or not has_all


def check_predictions(options: Options) -> None:
    """Refuse to write over predictions without a result, which would say whose they are."""
    for path in options.predictions:
        if path.is_file() and not options.arguments.overwrite_output_dir:
            raise InputError(
                f"--predictions_file {path}: it is there already; give another name, or "
                "--overwrite_output_dir to replace it"
            )
