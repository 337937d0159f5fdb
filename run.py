"""Zero-shot and in-context evaluation, fine-tuning, and HiZOO / MeZO: from arguments to a result.

python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo ...
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from command_line.arguments import (
    USAGE,
    Arguments,
    changed_settings,
    parse_arguments,
    settings_of_a_checkpoint,
)
from command_line.checks import check
from language_model.adapters import add_lora, add_prefix, without_adapter
from language_model.encoding import Encoder
from language_model.head import fit_head, freeze_all_but_head, head_is_tied, untie_head
from language_model.loading import (
    check_checkpoint,
    choose_dtype,
    choose_max_length,
    load_config_and_tokenizer,
    load_model,
)
from language_model.objectives import (
    GenerationExample,
    NegativeTextMetric,
    Objective,
    classification_loss,
    collate_generation,
    language_model_loss,
    negative_accuracy,
)
from language_model.packing import collate
from language_model.scoring import GenerationSettings, Prediction, can_share_prompt, predict
from tasks import (
    Sample,
    demonstration_seeds,
    load_samples,
    permutation_subset,
    sample_train_dev,
)
from trainer import (
    ObjectiveTrainer,
    SmoothingSchedule,
    ZerothOrderSettings,
    ZerothOrderTrainer,
)
from utils import (
    InputError,
    RunSettings,
    SaveOnInterrupt,
    check_state_files,
    check_writable,
    last_whole_checkpoint,
    read_trainer_state,
    remove_checkpoints,
    write_json,
    write_json_lines,
)

VERSIONS = ("torch", "transformers", "accelerate", "peft", "numpy")
SHOWN_EXAMPLES = 3


@dataclass(frozen=True)
class ExampleSet:
    """Training (or demonstration), dev and eval examples of one run.

    ``demonstrations`` holds what is shown before each eval example; nothing after training.
    """

    seed: int
    train: list[Sample]
    dev: list[Sample]
    evaluation: list[Sample]
    demonstrations: list[list[Sample]]


class Interrupted(Exception):
    """A signal ended the training after a checkpoint was saved."""


class Diverged(Exception):
    """Too many steps in a row had no finite loss; a checkpoint was saved."""


def zeroth_order_settings(arguments: Arguments) -> ZerothOrderSettings:
    """Return what the arguments say about the zeroth-order step."""
    dtype = arguments.hessian_dtype
    return ZerothOrderSettings(
        smoothing=SmoothingSchedule.parse(arguments.hessian_smooth_type),
        eps=arguments.zo_eps,
        hessian=arguments.hessian,
        hessian_dtype=None if dtype == "auto" else getattr(torch, dtype),
        perturbation=arguments.zo_perturbation,
        num_samples=arguments.zo_num_samples,
        compile={"auto": None, "yes": True, "no": False}[arguments.zo_compile],
        max_skipped_steps=arguments.max_skipped_steps,
    )


def draw_example_sets(
    arguments: Arguments, train: list[Sample], validation: list[Sample]
) -> list[ExampleSet]:
    """Draw the examples of every run, as MeZO's experiments do (tasks.py has the draws)."""
    num_eval = len(validation) if arguments.num_eval is None else arguments.num_eval
    if arguments.num_train_sets is not None:
        seeds = list(range(arguments.num_train_sets))
    elif arguments.train_set_seed is not None:
        seeds = [arguments.train_set_seed]
    elif arguments.trainer == "none" and arguments.num_train:
        evaluation = permutation_subset(validation, num_eval, seed=0)
        shown = [
            permutation_subset(train, arguments.num_train, seed)
            for seed in demonstration_seeds(len(evaluation))
        ]
        return [ExampleSet(0, [], [], evaluation, shown)]
    else:
        seeds = [0]
    sets = []
    for seed in seeds:
        drawn, dev = sample_train_dev(train, arguments.num_train, arguments.num_dev or 0, seed)
        evaluation = permutation_subset(validation, num_eval, seed)
        shown = drawn if arguments.trainer == "none" else []
        sets.append(ExampleSet(seed, drawn, dev, evaluation, [shown] * len(evaluation)))
    return sets


