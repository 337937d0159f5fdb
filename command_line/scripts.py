"""The variables of HiZOO.sh, finetune.sh, finetune_fsdp.sh and icl.sh, and their defaults."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from task_data.columns import Columns
from task_data.files import read_rows
from task_data.own_tasks import choose_task
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
BUNDLED_MODEL, BUNDLED_DATA = ROOT / "data" / "tiny-opt", ROOT / "data" / "samples"
SHARED = {
    **{"MODEL": "model_name", "DATA_DIR": "data_dir", "TASK": "task_name"},
    **{"TRAIN": "num_train", "EVAL": "num_eval", "SEED": "train_set_seed"},
}
OF_TRAINING = SHARED | {
    **{"BS": "per_device_train_batch_size", "LR": "learning_rate", "DEV": "num_dev", "MODE": ""},
}
OF_FINETUNE = OF_TRAINING | {"EPOCH": "num_train_epochs", "NUM_GPU": ""}
# The variables of each script, and the arguments that they set.
VARIABLES: dict[str, dict[str, str]] = {
    "HiZOO.sh": OF_TRAINING
    | {
        **{"EPS": "zo_eps", "HESSIAN_SMOOTH_TYPE": "hessian_smooth_type", "STEPS": "max_steps"},
        **{"DIRECTIONS": "zo_num_samples", "EVAL_STEPS": "eval_steps"},
        **{"WARMUP_STEP": "warmup_steps", "DECAY_STEP": "decay_step"},
        **{"ZO_LR_SCHEDULER_TYPE": "lr_scheduler_type", "WEIGHT_DECAY": "weight_decay"},
    },
    "finetune.sh": OF_FINETUNE,
    "finetune_fsdp.sh": OF_FINETUNE,
    "icl.sh": SHARED,
}
MODES = {"ft": "", "prefix": "prefix_tuning", "lora": "lora"}
# The middle of the MeZO paper's grids: prefixes and LoRA matrices take larger steps than weights.
LEARNING_RATES = {
    "HiZOO.sh": {"ft": "1e-6", "prefix": "1e-2", "lora": "1e-4"},
    "finetune.sh": {"ft": "1e-5", "prefix": "1e-2", "lora": "1e-4"},
}
SCALES = {"ft": "1e-3", "prefix": "1e-1", "lora": "1e-2"}
# CB and Copa have fewer than 500 training examples.
FEW_DEV = {"cb": 100, "copa": 100}
# Published runs train these with the language-model loss; SQuAD and DROP have no options.
WITHOUT_CLASSES = ("copa", "record")


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
    set_ones = {name: environment[name] for name in VARIABLES[script] if environment.get(name)}
    chosen = _Choice(script, set_ones, user).words(environment)
    labels = {
        argument: f"{name}={set_ones[name]}"
        for name, argument in VARIABLES[script].items()
        if name in set_ones
    }
    return {
        name: (str(word), labels.get(name, f"--{name} {word}"))
        for name, word in chosen.items()
        if name not in user
    }


class _Choice:
    """What one script chooses beside the variables that are set and the user's arguments."""

    def __init__(self, script: str, variables: dict[str, str], user: Mapping[str, Any]) -> None:
        self.script, self.set, self.user = script, variables, user
        self.trains = script != "icl.sh"
        self.backward = script.startswith("finetune")
        self.model = user.get("model_name") or variables.get("MODEL") or str(BUNDLED_MODEL)
        path = Path(self.model)
        self.is_bundled = path.exists() and path.resolve() == BUNDLED_MODEL
        if self.is_bundled:
            self.model = str(BUNDLED_MODEL)
        self.own_file = user.get("train_file") or user.get("validation_file")

    def words(self, environment: Mapping[str, str]) -> dict[str, Any]:
        self._refuse()
        named = VARIABLES[self.script].items()
        words: dict[str, Any] = {}
        if self.trains:
            examples = self._examples()
            words |= self._training() | examples | self._course(examples["num_dev"])
            words |= self._objective()
        elif self.own_file and "train_file" not in self.user:
            words["num_train"] = 0
        else:
            words["num_train"] = 32
        words |= {"num_eval": 1000, "trainer": self._trainer()}
        if not self.backward and not self._gives("load_float16 load_bfloat16 load_int8 load_int4"):
            words["load_saved_dtype"] = True
        if not self.own_file:
            words |= {"task_name": "SST2"} | ({"data_dir": BUNDLED_DATA} if self.is_bundled else {})
        words |= {name: self.set[each] for each, name in named if name and each in self.set}
        words["model_name"] = self.model
        if "num_train_sets" in self.user:
            words.pop("train_set_seed", None)
        if "num_train_epochs" in self.user:
            words.pop("max_steps", None)
        steps = self.user.get("eval_steps") or self.user.get("save_steps")
        steps = steps or words.get("eval_steps")
        if steps:
            words |= {"eval_steps": steps, "save_steps": steps}
        if self.trains:
            words["seed"] = self.set.get("SEED", "0")
            words["per_device_train_batch_size"] = self._share(
                words["per_device_train_batch_size"], environment
            )
        return words

    def _trainer(self) -> str:
        return "none" if not self.trains else "regular" if self.backward else "zo"

    def _gives(self, names: str) -> bool:
        return any(name in self.user for name in names.split())

    def _refuse(self) -> None:
        """Refuse what a script cannot do."""
        trainer = self.user.get("trainer")
        if self.trains and trainer == "none":
            raise InputError(f"--trainer none: {self.script} trains; bash icl.sh evaluates")
        if not self.trains and trainer not in (None, "none"):
            raise InputError(
                f"--trainer {trainer}: icl.sh trains nothing; HiZOO.sh and finetune.sh do"
            )
        mode = self.set.get("MODE", "ft")
        if mode not in MODES:
            raise InputError(f"MODE={mode}: give {', '.join(MODES)}")
        data = [f"{name}={self.set[name]}" for name in ("TASK", "DATA_DIR") if name in self.set]
        if self.own_file and data:
            raise InputError(
                f"{' '.join(data)} and --train_file, --validation_file exclude each other: give one"
            )

    @property
    def mode(self) -> str:
        """``ft``, ``prefix`` or ``lora``: the variable, or what the user's flags say."""
        typed = [mode for mode, flag in MODES.items() if flag and self.user.get(flag)]
        return self.set.get("MODE") or next(iter(typed), "ft")

    def _training(self) -> dict[str, Any]:
        words: dict[str, Any] = {"train_set_seed": self.set.get("SEED", "0"), "save_total_limit": 1}
        if self.mode != "ft":
            words[MODES[self.mode]] = True
        if self.is_bundled:
            words["per_device_eval_batch_size"] = 64
            # Before training nothing is sharded yet, nor whole.
            if "fsdp" not in self.user and self.script != "finetune_fsdp.sh":
                words["eval_before_training"] = True
        if self.backward:
            words |= {"learning_rate": LEARNING_RATES["finetune.sh"][self.mode]}
            words |= {"num_train_epochs": 5, "lr_scheduler_type": "linear"}
            words |= {"per_device_train_batch_size": 8} | self._precision()
            return words | ({"fsdp": True} if self.script == "finetune_fsdp.sh" else {})
        words |= {"learning_rate": LEARNING_RATES["HiZOO.sh"][self.mode]}
        words |= {"per_device_train_batch_size": 16, "hessian_smooth_type": "constant1e-8"}
        words |= {"zo_eps": SCALES[self.mode], "zo_num_samples": 1, "max_steps": 20000}
        if self.is_bundled:
            # It has a thousandth of the parameters and learns in far fewer steps.
            words |= {"learning_rate": "auto", "hessian_smooth_type": "constant1e-5"}
            words |= {"zo_num_samples": 2, "max_steps": 150}
        return words

    def _precision(self) -> dict[str, Any]:
        """Choose mixed precision: AdamW on float16 weights would lose most updates."""
        names = "fp16 bf16 use_cpu load_float16 load_bfloat16 load_int8 load_int4"
        found = [] if self._gives(names) else gpus("compute_cap")
        if not found:
            return {}
        # float16 overflows in models that were trained in bfloat16, which newer GPUs have.
        return {"bf16" if all(float(each) >= 8 for each in found) else "fp16": True}

    def _course(self, dev: int) -> dict[str, Any]:
        """Choose dev losses and checkpoints with them, of which the best counts."""
        dev = self.user.get("num_dev", self.set.get("DEV", dev))
        by = "epoch" if self.backward else "steps"
        evaluation = self.user.get("eval_strategy") or ("no" if dev in (0, "0") else by)
        saving = self.user.get("save_strategy") or (by if evaluation == "no" else evaluation)
        words: dict[str, Any] = {"eval_strategy": evaluation, "save_strategy": saving}
        if not self.backward:
            words["eval_steps"] = 50 if self.is_bundled else 2000
        if evaluation != "no" and saving in (evaluation, "best"):
            words["load_best_model_at_end"] = True
        return words

    def _examples(self) -> dict[str, Any]:
        task = str(self.user.get("task_name") or self.set.get("TASK", "")).lower()
        dev = FEW_DEV.get(task, 200 if self.is_bundled else 500)
        if not self.own_file:
            return {"num_train": 1000, "num_dev": dev}
        try:
            # A fifth of a file with few rows, at most, is dev.
            rows = sum(1 for _ in read_rows(Path(self.user["train_file"])))
        except (KeyError, InputError):
            return {"num_train": 1000, "num_dev": dev}  # the file's own error comes later
        dev = min(dev, rows // 5)
        return {"num_train": min(1000, rows - dev), "num_dev": dev}

    def _objective(self) -> dict[str, Any]:
        """Choose classification wherever there are options, but for Copa and ReCoRD."""
        if self._gives("non_diff only_train_option reward"):
            return {}
        user = self.user
        name = None if self.own_file else user.get("task_name") or self.set.get("TASK", "SST2")
        columns = (user.get(each) for each in ("text_column", "label_column", "prompt_template"))
        files = (user.get("train_file"), user.get("validation_file"), user.get("metric"))
        try:
            task = choose_task(name, *files, columns=Columns(*columns))
        except InputError:
            return {}  # it is said later
        classes = not task.generation and str(name).lower() not in WITHOUT_CLASSES
        return {"train_as_classification": True} if classes else {}

    def _share(self, examples: str, environment: Mapping[str, str]) -> Any:
        """Return the examples of a process: those of a step are shared by all."""
        number, processes = str(examples), environment.get("WORLD_SIZE") or "1"
        if self.backward:  # processes are to be started, or have been
            processes = environment.get("NUM_GPU") or processes
        if self.user.get("zo_parallel") == "directions" or not (number + processes).isdecimal():
            return examples
        if int(number) % int(processes):
            raise InputError(f"BS={examples}: give a multiple of the {processes} processes")
        return int(number) // int(processes)


def processes_of(script: str, environment: Mapping[str, str], user: Mapping[str, Any]) -> int:
    """Return how many processes finetune.sh starts; 0: this one does it all.

    Raises:
        InputError: NUM_GPU is no number, or there is no GPU.
    """
    if not script.startswith("finetune") or "WORLD_SIZE" in environment:
        return 0
    number = environment.get("NUM_GPU") or ""
    if not number and script == "finetune_fsdp.sh":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        number = str(len(visible.split(",") if visible else gpus("index")))
        if number == "0":
            raise InputError("no NVIDIA GPU found: run finetune.sh, or give NUM_GPU for other GPUs")
    if number and (not number.isdecimal() or int(number) < 1):
        raise InputError(f"NUM_GPU={number}: give the number of GPUs, at least 1")
    # The Trainer shards only in processes that torchrun has started, even if it is one.
    sharded = script == "finetune_fsdp.sh" or "fsdp" in user
    return int(number or 1) if sharded or int(number or 1) > 1 else 0


def gpus(query: str) -> list[str]:
    """Return what nvidia-smi answers for each visible GPU, nothing without one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def become_torchrun(processes: int, argv: list[str]) -> None:
    """Replace this process by torchrun, which starts so many of them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(processes), str(ROOT / "run.py"), *argv]
    # What ends a run lets it save a checkpoint first: the processes get the signal, and the time.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGTERM,SIGHUP,SIGUSR1,SIGUSR2")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.execv(sys.executable, command)


def warnings_of_variables(script: str, environment: Mapping[str, str]) -> list[str]:
    """Return a line for every variable that is set and not read, as far as it is meant."""
    known = VARIABLES[script]
    by_argument = {argument.upper(): name for name, argument in known.items() if argument}
    by_argument |= {"BATCH_SIZE": "BS"}
    others = {name for names in VARIABLES.values() for name in names}
    lines = []
    for name in sorted(environment.keys() - known.keys()):
        upper = name.upper()
        near = difflib.get_close_matches(upper, [n for n in known if len(n) > 3], 1, 0.87)
        meant = by_argument.get(upper) or (upper if upper in known else next(iter(near), None))
        if name in others:
            lines.append(f"warning: {name} is not read by {script}, see bash {script} --help")
        elif meant and len(name) > 1:
            lines.append(f"warning: {name} is not read, do you mean {meant}?")
    return lines
