"""What a run prints: metrics, examples, a closing table, and what speaks against its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiment.options import Options
from experiment.results import KINDS_OF_METRICS
from language_model.encoding import Encoder
from language_model.prediction import Prediction
from task_data.sampling import ExampleSet

SHOWN_EXAMPLES = 3
# Losses rise by as much by chance: a small batch can be hard, the dev examples are the same.
NOISE = {"loss": 1.0, "dev_loss": 0.1}
LOWER = "lower --learning_rate"


def metric_names(options: Options) -> dict[str, str]:
    """Return what the metrics are called, by their kinds."""
    after = "in-context" if options.data.draw.num_train else "zero-shot"
    words = ("zero-shot", "dev", "test" if options.training else after)
    metric = options.data.task.metric_name
    return {kind: f"{name} {metric}" for kind, name in zip(KINDS_OF_METRICS, words, strict=True)}


def describe(metrics: Mapping[str, float]) -> str:
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


def closing_lines(options: Options, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is left to say when a result is written: a single run's metrics are printed."""
    if "steps" in result:
        yield from _table(options.data.task.metric_name, result)
    yield from result_lines(options, result) if "runs" in result else _last_lines(options, result)


def _table(metric: str, result: Mapping[str, Any]) -> list[str]:
    """Return a training run at a glance: a line of names, and below each its value."""
    cells = {
        f"{title} {metric}": f"{result[kind][metric]:.4f}"
        for kind, title in zip(KINDS_OF_METRICS, ("before", "dev", "test"), strict=True)
        if kind in result
    }
    for name in ("steps", "forward_passes", "backward_passes"):
        if name in result:
            cells[name.replace("_", " ")] = f"{result[name]:,}"
    cells["training"] = f"{result['train_seconds']:.1f} s"
    cells["all"] = f"{result['seconds']:.1f} s"
    cells["memory"] = f"{result['peak_memory_mib']:,.0f} MiB"
    widths = [max(map(len, pair)) for pair in cells.items()]
    rows = (cells.keys(), cells.values())
    return ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]


def result_lines(options: Options, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a whole result in words: its metrics, what is wrong with it, and where it lies."""
    for kind, name in metric_names(options).items():
        if kind in result:
            line = f"{name}: {describe(result[kind])}"
            if f"{kind}_std" in result:
                line += f" (mean of {len(result['runs'])} sets, standard deviation "
                line += f"{describe(result[f'{kind}_std'])})"
            yield line
    yield from _last_lines(options, result)


def _last_lines(options: Options, result: Mapping[str, Any]) -> Iterator[str]:
    for run in result.get("runs", [result]):
        for line in concerns(run):
            yield f"set {run['train_set_seed']}: {line}" if "runs" in result else line
    yield f"result: {options.files.result}"


def concerns(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for everything that speaks against a run: it diverged, or did only harm.

    Dev losses count where there are any, training losses otherwise. They diverged if they end above
    the first by more than the first itself, and by more than ``NOISE``.
    """
    losses = result.get("history", {})
    name = next((name for name in ("dev_loss", "loss") if losses.get(name)), None)
    values = [*losses[name].values()] if name else []
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
