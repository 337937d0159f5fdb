"""What run.py refuses of the arguments of transformers' Trainer, before it loads anything."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import whoami
from huggingface_hub.errors import HTTPError
from transformers import Trainer
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import is_liger_kernel_available, is_torch_xla_available

from command_line.arguments import Arguments
from command_line.settings import examples_of_a_batch
from command_line.values import AUTO
from trainer import CURVATURE_PART
from utils import InputError, first_line, one_line

# The parameters that every schedule of transformers gets from the Trainer.
OF_EVERY_SCHEDULE = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
# These optimizers choose among a model's modules, and there is none yet.
CHOOSE_MODULES = ("galore", "apollo", "lomo", "adalomo")


def check_steps(arguments: Arguments) -> None:
    """Refuse what the Trainer would ignore, or would fail at later.

    Raises:
        InputError: names the argument, its value and the way out.
    """
    _check_dev_loss(arguments)
    _check_checkpoint_to_resume(arguments)
    _check_batches(arguments)
    if arguments.zo_parallel == "directions" and arguments.zo_directions == "example":
        raise InputError(
            "--zo_parallel directions: with --zo_directions example processes share the batch; "
            "leave one of them out"
        )
    if arguments.zo_parallel == "directions" and arguments.zo_num_samples < 2:
        raise InputError(
            "--zo_parallel directions: there is one direction only; give --zo_num_samples, at best "
            "as many as processes, or leave it out"
        )
    _check_schedule(arguments)
    _check_report_targets(arguments)
    if arguments.trainer == "regular":
        _check_optimizer(arguments)
    if arguments.torch_compile:
        _check_compilation(arguments)
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise InputError(
            "--use_liger_kernel needs liger-kernel: pip install liger-kernel, or leave it out"
        )
    if arguments.fp16 and not torch.accelerator.is_available():
        raise InputError("--fp16 needs a GPU: leave it out on this machine, or give --bf16")
    if DebugOption.TPU_METRICS_DEBUG in arguments.debug and not is_torch_xla_available():
        raise InputError("--debug tpu_metrics_debug needs a TPU: leave it out on this machine")
    if arguments.push_to_hub:
        _check_hub(arguments)


def steps_of_run(arguments: Arguments) -> int:
    """Return how many steps a run has, if there are as many training examples as were asked for."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batch = examples_of_a_batch(arguments)
    steps = math.ceil(
        math.ceil(arguments.num_train / batch) / arguments.gradient_accumulation_steps
    )
    return math.ceil(arguments.num_train_epochs * steps)


def _check_dev_loss(arguments: Arguments) -> None:
    """Refuse what needs dev examples without them, and what they are not measured by."""
    if not arguments.num_dev and arguments.eval_strategy != IntervalStrategy.NO:
        raise InputError(
            f"--eval_strategy {arguments.eval_strategy.value} needs dev examples: give --num_dev, "
            "or --eval_strategy no"
        )
    if not arguments.num_dev and arguments.eval_on_start:
        raise InputError("--eval_on_start needs dev examples: give --num_dev, or leave it out")
    if arguments.replays_best and arguments.eval_strategy == IntervalStrategy.NO:
        raise InputError(
            "--load_best_model_at_end needs dev losses: give --eval_strategy steps or epoch"
        )
    metric = arguments.metric_for_best_model
    if arguments.save_strategy == SaveStrategy.BEST and metric is None:
        raise InputError(
            "--save_strategy best needs --metric_for_best_model: give loss, or a metric of the task"
        )
    if metric is None:
        return
    is_loss = metric in ("loss", "eval_loss")
    names = arguments.task.metric_names
    if not is_loss and metric.removeprefix("eval_") not in names:
        raise InputError(
            f"--metric_for_best_model {metric}: the dev set has loss and, of "
            f"{arguments.task.name}, {' and '.join(names)}; give one of these"
        )
    follows = arguments.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    if follows and not is_loss and (arguments.lr_scheduler_kwargs or {}).get("mode") != "max":
        raise InputError(
            f"--metric_for_best_model {metric}: --lr_scheduler_type "
            f"{arguments.lr_scheduler_type.value} waits for what falls; give loss, or "
            '--lr_scheduler_kwargs \'{"mode": "max"}\''
        )
    if arguments.greater_is_better == is_loss:
        best = "loss is the lowest" if is_loss else f"{metric} is the highest"
        raise InputError(f"--greater_is_better: the best dev {best}; leave it out")


def _check_checkpoint_to_resume(arguments: Arguments) -> None:
    wanted = arguments.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("true", "false"):
        return
    if arguments.num_train_sets:
        raise InputError(
            f"--resume_from_checkpoint {wanted} is of one training set, --num_train_sets runs "
            "several: leave it out, and each goes on from its own"
        )
    if arguments.overwrite_output_dir:
        raise InputError(
            f"--overwrite_output_dir deletes checkpoints, --resume_from_checkpoint {wanted} needs "
            "one: give one of them"
        )


