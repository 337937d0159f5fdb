"""Zero-shot and in-context evaluation, fine-tuning, and HiZOO / MeZO: from arguments to a result.

python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo ...
"""

from __future__ import annotations

import gc
import os
import signal
import sys

if __name__ == "__main__":
    # Before torch is imported: idle threads leave the cores to other programs, and Ctrl-C while the
    # libraries load ends this one without a traceback. Nothing of theirs is garbage: to look for it
    # is a sixth of the time that they take to load.
    gc.disable()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from command_line.arguments import USAGE, Arguments, parse_arguments
from command_line.checks import check
from command_line.restarts import own_store
from command_line.settings import name_run, settle_dtype
from command_line.slurm import take_slurm_variables
from command_line.values import AUTO
from experiment.folders import locked_places, run_folders
from experiment.plan import tell
from experiment.predicting import predict_rows
from experiment.preparation import (
    Prepared,
    choose_trained_weights,
    chosen_by_optimizer,
    load_pretrained,
    make_trainer,
    prepare,
    save_trained,
    zeroth_order_settings,
)
from experiment.results import (
    describe,
    earlier_result,
    example_lines,
    history,
    is_wanted_again,
    metric_names,
    prediction_rows,
    show_again,
    summarize,
    used_settings,
    write_results,
)
from experiment.resuming import Start, find_start, journal_of_first_process, recording_of
from language_model.head import fit_head
from language_model.loading import leave_out_loading_bars
from language_model.precision import advice_for_losses
from language_model.prediction import Prediction, predict
from language_model.tensor_parallel import whole_shape
from task_data.sampling import ExampleSet
from tasks import Sample
from training.callbacks import SaveOnInterrupt
from training.checkpoints import RemoveEarlierCheckpoints, last_checkpoint, write_together
from training.journal import FILE
from training.replaying import go_back
from training.scales import ChooseScales
from utils import Diverged, Interrupted, exit_code, leave_process_group_at_exit


