"""One run of an experiment: evaluate a model, train it first, or answer rows (--predict_file)."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from command_line.declarations import AUTO
from command_line.settings import method
from experiment import preparation, results
from experiment.folders import locked_places
from experiment.options import Options
from experiment.resuming import Start, find_start, with_contents
from experiment.telling import describe, example_lines, metric_names, use_in_python
from experiment.training import dev_samples, make_trainer, save_model
from language_model.adapters import check_merge, save_merged
from language_model.batches import advice_for_losses
from language_model.encoding import Encoder
from language_model.head import fit_head
from language_model.scoring import Prediction
from metrics import mean, standard_error
from task_data.files import own_file, read_rows
from task_data.loading import load_samples, read_samples
from task_data.own_tasks import OwnTask
from task_data.sampling import ExampleSet
from tasks import Sample
from trainer import ZerothOrderTrainer
from training.callbacks import Reports, SaveOnInterrupt
from training.checkpoints import RemoveEarlierCheckpoints, last_checkpoint
from training.objective_trainer import SKIPPED_STEPS
from training.scales import PROBE, ChooseScale
from utils import Diverged, InputError, Interrupted, process_index, read_json

logger = logging.getLogger(__name__)
Model = PreTrainedModel | PeftModel


@dataclass(eq=False)
class SayAtStart(TrainerCallback):
    """Says lines when training begins: nothing is refused any more."""

    lines: list[str]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Say them."""
        for line in self.lines:
            say(line)


@dataclass
class Experiment:
    """What all runs share; ``used`` is what training made of settings that may be "auto"."""

    options: Options
    encoder: Encoder
    has_result: bool
    used: dict[str, Any] = field(default_factory=dict)
    reports: Reports | None = None

    def run(self, examples: ExampleSet, folder: Path) -> tuple[dict[str, Any], list[dict]]:
        """Evaluate, or train and evaluate; returns the results and the rows of predictions."""
        options, encoder = self.options, self.encoder
        arguments = options.arguments
        evaluated = (examples.evaluation, examples.demonstrations)
        result: dict[str, Any] = {"train_set_seed": examples.seed}
        model, start = preparation.load_pretrained(options.model), None
        if options.trains:
            pretrained, weights = model, options.weights
            if arguments.has_steps:
                options = with_contents(options, encoder, examples, model)
                steps = arguments.steps_of_run(len(examples.train))
                start = find_start(options, folder, self.has_result, steps)
                if start.source:
                    say(f"resuming from {start.words()}")
            model = preparation.choose_trained_weights(model, weights, encoder.tokenizer, say)
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
        return result, results.prediction_rows(encoder.task, examples.evaluation, predictions)

    def evaluate(
        self, kind: str, model: Model, samples: list[Sample], shown: list[list[Sample]]
    ) -> tuple[dict[str, dict[str, float]], list[Prediction]]:
        """Return the task's metrics with errors, and predictions; ``shown`` precede each sample."""
        name, encoder = metric_names(self.options)[kind], self.encoder
        predictions = results.answers(self.options, encoder, model, samples, shown, name)
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
        trainer = make_trainer(options, model, self.encoder, examples, folder, start)
        interrupt, measures_scale = SaveOnInterrupt(), arguments.zo_eps == AUTO
        if measures_scale:
            probe = ChooseScale(trainer.loss_along, trainer.recording, folder / PROBE)
            trainer.add_callback(probe)
        if arguments.overwrite_output_dir and not checkpoint:
            trainer.add_callback(RemoveEarlierCheckpoints())
        if arguments.save_on_interrupt:
            trainer.add_callback(interrupt)
        lines = [line] if (line := method(arguments, len(examples.train))) else []
        if not examples.dev and dev_samples(options, examples):
            lines.append("dev losses are those of the eval examples: there is no --num_dev")
        trainer.add_callback(SayAtStart(lines))
        self.reports = Reports(options.settings, trainer.callback_handler.callbacks)
        trainer.add_callback(self.reports)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if isinstance(trainer, ZerothOrderTrainer) and trainer.layerwise is not None:
            self.used = {"zo_perturbation": "layerwise" if trainer.layerwise else "inplace"}
        # Metrics come from the model's own dtype, not from mixed precision.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        state, last = trainer.state, last_checkpoint(folder)
        place = f"stopped after step {state.global_step}, checkpoint in {last}"
        if interrupt.received:
            hint = "the same command resumes there"
            if arguments.save_only_model and trainer.repeats_steps:
                hint = "--save_only_model left out what a further step needs"
            raise Interrupted(f"{interrupt.received}: {place}; {hint}")
        if trainer.diverged:
            from_the_start = state.global_step <= SKIPPED_STEPS
            remedy = f"lower --{arguments.rate}" + " or --zo_eps" * (arguments.trainer == "zo")
            advice = advice_for_losses(trainer.model, from_the_start, remedy)
            raise Diverged(f"{trainer.diverged}: {place}; {advice}")
        if arguments.save_model:
            if arguments.merge_adapter:
                save = functools.partial(save_merged, model)
                save_model(save, self.encoder.tokenizer, folder)
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
            **({"probe": read_json(folder / PROBE) or None} if measures_scale else {}),
            "history": results.history(state.log_history, options.task.metric_name),
        }

    def fit_head(self, model: Model, examples: ExampleSet, folder: Path) -> dict[str, Any]:
        """Fit the head of ``model`` by logistic regression; returns what it was fitted to."""
        started = time.perf_counter()
        encoder, options = self.encoder, self.options
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
    """Return a result's metrics by names that TensorBoard and W&B show in groups of their own."""
    forms = {
        "metric": "test_{}",
        "metric_before_training": "test_{}_before_training",
        "dev_metric": "eval_final_{}",
    }
    found = {}
    for kind, form in forms.items():
        for ending in ("", "_standard_error"):
            values = result.get(kind + ending, {})
            found |= {form.format(name) + ending: value for name, value in values.items()}
    return found


