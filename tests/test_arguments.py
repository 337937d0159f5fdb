"""The command line: what is refused, in which words and how fast, and what it means."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, ROOT, SAMPLES, command, contents, finish, refused_line, training
from transformers import AutoConfig, AutoModelForCausalLM, SchedulerType

from command_line.arguments import check, parse_arguments
from command_line.groups import SCHEDULES
from utils import InputError
from zeroth_order.config import smoothing_of

REGULAR = {"trainer": "regular", "hessian_smooth_type": None}
BROADCAST = {"trainer": "broadcast", "hessian_smooth_type": None, "learning_rate": None}
DEV_LOSSES = {"num_dev": 4, "eval_strategy": "steps", "eval_steps": 3}
# Arguments added to a training run that is in order, and what is said.
BAD_TRAINING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown task": ({"task_name": "SST3"}, ["SST3", "SST2, RTE, CB"]),
    "no training examples": ({"num_train": 0}, ["--num_train 0"]),
    "smoothing": (
        {"hessian_smooth_type": "exp1e-8"},
        ["exp1e-8", "give constant<number>"],
    ),
    "both dtypes": (
        {"load_float16": True, "load_bfloat16": True},
        ["--load_float16 and --load_bfloat16", "give one"],
    ),
    "quantised weights": ({"load_int8": True}, ["not here: --load_int8", "--offload streams"]),
    "best F1 of options": (
        DEV_LOSSES | {"metric_for_best_model": "f1", "load_best_model_at_end": True},
        ["--metric_for_best_model f1", "of SST2, accuracy"],
    ),
    "a falling accuracy": (
        {
            **DEV_LOSSES,
            **{"metric_for_best_model": "accuracy", "lr_scheduler_type": "reduce_lr_on_plateau"},
        },
        ["--metric_for_best_model accuracy", "waits for what falls"],
    ),
    "best of nothing": (
        DEV_LOSSES | {"save_strategy": "best"},
        ["--save_strategy best", "--metric_for_best_model: give loss"],
    ),
    "strategies that do not match": (
        {"load_best_model_at_end": True, "num_dev": 4, "eval_strategy": "epoch"},
        ["--load_best_model_at_end", "Save strategy"],
    ),
    "batches by length": (
        {"train_sampling_strategy": "group_by_length"},
        ["--train_sampling_strategy group_by_length"],
    ),
    "cut batches": (
        {"accelerator_config": '{"dispatch_batches": true}'},
        ["--accelerator_config is not offered"],
    ),
    "a model that is a device": (
        {"model_name": "/dev/null"},
        ["--model_name /dev/null: this is"],
    ),
    "one file twice": (
        {"predictions_file": "same.json", "result_file": "same.json", "no_eval": None},
        ["--result_file same.json is --predictions_file too"],
    ),
    "a schedule without its number": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        ["cosine_with_min_lr", "--lr_scheduler_kwargs"],
    ),
    "an option of another schedule": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"cycles": 1}'},
        ["--lr_scheduler_type cosine", "'cycles'", "--lr_scheduler_kwargs"],
    ),
    "a list of options": (
        REGULAR | {"activation_checkpointing": True, "activation_checkpointing_kwargs": "[1]"},
        ["--activation_checkpointing_kwargs [1]: give names and values"],
    ),
    "options without a name": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "[[["},
        ["--lr_scheduler_kwargs [[[: give names and values"],
    ),
    "an end above the start": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 1}'},
        ["--lr_scheduler_type polynomial", "lr_end"],
    ),
    "decay at the end": (
        {"decay_step": 6, "lr_scheduler_type": "linear"},
        ["--decay_step 6", "6 steps"],
    ),
    "warmup into the decay": (
        {"warmup_steps": 4, "decay_step": 3, "lr_scheduler_type": "cosine"},
        ["--warmup_steps 4", "--decay_step 3"],
    ),
    "more warmup than epochs": (
        {"max_steps": None, "num_train_epochs": 2, "warmup_steps": 7},
        ["--warmup_steps 7", "6 steps"],
    ),
    "decay after the epochs": (
        {"max_steps": None, "num_train_epochs": 2, "decay_step": 6, "lr_scheduler_type": "linear"},
        ["--decay_step 6", "6 steps"],
    ),
    "kernels of no package": ({"use_liger_kernel": True}, ["--use_liger_kernel", "pip install"]),
    "a report nowhere": ({"report_to": "paper"}, ["--report_to paper: it is not installed"]),
    "processes": ({"ddp_backend": "gloo"}, ["--ddp_backend gloo", "torchrun"]),
    "sharding by one process": (REGULAR | {"fsdp": "full_shard"}, ["--fsdp", "torchrun"]),
    "sharding for HiZOO": ({"fsdp": "full_shard"}, ["--fsdp", "has states to shard"]),
    "label smoothing": ({"label_smoothing_factor": 0.1}, ["--label_smoothing_factor", "neither"]),
    "gradients of HiZOO": (
        {"fp16": True, "optim": "sgd", "max_grad_norm": 0.5},
        ["--fp16", "--optim sgd", "--max_grad_norm 0.5", "regular has a backward pass"],
    ),
    "smaller batches of HiZOO": (
        {"auto_find_batch_size": True},
        ["--auto_find_batch_size: only --trainer regular starts again with smaller batches; leave"],
    ),
    "smaller batches of error broadcast": (
        BROADCAST | {"auto_find_batch_size": True},
        ["--auto_find_batch_size: only --trainer regular"],
    ),
    "a metric's gradient": (
        REGULAR | {"non_diff": True},
        ["--non_diff: it has no gradient for --trainer regular and broadcast; take --trainer zo"],
    ),
    "no package for the optimizer": (
        REGULAR | {"optim": "galore_adamw", "optim_target_modules": "attn"},
        ["--optim galore_adamw", "galore_torch"],
    ),
    "error broadcast of other weights": (
        BROADCAST | {"lora": True, "weight_decay": 0.1, "fsdp": "full_shard"},
        [
            "--lora: --trainer broadcast trains matrices of the blocks; take --trainer zo, or",
            *("--weight_decay 0.1: --trainer broadcast has", "--fsdp: only --trainer regular has"),
        ],
    ),
    "error broadcast of a prefix": (BROADCAST | {"prefix_tuning": True}, ["take --trainer zo"]),
    "error broadcast of the head": (BROADCAST | {"head_tuning": True}, ["take --trainer zo"]),
    "error broadcast of a metric": (
        BROADCAST | {"non_diff": True, "train_as_classification": None},
        ["--non_diff: it has no gradient", "take --trainer zo"],
    ),
    "bounds of error broadcast": (
        {
            **BROADCAST,
            **{"broadcast_rate": -1, "broadcast_damping": 0, "broadcast_from": 1},
            **{"broadcast_matrices": "q", "broadcast_tokens": 0},
        },
        [
            *("--broadcast_rate -1: must be at least 0", "--broadcast_damping 0: must be larger"),
            *("--broadcast_from 1: must be below 1", "--broadcast_tokens 0: must be at least 1"),
            "--broadcast_matrices q: choose from o,d | o | d",
        ],
    ),
    "a measured rate of AdamW": (
        REGULAR | {"learning_rate": "auto"},
        ["--learning_rate auto", "--trainer zo"],
    ),
    "classes of a text": ({"task_name": "SQuAD"}, ["--train_as_classification", "SQuAD"]),
    "two objectives": ({"non_diff": True}, ["--train_as_classification and --non_diff exclude"]),
    "calibrated training": ({"sfc": True}, ["--sfc", "--trainer none"]),
    "all at once": (
        {"zo_eps": 0, "num_train": -1, "trainer": "sgd", "zo_epss": 1, "seed": 2**32},
        [
            *("--zo_eps 0: must be larger than 0", "--num_train -1: must be at least 0"),
            *("--trainer sgd (choose from none", "--zo_epss: did you mean --zo_eps?"),
            "--seed 4294967296: must be below",
        ],
    ),
    "contradictions at once": (
        {"lora": True, "head_tuning": True, "num_train": 0, "sfc": True},
        ["--head_tuning and --lora exclude", "--num_train 0", "--sfc: scores are"],
    ),
}
BAD_EVALUATION: dict[str, tuple[dict[str, Any], list[str]]] = {
    "calibration of a text": ({"task_name": "SQuAD", "sfc": True}, ["--sfc", "SQuAD"]),
    "both calibrations": ({"sfc": True, "icl_sfc": True}, ["--icl_sfc exclude each other"]),
    "no end": ({"task_name": "DROP", "eos_token": ""}, ["--eos_token"]),
    "no task": ({"task_name": None}, ["--task_name is missing"]),
    "no model": ({"model_name": None}, ["--model_name is missing"]),
    "answers nowhere": ({"predict_file": "rows.jsonl"}, ["--predictions_file"]),
}
# What the model or the data show: arguments added to a training run.
BAD_PREPARATION: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown data directory": ({"data_dir": "nowhere"}, ["--data_dir nowhere"]),
    "unknown local model": ({"model_name": "./no/such"}, ["--model_name ./no/such"]),
    "too many dev examples": ({"num_dev": 1600, "no_eval": None}, ["1600", "--num_dev"]),
    "too long": ({"max_length": 1025}, ["--max_length 1025", "1024"]),
    "no checkpoint": ({"resume_from_checkpoint": "nowhere"}, ["--resume_from_checkpoint nowhere"]),
    "result under a file": ({"result_file": "file/x.json"}, ["--result_file file/x.json"]),
    "result is a folder": ({"result_file": "folder"}, ["--result_file folder"]),
    "output_dir is a file": ({"output_dir": "file"}, ["--output_dir file"]),
}


def refusal(argv: list[str]) -> str:
    """What is said about a command line; nothing: it is in order."""
    try:
        check(parse_arguments(argv))
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused(
    argv: list[str], folder: Path, capfd: pytest.CaptureFixture[str], parts: list[str]
) -> None:
    line = refused_line(argv, capfd, folder)
    for part in parts:
        assert part in line


def test_good_command_lines(tmp_path: Path) -> None:
    """What the bad ones are made of, and values at their bounds."""
    for more in (
        {},
        {"warmup_steps": 6},
        {"warmup_steps": 0.5, "lr_scheduler_type": "linear"},
        {"warmup_steps": 2, "decay_step": 5, "lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-7}'},
        DEV_LOSSES | {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"learning_rate": 0, "lr_scheduler_type": "linear"},
        {"learning_rate": "auto", "zo_eps": "auto"},
        REGULAR | {"optim": "sgd"},
    ):
        assert refusal(training(tmp_path, **more)) == ""
    assert refusal(command()) == ""


def test_bad_command_lines_are_refused(tmp_path: Path) -> None:
    failures = {}
    for kind, cases in (("training", BAD_TRAINING), ("evaluation", BAD_EVALUATION)):
        for name, (arguments, parts) in cases.items():
            argv = command(**arguments)
            if kind == "training":
                others = {key: value for key, value in arguments.items() if key != "task_name"}
                argv = training(tmp_path, arguments.get("task_name", "SST2"), **others)
            said = refusal(argv)
            if not said or [part for part in parts if part not in said]:
                failures[kind, name] = said
    assert not failures


def test_bad_model_or_data_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    failures = {}
    for name, (arguments, parts) in BAD_PREPARATION.items():
        line = refused_line(training(tmp_path, **arguments), capfd, tmp_path)
        if [part for part in parts if part not in line]:
            failures[name] = line
    assert not failures


def test_bad_evaluation_with_this_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, parts in (
        ({"task_name": "DROP", "max_new_tokens": 1024}, ["--max_new_tokens 1024", "1024"]),
    ):
        assert_refused(command(**arguments), tmp_path, capfd, parts)


def test_smoothing_is_a_constant() -> None:
    assert [smoothing_of(f"constant{word}") for word in ("0", "1e-8", "0.5")] == [0, 1e-8, 0.5]
    for text in ("", "1e-8", "constant", "constant-1", "constant1", "constantnan", "linear1e-6"):
        with pytest.raises(ValueError, match=r"give constant<number>, from 0 \(MeZO\) to below 1"):
            smoothing_of(text)


def test_report_target_that_is_not_installed(tmp_path: Path) -> None:
    said = refusal(training(tmp_path, report_to="comet_ml"))
    assert said.startswith("--report_to comet_ml: it is not installed; give none")


# Command lines, with variables of the environment, and what is said before torch is imported.
EARLY: tuple[tuple[list[str], dict[str, str], str], ...] = (
    (["--task_name", "SST3", "--zo_eps", "0"], {}, "--zo_eps 0: must be larger than 0"),
    (["--task_name", "SST3", "--model_name", "m"], {}, "SST3"),
    (["--lr", "1"], {}, "did you mean --learning_rate?"),
    (command(sfc=True, icl_sfc=True), {}, "exclude each other"),
    (command(trainer="zo", num_train=4, fp16=True), {}, "--fp16"),
    (["--script", "HiZOO.sh", "--lora", "--head_tuning"], {}, "exclude each other"),
    (["--script"], {}, "--script : choose from"),
    (["--config", "nowhere.yaml"], {}, "nowhere.yaml: cannot be read"),
    (["--lr_scheduler_type", "linaer"], {}, "--lr_scheduler_type linaer: choose from linear, "),
    (["--script", "HiZOO.sh"], {"RANK": "2"}, "RANK=2: expected WORLD_SIZE beside it"),
    (["--script", "HiZOO.sh"], {"STEPS": "$(touch x)"}, "STEPS=$(touch x): must be a whole number"),
    (command(), {"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5: expected a whole number from 0 to 1"),
    (command(output_dir="\udcff"), {}, "--output_dir \\udcff: not UTF-8"),
    (command(tag="x" * 250), {}, f"--tag {'x' * 250}: a name of more than 240 bytes"),
)


def test_errors_come_before_torch_is_imported(tmp_path: Path) -> None:
    """In a process of its own, for which torch and transformers do not exist."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    before = contents(tmp_path)
    failures = {}
    for line, variables, said in EARLY:
        done = subprocess.run(
            [sys.executable, "-B", str(ROOT / "run.py"), *line],
            env=os.environ | {"PYTHONPATH": str(tmp_path)} | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        one = done.stderr.startswith("error: ") and done.stderr.count("error:") == 1
        if (done.returncode, done.stdout) != (2, "") or not one or said not in done.stderr:
            failures[said] = done.stderr
    assert not failures and contents(tmp_path) == before


def test_deleted_working_directory_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    for words in (["bash", str(ROOT / "HiZOO.sh")], [sys.executable, str(ROOT / "run.py"), "--lr"]):
        done = subprocess.run(
            ["bash", "-c", 'rmdir ../gone; exec "$@"', "-", *words],
            **{"cwd": gone, "capture_output": True, "text": True, "timeout": 60},
        )
        assert done.returncode == 2 and "error: the working directory was deleted" in done.stderr
        gone.mkdir()


def test_schedules_are_those_of_transformers() -> None:
    assert set(SCHEDULES) == {each.value for each in SchedulerType}


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def with_architecture(name: str, model_type: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": [name], "model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:100_000]
        ),
        "no causal language model there",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "cut config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "op'),
        "no causal language model there",
    ),
    "no tokenizer": (without_tokenizer, "no tokenizer there"),
    "translation": (with_architecture("T5ForConditionalGeneration", "t5"), "T5Config"),
}


