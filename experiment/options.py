"""What the command line says, as frozen objects: nothing below this folder sees ``Arguments``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from command_line.arguments import Arguments
from command_line.checks import steps_of_run
from command_line.declarations import AUTO
from command_line.optimizer import optimizer_config, smoothing
from command_line.reading import TUNING_MODES
from command_line.settings import (
    changed_settings,
    examples_of_a_batch,
    length_of_run,
    settings_of_a_checkpoint,
)
from language_model.generation import GenerationSettings
from language_model.loading import choose_dtype
from task_data.sampling import ExampleSet, draw_example_sets
from tasks import Task
from utils import InputError
from zeroth_order.config import HiZOOConfig
from zeroth_order.smoothing import SmoothingSchedule


@dataclass(frozen=True)
class ModelOptions:
    """Which model is loaded, and how."""

    name: str
    dtype: torch.dtype = torch.float32
    bits: int | None = None
    spread: bool = True  # over all GPUs of one process
    device: torch.device | None = None  # None: sharding moves each layer itself
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TrainedWeights:
    """Which weights are trained; ``mode`` is one of ``TUNING_MODES``, or None: all weights."""

    mode: str | None = None
    seed: int = 42
    untie_emb: bool = False
    lora_r: int = 8
    lora_alpha: int = 16
    num_prefix: int = 5
    no_reparam: bool = True
    prefix_init_by_real_act: bool = True
    lp_early_stopping: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainedWeights:
        """Read settings by their names, those of an earlier run too; others are ignored.

        Raises:
            InputError: a value is of another type.
        """
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)[1:]}
        given = {name: settings[name] for name in kinds if settings.get(name) is not None}
        for name, value in given.items():
            if type(value) is not kinds[name]:
                raise InputError(f"{name} {value!r}: must be of type {kinds[name].__name__}")
        mode = next((mode for mode in TUNING_MODES if settings.get(mode) is True), None)
        return cls(mode, **given)


@dataclass(frozen=True)
class DataOptions:
    """Which examples are read and drawn, how they become tokens, and how text is generated."""

    task: Task
    data_dir: str | None
    draw: Callable[..., list[ExampleSet]]  # takes train and validation samples
    num_train: int
    max_length: int | None
    apply_chat_template: bool
    system_prompt: str | None
    generation: GenerationSettings


@dataclass(frozen=True)
class ZerothOrderOptions:
    """How zo trains: the arguments of ``ZerothOrderTrainer``."""

    config: HiZOOConfig
    smoothing: SmoothingSchedule
    perturbation: str
    parallel: str


@dataclass(frozen=True)
class TrainingOptions:
    """How weights are trained; ``own`` are the Trainer's own arguments."""

    own: TrainingArguments
    zeroth_order: ZerothOrderOptions | None
    measured: tuple[bool, bool]  # whether a probe chooses μ of g, and μ of c
    steps: int
    examples_of_a_batch: int  # in all processes together
    train_as_classification: bool
    only_train_option: bool
    non_diff: bool
    non_diff_metric: str | None
    reward_samples: int
    decay_step: int
    max_skipped_steps: int
    check_every: int
    wants_dev_metric: bool
    replays_best: bool  # from the journal, without checkpoints
    save_on_interrupt: bool


@dataclass(frozen=True)
class Files:
    """Where a run's files go, and what may happen to those that are there."""

    folders: tuple[Path, ...]  # of each set's checkpoints, journal and model
    result: Path
    predictions: tuple[Path, ...]  # each set's rows; empty: not written
    save_model: bool
    merge_adapter: bool
    overwrite: bool
    resume_from: str | None  # a checkpoint, "true" or "false"; None: the newest, if any


@dataclass(frozen=True)
class Identity:
    """What tells an experiment from others."""

    experiment: str  # hash of all that changes the result, but its length
    trainer: str
    settings: Mapping[str, Any]  # of the result
    course: Mapping[str, Any]  # what decides the course of the training
    length: Mapping[str, float]  # max_steps or num_train_epochs; empty without steps

    @property
    def of_run(self) -> dict[str, Any]:
        """What decides the course of the training, and its length."""
        return {**self.course, **self.length}


