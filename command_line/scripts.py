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
_ICL = {
    **{"MODEL": "model_name", "DATA_DIR": "data_dir", "TASK": "task_name"},
    **{"TRAIN": "num_train", "EVAL": "num_eval", "SEED": "train_set_seed"},
}
_TRAINING = _ICL | {
    **{"SEED": "train_set_seed seed", "BS": "per_device_train_batch_size", "DEV": "num_dev"}
}
_STEPS = {"STEPS": "max_steps", "EVAL_STEPS": "eval_steps save_steps"}
_TUNING = _TRAINING | {"LR": "learning_rate", "MODE": ""}
_MEZO = _TUNING | {"EPS": "zo_eps"} | _STEPS
VARIABLES: dict[str, dict[str, str]] = {
    "icl.sh": _ICL,
    "broadcast.sh": _TRAINING
    | {"RATE": "broadcast_rate", "DAMPING": "broadcast_damping", "FROM": "broadcast_from"}
    | _STEPS,
    "finetune.sh": _TUNING | {"EPOCH": "num_train_epochs"},
    "mezo.sh": _MEZO,
    "HiZOO.sh": _MEZO
    | {
        **{"HESSIAN_SMOOTH_TYPE": "hessian_smooth_type", "DIRECTIONS": "zo_num_samples"},
        **{"WARMUP_STEP": "warmup_steps", "DECAY_STEP": "decay_step"},
        **{"ZO_LR_SCHEDULER_TYPE": "lr_scheduler_type", "WEIGHT_DECAY": "weight_decay"},
    },
}
# What each script gives to run.py, unless a variable or the user says something else.
_EXAMPLES = {
    **{"num_train": 1000, "num_dev": 500, "num_eval": 1000, "seed": 0, "train_set_seed": 0},
    **{"per_device_train_batch_size": 16, "eval_strategy": "steps", "save_total_limit": 1},
}
_HIZOO = _EXAMPLES | {
    **{"trainer": "zo", "hessian_smooth_type": "constant1e-8", "zo_num_samples": 1},
    **{"max_steps": 20000, "eval_steps": 2000, "load_saved_dtype": True},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "icl.sh": {"trainer": "none", "num_train": 32, "num_eval": 1000, "load_saved_dtype": True},
    "HiZOO.sh": _HIZOO,
    # All modes have the same rate and scale there.
    "mezo.sh": _HIZOO
    | {"model_name": "facebook/opt-1.3b", "hessian_smooth_type": "constant0", "eval_steps": 4000}
    | {"learning_rate": "1e-5", "zo_eps": "1e-3"},
    "broadcast.sh": _EXAMPLES
    | {"trainer": "broadcast", "max_steps": 200, "eval_steps": 50, "load_saved_dtype": True},
    # Mixed precision, on a GPU: AdamW on half-precision weights would lose most updates.
    "finetune.sh": _EXAMPLES
    | {"trainer": "regular", "per_device_train_batch_size": 8, "num_train_epochs": 5}
    | {"eval_strategy": "epoch", "bf16": True},
}
# The bundled model has a thousandth of the parameters and learns in far fewer steps.
BUNDLED = {"num_dev": 200, "per_device_eval_batch_size": 64, "eval_before_training": True}
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
# Defaults that are left out where the user gives one of the arguments.
GIVES_WAY = {
    "load_saved_dtype": WEIGHTS,
    "bf16": (*WEIGHTS, "fp16"),
    "train_set_seed": ("num_train_sets",),
    "max_steps": ("num_train_epochs",),
    # Before training nothing is sharded yet, nor whole.
    "eval_before_training": ("fsdp",),
}