def test_damaged_model_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failures = {}
    for name, (change, part) in DAMAGE.items():
        model = tmp_path / name.replace(" ", "-")
        shutil.copytree(MODEL, model)
        change(model)
        line = refused_line(training(tmp_path, model_name=model), capfd, tmp_path)
        if f"--model_name {model}" not in line or part not in line:
            failures[name] = line
    assert not failures


def test_train_file_without_a_column(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data" / "SST2"
    shutil.copytree(SAMPLES / "sst2", folder)
    (folder / "train.jsonl").write_text('{"text": "good", "label": 1}\n')
    argv = training(tmp_path, data_dir=tmp_path / "data")
    assert_refused(argv, tmp_path, capfd, ["train.jsonl", "'sentence' is missing"])


def test_checkpoint_of_another_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    finish(training(tmp_path, model_name=MODEL, max_steps=3))
    (tmp_path / "result.json").unlink()
    config = json.loads((MODEL / "config.json").read_text())
    changed = {name: value for name, value in config.items() if name != "model_type"}
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", **changed | {"ffn_dim": 256})
    )
    shutil.copytree(MODEL, tmp_path / "wide" / "tiny-opt")
    other.save_pretrained(tmp_path / "wide" / "tiny-opt")
    argv = training(tmp_path, max_steps=6, model_name=tmp_path / "wide" / "tiny-opt")
    assert_refused(argv, tmp_path, capfd, ["checkpoint-3 comes from a run with other weights"])