def _check_batches(arguments: Arguments) -> None:
    """Refuse what leaves no batch whole, or none at all."""
    if arguments.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise InputError(
            f"--train_sampling_strategy {arguments.train_sampling_strategy}: the batches are "
            "packed; give random or sequential"
        )
    step = examples_of_a_batch(arguments)
    if arguments.dataloader_drop_last and arguments.num_train < step:
        raise InputError(
            f"--dataloader_drop_last leaves nothing of --num_train {arguments.num_train} in steps "
            f"of {step} examples: leave it out"
        )


def _check_schedule(arguments: Arguments) -> None:
    """Refuse steps beyond the end of the run, and options that the scheduler does not have."""
    steps = steps_of_run(arguments)
    warmup = arguments.get_warmup_steps(steps)
    name = arguments.lr_scheduler_type
    if warmup > steps:
        raise InputError(
            f"--warmup_steps {arguments.warmup_steps:g}: must be at most the run's {steps} steps "
            "(--max_steps)"
        )
    if arguments.decay_step:
        if name not in ("linear", "cosine"):
            raise InputError(
                f"--decay_step {arguments.decay_step} needs --lr_scheduler_type linear or cosine, "
                f"not {name.value}"
            )
        if arguments.decay_step >= steps:
            raise InputError(
                f"--decay_step {arguments.decay_step}: must be below the run's {steps} steps "
                "(--max_steps)"
            )
        if warmup > arguments.decay_step:
            raise InputError(
                f"--warmup_steps {arguments.warmup_steps:g}: must be at most --decay_step "
                f"{arguments.decay_step}"
            )
        if arguments.lr_scheduler_kwargs:
            raise InputError("--lr_scheduler_kwargs: it has no effect with --decay_step; give one")
    options = arguments.lr_scheduler_kwargs or {}
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters
    known = [option for option in parameters if option not in OF_EVERY_SCHEDULE]
    if "kwargs" not in known:
        for option in options.keys() - known:
            raise InputError(
                f"--lr_scheduler_kwargs {option}: --lr_scheduler_type {name.value} takes "
                f"{', '.join(known) or 'none'}"
            )
    # Some need options, and some values fail at their first use only.
    lr = CURVATURE_PART if arguments.learning_rate == AUTO else arguments.learning_rate
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


def _check_report_targets(arguments: Arguments) -> None:
    for target in arguments.report_to or ():
        if target not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise InputError(f"--report_to {target}: choose from none, all, {known}")
        if target not in get_available_reporting_integrations():
            raise InputError(
                f"--report_to {target}: it is not installed; pip install {target}, or leave it out"
            )


def _check_optimizer(arguments: Arguments) -> None:
    """Make the optimizer's options: its package may be missing, or one may change nothing."""
    name = arguments.optim.value
    pairs = arguments.optim_args.split(",") if arguments.optim_args else []
    if not all(pair.count("=") == 1 for pair in pairs):
        raise InputError(
            f"--optim_args {arguments.optim_args}: give name=value, several with commas between"
        )
    try:
        _, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, AttributeError) as error:
        if isinstance(error, ValueError) and name.startswith(CHOOSE_MODULES):
            return
        raise InputError(
            f"--optim {name}: {one_line(error)}; or take adamw_torch, adafactor or sgd"
        ) from error
    # What the options are like without each of the arguments that not every optimizer reads.
    absent: dict[str, dict[str, Any]] = {
        f"--optim_args {pair}": {"optim_args": ",".join(p for p in pairs if p != pair)}
        for pair in pairs
    }
    for argument in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        value, default = getattr(arguments, argument), getattr(Arguments, argument)
        if value != default:
            absent[f"--{argument} {value:g}"] = {argument: default}
    for shown, change in absent.items():
        changed = copy.copy(arguments)
        vars(changed).update(change)
        if Trainer.get_optimizer_cls_and_kwargs(changed)[1] == options:
            raise InputError(f"{shown}: it changes nothing of --optim {name}; leave it out")


def _check_compilation(arguments: Arguments) -> None:
    """Refuse what torch.compile does not know, and to compile without a compiler."""
    backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
    if backend.upper() not in DynamoBackend.__members__:
        known = ", ".join(member.lower() for member in DynamoBackend.__members__)
        raise InputError(f"--torch_compile_backend {backend}: choose from {known}")
    if mode:
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise InputError(f"--torch_compile_mode {mode}: choose from {', '.join(modes)}")
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise InputError(
                "--torch_compile: there is no working C++ compiler; install one, or leave it out"
            ) from error


def _check_hub(arguments: Arguments) -> None:
    """Ask the Hub who is there: the Trainer would do it once the model is loaded."""
    try:
        whoami(token=arguments.hub_token)
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(
            f"--push_to_hub: the Hub cannot be reached or does not know you ({first_line(error)}); "
            "hf auth login, or leave it out and take --save_model"
        ) from error
