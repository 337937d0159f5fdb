"""The arguments of an experiment: those of ours, and all of transformers' Trainer.

``check`` refuses what the Trainer itself would refuse late, or not at all.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.optimization import get_scheduler
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from command_line.contradictions import check_values, warning, without_effect
from command_line.declarations import AUTO
from command_line.effects import FOLLOW_DEV_METRIC, ON_GPU
from command_line.reading import GROUPS, OWN, Meaning, Values, read_values
from command_line.trainer_arguments import OTHERS
from training.processes import join, naming_lost_processes
from utils import InputError, one_line, share_of_run

# These optimizers choose among a model's modules, and there is none yet.
CHOOSE_MODULES = ("galore", "apollo", "lomo", "adalomo")


@dataclass
class Arguments(Meaning, *reversed(GROUPS), TrainingArguments):
    """The arguments of the experiment, and all of transformers.TrainingArguments."""

    # The names of what a user or a script gives, and of what a user gives.
    given: frozenset[str] = field(default=frozenset(), init=False)
    given_by_user: frozenset[str] = field(default=frozenset(), init=False)
    # Names what is given without an effect.
    warning: str | None = field(default=None, init=False)
    # The hash of all settings that change the result, and the run's name (settings.name_run).
    experiment: str = field(default="", init=False)
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        output_dir = self.output_dir
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else processes of torchrun on CPUs would not find one another
        if self.ddp_backend and "LOCAL_RANK" not in os.environ:
            alone = "it needs processes, started with torchrun; leave it out"
            raise InputError(f"--ddp_backend {self.ddp_backend}: {alone}")
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # in a file a bar is one endless line
        if self.offload != "none" and self.trainer == "zo" and self.zo_perturbation == AUTO:
            # Streamed weights are perturbed as copies: a run may resume in memory, or streamed.
            self.zo_perturbation = "layerwise"
        self.choose_schedule()
        join(self.use_cpu, self.ddp_backend, self.ddp_timeout)
        with naming_lost_processes(self.ddp_timeout):
            super().__post_init__()
        # The Trainer would call it trainer_output; settings.name_run names it after the run.
        self.output_dir = output_dir
        # Batches of encoded examples have no columns that a model's forward could name.
        self.remove_unused_columns = False

    @property
    def examples_of_a_batch(self) -> int:
        """The examples of a batch in all processes together."""
        return self.per_device_train_batch_size * self.world_size

    def batches_of_an_epoch(self, examples: int) -> int:
        """Return the batches that so many training examples make."""
        whole = math.floor if self.dataloader_drop_last else math.ceil
        return whole(examples / self.examples_of_a_batch)

    def steps_of_run(self, examples: int) -> int:
        """Return the steps of a run that has so many training examples."""
        steps = math.ceil(self.batches_of_an_epoch(examples) / self.gradient_accumulation_steps)
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps)


@functools.cache
def _trainers_parser() -> HfArgumentParser:
    return HfArgumentParser(TrainingArguments, allow_abbrev=False, exit_on_error=False)


def _read_others(values: Values, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of the Trainer's other arguments, as transformers reads them."""
    line = []
    for name in names:
        words = values.words[name]
        if name == "fsdp" and words == ["True"]:
            words = []  # "True" would be a sharding of that name
        # A value that begins with a dash would be taken for an argument.
        line += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    try:
        read = vars(_trainers_parser().parse_args(line))
    except argparse.ArgumentError as error:
        raise InputError(one_line(error)) from error
    return {name: read[name] for name in names}


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read a command line; what has no effect is left out, and stands in ``warning``.

    Raises:
        InputError: an argument is unknown, or its value is not of its kind or out of its bounds.
    """
    return make_arguments(read_values(argv))


def make_arguments(values: Values) -> Arguments:
    """Return the arguments of a command line that was read; see ``parse_arguments``."""
    unmet = without_effect(values)
    on_gpu = torch.accelerator.is_available() and not values.use_cpu
    if values.trainer == "regular" and not on_gpu:
        of_a_gpu = ("fp16", "bf16") if "bf16" not in values.given_by_user else ("fp16",)
        unmet |= {name: ON_GPU for name in of_a_gpu if getattr(values, name)}
    names = [name for name in values.given if name not in unmet]
    try:
        arguments = Arguments(
            **{name: values.given[name] for name in names if name in OWN},
            **_read_others(values, [name for name in names if name in OTHERS]),
        )
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise InputError(one_line(error)) from error
    if "task" in vars(values) and arguments.words_of_task == values.words_of_task:
        arguments.task = values.task  # a reward's file, which may load a model, runs once
    arguments.given = frozenset(names)
    arguments.given_by_user = values.given_by_user.intersection(names)
    arguments.warning = warning(values, unmet)
    return arguments


def plain_value(value: Any) -> Any:
    """Return a value as JSON has it: that of an enumeration, the dictionary of a configuration."""
    return value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)


def check(arguments: Arguments) -> None:
    """Refuse what contradicts itself, what cannot be done, and what must not be ignored.

    Raises:
        InputError: names the arguments, their values and the way out.
    """
    check_values(arguments)
    if arguments.fsdp and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("--fsdp needs processes: start them with torchrun")
    if not arguments.has_steps:
        return
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("--use_liger_kernel: pip install liger-kernel, or leave it out")
    _check_schedule(arguments)
    installed = get_available_reporting_integrations()
    for target in arguments.report_to or ():
        if target not in installed:
            listed = ", ".join(["none", *installed])
            raise InputError(f"--report_to {target}: it is not installed; give {listed}")
    if arguments.trainer == "regular":
        _check_optimizer(arguments)


def _check_schedule(arguments: Arguments) -> None:
    """Refuse steps beyond the end of the run, and options that the schedule does not take."""
    steps = arguments.steps_of_run(arguments.num_train)  # fewer rows make fewer steps
    warmup = arguments.get_warmup_steps(steps)
    name = arguments.lr_scheduler_type
    decay = share_of_run(arguments.decay_step, steps)
    for argument, value in (("warmup_steps", warmup), ("decay_step", decay + 1)):
        if value > steps:
            typed = f"--{argument} {getattr(arguments, argument):g}"
            raise InputError(f"{typed}: the run has {steps} steps")
    options = arguments.lr_scheduler_kwargs or {}
    metric = arguments.metric_for_best_model
    follows = name in FOLLOW_DEV_METRIC
    if follows and metric not in (None, "loss", "eval_loss") and options.get("mode") != "max":
        raise InputError(
            f"--metric_for_best_model {metric}: --lr_scheduler_type {name.value} waits for what "
            'falls; give loss, or --lr_scheduler_kwargs \'{"mode": "max"}\''
        )
    # Some need options, and some values fail at their first use only.
    lr = 0.1 if arguments.learning_rate == AUTO else arguments.learning_rate
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    try:
        schedule = get_scheduler(name, optimizer, warmup, steps, dict(options))
        for factor in getattr(schedule, "lr_lambdas", ()):
            for step in (warmup, steps // 2, steps):
                factor(step)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"--lr_scheduler_type {name.value}: {one_line(error)}; give it in "
            "--lr_scheduler_kwargs '{\"name\": value}', or take constant, linear or cosine"
        ) from error


def _check_optimizer(arguments: Arguments) -> None:
    """Make the optimizer's options: the package of an optimizer may be missing."""
    name = arguments.optim.value
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, AttributeError) as error:
        if isinstance(error, ValueError) and name.startswith(CHOOSE_MODULES):
            return
        others = "take adamw_torch, adafactor or sgd"
        raise InputError(f"--optim {name}: {one_line(error)}; or {others}") from error
