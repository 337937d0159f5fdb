"""The variables of the shell scripts, and the defaults of each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from task_data.files import read_rows
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
BUNDLED_MODEL, BUNDLED_DATA = ROOT / "data" / "tiny-opt", ROOT / "data" / "samples"
# The variables of each script, and the arguments that they set.
VARIABLES: dict[str, dict[str, str]] = {
    "icl.sh": {
        **{"MODEL": "model_name", "DATA_DIR": "data_dir", "TASK": "task_name"},
        **{"TRAIN": "num_train", "EVAL": "num_eval", "SEED": "train_set_seed"},
    }
}
_STEPS = {"STEPS": "max_steps", "EVAL_STEPS": "eval_steps save_steps"}
VARIABLES["broadcast.sh"] = VARIABLES["icl.sh"] | {
    **{"SEED": "train_set_seed seed", "BS": "per_device_train_batch_size", "DEV": "num_dev"},
    **{"RATE": "broadcast_rate", "DAMPING": "broadcast_damping", "FROM": "broadcast_from"},
    **_STEPS,
}
_TRAINING = VARIABLES["icl.sh"] | {
    **{"SEED": "train_set_seed seed", "BS": "per_device_train_batch_size", "LR": "learning_rate"},
    **{"DEV": "num_dev", "MODE": ""},
}
VARIABLES["finetune.sh"] = _TRAINING | {"EPOCH": "num_train_epochs"}
VARIABLES["mezo.sh"] = _TRAINING | {"EPS": "zo_eps"} | _STEPS
VARIABLES["HiZOO.sh"] = VARIABLES["mezo.sh"] | {
    **{"HESSIAN_SMOOTH_TYPE": "hessian_smooth_type", "DIRECTIONS": "zo_num_samples"},
    **{"WARMUP_STEP": "warmup_steps", "DECAY_STEP": "decay_step"},
    **{"ZO_LR_SCHEDULER_TYPE": "lr_scheduler_type", "WEIGHT_DECAY": "weight_decay"},
}
# What each script gives to run.py, unless a variable or the user says something else.
_EXAMPLES = {"num_train": 1000, "num_dev": 500, "num_eval": 1000, "seed": 0, "train_set_seed": 0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "icl.sh": {"trainer": "none", "num_train": 32, "num_eval": 1000, "load_saved_dtype": True},
    "HiZOO.sh": _EXAMPLES
    | {
        **{"trainer": "zo", "per_device_train_batch_size": 16, "max_steps": 20000},
        **{"hessian_smooth_type": "constant1e-8", "zo_num_samples": 1, "eval_strategy": "steps"},
        **{"eval_steps": 2000, "save_total_limit": 1, "load_saved_dtype": True},
    },
    "broadcast.sh": _EXAMPLES
    | {
        **{"trainer": "broadcast", "per_device_train_batch_size": 16, "max_steps": 200},
        **{"eval_strategy": "steps", "eval_steps": 50, "save_total_limit": 1},
        **{"load_saved_dtype": True},
    },
    "finetune.sh": _EXAMPLES
    | {
        **{"trainer": "regular", "per_device_train_batch_size": 8, "num_train_epochs": 5},
        # Mixed precision, on a GPU: AdamW on half-precision weights would lose most updates.
        **{"eval_strategy": "epoch", "save_total_limit": 1, "bf16": True},
    },
}
DEFAULTS["mezo.sh"] = DEFAULTS["HiZOO.sh"] | {
    **{"model_name": "facebook/opt-1.3b", "hessian_smooth_type": "constant0", "eval_steps": 4000},
}
# The bundled model has a thousandth of the parameters and learns in far fewer steps.
BUNDLED: dict[str, Any] = {
    **{"num_dev": 200, "per_device_eval_batch_size": 64, "eval_before_training": True}
}
_FAST = {"learning_rate": "auto", "max_steps": 150, "eval_steps": 50}
BUNDLED_STEPS: dict[str, dict[str, Any]] = {
    "HiZOO.sh": _FAST | {"hessian_smooth_type": "constant1e-5", "zo_num_samples": 2},
    "mezo.sh": _FAST,
    "broadcast.sh": {"max_steps": 100, "eval_steps": 25},
}
# The middle of the MeZO paper's grids: prefixes and LoRA matrices take larger steps than weights.
MODES: dict[str, dict[str, Any]] = {
    "ft": {"learning_rate": "1e-6", "zo_eps": "1e-3"},
    "prefix": {"prefix_tuning": True, "learning_rate": "1e-2", "zo_eps": "1e-1"},
    "lora": {"lora": True, "learning_rate": "1e-4", "zo_eps": "1e-2"},
}
RATE_OF_ADAMW = "1e-5"
# CB and Copa have fewer than 500 training examples.
FEW_DEV = {"cb": 100, "copa": 100}
WEIGHTS = ("load_float16", "load_bfloat16")


def choose_defaults(
    script: str, environment: Mapping[str, str], user: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return what a script gives to run.py: by argument the word, and what the user knows it by.

    Args:
        script: its file's name.
        environment: with its variables.
        user: the arguments that the user types, which win over the script's.

    Raises:
        InputError: a variable makes no sense.
    """
    if script not in VARIABLES:
        raise InputError(f"--script {script}: choose from {', '.join(VARIABLES)}")
    found = {name: environment[name] for name in VARIABLES[script] if environment.get(name)}
    found = {name: word for name, word in found.items() if name not in replaced(found, user)}
    if found.get("MODE", "ft") not in MODES:
        raise InputError(f"MODE={found['MODE']}: give {', '.join(MODES)}")
    variables = {each: name for name in found for each in VARIABLES[script][name].split()}
    values = {argument: found[name] for argument, name in variables.items()}
    said = values | user
    chosen = {"model_name": str(BUNDLED_MODEL)} | DEFAULTS[script]
    is_bundled = _is_bundled(said.get("model_name", chosen["model_name"]))
    if not _own_file(said):
        chosen |= {"task_name": "SST2"} | ({"data_dir": BUNDLED_DATA} if is_bundled else {})
    if script != "icl.sh":
        chosen |= _of_mode(script, found.get("MODE"), said)
        chosen |= BUNDLED | BUNDLED_STEPS.get(script, {}) if is_bundled else {}
        chosen |= _examples(said, chosen["num_dev"])
    elif _own_file(said) and "train_file" not in said:
        chosen["num_train"] = 0
    chosen |= values | ({"model_name": BUNDLED_MODEL} if is_bundled else {})
    _follow(chosen, user)
    if script != "icl.sh":
        _share(chosen, environment, user)
    labels = {argument: f"{name}={found[name]}" for argument, name in variables.items()}
    return {
        name: (str(word), labels.get(name, f"--{name} {word}"))
        for name, word in chosen.items()
        if name not in user
    }


