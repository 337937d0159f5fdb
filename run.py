"""Zero-shot and in-context evaluation, fine-tuning, and HiZOO / MeZO: from arguments to a result.

python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo ...
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from callbacks import SaveOnInterrupt
from checkpoints import RunSettings, find_checkpoint, last_whole_checkpoint, remove_checkpoints
from command_line.arguments import USAGE, Arguments, parse_arguments, settings_of_a_checkpoint
from command_line.checks import check
from language_model.adapters import without_adapter
from language_model.head import fit_head
from language_model.loading import leave_out_loading_bars
from language_model.precision import advice_for_losses
from language_model.prediction import Prediction, predict
from preparation import (
    Prepared,
    choose_objective,
    choose_trained_weights,
    load_pretrained,
    prepare,
    zeroth_order_settings,
)
from results import describe, example_lines, prediction_rows, summarize
from sampling import ExampleSet
from tasks import Sample
from trainer import ObjectiveTrainer, ZerothOrderTrainer
from utils import InputError, leave_process_group_at_exit, write_json, write_json_lines


class Interrupted(Exception):
    """A signal ended the training after a checkpoint was saved."""


class Diverged(Exception):
    """Too many steps in a row had no finite loss; a checkpoint was saved."""


@dataclass
class Experiment:
    """What all runs share: the arguments, what was prepared from them, and the printed lines."""

    arguments: Arguments
    prepared: Prepared

    def run(self, examples: ExampleSet, output_dir: Path) -> tuple[dict[str, Any], list[dict]]:
        """Do one run: evaluate, or train and evaluate. Returns its results and prediction rows."""
        arguments, encoder = self.arguments, self.prepared.encoder
        result: dict[str, Any] = {"train_set_seed": examples.seed}
        model = load_pretrained(arguments)
        name = f"zero-shot {encoder.task.metric_name}"
        if arguments.trainer == "none":
            if arguments.num_train:
                name = f"in-context {encoder.task.metric_name}"
        else:
            model = choose_trained_weights(arguments, model, encoder, self.say)
            checkpoint = self.find_checkpoint(output_dir, model)
            if arguments.eval_before_training:
                result["metric_before_training"], _ = self.evaluate(
                    without_adapter(model), examples.evaluation, examples.demonstrations, name
                )
            trained = [p.numel() for p in model.parameters() if p.requires_grad]
            result["trained_parameters"] = sum(trained)
            if arguments.linear_probing:
                result |= self.probe(model, examples, output_dir)
            else:
                result |= self.train(model, examples, output_dir, checkpoint)
            name = f"test {encoder.task.metric_name}"
            if arguments.no_eval:
                return result, []
            if examples.dev:
                shown: list[list[Sample]] = [[]] * len(examples.dev)
                dev_name = f"dev {encoder.task.metric_name}"
                result["dev_metric"], _ = self.evaluate(model, examples.dev, shown, dev_name)
        result["metric"], predictions = self.evaluate(
            model, examples.evaluation, examples.demonstrations, name
        )
        if arguments.verbose:
            for line in example_lines(encoder, examples, predictions):
                self.say(line)
        return result, prediction_rows(encoder.task, examples.evaluation, predictions)

    def evaluate(
        self,
        model: PreTrainedModel,
        samples: list[Sample],
        demonstrations: list[list[Sample]],
        progress: str,
    ) -> tuple[dict[str, float], list[Prediction]]:
        """Return the task's metrics and every prediction."""
        predictions = predict(
            model,
            self.prepared.encoder,
            samples,
            demonstrations,
            self.arguments.per_device_eval_batch_size,
            self.arguments.calibration,
            self.prepared.generation,
            progress,
        )
        answers = [prediction.answer for prediction in predictions]
        metrics = self.prepared.encoder.task.score(answers, samples)
        self.say(f"{progress}: {describe(metrics)} ({len(samples)} examples)")
        return metrics, predictions

    def find_checkpoint(self, output_dir: Path, model: PreTrainedModel) -> Path | None:
        """Return the checkpoint to go on from; None to start anew, without those of before."""
        arguments = self.arguments
        if arguments.linear_probing:
            return None
        checkpoint = find_checkpoint(
            output_dir,
            model,
            settings_of_a_checkpoint(arguments),
            wanted=arguments.resume_from_checkpoint,
            overwrite=arguments.overwrite_output_dir,
            max_steps=arguments.max_steps,
        )
        if checkpoint:
            self.say(f"going on from {checkpoint}")
        elif arguments.overwrite_output_dir and arguments.process_index == 0:
            remove_checkpoints(output_dir)
        return checkpoint

    def train(
        self,
        model: PreTrainedModel,
        examples: ExampleSet,
        output_dir: Path,
        checkpoint: Path | None,
    ) -> dict[str, Any]:
        """Train ``model`` in place; returns steps and seconds."""
        arguments = copy.copy(self.arguments)
        arguments.output_dir = str(output_dir)
        training = choose_objective(arguments, model, self.prepared)
        shared = {
            "model": model,
            "args": arguments,
            "train_dataset": [training.encode(sample) for sample in examples.train],
            "eval_dataset": [training.encode(sample) for sample in examples.dev] or None,
            "processing_class": self.prepared.encoder.tokenizer,
            "objective": training.objective,
            "data_collator": training.collate,
            "decay_step": arguments.decay_step,
            "max_skipped_steps": arguments.max_skipped_steps,
        }
        if arguments.trainer == "zo":
            trainer: ObjectiveTrainer = ZerothOrderTrainer(
                settings=zeroth_order_settings(arguments), **shared
            )
        else:
            trainer = ObjectiveTrainer(**shared)
        trainer.add_callback(RunSettings(settings_of_a_checkpoint(arguments)))
        interrupt = SaveOnInterrupt()
        if arguments.save_on_interrupt:
            trainer.add_callback(interrupt)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # What is reported comes from the model's own dtype, not from mixed precision.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if interrupt.received:
            raise Interrupted(
                f"{interrupt.received}: stopped after step {trainer.state.global_step}, checkpoint "
                f"in {last_whole_checkpoint(output_dir)}; the same command goes on from there"
            )
        if trainer.diverged:
            from_the_start = trainer.state.global_step <= arguments.max_skipped_steps
            raise Diverged(
                f"no finite loss in {arguments.max_skipped_steps} steps in a row: stopped after "
                f"step {trainer.state.global_step}, checkpoint in "
                f"{last_whole_checkpoint(output_dir)}; {advice_for_losses(model, from_the_start)}"
            )
        if arguments.save_model:
            trainer.save_model(str(output_dir))
            self.say(f"model: {output_dir}")
        best = trainer.state.best_model_checkpoint or last_whole_checkpoint(output_dir)
        if best:
            self.say(f"checkpoint: {best}")
        return {
            "steps": trainer.state.global_step,
            "train_seconds": round(time.perf_counter() - started, 3),
            "resumed_from": str(checkpoint) if checkpoint else None,
            "checkpoint": str(best) if best else None,
        }

    def probe(
        self, model: PreTrainedModel, examples: ExampleSet, output_dir: Path
    ) -> dict[str, Any]:
        """Fit the head of ``model`` by logistic regression; returns what it was fitted to."""
        arguments = self.arguments
        started = time.perf_counter()
        fitted = fit_head(
            model,
            self.prepared.encoder.tokenizer,
            [self.prepared.encoder.correct_option(sample) for sample in examples.train],
            arguments.per_device_eval_batch_size,
            arguments.lp_early_stopping,
        )
        if arguments.save_model and arguments.process_index == 0:
            model.save_pretrained(output_dir)
            self.prepared.encoder.tokenizer.save_pretrained(output_dir)
            self.say(f"model: {output_dir}")
        if not fitted.converged:
            self.say("the logistic regression stopped before it converged (--lp_early_stopping)")
        return {
            "linear_probe": dataclasses.asdict(fitted),
            "trained_parameters": sum(
                fitted.tokens * parameter[0].numel()
                for parameter in model.get_output_embeddings().parameters()
            ),
            "train_seconds": round(time.perf_counter() - started, 3),
        }

    def say(self, line: str) -> None:
        """Print a line, from one process only."""
        if self.arguments.process_index == 0:
            print(line, flush=True)


