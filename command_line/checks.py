"""What run.py refuses before it loads anything: bad values, and arguments that exclude others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import ParallelMode

from command_line.arguments import TUNING_MODES, Arguments
from tasks import Task
from trainer import SmoothingSchedule
from utils import InputError, one_line

ADAPTERS = ("lora", "prefix_tuning")
EXCLUDE_EACH_OTHER = (
    ("load_float16", "load_bfloat16"),
    ("load_int8", "load_int4"),
    ("sfc", "icl_sfc"),
    ("train_set_seed", "num_train_sets"),
    ("task_name", "train_file"),
    ("task_name", "validation_file"),
    ("data_dir", "train_file"),
    ("data_dir", "validation_file"),
    *((first, second) for first in TUNING_MODES for second in TUNING_MODES if first < second),
)
LEAST = {
    **{"num_train": 0, "num_dev": 0, "num_eval": 1, "num_train_sets": 1, "train_set_seed": 0},
    **{"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "seed": 0},
    **{"gradient_accumulation_steps": 1, "decay_step": 0, "max_skipped_steps": 1},
    **{"zo_num_samples": 1, "lora_r": 1, "lora_alpha": 1, "num_prefix": 1},
    **{"max_new_tokens": 1, "num_beams": 1, "top_k": 1},
}


def check(arguments: Arguments) -> None:
    """Refuse values and combinations that would be ignored, or fail later.

    Raises:
        InputError: names the argument, its value and the way out.
    """
    _check_numbers(arguments)
    _check_files(arguments)
    for first, second in EXCLUDE_EACH_OTHER:
        if _given(arguments, first) and _given(arguments, second):
            raise InputError(f"--{first} and --{second} exclude each other: give one")
    task = arguments.task
    if not arguments.model_name:
        raise InputError("--model_name is missing: give a Hub id or a local model directory")
    SmoothingSchedule.parse(arguments.hessian_smooth_type)
    if not (arguments.train_file or arguments.validation_file):
        _refuse(arguments, "metric", "it is for --train_file and --validation_file")
    if arguments.calibration and task.generation:
        raise InputError(
            f"--{arguments.calibration}: the answers of {task.name} are generated, there are no "
            "options to calibrate; leave it out"
        )
    _check_tuning_mode(arguments)
    if arguments.fsdp:
        _check_sharding(arguments)
    if arguments.trainer == "none":
        nothing = "nothing is trained with --trainer none"
        for name in (*TUNING_MODES, "untie_emb", "non_diff", "num_dev", "train_as_classification"):
            _refuse(arguments, name, nothing)
        _refuse(arguments, "eval_before_training", nothing)
    else:
        _check_training(arguments, task)


def _check_numbers(arguments: Arguments) -> None:
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    for name in ("seed", "data_seed", "train_set_seed"):
        value = getattr(arguments, name)
        if value is not None and value >= 2**32:
            raise InputError(f"--{name} {value}: must be below {2**32}")
    for name in ("zo_eps", "temperature", "top_p", "num_train_epochs", "save_steps"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise InputError(f"--{name} {getattr(arguments, name)}: must be larger than 0")
    for name in ("learning_rate", "weight_decay"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise InputError(f"--{name} {getattr(arguments, name)}: must be at least 0")
    if arguments.top_p > 1:
        raise InputError(f"--top_p {arguments.top_p}: must be at most 1")
    if arguments.max_steps < 1 and arguments.max_steps != -1:
        raise InputError(
            f"--max_steps {arguments.max_steps}: must be at least 1, or -1 for --num_train_epochs"
        )
    if not arguments.eos_token:
        raise InputError("--eos_token '': give the text that ends an answer, as in \\n")


def _check_files(arguments: Arguments) -> None:
    """Refuse to write over a file that another argument names."""
    names = ("train_file", "validation_file", "predictions_file", "result_file")
    files = {name: Path(getattr(arguments, name)) for name in names if getattr(arguments, name)}
    for written in ("predictions_file", "result_file"):
        for name, file in files.items():
            if name != written and written in files and file.resolve() == files[written].resolve():
                raise InputError(f"--{written} {file} is --{name} too: give another name")


def _check_tuning_mode(arguments: Arguments) -> None:
    """Refuse what belongs to another way of tuning."""
    for mode, settings in TUNING_MODES.items():
        if not getattr(arguments, mode):
            for name in settings:
                _refuse(arguments, name, f"it belongs to --{mode}")
    quantised = next((n for n in ("load_int8", "load_int4") if getattr(arguments, n)), None)
    adapted = any(getattr(arguments, name) for name in ADAPTERS)
    if quantised and arguments.trainer != "none" and not adapted:
        raise InputError(
            f"--{quantised}: quantised weights cannot be trained themselves; add --lora or "
            "--prefix_tuning, or use --load_float16"
        )
    if arguments.prefix_tuning:
        # It recomputes layers without the keys and values of the prefix.
        _refuse_recomputation(arguments, "it leaves the prefix of --prefix_tuning out")
    if quantised:
        _refuse(arguments, "untie_emb", f"the head of --{quantised} is quantised")


def _check_sharding(arguments: Arguments) -> None:
    """Refuse what has no whole weights where it needs them."""
    if arguments.trainer != "regular":
        raise InputError(
            f"--fsdp shards what AdamW needs, --trainer {arguments.trainer} does not: leave it out"
        )
    for name in ("linear_probing", "prefix_tuning", "eval_before_training"):
        _refuse(arguments, name, "it needs the whole weights, which --fsdp shards")
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("--fsdp needs processes: start with torchrun, or bash finetune_fsdp.sh")


def _check_training(arguments: Arguments, task: Task) -> None:
    if arguments.num_train < 1:
        raise InputError(
            f"--num_train {arguments.num_train}: training needs at least 1 example, as in "
            "--num_train 1000"
        )
    if arguments.calibration:
        raise InputError(f"--{arguments.calibration} is for --trainer none: leave it out")
    if arguments.train_as_classification and task.generation:
        raise InputError(f"--train_as_classification: {task.name} has no options; leave it out")
    if not arguments.num_dev and arguments.eval_strategy != IntervalStrategy.NO:
        raise InputError(
            f"--eval_strategy {arguments.eval_strategy.value} needs dev examples: give --num_dev, "
            "or --eval_strategy no"
        )
    if arguments.decay_step and arguments.lr_scheduler_type not in ("linear", "cosine"):
        raise InputError(
            f"--decay_step {arguments.decay_step} needs --lr_scheduler_type linear or cosine, not "
            f"{arguments.lr_scheduler_type.value}"
        )
    if 0 < arguments.max_steps <= arguments.decay_step:
        raise InputError(f"--decay_step {arguments.decay_step}: must be below --max_steps")
    if arguments.eval_strategy == IntervalStrategy.STEPS and not arguments.eval_steps > 0:
        raise InputError(f"--eval_steps {arguments.eval_steps}: must be larger than 0")
    _check_best_metric(arguments)
    _check_checkpoint_to_resume(arguments)
    if arguments.train_sampling_strategy == "group_by_length":
        raise InputError(
            "--train_sampling_strategy group_by_length: the batches are packed; give random or "
            "sequential"
        )
    step = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and arguments.num_train < step:
        raise InputError(
            f"--dataloader_drop_last leaves nothing of --num_train {arguments.num_train} in steps "
            f"of {step} examples: leave it out"
        )
    _check_scheduler(arguments)
    _check_report_targets(arguments)
    _refuse(arguments, "label_smoothing_factor", "the options' losses have none")
    _check_objective(arguments, task)
    if arguments.trainer == "zo":
        _check_zeroth_order(arguments)
    if arguments.linear_probing:
        _check_linear_probing(arguments)


def _check_best_metric(arguments: Arguments) -> None:
    """Refuse what the dev set is not measured by."""
    metric = arguments.metric_for_best_model
    if metric not in (None, "loss", "eval_loss"):
        raise InputError(
            f"--metric_for_best_model {metric}: the dev set has a loss only, give loss or leave it "
            "out"
        )
    if arguments.save_strategy == SaveStrategy.BEST and metric is None:
        raise InputError("--save_strategy best needs --metric_for_best_model loss")


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


def _check_objective(arguments: Arguments, task: Task) -> None:
    if not arguments.non_diff:
        _refuse(arguments, "non_diff_metric", "it belongs to --non_diff")
        return
    if arguments.trainer == "regular":
        raise InputError("--non_diff has no gradient for --trainer regular: use --trainer zo")
    metric = arguments.non_diff_metric
    fitting = ("f1", "em") if task.generation else ("accuracy",)
    if metric and metric not in fitting:
        answers = "are generated" if task.generation else "are chosen from options"
        raise InputError(
            f"--non_diff_metric {metric}: the answers of {task.name} {answers}; give "
            f"{' or '.join(fitting)}"
        )
    _refuse(arguments, "train_as_classification", "--non_diff is another objective")
    _refuse(arguments, "sampling", "the loss of --non_diff would change with every draw")
    if not arguments.only_train_option:
        raise InputError("--only_train_option False: --non_diff is another objective; leave it out")


def _check_linear_probing(arguments: Arguments) -> None:
    """Refuse what only steps of training could use."""
    if arguments.trainer != "regular":
        raise InputError(
            f"--linear_probing fits by logistic regression, not with --trainer {arguments.trainer}:"
            " use --trainer regular"
        )
    fits = "--linear_probing fits without steps"
    of_steps = ("max_steps", "learning_rate", "weight_decay", "optim", "resume_from_checkpoint")
    for name in (*of_steps, "train_as_classification", "fp16", "bf16"):
        _refuse(arguments, name, fits)
    _refuse_recomputation(arguments, fits)
    if not arguments.only_train_option:
        raise InputError(
            "--only_train_option False: --linear_probing fits the answers' tokens; leave it out"
        )
    if arguments.eval_strategy != IntervalStrategy.NO:
        raise InputError(
            f"--eval_strategy {arguments.eval_strategy.value}: --linear_probing fits without "
            "steps; leave it out"
        )


def _check_zeroth_order(arguments: Arguments) -> None:
    if arguments.hessian == "lowrank":
        _refuse(arguments, "hessian_dtype", "the vectors of --hessian lowrank are float64")
    _refuse(arguments, "optim", "--trainer zo has its own optimizer")
    _refuse(arguments, "max_grad_norm", "--trainer zo has no gradient to clip")
    _refuse_recomputation(arguments, "--trainer zo has no backward pass")
    if arguments.fp16:
        raise InputError("--fp16 scales gradients, --trainer zo has none: use --load_float16")


def _check_scheduler(arguments: Arguments) -> None:
    """Make the scheduler for a dummy: some need ``--lr_scheduler_kwargs``."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    name, steps = arguments.lr_scheduler_type, max(1, arguments.max_steps)
    options = arguments.lr_scheduler_kwargs or {}
    warmup = arguments.get_warmup_steps(steps)
    try:
        get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=dict(options))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_type {getattr(name, 'value', name)}: {one_line(error)}; give it in "
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


def _given(arguments: Arguments, name: str) -> bool:
    (default,) = (f.default for f in dataclasses.fields(arguments) if f.name == name)
    value = getattr(arguments, name)
    # The Trainer's arguments turn a default of None into False.
    return value != default and not (default is None and value is False)


def _refuse_recomputation(arguments: Arguments, reason: str) -> None:
    # transformers has two names for it.
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        _refuse(arguments, name, reason)


def _refuse(arguments: Arguments, name: str, reason: str) -> None:
    if _given(arguments, name):
        value = getattr(arguments, name)
        shown = "" if value is True else f" {getattr(value, 'value', value)}"
        raise InputError(f"--{name}{shown}: {reason}; leave it out")
