"""One run of an experiment: evaluate a model, or train it and evaluate what came of it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from experiment.options import Options
from experiment.preparation import Prepared, choose_trained_weights, load_pretrained
from experiment.results import history, prediction_rows
from experiment.resuming import Start, find_start, journal_of_first_process, recording_of
from experiment.telling import describe, example_lines, metric_names
from experiment.training import chosen_by_optimizer, make_trainer, save_trained
from language_model.batches import process_index
from language_model.head import fit_head
from language_model.precision import advice_for_losses
from language_model.prediction import Prediction, predict
from task_data.sampling import ExampleSet
from tasks import Sample
from training.callbacks import SaveOnInterrupt
from training.checkpoints import RemoveEarlierCheckpoints, last_checkpoint, write_together
from training.journal import FILE
from training.objective_trainer import ObjectiveTrainer
from training.replaying import return_to
from training.scales import ChooseScales
from utils import Diverged, Interrupted


@dataclass
class Experiment:
    """What all runs share.

    Attributes:
        options: what the command line says.
        prepared: tokenizer and examples.
        has_result: whether this very experiment has written its result before.
        chosen: values that training has found for settings that may be "auto".
    """

    options: Options
    prepared: Prepared
    has_result: bool
    chosen: dict[str, Any] = field(default_factory=dict)

    def run(self, examples: ExampleSet, folder: Path) -> tuple[dict[str, Any], list[dict]]:
        """Evaluate, or train and evaluate; returns the results and the rows of predictions."""
        evaluation, task = self.options.evaluation, self.prepared.encoder.task
        model = load_pretrained(self.options.model)
        result: dict[str, Any] = {"train_set_seed": examples.seed}
        if self.options.training:
            model = self.train(model, examples, folder, result)
            if evaluation.no_eval:
                return result, []
            if examples.dev:
                shown: list[list[Sample]] = [[]] * len(examples.dev)
                result["dev_metric"], _ = self.evaluate(model, examples.dev, shown, "dev_metric")
        result["metric"], predictions = self.evaluate(
            model, examples.evaluation, examples.demonstrations, "metric"
        )
        if evaluation.verbose:
            for line in example_lines(self.prepared.encoder, examples, predictions):
                say(line)
        return result, prediction_rows(task, examples.evaluation, predictions)

    def evaluate(
        self,
        model: PreTrainedModel | PeftModel,
        samples: list[Sample],
        demonstrations: list[list[Sample]],
        kind: str,
    ) -> tuple[dict[str, float], list[Prediction]]:
        """Return the task's metrics and every prediction; ``kind`` is that of the metrics."""
        options, encoder = self.options.evaluation, self.prepared.encoder
        name = metric_names(self.options)[kind]
        predictions = predict(
            *(model, encoder, samples, demonstrations, options.batch_size),
            options.calibration,
            generation=self.prepared.generation,
            progress=None if options.quiet else name,
        )
        metrics = encoder.task.score([prediction.answer for prediction in predictions], samples)
        say(f"{name}: {describe(metrics)} ({len(samples)} examples)")
        return metrics, predictions

    def train(
        self,
        pretrained: PreTrainedModel | PeftModel,
        examples: ExampleSet,
        folder: Path,
        result: dict[str, Any],
    ) -> PreTrainedModel | PeftModel:
        """Train what the options choose of a model; returns it, and adds to ``result``."""
        options = self.options
        model = self._with_trained_weights(pretrained, loud=True)
        start = find_start(options, folder, model, self.has_result)
        for line in start.lines():
            say(line)
        if options.evaluation.eval_before_training:
            result["metric_before_training"], _ = self.evaluate(
                pretrained, examples.evaluation, examples.demonstrations, "metric_before_training"
            )
        trained = (p.numel() for p in model.parameters() if p.requires_grad)
        result["trained_parameters"] = sum(trained)
        if options.weights.mode == "linear_probing":
            result |= self._fit_head(model, examples, folder)
        else:
            result |= self._train_in_steps(model, examples, folder, start)
        return model

    def _with_trained_weights(
        self, model: PreTrainedModel | PeftModel, loud: bool
    ) -> PreTrainedModel | PeftModel:
        tokenizer, weights = self.prepared.encoder.tokenizer, self.options.weights
        return choose_trained_weights(model, weights, tokenizer, *([say] if loud else []))

    def _train_in_steps(
        self,
        model: PreTrainedModel | PeftModel,
        examples: ExampleSet,
        folder: Path,
        start: Start,
    ) -> dict[str, Any]:
        """Train ``model`` in place; returns steps, seconds and losses."""
        options, files = self.options, self.options.files
        recording = recording_of(options, start)
        trainer = make_trainer(options, model, self.prepared, examples, folder, recording)
        interrupt, checkpoint = SaveOnInterrupt(), start.checkpoint
        probe, autos = None, (options.training.auto_eps, options.training.auto_curvature_eps)
        if any(autos):
            probe = ChooseScales(trainer.loss_along, trainer.recording, *autos, folder)
            trainer.add_callback(probe)
        if files.overwrite and not checkpoint:
            trainer.add_callback(RemoveEarlierCheckpoints())
        if options.training.save_on_interrupt:
            trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.chosen = chosen_by_optimizer(trainer.optimizer)
        # Metrics come from the model's own dtype, not from mixed precision.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self._check_the_end(trainer, interrupt.received, model, folder)
        state, replays = trainer.state, options.training.replays_best
        if replays and state.best_global_step:
            self._go_back(model, folder, state.best_global_step)
        if files.save_model:
            save_trained(trainer, folder, files.merge_adapter)
            say(f"model: {folder}")
        best = state.best_model_checkpoint or last_checkpoint(folder)
        if best:
            say(f"checkpoint: {best}")
        return {
            "steps": state.global_step,
            "train_seconds": trainer.costs.seconds,
            **trainer.costs.passes(),
            "resumed_from": start.source,
            "checkpoint": str(best) if best else None,
            **({"best_step": state.best_global_step} if replays else {}),
            **({"probe": probe.found} if probe else {}),
            "history": history(state.log_history, options.data.task.metric_name),
        }

    def _check_the_end(
        self,
        trainer: ObjectiveTrainer,
        received: str | None,
        model: PreTrainedModel | PeftModel,
        folder: Path,
    ) -> None:
        """Raise what ended the training before its last step."""
        step = trainer.state.global_step
        place = f"stopped after step {step}, checkpoint in {last_checkpoint(folder)}"
        if received:
            raise Interrupted(f"{received}: {place}; the same command resumes there")
        if trainer.divergence.reason:
            from_the_start = step <= self.options.training.max_skipped_steps
            advice = advice_for_losses(model, from_the_start)
            raise Diverged(f"{trainer.divergence.reason}: {place}; {advice}")

    def _go_back(self, model: PreTrainedModel | PeftModel, folder: Path, step: int) -> None:
        """Give ``model`` the weights of the best step, from its journal."""
        began = self._with_trained_weights(load_pretrained(self.options.model), loud=False)
        journal = journal_of_first_process(folder / FILE)
        compile = self.options.training.zeroth_order.config.compile
        return_to(model, began, journal, step, compile)
        say(f"best step: {step}, by a replay of {journal.path}")

    def _fit_head(
        self, model: PreTrainedModel, examples: ExampleSet, folder: Path
    ) -> dict[str, Any]:
        """Fit the head of ``model`` by logistic regression; returns what it was fitted to."""
        started = time.perf_counter()
        encoder, options = self.prepared.encoder, self.options
        fitted = fit_head(
            model,
            encoder.tokenizer,
            [encoder.correct_option(sample) for sample in examples.train],
            options.evaluation.batch_size,
            options.weights.lp_early_stopping,
        )

        def write() -> None:
            if process_index() == 0:
                model.save_pretrained(folder)
                encoder.tokenizer.save_pretrained(folder)

        if options.files.save_model:
            write_together(folder, write)
            say(f"model: {folder}")
        if not fitted.converged:
            say("the logistic regression stopped before it converged (--lp_early_stopping)")
        head = model.get_output_embeddings().parameters()
        return {
            "linear_probe": dataclasses.asdict(fitted),
            "trained_parameters": sum(fitted.tokens * rows[0].numel() for rows in head),
            "train_seconds": round(time.perf_counter() - started, 3),
        }


def say(line: str) -> None:
    """Print a line, from one process only."""
    if process_index() == 0:
        print(line, flush=True)
