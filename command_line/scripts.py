"""The variables of the shell scripts, and the defaults of each."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command_line import launchers
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
VARIABLES["finetune.sh"] = _TRAINING | {"EPOCH": "num_train_epochs", "NUM_GPU": ""}
VARIABLES["finetune_fsdp.sh"] = VARIABLES["finetune.sh"]
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
        **{"eval_strategy": "epoch", "save_total_limit": 1},
    },
}
DEFAULTS["mezo.sh"] = DEFAULTS["HiZOO.sh"] | {
    **{"model_name": "facebook/opt-1.3b", "hessian_smooth_type": "constant0", "eval_steps": 4000},
}
DEFAULTS["finetune_fsdp.sh"] = DEFAULTS["finetune.sh"] | {"fsdp": True}
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
WEIGHTS = ("load_float16", "load_bfloat16", "load_int8", "load_int4")


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
    _refuse(script, found, user)
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
        _share(script, chosen, environment, user)
    labels = {argument: f"{name}={found[name]}" for argument, name in variables.items()}
    return {
        name: (str(word), labels.get(name, f"--{name} {word}"))
        for name, word in chosen.items()
        if name not in user
    }


def _refuse(script: str, found: Mapping[str, str], user: Mapping[str, Any]) -> None:
    """Refuse what a script cannot do."""
    trainer, trains = user.get("trainer"), script != "icl.sh"
    if trains and trainer == "none":
        raise InputError(f"--trainer none: {script} trains; bash icl.sh evaluates")
    if not trains and trainer not in (None, "none"):
        others = "HiZOO.sh, broadcast.sh and finetune.sh"
        raise InputError(f"--trainer {trainer}: icl.sh trains nothing; {others} do")
    if found.get("MODE", "ft") not in MODES:
        raise InputError(f"MODE={found['MODE']}: give {', '.join(MODES)}")
    data = " ".join(f"{name}={found[name]}" for name in ("TASK", "DATA_DIR") if name in found)
    if data and _own_file(user):
        raise InputError(f"{data} and --train_file, --validation_file exclude each other: give one")


def _own_file(said: Mapping[str, Any]) -> str | None:
    return said.get("train_file") or said.get("validation_file")


def _is_bundled(model: str | Path) -> bool:
    return os.path.exists(model) and Path(model).resolve() == BUNDLED_MODEL


def _of_mode(script: str, mode: str | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is trained, at which rate; for AdamW the precision too."""
    if script == "broadcast.sh":
        return {}
    typed = "lora" if said.get("lora") else "prefix" if said.get("prefix_tuning") else None
    mode = typed or mode or "ft"
    if script == "HiZOO.sh":
        return MODES[mode]
    if script == "mezo.sh":  # the same rate and scale in all modes there
        return MODES[mode] | {"learning_rate": "1e-5", "zo_eps": "1e-3"}
    chosen = MODES[mode] | ({"learning_rate": RATE_OF_ADAMW} if mode == "ft" else {})
    given = any(name in said for name in ("fp16", "bf16", "use_cpu", *WEIGHTS))
    given |= said.get("trainer", "regular") != "regular"  # there is no gradient to scale
    if capabilities := [] if given else launchers.gpus("compute_cap"):
        # AdamW on float16 weights would lose most updates, so precision is mixed. float16 overflows
        # in models that were trained in bfloat16, which newer GPUs have.
        newer = all(float(each) >= 8 for each in capabilities)
        chosen |= {"bf16" if newer else "fp16": True}
    return chosen


def _examples(said: Mapping[str, Any], dev: int) -> dict[str, Any]:
    """Choose fewer examples where there are few."""
    if not _own_file(said):
        return {"num_dev": FEW_DEV.get(str(said.get("task_name")).lower(), dev)}
    try:
        rows = sum(1 for _ in read_rows(Path(said["train_file"])))
    except (KeyError, InputError):
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


def _share(
    script: str, chosen: dict[str, Any], environment: Mapping[str, str], user: Mapping[str, Any]
) -> None:
    """Give each process its share of the examples of a step."""
    examples = str(chosen["per_device_train_batch_size"])
    processes = environment.get("WORLD_SIZE") or "1"
    if script.startswith("finetune"):  # processes are to be started, or have been
        processes = environment.get("NUM_GPU") or processes
    try:
        share, rest = divmod(int(examples), int(processes))
    except (ValueError, ZeroDivisionError):
        return  # the check of their values says it
    is_chosen = "per_device_train_batch_size" in user or user.get("zo_parallel") == "directions"
    if is_chosen or int(processes) < 1:
        return
    if rest:
        raise InputError(f"BS={examples}: give a multiple of the {processes} processes")
    chosen["per_device_train_batch_size"] = share


def warnings_of_variables(script: str, environment: Mapping[str, str]) -> list[str]:
    """Return a line for every variable that is set and not read, as far as it is meant."""
    known = VARIABLES[script]
    meant_by = {each.upper(): name for name, text in known.items() for each in text.split()}
    meant_by |= {"BATCH_SIZE": "BS"} | {name: name for name in known}
    others = {name for names in VARIABLES.values() for name in names}
    lines = []
    for name in sorted(environment.keys() - known.keys()):
        near = difflib.get_close_matches(name.upper(), [n for n in known if len(n) > 3], 1, 0.87)
        meant = meant_by.get(name.upper()) or next(iter(near), None)
        if name in others:
            lines.append(f"warning: {name} is not read by {script}, see bash {script} --help")
        elif meant and len(name) > 1:
            lines.append(f"warning: {name} is not read, do you mean {meant}?")
    return lines