def run_experiment(arguments: Arguments) -> None:
    """Do every run and write the result JSON and the predictions."""
    started = time.perf_counter()
    transformers.set_seed(arguments.seed)
    prepared = prepare(arguments)
    experiment = Experiment(arguments, prepared)
    runs = []
    several = len(prepared.example_sets) > 1
    output_dir = Path(arguments.output_dir)
    for examples in prepared.example_sets:
        result, rows = experiment.run(
            examples, output_dir / f"set{examples.seed}" if several else output_dir
        )
        runs.append(result)
        if arguments.predictions_file and rows and arguments.process_index == 0:
            path = Path(arguments.predictions_file)
            write_json_lines(
                path.with_stem(f"{path.stem}-set{examples.seed}") if several else path, rows
            )
    if arguments.process_index == 0:
        seconds = time.perf_counter() - started
        write_json(arguments.result_path, summarize(arguments, runs, seconds))
        print(f"result: {arguments.result_path}")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: the losses were not finite any more. 2: bad input. 130: interrupted.
    """
    if not argv:
        print(USAGE)
        return 2
    leave_out_loading_bars()
    try:
        arguments = parse_arguments(argv)
        check(arguments)
        if torch.distributed.is_initialized():
            leave_process_group_at_exit()
        run_experiment(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