def replaced(environment: Mapping[str, str], user: Mapping[str, Any]) -> list[str]:
    """Return the variables that are set, and that the user's own files replace."""
    return [name for name in ("TASK", "DATA_DIR") if environment.get(name) and _own_file(user)]


def _own_file(said: Mapping[str, Any]) -> str | None:
    return said.get("train_file") or said.get("validation_file")


def _is_bundled(model: str | Path) -> bool:
    return os.path.exists(model) and Path(model).resolve() == BUNDLED_MODEL


def _of_mode(script: str, mode: str | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is trained, at which rate."""
    if script == "broadcast.sh":
        return {}
    typed = "lora" if said.get("lora") else "prefix" if said.get("prefix_tuning") else None
    mode = typed or mode or "ft"
    if script == "HiZOO.sh":
        return MODES[mode]
    if script == "mezo.sh":  # the same rate and scale in all modes there
        return MODES[mode] | {"learning_rate": "1e-5", "zo_eps": "1e-3"}
    return MODES[mode] | ({"learning_rate": RATE_OF_ADAMW} if mode == "ft" else {})


def _examples(said: Mapping[str, Any], dev: int) -> dict[str, Any]:
    """Choose fewer examples where there are few."""
    if not _own_file(said):
        return {"num_dev": FEW_DEV.get(str(said.get("task_name")).lower(), dev)}
    try:
        rows = sum(1 for _ in read_rows(Path(said["train_file"])))
    except (KeyError, InputError, OSError):
        return {}  # the file's own error comes later
    rows -= 0 if said.get("validation_file") else max(1, rows // 10)  # held out to report on
    try:
        dev = int(said.get("num_dev", min(dev, rows // 5)))
    except ValueError:
        return {}  # the check of DEV says it
    return {"num_train": max(1, min(1000, rows - dev)), "num_dev": dev}


def _follow(chosen: dict[str, Any], user: Mapping[str, Any]) -> None:
    """Let defaults follow what else is said: dtypes, seeds, lengths, dev losses, checkpoints."""
    if any(name in user for name in WEIGHTS):
        chosen.pop("load_saved_dtype", None)
        chosen.pop("bf16", None)
    if "fp16" in user or user.get("trainer", "regular") != "regular":
        chosen.pop("bf16", None)
    if "num_train_sets" in user:
        chosen.pop("train_set_seed", None)
    if "num_train_epochs" in user:
        chosen.pop("max_steps", None)
    if chosen.get("fsdp") or "fsdp" in user:
        # Before training nothing is sharded yet, nor whole.
        chosen.pop("eval_before_training", None)
    steps = user.get("eval_steps") or user.get("save_steps") or chosen.get("eval_steps")
    if steps:
        chosen |= {"eval_steps": steps, "save_steps": steps}
    if "eval_strategy" in chosen:
        by = chosen["eval_strategy"]
        if str((chosen | user)["num_dev"]) == "0":
            chosen["eval_strategy"] = "no"
        evaluation = user.get("eval_strategy", chosen["eval_strategy"])
        chosen["save_strategy"] = by if evaluation == "no" else evaluation
        saving = user.get("save_strategy", chosen["save_strategy"])
        # The best checkpoint counts where dev losses and checkpoints come together.
        if evaluation != "no" and saving in (evaluation, "best"):
            chosen["load_best_model_at_end"] = True


def _share(chosen: dict[str, Any], environment: Mapping[str, str], user: Mapping[str, Any]) -> None:
    """Give each process its share of the examples of a step."""
    examples = str(chosen["per_device_train_batch_size"])
    processes = environment.get("WORLD_SIZE") or "1"
    try:
        share, rest = divmod(int(examples), int(processes))
    except (ValueError, ZeroDivisionError):
        return  # the check of their values says it
    if "per_device_train_batch_size" in user or int(processes) < 1:
        return
    if rest:
        raise InputError(f"BS={examples}: give a multiple of the {processes} processes")
    chosen["per_device_train_batch_size"] = share


def unread_variables(script: str, environment: Mapping[str, str]) -> list[str]:
    """Return a line for every variable of another script, or of an earlier version, that is set."""
    others = {name for names in VARIABLES.values() for name in names} | {"NUM_GPU"}
    unread = sorted((others - VARIABLES[script].keys()) & environment.keys())
    return [f"warning: {n} is not read by {script}, see bash {script} --help" for n in unread]
