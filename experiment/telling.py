"""What a run prints: metrics, examples, a closing table, and what speaks against its result."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from command_line.groups import Generation, Model
from command_line.reading import OWN
from experiment.options import Options
from experiment.results import KINDS_OF_METRICS, ROOT
from language_model.adapters import SavedAdapter
from language_model.encoding import Encoder
from language_model.scoring import Prediction
from task_data.own_tasks import OwnTask
from task_data.sampling import ExampleSet
from tasks import Sample

SHOWN_EXAMPLES = 3
# Losses rise by as much by chance: a small batch can be hard, the dev examples are the same.
NOISE = {"loss": 1.0, "dev_loss": 0.1}
# What a prediction needs to read its rows as training did.
READS_ROWS = (
    *("train_file", "text_column", "label_column", "label_words", "answer_column"),
    *("prompt_template", *(field.name for kind in (Model, Generation) for field in fields(kind))),
)


def metric_names(options: Options) -> dict[str, str]:
    """Return what the metrics are called, by their kinds."""
    after = "in-context" if options.arguments.num_train else "zero-shot"
    words = ("zero-shot", "dev", "test" if options.trains else after)
    metric = options.task.metric_name
    return {kind: f"{name} {metric}" for kind, name in zip(KINDS_OF_METRICS, words, strict=True)}


def describe(metrics: Mapping[str, float], errors: Mapping[str, float] | None = None) -> str:
    """Return metrics as text, with errors that are not 0; the first one's name is said already."""
    values = {name: f"{value:.4f}" for name, value in metrics.items()}
    values |= {n: f"{values[n]} ± {error:.4f}" for n, error in (errors or {}).items() if error}
    (_, first), *others = values.items()
    return ", ".join([first, *(f"{name} {value}" for name, value in others)])


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


def table(metric: str, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a training run at a glance: a line of names, and below each its value."""
    cells = {
        f"{title} {metric}": f"{result[kind][metric]:.4f}"
        for kind, title in zip(KINDS_OF_METRICS, ("before", "dev", "test"), strict=True)
        if kind in result
    }
    counts = ("steps", "forward_passes", "backward_passes")
    cells |= {n.replace("_", " "): f"{result[n]:,}" for n in counts if n in result}
    cells["training"] = f"{result['train_seconds']:.1f} s"
    cells["all"] = f"{result['seconds']:.1f} s"
    cells["memory"] = f"{result['peak_memory_mib']:,.0f} MiB"
    widths = [max(map(len, pair)) for pair in cells.items()]
    for row in (cells.keys(), cells.values()):
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))


def result_lines(
    options: Options, result: Mapping[str, Any], with_metrics: bool = True
) -> Iterator[str]:
    """Yield a whole result in words: its metrics, what is wrong with it, and where it lies."""
    runs = result.get("runs", [result])
    for kind, name in metric_names(options).items():
        if with_metrics and kind in result:
            spread = ""
            if f"{kind}_std" in result:
                deviation = describe(result[f"{kind}_std"])
                spread = f" (mean of {len(runs)} sets, standard deviation {deviation})"
            errors = result.get(f"{kind}_standard_error")
            yield f"{name}: {describe(result[kind], errors)}{spread}"
    for run in runs:
        for line in concerns(run, options.arguments.rate):
            yield f"set {run['train_set_seed']}: {line}" if len(runs) > 1 else line
    if len(runs) == 1:
        yield from _next_step(options, result)
    yield f"result: {options.arguments.result_path}"


def _next_step(options: Options, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the command by which a model that was trained on one's own rows answers others."""
    arguments = options.arguments
    if not (options.trains and isinstance(options.task, OwnTask)):
        return
    model = options.folders[0] if arguments.save_model else result.get("checkpoint")
    if not model:
        yield "next: the same command with --save_model keeps the model, and answers other rows"
        return
    values = {name: getattr(arguments, name) for name in READS_ROWS}
    values |= {"model_name": None, "offload_dir": None}  # the folder is of this run
    words = []
    for name, value in values.items():
        if value is not None and value != OWN[name].default:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    file = Path(arguments.validation_file or arguments.train_file)
    answers = "answers.csv" if file.suffix.lower() == ".csv" else "answers.jsonl"
    words += ["--predict_file", str(file), "--predictions_file", answers]
    yield f"next, with a file of rows without answers in place of {file.name}:"
    script = "run.py" if Path.cwd() == ROOT else str(ROOT / "run.py")
    yield f"  {_command(script, '--model_name', str(model), *words)}"


def use_in_python(options: Options, encoder: Encoder, sample: Sample) -> Iterator[str]:
    """Yield the command that answers a row with the model and transformers alone."""
    name, task = options.model.name, encoder.task
    if Path(name).suffix.lower() == ".gguf" or not isinstance(task, OwnTask):
        return
    if adapter := SavedAdapter.find(name):
        if adapter.mode == "lora":
            yield "next: the training command with --save_model --merge_adapter makes one model"
        return
    prompt: Any = task.prompt(sample).strip()
    if options.arguments.apply_chat_template:
        said = options.arguments.system_prompt
        system = [{"role": "system", "content": said}] if said else []
        prompt = [*system, *task.messages(prompt, sample)]
    answers = encoder.options(sample).options  # none where the answers are generated
    length = max((answer.scored for answer in answers), default=encoder.max_new_tokens)
    how = f"max_new_tokens={length}, do_sample=False"
    if answers and length == 1:  # training may have compared the labels alone
        labels = [answer.tokens[-1] for answer in answers]
        how += f", prefix_allowed_tokens_fn=lambda *_: {labels}"
    model, text = (json.dumps(each, ensure_ascii=False) for each in (name, prompt))
    code = (
        f'from transformers import pipeline; write = pipeline("text-generation", model={model}); '
        f"print(write({text}, {how}))"
    )
    yield f"next, without this package:\n  {_command('-c', code)}"


def _command(*words: str) -> str:
    """Return a command of this Python, to be pasted into a shell."""
    found = shutil.which("python")
    same = found and os.path.dirname(found) == os.path.dirname(sys.executable)
    return shlex.join(["python" if same else sys.executable, *words])


def concerns(result: Mapping[str, Any], rate: str = "learning_rate") -> Iterator[str]:
    """Yield a line for everything that speaks against a run: it diverged, or did only harm.

    Dev losses count where there are any, training losses otherwise. They diverged if they end above
    the first by more than the first itself, and by more than ``NOISE``.
    """
    losses, way_out = result.get("history", {}), f"lower --{rate}"
    name = "dev_loss" if losses.get("dev_loss") else "loss"
    values, words = list(losses.get(name, {}).values()), name.replace("_", " ")
    if len(values) > 1 and values[0] is not None:
        first, last = values[0], values[-1]
        if last is None:
            yield f"warning: the last {words} is not finite (the first: {first:.4g}); {way_out}"
        elif last - first > max(abs(first), NOISE[name]):
            yield f"warning: the {words} went up from {first:.4g} to {last:.4g}; {way_out}"
    before, after = result.get("metric_before_training"), result.get("metric")
    metric = next(iter(before or ()), None)
    if before and after and after[metric] < before[metric]:
        yield (
            f"warning: the {metric} of {after[metric]:.4f} is below that before training, "
            f"{before[metric]:.4f}; {way_out}"
        )
