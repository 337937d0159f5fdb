"""One run of an experiment: evaluate a model, or train it and evaluate what came of it."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from command_line.declarations import AUTO
from command_line.settings import method
from experiment.options import Options
from experiment.predicting import answers
from experiment.preparation import Prepared, choose_trained_weights, load_pretrained
from experiment.results import history, prediction_rows
from experiment.resuming import Start, find_start, with_contents
from experiment.telling import describe, example_lines, metric_names
from experiment.training import dev_samples, make_trainer, save_model, used_by_optimizer
from language_model.adapters import check_merge, save_merged
from language_model.batches import advice_for_losses
from language_model.head import fit_head
from language_model.scoring import Prediction
from metrics import mean, standard_error
from task_data.sampling import ExampleSet
from tasks import Sample
from training.callbacks import Reports, SaveOnInterrupt
from training.checkpoints import RemoveEarlierCheckpoints, last_checkpoint
from training.scales import ChooseScale
from training.watching import SKIPPED_STEPS
from utils import Diverged, Interrupted, process_index

Model = PreTrainedModel | PeftModel


class SayAtStart(TrainerCallback):
    """Says lines when training begins: nothing is refused any more."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = lines

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Say them."""
        for line in self.lines:
            say(line)


@dataclass
class Experiment:
    """What all runs share; ``used`` is what training made of settings that may be "auto"."""

    options: Options
    prepared: Prepared
    has_result: bool
    used: dict[str, Any] = field(default_factory=dict)
    reports: Reports | None = None

    def run(self, examples: ExampleSet, folder: Path) -> tuple[dict[str, Any], list[dict]]:
        """Evaluate, or train and evaluate; returns the results and the rows of predictions."""
        options, encoder = self.options, self.prepared.encoder
        arguments = options.arguments
        evaluated = (examples.evaluation, examples.demonstrations)
        result: dict[str, Any] = {"train_set_seed": examples.seed}
        model, start = load_pretrained(options.model), None
        if options.trains:
            pretrained, weights = model, options.weights
            if weights.mode != "linear_probing":
                options = with_contents(options, encoder, examples, model)
                start = find_start(options, folder, self.has_result)
                if start.source:
                    say(f"resuming from {start.words()}")
            model = choose_trained_weights(model, weights, encoder.tokenizer, say)
            if arguments.eval_before_training:
                kind = "metric_before_training"
                result |= self.evaluate(kind, pretrained, *evaluated)[0]
            if start:
                result |= self.train(options, model, examples, folder, start)
            else:
                result |= self.fit_head(model, examples, folder)
            if arguments.no_eval:
                return result, []
            if dev := examples.dev:
                result |= self.evaluate("dev_metric", model, dev, [[]] * len(dev))[0]
        metrics, predictions = self.evaluate("metric", model, *evaluated)
        result |= metrics
        if self.reports:
            self.reports.metrics(reported(result))
        if arguments.verbose:
            say("\n".join(example_lines(encoder, examples, predictions)))
        return result, prediction_rows(encoder.task, examples.evaluation, predictions)

    def evaluate(
        self, kind: str, model: Model, samples: list[Sample], shown: list[list[Sample]]
    ) -> tuple[dict[str, dict[str, float]], list[Prediction]]:
        """Return the task's metrics with their errors, and every prediction.

        ``shown`` are the demonstrations before each sample.
        """
        name, encoder = metric_names(self.options)[kind], self.prepared.encoder
        predictions = answers(self.options, encoder, model, samples, shown, name)
        scores = encoder.task.scores([prediction.answer for prediction in predictions], samples)
        metrics = {metric: mean(values) for metric, values in scores.items()}
        errors = {metric: standard_error(values) for metric, values in scores.items()}
        say(f"{name}: {describe(metrics, errors)} ({len(samples)} examples)")
        return {kind: metrics, f"{kind}_standard_error": errors}, predictions

    def train(
        self, options: Options, model: Model, examples: ExampleSet, folder: Path, start: Start
    ) -> dict[str, Any]:
        """Train ``model`` in place; returns steps, seconds and losses.

        Raises:
            Interrupted: by a signal; there is a checkpoint.
            Diverged: the losses are not finite any more, or far too large.
        """
        arguments, checkpoint = options.arguments, start.checkpoint
        if arguments.merge_adapter:
            check_merge(model)
        trainer = make_trainer(options, model, self.prepared, examples, folder, start)
        probe, interrupt = None, SaveOnInterrupt()
        if arguments.zo_eps == AUTO:
            probe = ChooseScale(trainer.loss_along, trainer.recording, folder)
            trainer.add_callback(probe)
        if arguments.overwrite_output_dir and not checkpoint:
            trainer.add_callback(RemoveEarlierCheckpoints())
        if arguments.save_on_interrupt:
            trainer.add_callback(interrupt)
        trainer.add_callback(SayAtStart(self.first_lines(examples)))
        self.reports = Reports(options.settings, trainer.callback_handler.callbacks)
        trainer.add_callback(self.reports)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        self.used = used_by_optimizer(trainer.optimizer)
        # Metrics come from the model's own dtype, not from mixed precision.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        state, last = trainer.state, last_checkpoint(folder)
        place = f"stopped after step {state.global_step}, checkpoint in {last}"
        if interrupt.received:
            raise Interrupted(f"{interrupt.received}: {place}; the same command resumes there")
        if reason := trainer.divergence.reason:
            from_the_start = state.global_step <= SKIPPED_STEPS
            remedy = f"lower --{arguments.rate}" + " or --zo_eps" * (arguments.trainer == "zo")
            advice = advice_for_losses(trainer.model, from_the_start, remedy)
            raise Diverged(f"{reason}: {place}; {advice}")
        if arguments.save_model:
            if arguments.merge_adapter:
                save = functools.partial(save_merged, model)
                save_model(save, self.prepared.encoder.tokenizer, folder)
            else:
                trainer.save_model(str(folder))
            say(f"model: {folder}")
        best = state.best_model_checkpoint or last
        if best:
            say(f"checkpoint: {best}")
        return {
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": state.global_step,
            "train_seconds": trainer.costs.seconds,
            **trainer.costs.passes(),
            "resumed_from": start.source,
            "checkpoint": best and str(best),
            **({"probe": probe.found} if probe else {}),
            "history": history(state.log_history, options.task.metric_name),
        }

    def first_lines(self, examples: ExampleSet) -> Iterator[str]:
        """Yield what trains, and on what dev losses are measured."""
        if line := method(self.options.arguments):
            yield line
        if not examples.dev and dev_samples(self.options, examples):
            yield "dev losses are those of the eval examples: there is no --num_dev"

    def fit_head(self, model: Model, examples: ExampleSet, folder: Path) -> dict[str, Any]:
        """Fit the head of ``model`` by logistic regression; returns what it was fitted to."""
        started = time.perf_counter()
        encoder, options = self.prepared.encoder, self.options
        fitted = fit_head(
            model,
            encoder.tokenizer,
            [encoder.correct_option(sample) for sample in examples.train],
            options.arguments.per_device_eval_batch_size,
            options.weights.lp_early_stopping,
        )
        if options.arguments.save_model:
            save_model(model.save_pretrained, encoder.tokenizer, folder)
            say(f"model: {folder}")
        if not fitted.converged:
            say("the logistic regression stopped before it converged (--lp_early_stopping)")
        head = model.get_output_embeddings().parameters()
        return {
            "linear_probe": dataclasses.asdict(fitted),
            "trained_parameters": sum(fitted.tokens * rows[0].numel() for rows in head),
            "train_seconds": round(time.perf_counter() - started, 3),
        }


def reported(result: dict[str, Any]) -> dict[str, float]:
    """Return a result's metrics with standard errors, by the names in TensorBoard and W&B.

    These show ``test_…`` and ``eval_…`` in groups of their own.
    """
    forms = {
        "metric": "test_{}",
        "metric_before_training": "test_{}_before_training",
        "dev_metric": "eval_final_{}",
    }
    found = {}
    for kind, form in forms.items():
        named = result.get(kind, {}), result.get(f"{kind}_standard_error", {})
        for values, ending in zip(named, ("", "_standard_error"), strict=True):
            found |= {form.format(name) + ending: value for name, value in values.items()}
    return found


def say(line: str) -> None:
    """Print a line, above a bar if there is one, from one process only."""
    if process_index() == 0:
        tqdm.write(line)
        sys.stdout.flush()
