"""The settings of a run: what its name, result, checkpoints and optimizer go by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from command_line.arguments import Arguments, plain_value
from command_line.contradictions import unmet
from command_line.declarations import AUTO, NOTHING, RESULT, TRAINING
from command_line.effects import FOLLOW_DEV_METRIC
from command_line.groups import Generation
from command_line.reading import DECLARED, OWN, TUNING_MODES
from language_model.loading import saved_dtype
from task_data.loading import split_files
from utils import fingerprint
from zeroth_order.config import HiZOOConfig, smoothing_of
from zeroth_order.step_rule import RARELY

LENGTH = ("max_steps", "num_train_epochs")
# What does not change the result. All else does, the Trainer's arguments of tomorrow too.
NOT_OF_THE_RESULT = {name for name, each in DECLARED.items() if each.decides == NOTHING}
# Of κ: what a run's values sum up to, and the largest (measured: docs/error-broadcast.md).
SUM_OF_RATES, LARGEST_RATE = 100, 4.0
COMPILE = {"auto": None, "yes": True, "no": False}
# File systems allow 255 bytes; length, hash, suffix and a temporary file's name come on top.
READABLE_BYTES = 120


def settle_dtype(arguments: Arguments) -> None:
    """Replace ``--load_saved_dtype`` by the flag of the dtype that it means, if it is not float32.

    So weights of the same dtype make the same experiment, whichever way they were asked for.

    Raises:
        InputError: there is no such model.
    """
    if not arguments.load_saved_dtype:
        return
    arguments.load_saved_dtype = False
    arguments.given -= {"load_saved_dtype"}
    if not arguments.use_cpu:
        dtype = saved_dtype(arguments.model_name, arguments.trust_remote_code)
        arguments.load_float16 = dtype == torch.float16
        # float16 would overflow in what was trained in bfloat16.
        arguments.load_bfloat16 = dtype == torch.bfloat16 and torch.cuda.is_bf16_supported(False)


def name_run(arguments: Arguments) -> None:
    """Give a run its hash and its name, and a folder of that name if it has none.

    With ``--tag`` the name is task, model and tag, as in MeZO; else it is made of the settings.

    Raises:
        InputError: a file of data is missing.
    """
    arguments.experiment = experiment_hash(arguments)
    arguments.name = default_name(arguments)
    if arguments.tag:
        parts = _task_part(arguments), _model_part(arguments.model_name), arguments.tag
        arguments.name = "-".join(parts)
    if not arguments.output_dir:
        arguments.output_dir = str(Path("result") / arguments.name)


def default_name(arguments: Arguments) -> str:
    """Name a run after what people look for, and a hash, which tells the others apart."""
    mode = next((name for each, name in TUNING_MODES.items() if getattr(arguments, each)), "ft")
    rate = getattr(arguments, arguments.rate)
    parts = [
        _task_part(arguments),
        _model_part(arguments.model_name),
        arguments.trainer,
        mode if arguments.trainer != "none" else f"{arguments.num_train}-shot",
        f"lr{rate if isinstance(rate, str) else f'{rate:g}'}" if length_of_run(arguments) else "",
        f"seed{arguments.seed}",
    ]
    readable = "-".join(filter(None, parts)).encode()[:READABLE_BYTES].decode(errors="ignore")
    length = (f"{n.rpartition('_')[2]}{value:g}" for n, value in length_of_run(arguments).items())
    return "-".join([readable, *length, arguments.experiment])


def _task_part(arguments: Arguments) -> str:
    own = arguments.train_file or arguments.validation_file
    path = Path(own or "").absolute()
    return f"{path.parent.name}-{path.stem}"[:40] if own else arguments.task.name


def _model_part(name: str) -> str:
    path = Path(name).resolve() if Path(name).is_dir() else Path(name)
    # Checkpoints of all runs are called alike.
    part = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
    return part.removesuffix(".gguf")[-40:].lstrip("-")


def length_of_run(arguments: Arguments) -> dict[str, float]:
    """Return how long a training run is, by the argument that says so; nothing without steps."""
    if not arguments.has_steps:
        return {}
    name = "max_steps" if arguments.max_steps > 0 else "num_train_epochs"
    return {name: getattr(arguments, name)}


def experiment_hash(arguments: Arguments) -> str:
    """Return 8 hexadecimal digits of all that changes a run's result, except its length.

    The model and the data count by their content where they lie on disk, and by their names on the
    Hub, so that an experiment is the same one on another machine.
    """
    fields = (field for field in dataclasses.fields(arguments) if field.init)
    # Those at their defaults do not count: a new argument leaves the names of results.
    names = {each.name for each in fields if getattr(arguments, each.name) != each.default}
    names -= NOT_OF_THE_RESULT.union(LENGTH)
    if not arguments.load_best_model_at_end:
        names -= {"save_strategy", "save_steps"}  # when checkpoints are saved
    model, reward = Path(arguments.model_name), arguments.task.reward
    data = split_files(arguments.task, arguments.data_dir) or ()
    identity = {
        **_plain_values(arguments, names),
        **_batch_and_processes(arguments, "processes"),
        "task": arguments.task.name if arguments.task.hub_path else None,
        "model": fingerprint(model_files(model)) if model.exists() else arguments.model_name,
        "data": [path and fingerprint([path]) for path in data],
        "reward": reward and (reward.name, fingerprint([reward.file])),
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def model_files(model: Path) -> list[Path]:
    """Return the files of a model that can change what it computes, by name: a folder's, or one."""
    if model.is_file():
        return [model]
    suffixes = {".json", ".safetensors", ".bin", ".model", ".txt", ".py", ".jinja"}
    return sorted(path for path in model.iterdir() if path.suffix in suffixes and path.is_file())