def test_checkpoint_of_another_experiment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    finish(training(tmp_path, max_steps=1, save_steps=1))
    for change, part in (
        ({"learning_rate": 2e-4}, "--learning_rate 0.0001, not 0.0002"),
        ({"num_train": 11}, "--num_train 12, not 11"),
        ({"seed": 1}, "--seed 42, not 1"),
        ({"hessian_smooth_type": "constant0"}, "--hessian_smooth_type constant1e-2"),
        (REGULAR, "--trainer zo, not regular"),
    ):
        argv = training(tmp_path, **({"save_steps": 1, "max_steps": 1} | change))
        assert_refused(argv, tmp_path, capfd, [part, "--overwrite_output_dir"])


def test_other_names_and_repeated_arguments(tmp_path: Path) -> None:
    line = "--num_test 7 --num-dev 3 --evaluation_strategy steps --zo-lr-scheduler-type linear"
    line += " --warmup_step 4 --train_as_classification False --eval_steps=2 --no_save_on_interrupt"
    line += " --lr_scheduler_type cosine"
    arguments = parse_arguments([*training(tmp_path, num_eval=3, no_eval=None), *line.split()])
    assert (arguments.num_eval, arguments.num_dev, arguments.eval_strategy) == (7, 3, "steps")
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == ("linear", 4)
    assert arguments.train_as_classification is False and arguments.save_on_interrupt is False
    assert arguments.trust_remote_code is False


def test_a_set_seed_wins_over_the_number_of_sets() -> None:
    for seed in (0, 3):
        arguments = parse_arguments(command(num_train=4, train_set_seed=seed, num_train_sets=2))
        assert (arguments.train_set_seed, arguments.num_train_sets) == (seed, None)
        said = "warning: no effect here: --num_train_sets (--train_set_seed decides)"
        assert arguments.warning == said
