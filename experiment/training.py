"""The trainer of a run: its objective, its examples, its dev metric, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from command_line.arguments import Arguments
from command_line.settings import broadcast_rate, optimizer_config
from experiment.options import Options
from experiment.results import answers
from experiment.resuming import Start
from language_model import objectives
from language_model.encoding import Encoder
from language_model.packing import collate
from language_model.shared_tokens import can_share_prompt
from task_data.sampling import ExampleSet, has_correct_option
from tasks import Sample
from trainer import ErrorBroadcastTrainer, ZerothOrderTrainer
from training.checkpoints import UNFINISHED, write_together
from training.objective_trainer import ObjectiveTrainer
from training.recording import Recording
from utils import process_index


class Training(NamedTuple):
    """What is minimised, how a sample is encoded for it, and how examples become a batch."""

    objective: objectives.Objective
    encode: Callable[[Sample], Any]
    collate: Callable[[list[Any]], dict[str, Any]]


def choose_objective(
    options: Options, model: PreTrainedModel | PeftModel, encoder: Encoder
) -> Training:
    """Return what training minimises."""
    arguments, task, generation = options.arguments, encoder.task, options.generation
    packed = functools.partial(collate, share_prompt=can_share_prompt(model, encoder.max_length))
    if arguments.train_as_classification:
        return Training(objectives.classification_loss, encoder.options, packed)
    if not task.reward and not arguments.non_diff:
        only_option = arguments.only_train_option
        encode = functools.partial(encoder.correct_option, only_option=only_option)
        return Training(objectives.language_model_loss, encode, packed)
    if not task.generation:
        return Training(objectives.negative_accuracy, encoder.options, packed)
    metric, count = "f1", 1
    if task.reward:
        # Several texts of a prompt are sampled.
        metric, count = "reward", arguments.reward_samples
        generation = dataclasses.replace(generation, sampling=generation.sampling or count > 1)
    return Training(
        objectives.NegativeTextMetric(
            task, metric, encoder.tokenizer, generation, count, arguments.seed
        ),
        lambda sample: (encoder.prompt(sample), sample),
        objectives.collate_prompts,
    )


def make_trainer(
    options: Options,
    model: PreTrainedModel | PeftModel,
    encoder: Encoder,
    examples: ExampleSet,
    output_dir: Path,
    start: Start | None = None,
) -> ObjectiveTrainer:
    """Return what trains ``model`` on a run's examples; with ``start`` it keeps a journal.

    Raises:
        InputError: the model, the machine and the options do not go together.
    """
    arguments = options.arguments
    chosen = choose_objective(options, model, encoder)
    dev = dev_samples(options, examples)
    shared = {
        "model": model,
        "args": trainers_own(arguments, output_dir),
        "train_dataset": [chosen.encode(sample) for sample in examples.train],
        "eval_dataset": [chosen.encode(sample) for sample in dev] or None,
        "processing_class": encoder.tokenizer,
        "objective": chosen.objective,
        "data_collator": chosen.collate,
        "decay_step": arguments.decay_step,
        "dev_metric": dev_metric(options, encoder, dev),
        "settings": options.of_run,
    }
    if arguments.trainer == "regular":
        return ObjectiveTrainer(**shared)
    if arguments.trainer == "broadcast":
        method = {
            "lr": broadcast_rate(arguments, len(examples.train)),
            "damping": arguments.broadcast_damping,
            "first": arguments.broadcast_from,
            "matrices": arguments.broadcast_matrices.split(","),
            "max_tokens": arguments.broadcast_tokens,
        }
        return ErrorBroadcastTrainer(method=method, **shared)
    recording = start.recording if start else Recording()
    recording.header = {"model": {"name": options.model.name}, "settings": options.of_run}
    return ZerothOrderTrainer(
        config=optimizer_config(arguments),
        perturbation=arguments.zo_perturbation,
        recording=recording,
        **shared,
    )


def trainers_own(arguments: Arguments, output_dir: Path) -> TrainingArguments:
    """Return the Trainer's arguments without ours, as checkpoints keep them."""
    ours = {field.name for field in dataclasses.fields(Arguments)} | {"task"}
    ours -= {field.name for field in dataclasses.fields(TrainingArguments)}
    own = object.__new__(TrainingArguments)
    vars(own).update({name: each for name, each in vars(arguments).items() if name not in ours})
    own.output_dir = str(output_dir)
    return own


def dev_samples(options: Options, examples: ExampleSet) -> list[Sample]:
    """Return what dev losses are of: without dev examples the eval examples, as in MeZO."""
    arguments = options.arguments
    if examples.dev or (arguments.eval_strategy == "no" and not arguments.eval_on_start):
        return examples.dev
    return [sample for sample in examples.evaluation if has_correct_option(sample)]


def dev_metric(
    options: Options, encoder: Encoder, dev: list[Sample]
) -> Callable[[PreTrainedModel], dict[str, float]] | None:
    """Return what measures the task's metrics on the dev set; None: they are not asked for."""

    def measure(model: PreTrainedModel) -> dict[str, float]:
        label = f"dev {encoder.task.metric_name}"
        predictions = answers(options, encoder, model, dev, [[]] * len(dev), label)
        return encoder.task.score([prediction.answer for prediction in predictions], dev)

    return measure if options.arguments.wants_dev_metric and dev else None


def save_model(
    save: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Let the first process save a model and its tokenizer, whole or not at all.

    Raises:
        NotWritten: the disk is full.
    """
    unfinished = folder / UNFINISHED

    def write() -> None:
        if process_index() == 0:
            save(unfinished)
            tokenizer.save_pretrained(unfinished)
            # The configuration, whose presence makes it a model, is the last one.
            files = sorted(unfinished.iterdir(), key=lambda file: "config.json" in file.name)
            for file in files:
                file.replace(folder / file.name)
            for name in {file.name for file in folder.glob("adapter_*")} - {f.name for f in files}:
                (folder / name).unlink()  # of a model that was saved there before

    try:
        write_together(folder, write)
    finally:
        if process_index() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