@dataclass
class Experiment:
    """What all runs share: the arguments, the task, how it is encoded, and the printed lines."""

    arguments: Arguments
    encoder: Encoder
    generation: GenerationSettings

    def load_model(self) -> PreTrainedModel:
        """Load the model anew: each run starts from the pre-trained weights."""
        arguments = self.arguments
        model = load_model(
            arguments.model_name,
            choose_dtype(arguments.load_float16, arguments.load_bfloat16),
            8 if arguments.load_int8 else 4 if arguments.load_int4 else None,
            not arguments.no_auto_device,
            arguments.trust_remote_code,
        )
        # Sharding moves each layer itself: no GPU has room for all of them.
        if getattr(model, "hf_device_map", None) is None and not arguments.fsdp:
            model.to(arguments.device)
        return model

    def choose_trained_weights(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Return the model with what is trained: an adapter, the head, or all of its weights."""
        arguments = self.arguments
        # Whatever ran before, a run's adapter starts from the same random numbers.
        transformers.set_seed(arguments.seed)
        if arguments.untie_emb:
            untie_head(model)
        if arguments.lora:
            model = add_lora(model, arguments.lora_r, arguments.lora_alpha)
        elif arguments.prefix_tuning:
            tokens = random_tokens(self.encoder.tokenizer, arguments.num_prefix, arguments.seed)
            model = add_prefix(
                model,
                arguments.num_prefix,
                reparameterise=not arguments.no_reparam,
                tokens=tokens if arguments.prefix_init_by_real_act else None,
            )
        elif arguments.head_tuning:
            if head_is_tied(model):
                self.say("the head is tied: the input embeddings are trained with it (--untie_emb)")
            freeze_all_but_head(model)
        return model

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
            self.encoder,
            samples,
            demonstrations,
            self.arguments.per_device_eval_batch_size,
            self.arguments.calibration,
            self.generation,
            progress,
        )
        answers = [prediction.answer for prediction in predictions]
        metrics = self.encoder.task.score(answers, samples)
        self.say(f"{progress}: {describe(metrics)} ({len(samples)} examples)")
        return metrics, predictions

    def run(self, examples: ExampleSet, output_dir: Path) -> tuple[dict[str, Any], list[dict]]:
        """Do one run: evaluate, or train and evaluate. Returns its results and prediction rows."""
        arguments = self.arguments
        result: dict[str, Any] = {"train_set_seed": examples.seed}
        model = self.load_model()
        name = f"zero-shot {self.encoder.task.metric_name}"
        if arguments.trainer == "none":
            if arguments.num_train:
                name = f"in-context {self.encoder.task.metric_name}"
        else:
            model = self.choose_trained_weights(model)
            checkpoint = None
            if not arguments.linear_probing:
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
            name = f"test {self.encoder.task.metric_name}"
            if arguments.no_eval:
                return result, []
            if examples.dev:
                shown: list[list[Sample]] = [[]] * len(examples.dev)
                dev_name = f"dev {self.encoder.task.metric_name}"
                result["dev_metric"], _ = self.evaluate(model, examples.dev, shown, dev_name)
        result["metric"], predictions = self.evaluate(
            model, examples.evaluation, examples.demonstrations, name
        )
        if arguments.verbose:
            self.show(examples, predictions)
        return result, prediction_rows(self.encoder.task, examples.evaluation, predictions)

    def find_checkpoint(self, output_dir: Path, model: PreTrainedModel) -> Path | None:
        """Return the checkpoint to go on from, checked against the model; None to start anew."""
        arguments = self.arguments
        wanted = arguments.resume_from_checkpoint
        if wanted is not None and wanted.lower() not in ("true", "false"):
            checkpoint = Path(wanted)
        elif arguments.overwrite_output_dir or (wanted and wanted.lower() == "false"):
            checkpoint = None
        else:
            checkpoint = last_whole_checkpoint(output_dir)
            if checkpoint is None and wanted:
                raise InputError(f"--resume_from_checkpoint: no whole checkpoint in {output_dir}")
        if checkpoint:
            self.check_settings(checkpoint)
            check_checkpoint(str(checkpoint), model)
            check_state_files(checkpoint)
            steps = read_trainer_state(checkpoint)["global_step"]
            if 0 < arguments.max_steps < steps:
                raise InputError(
                    f"{checkpoint} has more than --max_steps {arguments.max_steps}: give another "
                    "--output_dir, or --overwrite_output_dir to start anew"
                )
            self.say(f"going on from {checkpoint}")
        elif arguments.overwrite_output_dir and arguments.process_index == 0:
            remove_checkpoints(output_dir)
        return checkpoint

    def check_settings(self, checkpoint: Path) -> None:
        """Refuse to go on with a run under other settings than it was started with.

        The state of optimizer and scheduler would bring the old ones back, without a word.
        """
        now = settings_of_a_checkpoint(self.arguments)
        for name, then in RunSettings.read(checkpoint).items():
            if name in now and now[name] != then:
                raise InputError(
                    f"{checkpoint} comes from a run with --{name} {then}, not {now[name]}: give "
                    "another --output_dir, or --overwrite_output_dir to start anew"
                )

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
        objective, encode, make_batch = self.choose_objective(model)
        shared = {
            "model": model,
            "args": arguments,
            "train_dataset": [encode(sample) for sample in examples.train],
            "eval_dataset": [encode(sample) for sample in examples.dev] or None,
            "processing_class": self.encoder.tokenizer,
            "objective": objective,
            "data_collator": make_batch,
            "decay_step": arguments.decay_step,
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
            raise Diverged(
                f"no finite loss in {arguments.max_skipped_steps} steps in a row: stopped after "
                f"step {trainer.state.global_step}, checkpoint in "
                f"{last_whole_checkpoint(output_dir)}; lower --learning_rate or --zo_eps"
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

    def choose_objective(
        self, model: PreTrainedModel | PeftModel
    ) -> tuple[Objective, Callable[[Sample], Any], Callable[[list[Any]], dict[str, Any]]]:
        """Return what becomes small, how a sample is encoded for it, and how a batch is made."""
        arguments, encoder = self.arguments, self.encoder
        share = can_share_prompt(model, encoder.max_length)
        packed = functools.partial(collate, share_prompt=share)
        if arguments.train_as_classification:
            return classification_loss, encoder.options, packed
        if not arguments.non_diff:
            encode = functools.partial(
                encoder.correct_option, only_option=arguments.only_train_option
            )
            return language_model_loss, encode, packed
        if not encoder.task.generation:
            return negative_accuracy, encoder.options, packed
        metric = arguments.non_diff_metric or "f1"
        objective = NegativeTextMetric(metric, encoder.tokenizer, self.generation)
        return objective, self.encode_for_generation, collate_generation

    def encode_for_generation(self, sample: Sample) -> GenerationExample:
        """Encode the prompt that an answer is generated behind."""
        return GenerationExample(self.encoder.prompt(sample), sample.correct)

    def probe(
        self, model: PreTrainedModel, examples: ExampleSet, output_dir: Path
    ) -> dict[str, Any]:
        """Fit the head of ``model`` by logistic regression; returns what it was fitted to."""
        arguments = self.arguments
        started = time.perf_counter()
        fitted = fit_head(
            model,
            self.encoder.tokenizer,
            [self.encoder.correct_option(sample) for sample in examples.train],
            arguments.per_device_eval_batch_size,
            arguments.lp_early_stopping,
        )
        if arguments.save_model and arguments.process_index == 0:
            model.save_pretrained(output_dir)
            self.encoder.tokenizer.save_pretrained(output_dir)
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

    def show(self, examples: ExampleSet, predictions: list[Prediction]) -> None:
        """Print the first prompts with their options and scores."""
        task, tokenizer = self.encoder.task, self.encoder.tokenizer
        pairs = zip(examples.evaluation, examples.demonstrations, strict=True)
        for (sample, shown), prediction in list(zip(pairs, predictions, strict=True))[
            :SHOWN_EXAMPLES
        ]:
            self.say(f"--- example {sample.id}, correct: {' | '.join(map(str, sample.correct))}")
            self.say(tokenizer.decode(self.encoder.prompt(sample, shown)))
            if prediction.scores is None:
                self.say(f"  generated: {prediction.answer!r}")
                continue
            for candidate, score in zip(sample.candidates, prediction.scores, strict=True):
                self.say(f"  {task.option(sample, candidate)!r}: {score:.4f}")

    def say(self, line: str) -> None:
        """Print a line, from one process only."""
        if self.arguments.process_index == 0:
            print(line, flush=True)


def random_tokens(tokenizer: PreTrainedTokenizerBase, number: int, seed: int) -> torch.Tensor:
    """Return tokens of the vocabulary, (number,), none of them special, drawn from a seed."""
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (number,), generator=generator)]


def describe(metrics: dict[str, float]) -> str:
    """Return metrics as text; the first one's name is said already."""
    values = [f"{name} {value:.4f}" for name, value in metrics.items()]
    return ", ".join([values[0].split()[-1], *values[1:]])


def prediction_rows(task: Any, samples: list[Sample], predictions: list[Prediction]) -> list[dict]:
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


def prepare(arguments: Arguments) -> tuple[Experiment, list[ExampleSet]]:
    """Load and check everything but the weights; nothing is written yet.

    Raises:
        InputError: the model, the data or a number does not fit.
    """
    task = arguments.task
    config, tokenizer = load_config_and_tokenizer(arguments.model_name, arguments.trust_remote_code)
    max_length = choose_max_length(arguments.max_length, config)
    if arguments.prefix_tuning:
        # The prefix takes positions of its own before every text.
        max_length -= arguments.num_prefix
        if max_length < 2:
            raise InputError(
                f"--num_prefix {arguments.num_prefix} leaves no room for a text in --max_length "
                f"{max_length + arguments.num_prefix}"
            )
    check_writable("--result_file", arguments.result_path)
    if arguments.predictions_file:
        check_writable("--predictions_file", Path(arguments.predictions_file))
    if arguments.trainer != "none":
        check_writable("--output_dir", Path(arguments.output_dir), is_folder=True)
    if task.generation and arguments.max_new_tokens >= max_length:
        raise InputError(
            f"--max_new_tokens {arguments.max_new_tokens} leaves no room for a prompt in a text of "
            f"{max_length} tokens (--max_length)"
        )
    train, validation = load_samples(task, arguments.data_dir)
    generation = GenerationSettings(
        arguments.max_new_tokens,
        arguments.eos_token.replace("\\n", "\n"),
        arguments.sampling,
        arguments.temperature,
        arguments.num_beams,
        arguments.top_k,
        arguments.top_p,
    )
    encoder = Encoder(task, tokenizer, max_length, arguments.max_new_tokens)
    return Experiment(arguments, encoder, generation), draw_example_sets(
        arguments, train, validation
    )


def run_experiment(arguments: Arguments) -> None:
    """Do every run and write the result JSON and the predictions."""
    started = time.perf_counter()
    transformers.set_seed(arguments.seed)
    experiment, example_sets = prepare(arguments)
    runs = []
    several = len(example_sets) > 1
    output_dir = Path(arguments.output_dir)
    for examples in example_sets:
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
        write_json(arguments.result_path, summarize(arguments, runs, started))
        print(f"result: {arguments.result_path}")


def mean_metrics(runs: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Return the mean over the runs of each metric of one kind."""
    return {name: sum(run[kind][name] for run in runs) / len(runs) for name in runs[0][kind]}


def summarize(arguments: Arguments, runs: list[dict[str, Any]], started: float) -> dict[str, Any]:
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
        "seconds": round(time.perf_counter() - started, 3),
        "settings": changed_settings(arguments),
        "versions": {"python": platform.python_version(), **versions},
    }


def leave_out_loading_bars() -> None:
    """Show no bar for reading and writing weight files; downloads and our own bars stay."""
    downloads_are_shown = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads_are_shown:
        enable_progress_bars()


@functools.cache
def leave_process_group_at_exit() -> None:
    """End the processes' connection before Python does: its threads would abort the process."""
    atexit.register(torch.distributed.destroy_process_group)


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
