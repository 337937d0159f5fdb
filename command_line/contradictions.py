"""What run.py refuses before it loads anything, all of it at once, and what it warns of.

Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_line.declarations import AUTO, OFF, Effect
from command_line.reading import DECLARED, OWN, TUNING_MODES, raise_problems
from command_line.scripts import WEIGHTS
from task_data.own_tasks import OwnTask
from tasks import Task
from utils import InputError
from zeroth_order.config import smoothing_of

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
DICTIONARIES = ("lr_scheduler_kwargs", *(f"{n}_kwargs" for n in CHECKPOINTING), "fsdp_config")
EXCLUDE_EACH_OTHER = (
    ("load_float16", "load_bfloat16"),
    *(("load_saved_dtype", other) for other in WEIGHTS),
    ("sfc", "icl_sfc"),
    ("reward", "non_diff"),
    ("train_as_classification", "non_diff"),
    ("text_column", "prompt_template"),
    ("label_column", "answer_column"),
    ("predict_file", "num_train_sets"),
    ("task_name", "train_file"),
    ("task_name", "validation_file"),
    ("data_dir", "train_file"),
    ("data_dir", "validation_file"),
    *((first, second) for first in TUNING_MODES for second in TUNING_MODES if first < second),
)


def check_values(values: Any) -> None:
    """Refuse what contradicts itself, what cannot be done, and what must not be ignored.

    Raises:
        InputError: names every problem, with the way out.
    """
    problems = [*_pairs(values), *_files(values)]
    try:
        smoothing_of(values.hessian_smooth_type)
    except ValueError as error:
        problems.append(f"--hessian_smooth_type {error}")
    try:
        problems += _problems_of_task(values, values.task)
    except InputError as error:
        problems.append(str(error))
    if not values.model_name:
        problems.append("--model_name is missing: give a Hub id, a local directory or a GGUF file")
    elif (path := Path(values.model_name)).exists() and not (path.is_dir() or path.is_file()):
        problems.append(f"--model_name {path}: this is a device; give a local directory or a file")
    problems += _refused(values)
    problems += _problems_of_weights(values)
    if values.trainer != "none" and values.num_train < 1:
        problems.append(f"--num_train {values.num_train}: give at least 1 example to train on")
    if values.has_steps:
        problems += _problems_of_steps(values)
    raise_problems(problems)


def without_effect(values: Any) -> dict[str, Effect]:
    """Return the given arguments that have no effect, and the condition that is not met."""
    effects = ((name, unmet(values, name)) for name in values.given)
    return {name: effect for name, effect in effects if effect and not effect.refused}


def warning(values: Any, effects: dict[str, Effect]) -> str | None:
    """Return the line that names what the user gave without an effect, None if there is nothing."""
    given = {n: e for n, e in effects.items() if n in values.given_by_user and _asks(values, n)}
    options = {f"--{name}": effect.otherwise for name, effect in given.items()} | values.ignored
    shown = [f"{', '.join(names)} ({reason})" for reason, names in _by_reason(options).items()]
    return f"warning: no effect here: {', '.join(shown)}" if shown else None


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    """Return the arguments that share a reason."""
    arguments: dict[str, list[str]] = {}
    for argument, reason in reasons.items():
        arguments.setdefault(reason, []).append(argument)
    return arguments


def unmet(values: Any, name: str) -> Effect | None:
    """Return the condition for which an argument has no effect, None if it has one."""
    effect = DECLARED[name].effect if name in DECLARED else None
    try:
        return effect.unmet(values) if effect else None
    except ValueError:
        return None  # of no task, or no smoothing: ``check_values`` says so


def _asks(values: Any, name: str) -> bool:
    """Whether a value asks for something: ``--num_dev 0`` switches off what is off anyway."""
    value = getattr(values, name)
    if isinstance(value, bool) and name in OWN:
        return value != OWN[name].default
    # 0 is a seed like any other.
    return value not in OFF or (name.endswith("seed") and value is not None)


def _refused(values: Any) -> list[str]:
    """Return what would give another result if it were ignored."""
    reasons: dict[str, str] = {}
    for name in DECLARED:
        effect = unmet(values, name) if name in values.given else None
        if effect and effect.refused and _asks(values, name):
            reasons[_shown(values, name)] = f"{effect.otherwise}; {effect.way_out}"
    return [f"{', '.join(shown)}: {reason}" for reason, shown in _by_reason(reasons).items()]


def _shown(values: Any, name: str) -> str:
    """Return an argument with its value, as it may be typed; secrets are left out."""
    value = getattr(values, name)
    value = getattr(value, "value", value)
    if value is True or name == "hub_token":
        return f"--{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def _pairs(values: Any) -> Iterator[str]:
    """Refuse two arguments of which a run can have one."""
    for pair in EXCLUDE_EACH_OTHER:
        if all(getattr(values, name) not in (None, False, OWN[name].default) for name in pair):
            yield f"--{pair[0]} and --{pair[1]} exclude each other: give one"


def _files(values: Any) -> Iterator[str]:
    """Refuse to write over a file that another argument names."""
    written = ("predictions_file", "result_file")
    names = ("train_file", "validation_file", "predict_file", "config", *written)
    files = {name: Path(getattr(values, name)) for name in names if getattr(values, name)}
    for name, other in itertools.combinations(files, 2):
        if other in written and files[name].resolve() == files[other].resolve():
            yield f"--{other} {files[other]} is --{name} too: give another name"
    if values.predict_file and not values.predictions_file:
        yield f"--predict_file {values.predict_file}: give --predictions_file, for the answers"


def _problems_of_task(values: Any, task: Task) -> Iterator[str]:
    """Yield what the task cannot do."""
    trained = values.trainer != "none"
    from_messages = isinstance(task, OwnTask) and task.own_columns.from_messages
    if from_messages and not values.apply_chat_template:
        yield f"{task.first_file} has messages: add --apply_chat_template"
    if task.generation and not values.eos_token:
        yield "--eos_token '': give the text that ends an answer, as in \\n"
    if values.calibration and task.generation:
        yield f"--{values.calibration}: {task.name} has no options to calibrate; leave it out"
    if values.train_as_classification and task.generation and trained:
        yield f"--train_as_classification: {task.name} has no options; leave it out"
    if task.reward and not task.answer_column and not trained and values.num_train:
        yield f"--num_train {values.num_train}: the rows have no answers to demonstrate"
    metric = values.metric_for_best_model
    if metric and trained and metric.removeprefix("eval_") not in ("loss", *task.metric_names):
        measured = f"of {task.name}, {' and '.join(task.metric_names)}"
        yield f"--metric_for_best_model {metric}: the dev set has loss and, {measured}; give one"


def _problems_of_weights(values: Any) -> Iterator[str]:
    """Yield what cannot be trained, or saved."""
    offload = f"--offload {values.offload}"
    if values.offload != "none" and values.zo_perturbation == "inplace" and values.trainer == "zo":
        yield f"--zo_perturbation inplace: {offload} perturbs copies of a block; leave it out"
    if values.offload != "none" and values.merge_adapter:
        yield f"--merge_adapter needs all weights in memory, without {offload}; leave it out"
    for name in CHECKPOINTING:
        # Layers are computed again without the keys and values of the prefix.
        if values.prefix_tuning and getattr(values, name) and name in values.given:
            yield f"--{name}: it leaves the prefix of --prefix_tuning out; leave it out"
    for name in ("linear_probing", "prefix_tuning", "merge_adapter", "eval_before_training"):
        if values.fsdp and values.trainer == "regular" and getattr(values, name):
            yield f"--{name}: it needs whole weights, which --fsdp shards; leave it out"


def _problems_of_steps(values: Any) -> Iterator[str]:
    """Yield what is wrong with a training in steps."""
    if values.learning_rate == AUTO and values.trainer == "regular":
        yield "--learning_rate auto is found by forward passes, for --trainer zo: give a number"
    samples = values.reward_samples
    if values.reward and values.num_beams > 1 and samples > 1:
        yield f"--num_beams {values.num_beams}: --reward_samples {samples} draws texts at random"
    if values.non_diff and values.sampling:
        yield "--sampling: the loss of --non_diff would change with every draw; leave it out"
    metric = values.metric_for_best_model
    if values.save_strategy == "best" and metric is None:
        yield "--save_strategy best needs --metric_for_best_model: give loss, or a task's metric"
    sampling = values.train_sampling_strategy
    if sampling in ("group_by_length", "batch_rebalance"):
        yield f"--train_sampling_strategy {sampling}: batches are packed; give random or sequential"
    resumed = f"--resume_from_checkpoint {values.resume_from_checkpoint}"
    if str(values.resume_from_checkpoint).lower() not in ("none", "true", "false"):
        if values.num_train_sets:
            yield f"{resumed} is of one set: leave it out, and each of --num_train_sets resumes"
        if values.overwrite_output_dir:
            yield f"{resumed} and --overwrite_output_dir, which deletes checkpoints: give one"
    for name in DICTIONARIES:
        value = getattr(values, name)
        is_file = name == "fsdp_config" and isinstance(value, str) and Path(value).is_file()
        if isinstance(value, str) and not value.startswith("{") and not is_file:
            yield f"--{name} {value}: give names and values, as in '{{\"num_cycles\": 2}}'"
    warmup, decay = values.warmup_steps, values.decay_step
    comparable = (warmup < 1) == (decay < 1)  # steps, or fractions of the run
    if decay and not unmet(values, "decay_step") and comparable and warmup > decay:
        yield f"--warmup_steps {warmup:g}: must be at most --decay_step {decay:g}"