def choose_defaults(
    script: str, environment: Mapping[str, str], user: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return what a script gives to run.py beside what the user types.

    By argument: the word, and the variable of the environment that says it, if one does.
    """
    if script not in VARIABLES:
        raise InputError(f"--script {script}: choose from {', '.join(VARIABLES)}")
    read = [name for name in VARIABLES[script] if name not in replaced(environment, user)]
    found = {name: environment[name] for name in read if environment.get(name)}
    variables = {each: name for name in found for each in VARIABLES[script][name].split()}
    values = {argument: found[name] for argument, name in variables.items()}
    # An empty text names no file.
    said = values | {name: value for name, value in user.items() if value is not None}
    chosen: dict[str, Any] = {"model_name": str(BUNDLED_MODEL)}
    chosen |= _of_mode(script, found.get("MODE", "ft"), said) | DEFAULTS[script]
    model = said.get("model_name", chosen["model_name"])
    is_bundled = os.path.exists(model) and Path(model).resolve() == BUNDLED_MODEL
    of_file = _own_file(said) or ("task_name" not in said and said.get("predict_file"))
    if not of_file:
        chosen |= {"task_name": "SST2"} | ({"data_dir": BUNDLED_DATA} if is_bundled else {})
    if script != "icl.sh":
        chosen |= BUNDLED | BUNDLED_STEPS.get(script, {}) if is_bundled else {}
        chosen |= _examples(said, chosen["num_dev"])
    elif of_file and "train_file" not in said:
        chosen["num_train"] = 0
    chosen |= values | ({"model_name": BUNDLED_MODEL} if is_bundled else {})
    _follow(chosen, user)
    _share(chosen, environment, user)
    labels = {argument: f"{name}={found[name]}" for argument, name in variables.items()}
    return {
        name: (str(word), labels.get(name, "")) for name, word in chosen.items() if name not in user
    }


def replaced(environment: Mapping[str, str], user: Mapping[str, Any]) -> list[str]:
    """Return the variables that are set, and that the user's own files replace."""
    return [name for name in ("TASK", "DATA_DIR") if environment.get(name) and _own_file(user)]


def _own_file(said: Mapping[str, Any]) -> str | None:
    return said.get("train_file") or said.get("validation_file")


def _of_mode(script: str, mode: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is trained, at which rate."""
    if mode not in MODES:
        raise InputError(f"MODE={mode}: give {', '.join(MODES)}")
    if "MODE" not in VARIABLES[script]:
        return {}
    mode = "lora" if said.get("lora") else "prefix" if said.get("prefix_tuning") else mode
    of_adamw = (script, mode) == ("finetune.sh", "ft")
    return MODES[mode] | ({"learning_rate": RATE_OF_ADAMW} if of_adamw else {})


def _examples(said: Mapping[str, Any], dev: int) -> dict[str, Any]:
    """Choose fewer examples where there are few."""
    if not _own_file(said):
        return {"num_dev": FEW_DEV.get(str(said.get("task_name")).lower(), dev)}
    try:
        rows = sum(1 for _ in read_rows(Path(said["train_file"])))
        rows -= 0 if said.get("validation_file") else max(1, rows // 10)  # held out to report on
        dev = int(said.get("num_dev", min(dev, rows // 5)))
    except (KeyError, ValueError, OSError):
        return {}  # the check of the file, or of DEV, says it
    return {"num_train": max(1, min(1000, rows - dev)), "num_dev": dev}


def _follow(chosen: dict[str, Any], user: Mapping[str, Any]) -> None:
    """Let defaults follow what else is said: dtypes, seeds, lengths, dev losses, checkpoints."""
    for name, others in GIVES_WAY.items():
        if not user.keys().isdisjoint(others):
            chosen.pop(name, None)
    if user.get("trainer", "regular") != "regular":
        chosen.pop("bf16", None)
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
    examples = chosen.get("per_device_train_batch_size")
    if examples is None or "per_device_train_batch_size" in user:
        return
    processes = environment.get("WORLD_SIZE", "1")
    try:
        share, rest = divmod(int(examples), int(processes))
    except (ValueError, ZeroDivisionError):
        return  # the check of their values says it
    if rest:
        raise InputError(f"BS={examples}: give a multiple of the {processes} processes")
    chosen["per_device_train_batch_size"] = share


def unread_variables(script: str, environment: Mapping[str, str]) -> list[str]:
    """Return a line for every variable of another script, or of an earlier version, that is set."""
    others = {name for names in VARIABLES.values() for name in names} | {"NUM_GPU"}
    unread = sorted((others - VARIABLES[script].keys()) & environment.keys())
    return [f"warning: {n} is not read by {script}, see bash {script} --help" for n in unread]
