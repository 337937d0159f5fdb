"""What run.py refuses of the Trainer's arguments that the Trainer refuses late, or not at all."""

from __future__ import annotations

import math

import torch
from transformers import Trainer
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.optimization import get_scheduler
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from command_line.arguments import Arguments
from command_line.contradictions import check_values
from command_line.declarations import AUTO
from command_line.settings import examples_of_a_batch
from utils import InputError, one_line, share_of_run

# These optimizers choose among a model's modules, and there is none yet.
CHOOSE_MODULES = ("galore", "apollo", "lomo", "adalomo")


def check(arguments: Arguments) -> None:
    """Refuse what contradicts itself, what cannot be done, and what must not be ignored.

    Raises:
        InputError: names the arguments, their values and the way out.
    """
    check_values(arguments)
    if arguments.fsdp and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("--fsdp needs processes: start them with torchrun")
    if arguments.trainer == "none" or arguments.linear_probing:
        return
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("--use_liger_kernel: pip install liger-kernel, or leave it out")
    if arguments.dataloader_drop_last and arguments.num_train < examples_of_a_batch(arguments):
        raise InputError(
            f"--dataloader_drop_last leaves nothing of --num_train {arguments.num_train} in steps "
            f"of {examples_of_a_batch(arguments)} examples: leave it out"
        )
    _check_schedule(arguments)
    installed = get_available_reporting_integrations()
    for target in arguments.report_to or ():
        if target not in installed:
            listed = ", ".join(["none", *installed])
            raise InputError(f"--report_to {target}: it is not installed; give {listed}")
    if arguments.trainer == "regular":
        _check_optimizer(arguments)


def steps_of_run(arguments: Arguments) -> int:
    """Return how many steps a run has, if there are as many training examples as were asked for."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(arguments.num_train / examples_of_a_batch(arguments))
    steps = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * steps)


def _check_schedule(arguments: Arguments) -> None:
    """Refuse steps beyond the end of the run, and options that the schedule does not take."""
    steps = steps_of_run(arguments)
    warmup = arguments.get_warmup_steps(steps)
    name = arguments.lr_scheduler_type
    decay = share_of_run(arguments.decay_step, steps)
    for argument, value in (("warmup_steps", warmup), ("decay_step", decay + 1)):
        if value > steps:
            raise InputError(
                f"--{argument} {getattr(arguments, argument):g}: the run has {steps} steps"
            )
    options = arguments.lr_scheduler_kwargs or {}
    metric = arguments.metric_for_best_model
    follows = name.value in ("reduce_lr_on_plateau", "greedy")
    if follows and metric not in (None, "loss", "eval_loss") and options.get("mode") != "max":
        raise InputError(
            f"--metric_for_best_model {metric}: --lr_scheduler_type {name.value} waits for what "
            'falls; give loss, or --lr_scheduler_kwargs \'{"mode": "max"}\''
        )
    # Some need options, and some values fail at their first use only.
    lr = 0.1 if arguments.learning_rate == AUTO else arguments.learning_rate
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    try:
        schedule = get_scheduler(
            name, optimizer, warmup, steps, scheduler_specific_kwargs=dict(options)
        )
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
        raise InputError(
            f"--optim {name}: {one_line(error)}; or take adamw_torch, adafactor or sgd"
        ) from error