def predict_rows(options: Options, file: str) -> None:
    """Answer every row of a file, and write the answers in its order.

    Raises:
        InputError: the model or the data do not fit, or the answers' file is there already.
    """
    results.check_predictions(options)
    (path,) = options.predictions
    transformers.set_seed(options.weights.seed)
    task = options.task
    encoder = preparation.prepare_encoder(options)
    questions = read_samples(task, own_file("--predict_file", file), with_answers=False)
    own = [row for _, row in read_rows(Path(file))]  # with columns that no prompt needs
    if taken := {"prediction", "scores", "correct"} & own[0].keys():
        raise InputError(f"{file}: rename its column {min(taken)!r}: predictions have one")
    if isinstance(task, OwnTask) and task.generation and not options.arguments.train_file:
        logger.warning("answers are generated; --train_file chooses among the labels of its rows")
    train: list[Sample] = []
    if options.arguments.num_train:
        train, _ = load_samples(task, options.arguments.data_dir, with_validation=False)
    # Demonstrations are drawn as before eval examples, in whose order the answers come.
    (drawn,) = options.draw(train, questions)
    preparation.check_conversations(encoder, drawn, file)
    with locked_places(options):
        model = preparation.load_pretrained(options.model)
        evaluated = (drawn.evaluation, drawn.demonstrations)
        predictions = results.answers(options, encoder, model, *evaluated, "prediction")
        if process_index() == 0:
            unrated = dataclasses.replace(task, reward=None)
            rows = results.prediction_rows(unrated, drawn.evaluation, predictions)
            order = {sample.id: row for sample, row in zip(drawn.evaluation, rows, strict=True)}
            results.write_rows(path, [row | order[n] for n, row in enumerate(own)])
            print("\n".join(use_in_python(options, encoder, questions[0])))
            print(f"predictions: {path} ({len(questions)} rows)")


def say(line: str) -> None:
    """Print a line, above a bar if there is one, from one process only."""
    if process_index() == 0:
        tqdm.write(line)
        sys.stdout.flush()