def changed_settings(arguments: Arguments) -> dict[str, Any]:
    """Return what was given, and all that changes the result of such a run; no secrets."""
    decide = {name for name, each in DECLARED.items() if each.decides == TRAINING}
    decide |= {name for name, each in OWN.items() if each.decides == RESULT}
    names = {name for name in decide if not unmet(arguments, name)}
    return _plain_values(arguments, {*arguments.given, *names} - {"hub_token"})


def settings_of_all_processes(arguments: Arguments) -> dict[str, Any]:
    """Return what has to be the same in all processes of a run, as a user types it."""
    own = {"local_rank", "disable_tqdm", "log_level", "log_level_replica", "hub_token"}
    names = {field.name for field in dataclasses.fields(arguments) if field.init} - own
    return {f"--{name}": value for name, value in _plain_values(arguments, names).items()}


def settings_of_a_checkpoint(arguments: Arguments) -> dict[str, Any]:
    """Return what decides the course of a training run, whatever its length and its folders."""
    names = {name for name, each in DECLARED.items() if each.decides == TRAINING}
    names -= {"trainer", *LENGTH}
    if arguments.non_diff or arguments.reward:
        names |= {field.name for field in dataclasses.fields(Generation)}
    if arguments.lr_scheduler_type in FOLLOW_DEV_METRIC:
        names |= {"metric_for_best_model", "eval_strategy", "eval_steps", "eval_delay"}
        names |= set() if arguments.num_dev else {"num_eval"}
    reward = arguments.task.reward
    return {
        "trainer": arguments.trainer,
        # The user's own files count by their content.
        "task_name": arguments.task.name if arguments.task.hub_path else None,
        "reward": reward and f"{reward.file.name}:{reward.name}",
        **_plain_values(arguments, {name for name in names if not unmet(arguments, name)}),
        **_batch_and_processes(arguments, "nproc_per_node"),
    }


def _batch_and_processes(arguments: Arguments, name: str) -> dict[str, int]:
    """Return the examples of a step, and under ``name`` the number of processes where it counts.

    Steps without a backward pass are the same however many processes share them, up to rounding.
    """
    if arguments.shares_batches:
        return {"per_device_train_batch_size": arguments.examples_of_a_batch, name: 1}
    return {name: arguments.world_size if arguments.trainer != "none" else 1}


def _plain_values(arguments: Arguments, names: Collection[str]) -> dict[str, Any]:
    """Return the values as JSON has them, in the order of the fields."""
    fields = (each.name for each in dataclasses.fields(arguments))
    return {name: plain_value(getattr(arguments, name)) for name in fields if name in names}


def optimizer_config(arguments: Arguments) -> HiZOOConfig:
    """Return HiZOO's settings at the first step; where μ is ``auto``, its default."""
    eps = arguments.zo_eps
    return HiZOOConfig(
        lr=arguments.learning_rate,
        eps=HiZOOConfig.eps if eps == AUTO else eps,
        hessian_smooth=smoothing_of(arguments.hessian_smooth_type),
        weight_decay=arguments.weight_decay,
        hessian=arguments.hessian,
        num_samples=arguments.zo_num_samples,
        seed=arguments.seed,
        compile=COMPILE[arguments.zo_compile],
    )


def broadcast_rate(arguments: Arguments, examples: int) -> float:
    """Return κ at the first step of a run that has so many training examples."""
    rate = arguments.broadcast_rate
    return rate_of_run(arguments.steps_of_run(examples)) if rate == AUTO else rate


def rate_of_run(steps: int) -> float:
    """Return the κ from which a run of error broadcast falls linearly to 0."""
    return min(LARGEST_RATE, 2 * SUM_OF_RATES / max(1, steps))


def passes_of_a_batch(config: HiZOOConfig) -> tuple[int, int]:
    """Return the passes for g, and n of "every n-th step takes one more, for c", 0 for none."""
    rarely = RARELY if config.lr == AUTO else 0
    return 2 * config.num_samples, 1 if config.hessian_smooth else rarely


def method(arguments: Arguments, examples: int) -> str | None:
    """Return what trains, and its forward passes: ``HiZOO, α 1e-8: 3 forward passes a step``.

    ``examples`` is the number of those that it trains on. None: backpropagation.
    """
    unit = "step" if arguments.gradient_accumulation_steps == 1 else "batch"
    if arguments.trainer == "broadcast":
        rate, damping = broadcast_rate(arguments, examples), arguments.broadcast_damping
        return f"error broadcast, κ {rate:.3g}, λ {damping:g}: 1 forward pass a {unit}"
    if arguments.trainer != "zo":
        return None
    config = optimizer_config(arguments)
    of_g, every = passes_of_a_batch(config)
    parts = ["MeZO"]
    if config.hessian_smooth:
        name = "HiZOO-L" if config.hessian == "lowrank" else "HiZOO"
        parts = [name, f"α {config.hessian_smooth:g}".replace("e-0", "e-")]
    parts += [f"{config.num_samples} directions"] if config.num_samples > 1 else []
    parts += ["η auto"] if config.lr == AUTO else []
    more = f", 1 more in every {every}th" if every > 1 else ""
    return f"{', '.join(parts)}: {of_g + (every == 1)} forward passes a {unit}{more}"
