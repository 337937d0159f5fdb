"""What run.py refuses before it loads anything: bad values, and arguments that exclude others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.training_args import ParallelMode

from command_line.applicability import check_applicability, show_argument
from command_line.arguments import TUNING_MODES, Arguments
from command_line.settings import WEIGHTS
from command_line.trainer_checks import check_steps
from command_line.values import AUTO
from task_data.own_tasks import OwnTask
from tasks import Task
from utils import InputError
from zeroth_order.smoothing import SmoothingSchedule

ADAPTERS = ("lora", "prefix_tuning")
EXCLUDE_EACH_OTHER = (
    ("load_float16", "load_bfloat16"),
    ("load_int8", "load_int4"),
    *(("load_saved_dtype", other) for other in WEIGHTS),
    ("sfc", "icl_sfc"),
    ("train_set_seed", "num_train_sets"),
    ("reward", "non_diff"),
    ("text_column", "prompt_template"),
    ("predict_file", "num_train_sets"),
    ("task_name", "train_file"),
    ("task_name", "validation_file"),
    ("data_dir", "train_file"),
    ("data_dir", "validation_file"),
    *((first, second) for first in TUNING_MODES for second in TUNING_MODES if first < second),
)


def check(arguments: Arguments) -> None:
    """Refuse values and combinations that would be ignored, or fail later.

    Raises:
        InputError: names the argument, its value and the way out.
    """
    if not arguments.eos_token:
        raise InputError("--eos_token '': give the text that ends an answer, as in \\n")
    _check_files(arguments)
    for first, second in EXCLUDE_EACH_OTHER:
        if _given(arguments, first) and _given(arguments, second):
            raise InputError(f"--{first} and --{second} exclude each other: give one")
    task = arguments.task
    from_messages = isinstance(task, OwnTask) and task.own_columns.from_messages
    if from_messages and not arguments.apply_chat_template:
        raise InputError(
            f"{task.first_file} has messages: add --apply_chat_template, with an instruct model"
        )
    if arguments.predict_file and not arguments.predictions_file:
        raise InputError(
            f"--predict_file {arguments.predict_file}: give --predictions_file, where the answers "
            "go"
        )
    if arguments.merge_adapter and (arguments.load_int8 or arguments.load_int4):
        raise InputError("--merge_adapter: quantised weights take no matrices; leave it out")
    if not arguments.model_name:
        raise InputError("--model_name is missing: give a Hub id, a local directory or a GGUF file")
    try:
        SmoothingSchedule.parse(arguments.hessian_smooth_type)
    except ValueError as error:
        raise InputError(f"--hessian_smooth_type {error}") from error
    if arguments.linear_probing and arguments.trainer == "zo":
        raise InputError(
            "--linear_probing fits by logistic regression, not with --trainer zo: use --trainer "
            "regular"
        )
    check_applicability(arguments)
    _check_probed(arguments)
    if task.reward and not task.answer_column and arguments.trainer == "none":
        _refuse(arguments, "num_train", "demonstrations need answers, the rows have none")
    if arguments.calibration and task.generation:
        raise InputError(
            f"--{arguments.calibration}: the answers of {task.name} are generated, there are no "
            "options to calibrate; leave it out"
        )
    _check_trained_weights(arguments)
    if arguments.fsdp:
        _check_sharding(arguments)
    if arguments.tensor_parallel:
        _check_parts(arguments)
    if arguments.trainer != "none":
        _check_training(arguments, task)


def check_sizes(arguments: Arguments, config: PreTrainedConfig) -> None:
    """Refuse what is larger than the model, once its configuration is known.

    Raises:
        InputError: names the argument and the largest value that makes sense.
    """
    sizes = config.get_text_config()
    for name, largest, what in (
        ("lora_r", getattr(sizes, "hidden_size", None), "the model's hidden size"),
        ("num_beams", getattr(sizes, "vocab_size", None), "the tokens of the vocabulary"),
        ("top_k", getattr(sizes, "vocab_size", None), "the tokens of the vocabulary"),
    ):
        value = getattr(arguments, name)
        if largest and value is not None and value > largest:
            raise InputError(f"--{name} {value}: must be at most {largest}, {what}")


def _check_files(arguments: Arguments) -> None:
    """Refuse to write over a file that another argument names."""
    names = ("train_file", "validation_file", "predict_file", "config")
    names = (*names, "predictions_file", "result_file")
    files = {name: Path(getattr(arguments, name)) for name in names if getattr(arguments, name)}
    for written in ("predictions_file", "result_file"):
        for name, file in files.items():
            if name != written and written in files and file.resolve() == files[written].resolve():
                raise InputError(f"--{written} {file} is --{name} too: give another name")


def _check_trained_weights(arguments: Arguments) -> None:
    """Refuse to train weights that cannot be."""
    quantised = next((n for n in ("load_int8", "load_int4") if getattr(arguments, n)), None)
    adapted = any(getattr(arguments, name) for name in ADAPTERS)
    if quantised and arguments.trainer != "none" and not adapted:
        raise InputError(
            f"--{quantised}: quantised weights cannot be trained themselves; add --lora or "
            "--prefix_tuning, or use --load_float16"
        )
    if arguments.prefix_tuning:
        # It recomputes layers without the keys and values of the prefix. The Trainer sets both its
        # names; the line shall have the one that was given.
        names = ("activation_checkpointing", "gradient_checkpointing")
        for name in sorted(names, key=lambda name: name not in arguments.given):
            _refuse(arguments, name, "it leaves the prefix of --prefix_tuning out")
    if quantised:
        _refuse(arguments, "untie_emb", f"the head of --{quantised} is quantised")


def _check_sharding(arguments: Arguments) -> None:
    """Refuse what has no whole weights where it needs them."""
    for name in ("linear_probing", "prefix_tuning", "eval_before_training"):
        _refuse(arguments, name, "it needs the whole weights, which --fsdp shards")
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("--fsdp needs processes: start with torchrun, or bash finetune_fsdp.sh")


def _check_parts(arguments: Arguments) -> None:
    """Refuse what does not go together with a part of every weight in each process."""
    for name in ("lora", "prefix_tuning", "load_int8", "load_int4"):
        _refuse(arguments, name, "its weights are not cut into the parts of --tensor_parallel")
    _refuse(arguments, "untie_emb", "the head of --tensor_parallel is not copied")
    for name in ("sampling", "reward"):
        _refuse(arguments, name, "processes of --tensor_parallel have to write the same texts")
    if arguments.zo_directions == "example":
        raise InputError(
            "--zo_directions example: examples have signs for whole rows and columns, which "
            "--tensor_parallel cuts; leave one of them out"
        )
    if arguments.zo_parallel != "batch":
        raise InputError(
            f"--zo_parallel {arguments.zo_parallel}: with --tensor_parallel processes share the "
            "weights; leave one of them out"
        )
    unknown = ("head_tuning", "torch_compile", "use_liger_kernel", "dry_run", "save_on_each_node")
    for name in unknown:
        _refuse(arguments, name, "it does not know the parts of --tensor_parallel")
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError(
            "--tensor_parallel needs processes: start with torchrun --nproc_per_node N, or srun"
        )
    if arguments.use_cpu and torch.accelerator.is_available():
        raise InputError("--use_cpu: --tensor_parallel takes the GPUs that are there; leave it out")


def _check_probed(arguments: Arguments) -> None:
    """Refuse ``auto`` where no forward passes alone can find a value."""
    if arguments.probed and arguments.trainer != "zo":
        name = arguments.probed[0]
        raise InputError(
            f"--{name} auto is found by forward passes, for --trainer zo: give a number with "
            f"--trainer {arguments.trainer}"
        )


def _check_training(arguments: Arguments, task: Task) -> None:
    if task.reward and arguments.num_beams > 1 and arguments.reward_samples > 1:
        raise InputError(
            f"--num_beams {arguments.num_beams}: --reward_samples {arguments.reward_samples} draws "
            "texts at random; leave one out"
        )
    if arguments.num_train < 1:
        raise InputError(
            f"--num_train {arguments.num_train}: training needs at least 1 example, as in "
            "--num_train 1000"
        )
    if arguments.train_as_classification and task.generation:
        raise InputError(f"--train_as_classification: {task.name} has no options; leave it out")
    if arguments.non_diff:
        _check_objective(arguments, task)
    if arguments.zo_directions == "example":
        _check_directions(arguments)
    if not arguments.linear_probing:
        check_steps(arguments)


def _check_objective(arguments: Arguments, task: Task) -> None:
    """Refuse what does not go together with an objective without a gradient."""
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


def _check_directions(arguments: Arguments) -> None:
    """Refuse what does not go together with a direction for every example."""
    if arguments.prefix_tuning:
        raise InputError(
            "--zo_directions example: all examples of a row share the keys and values of "
            "--prefix_tuning; use --lora, or --zo_directions shared"
        )
    if arguments.zo_normalize and arguments.learning_rate == AUTO:
        raise InputError(
            "--zo_normalize: --learning_rate auto is per unit of the projected gradient itself; "
            "give a learning rate"
        )
    examples = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.zo_normalize and examples * arguments.gradient_accumulation_steps < 2:
        raise InputError(
            "--zo_normalize: a single example has no standard deviation; give a larger "
            "--per_device_train_batch_size"
        )


def _given(arguments: Arguments, name: str) -> bool:
    (default,) = (f.default for f in dataclasses.fields(arguments) if f.name == name)
    value = getattr(arguments, name)
    # The Trainer's arguments turn a default of None into False.
    return value != default and not (default is None and value is False)


def _refuse(arguments: Arguments, name: str, reason: str) -> None:
    if _given(arguments, name):
        raise InputError(f"{show_argument(arguments, name)}: {reason}; leave it out")