@dataclass
class Experiment:
    """What all runs share: the arguments, what was prepared from them, and the printed lines.

    Attributes:
        has_result: whether this very experiment has written its result before.
        chosen: what training has made of settings that may be "auto".
    """

    arguments: Arguments
    prepared: Prepared
    has_result: bool
    chosen: dict[str, Any] = field(default_factory=dict)

    def run(self, examples: ExampleSet, output_dir: Path) -> tuple[dict[str, Any], list[dict]]:
        """Do one run: evaluate, or train and evaluate. Returns its results and prediction rows."""
        arguments, encoder = self.arguments, self.prepared.encoder
        names = metric_names(arguments)
        result: dict[str, Any] = {"train_set_seed": examples.seed}
        model = pretrained = load_pretrained(arguments)
        if arguments.trainer != "none":
            model = choose_trained_weights(arguments, model, encoder.tokenizer, self.say)
            start = find_start(arguments, output_dir, model, self.has_result)
            for line in start.lines():
                self.say(line)
            if arguments.eval_before_training:
                kind = "metric_before_training"
                result[kind], _ = self.evaluate(
                    pretrained, examples.evaluation, examples.demonstrations, names[kind]
                )
            trained = [whole_shape(model, p) for p in model.parameters() if p.requires_grad]
            result["trained_parameters"] = sum(map(math.prod, trained))
            if arguments.linear_probing:
                result |= self.probe(model, examples, output_dir)
            else:
                result |= self.train(model, examples, output_dir, start)
            if arguments.no_eval:
                return result, []
            if examples.dev:
                shown: list[list[Sample]] = [[]] * len(examples.dev)
                result["dev_metric"], _ = self.evaluate(
                    model, examples.dev, shown, names["dev_metric"]
                )
        result["metric"], predictions = self.evaluate(
            model, examples.evaluation, examples.demonstrations, names["metric"]
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
            None if self.arguments.quiet else progress,
        )
        answers = [prediction.answer for prediction in predictions]
        metrics = self.prepared.encoder.task.score(answers, samples)
        self.say(f"{progress}: {describe(metrics)} ({len(samples)} examples)")
        return metrics, predictions

    def train(
        self,
        model: PreTrainedModel,
        examples: ExampleSet,
        output_dir: Path,
        start: Start,
    ) -> dict[str, Any]:
        """Train ``model`` in place; returns steps, seconds and losses."""
        arguments, checkpoint = self.arguments, start.checkpoint
        recording = recording_of(arguments, start)
        trainer = make_trainer(arguments, model, self.prepared, examples, output_dir, recording)
        interrupt = SaveOnInterrupt()
        probe = None
        if AUTO in (arguments.zo_eps, arguments.curvature_eps):
            eps, eps_of_c = arguments.zo_eps, arguments.curvature_eps or arguments.zo_eps
            probe = ChooseScales(
                *(trainer.loss_along, trainer.recording, eps == AUTO, eps_of_c == AUTO, output_dir)
            )
            trainer.add_callback(probe)
        if arguments.overwrite_output_dir and not checkpoint:
            trainer.add_callback(RemoveEarlierCheckpoints())
        if arguments.save_on_interrupt:
            trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.chosen = chosen_by_optimizer(trainer.optimizer)
        # What is reported comes from the model's own dtype, not from mixed precision.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if interrupt.received:
            raise Interrupted(
                f"{interrupt.received}: stopped after step {trainer.state.global_step}, checkpoint "
                f"in {last_checkpoint(output_dir)}; the same command goes on from there"
            )
        if trainer.diverged:
            from_the_start = trainer.state.global_step <= arguments.max_skipped_steps
            raise Diverged(
                f"{trainer.diverged}: stopped after step {trainer.state.global_step}, checkpoint "
                f"in {last_checkpoint(output_dir)}; {advice_for_losses(model, from_the_start)}"
            )
        if arguments.replays_best and trainer.state.best_global_step:
            self.go_back(model, output_dir, trainer.state.best_global_step)
        if arguments.save_model:
            save_trained(trainer, output_dir, arguments.merge_adapter)
            self.say(f"model: {output_dir}")
        best = trainer.state.best_model_checkpoint or last_checkpoint(output_dir)
        if best:
            self.say(f"checkpoint: {best}")
        return {
            "steps": trainer.state.global_step,
            "train_seconds": trainer.costs.seconds,
            **trainer.costs.passes(),
            "resumed_from": start.source,
            "checkpoint": str(best) if best else None,
            **({"best_step": trainer.state.best_global_step} if arguments.replays_best else {}),
            **({"probe": probe.found} if probe else {}),
            "history": history(trainer.state.log_history, arguments.task.metric_name),
        }

    def go_back(self, model: PreTrainedModel, output_dir: Path, step: int) -> None:
        """Give ``model`` the weights of the best step, from its journal."""
        tokenizer, arguments = self.prepared.encoder.tokenizer, self.arguments
        pretrained = load_pretrained(arguments)
        began = choose_trained_weights(arguments, pretrained, tokenizer, lambda line: None)
        journal = journal_of_first_process(output_dir / FILE)
        go_back(model, began, journal, step, zeroth_order_settings(arguments).compile)
        self.say(f"best step: {step}, by a replay of {journal.path}")

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
        if arguments.save_model:
            write_together(output_dir, lambda: self.save_probed(model, output_dir))
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

    def save_probed(self, model: PreTrainedModel, output_dir: Path) -> None:
        """Write a model whose head was fitted, from one process only."""
        if self.arguments.process_index == 0:
            model.save_pretrained(output_dir)
            self.prepared.encoder.tokenizer.save_pretrained(output_dir)

    def say(self, line: str) -> None:
        """Print a line, from one process only."""
        if self.arguments.process_index == 0:
            print(line, flush=True)


def run_experiment(arguments: Arguments) -> None:
    """Do every run and write the result JSON and the predictions, where they are not there yet."""
    started = time.perf_counter()
    earlier = earlier_result(arguments)
    if earlier and not is_wanted_again(arguments):
        show_again(arguments, earlier)
        return
    transformers.set_seed(arguments.seed)
    experiment = Experiment(arguments, prepare(arguments), has_result=earlier is not None)
    example_sets = experiment.prepared.example_sets
    runs = zip(example_sets, run_folders(arguments), strict=True)
    results, predictions = zip(*(experiment.run(*each) for each in runs), strict=True)
    if arguments.process_index == 0:
        used = used_settings(example_sets[0], experiment.prepared.encoder.max_length)
        seconds = time.perf_counter() - started
        summary = summarize(arguments, results, used | experiment.chosen, seconds)
        write_results(arguments, summary, predictions)


def run_command_line(argv: Sequence[str]) -> None:
    """Read and check the command line, and do what it says."""
    arguments = parse_arguments(argv)
    check(arguments)
    settle_dtype(arguments)
    if arguments.show_config or arguments.dry_run:
        tell(arguments)
        return
    leave_process_group_at_exit()
    if arguments.predict_file:
        predict_rows(arguments)
        return
    name_run(arguments)
    with locked_places(arguments):
        run_experiment(arguments)


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (``utils.exit_code``)."""
    if not argv:
        print(USAGE)
        return 2
    leave_out_loading_bars()
    take_slurm_variables(os.environ)
    with own_store(os.environ):
        return exit_code(lambda: run_command_line(argv))


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
