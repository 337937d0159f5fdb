"""The trainer of a run: its objective, its examples, its dev metric, and what it leaves behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from experiment.options import Options
from experiment.predicting import answers
from experiment.preparation import Prepared
from experiment.resuming import Start
from hizoo import HiZOO
from language_model.adapters import save_merged
from language_model.encoding import Encoder
from language_model.objectives import (
    NegativeTextMetric,
    Objective,
    PromptExample,
    classification_loss,
    collate_prompts,
    language_model_loss,
    negative_accuracy,
)
from language_model.packing import collate
from language_model.shared_tokens import can_share_prompt
from task_data.sampling import ExampleSet
from tasks import Sample
from trainer import ZerothOrderTrainer
from training.checkpoints import write_together
from training.objective_trainer import ObjectiveTrainer
from training.recording import Recording


class Training(NamedTuple):
    """What is minimised, how a sample is encoded for it, and how examples become a batch."""

    objective: Objective
    encode: Callable[[Sample], Any]
    collate: Callable[[list[Any]], dict[str, Any]]


def choose_objective(
    options: Options, model: PreTrainedModel | PeftModel, encoder: Encoder
) -> Training:
    """Return what training minimises."""
    training, task, generation = options.training, encoder.task, options.data.generation
    packed = functools.partial(collate, share_prompt=can_share_prompt(model, encoder.max_length))
    if training.train_as_classification:
        return Training(classification_loss, encoder.options, packed)
    if not task.reward and not training.non_diff:
        only_option = training.only_train_option
        encode = functools.partial(encoder.correct_option, only_option=only_option)
        return Training(language_model_loss, encode, packed)
    if not task.generation:
        return Training(negative_accuracy, encoder.options, packed)
    metric, count = training.non_diff_metric or "f1", 1
    if task.reward:
        # Several texts of a prompt are sampled.
        metric, count = "reward", training.reward_samples
        generation = replace(generation, sampling=generation.sampling or count > 1)
    objective = NegativeTextMetric(
        task, metric, encoder.tokenizer, generation, count, training.own.seed
    )
    return Training(
        objective, lambda sample: PromptExample(encoder.prompt(sample), sample), collate_prompts
    )


def make_trainer(
    options: Options,
    model: PreTrainedModel | PeftModel,
    prepared: Prepared,
    examples: ExampleSet,
    output_dir: Path,
    start: Start | None = None,
) -> ObjectiveTrainer:
    """Return what trains ``model`` on a run's examples; with ``start`` it keeps a journal.

    Raises:
        InputError: the model, the machine and the options do not go together.
    """
    training, identity = options.training, options.identity
    chosen = choose_objective(options, model, prepared.encoder)
    own = copy.copy(training.own)
    own.output_dir = str(output_dir)
    shared = {
        "model": model,
        "args": own,
        "train_dataset": [chosen.encode(sample) for sample in examples.train],
        "eval_dataset": [chosen.encode(sample) for sample in examples.dev] or None,
        "processing_class": prepared.encoder.tokenizer,
        "objective": chosen.objective,
        "data_collator": chosen.collate,
        "decay_step": training.decay_step,
        "max_skipped_steps": training.max_skipped_steps,
        "dev_metric": dev_metric(options, prepared.encoder, examples.dev),
        "quiet": options.quiet,
        "settings": identity.of_run,
    }
    if not training.zeroth_order:
        return ObjectiveTrainer(**shared)
    recording = None
    if start:
        header = {
            "model": {"name": options.model.name},
            "settings": identity.of_run,
            "versions": {"torch": torch.__version__},
        }
        recording = Recording(start.journal, header, start.replay, training.check_every)
    return ZerothOrderTrainer(**vars(training.zeroth_order), recording=recording, **shared)


def dev_metric(
    options: Options, encoder: Encoder, dev: list[Sample]
) -> Callable[[PreTrainedModel], dict[str, float]] | None:
    """Return what measures the task's metrics on the dev set; None: they are not asked for."""
    if not options.training.wants_dev_metric or not dev:
        return None

    def measure(model: PreTrainedModel) -> dict[str, float]:
        label = f"dev {encoder.task.metric_name}"
        predictions = answers(options, encoder, model, dev, [[]] * len(dev), label)
        return encoder.task.score([prediction.answer for prediction in predictions], dev)

    return measure


def save_trained(trainer: ObjectiveTrainer, folder: Path, merge: bool) -> None:
    """Write a trained model, or with ``merge`` the model that its LoRA matrices make of it."""
    if not merge:
        trainer.save_model(str(folder))
        return
    model = trainer.accelerator.unwrap_model(trainer.model)

    def write() -> None:
        if trainer.args.should_save:
            save_merged(model, folder)
            trainer.processing_class.save_pretrained(folder)

    write_together(folder, write)


def used_by_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, str | None]:
    """Return what HiZOO has made of settings that may be "auto"; nothing for other optimizers."""
    if not isinstance(optimizer, HiZOO):
        return {}
    full = (state.get("hessian_minus_one") for state in optimizer.state.values())
    dtypes = {str(h.dtype).removeprefix("torch.") for h in full if h is not None}
    return {
        "zo_perturbation": "inplace" if optimizer.layers is None else "layerwise",
        "hessian_dtype": ", ".join(sorted(dtypes)) or None,
    }