@dataclass(frozen=True)
class Options:
    """All that an experiment is told; ``training`` is None where nothing is trained."""

    model: ModelOptions
    weights: TrainedWeights
    data: DataOptions
    training: TrainingOptions | None
    files: Files
    identity: Identity
    eval_batch_size: int
    calibration: str | None
    eval_before_training: bool
    no_eval: bool
    quiet: bool
    verbose: bool


def options_of(arguments: Arguments) -> Options:
    """Return what checked arguments say."""
    trained = arguments.trainer != "none"
    draw = functools.partial(
        draw_example_sets,
        num_train=arguments.num_train,
        num_dev=arguments.num_dev or 0,
        num_eval=arguments.num_eval,
        num_train_sets=arguments.num_train_sets,
        train_set_seed=arguments.train_set_seed,
        in_context=not trained,
    )
    end_of_text = arguments.eos_token.replace("\\n", "\n")
    generation = _taken(GenerationSettings, arguments, eos_token=end_of_text)
    model = ModelOptions(
        arguments.model_name,
        choose_dtype(arguments.load_float16, arguments.load_bfloat16),
        8 if arguments.load_int8 else 4 if arguments.load_int4 else None,
        not arguments.no_auto_device,
        None if arguments.fsdp else arguments.device,
        arguments.trust_remote_code,
    )
    identity = Identity(
        arguments.experiment,
        arguments.trainer,
        changed_settings(arguments),
        settings_of_a_checkpoint(arguments),
        length_of_run(arguments),
    )
    return _taken(
        Options,
        arguments,
        model=model,
        weights=TrainedWeights.of(vars(arguments)),
        data=_taken(DataOptions, arguments, draw=draw, generation=generation),
        training=_training_options(arguments) if trained else None,
        files=_files(arguments),
        identity=identity,
        eval_batch_size=arguments.per_device_eval_batch_size,
    )


def _taken(kind: type, arguments: Arguments, **others: Any) -> Any:
    """Return an object whose fields have the values of the arguments of the same names."""
    names = {field.name for field in dataclasses.fields(kind)} - others.keys()
    return kind(**{name: getattr(arguments, name) for name in names}, **others)


def _training_options(arguments: Arguments) -> TrainingOptions:
    ours = {field.name for field in dataclasses.fields(Arguments)} | {"task"}
    ours -= {field.name for field in dataclasses.fields(TrainingArguments)}
    own = object.__new__(TrainingArguments)
    vars(own).update({n: value for n, value in vars(arguments).items() if n not in ours})
    zeroth_order, measured = None, (False, False)
    if arguments.trainer == "zo":
        config, schedule = optimizer_config(arguments), smoothing(arguments)
        ways = (arguments.zo_perturbation, arguments.zo_parallel)
        zeroth_order = ZerothOrderOptions(config, schedule, *ways)
        eps = arguments.zo_eps
        measured = (eps == AUTO, (arguments.curvature_eps or eps) == AUTO)
    return _taken(
        TrainingOptions,
        arguments,
        own=own,
        zeroth_order=zeroth_order,
        measured=measured,
        steps=steps_of_run(arguments),
        examples_of_a_batch=examples_of_a_batch(arguments),
    )


def _files(arguments: Arguments) -> Files:
    """Return where the files of all sets go; several sets have a folder each."""
    sets = arguments.num_train_sets or 1
    names = [f"set{seed}" for seed in range(sets)] if sets > 1 else [""]
    rows = arguments.predictions_file and Path(arguments.predictions_file)
    resume_from = arguments.resume_from_checkpoint
    if resume_from and resume_from.lower() in ("true", "false"):
        resume_from = resume_from.lower()
    return Files(
        folders=tuple(Path(arguments.output_dir or "", name) for name in names),
        result=arguments.result_path,
        predictions=tuple(
            rows.with_stem(f"{rows.stem}-{name}") if name else rows for name in names if rows
        ),
        save_model=arguments.save_model,
        merge_adapter=arguments.merge_adapter,
        overwrite=arguments.overwrite_output_dir,
        resume_from=resume_from,
    )
