"""icl.sh, finetune.sh and finetune_fsdp.sh: what they pass to run.py, and runs of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import MODEL, ROOT, SAMPLES, log_of, start, weights
from test_hizoo_sh import (
    passed_arguments,
    passed_to_python,
    run_script,
    value_of,
)

import run

ICL = ROOT / "icl.sh"
FINETUNE = ROOT / "finetune.sh"
FSDP = ROOT / "finetune_fsdp.sh"
PROCESSES = ROOT / "command_line" / "processes.py"
SMALL = {"TRAIN": "16", "DEV": "4", "EVAL": "6", "EPOCH": "1"}


def finish(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: str, **env: str
) -> dict[str, Any]:
    """Run what the script passes in this process, with ``folder`` below the working directory."""
    folder.mkdir(exist_ok=True)
    argv = passed_arguments(folder, *arguments, script=script, **env)
    monkeypatch.chdir(folder)
    assert run.main(argv) == 0
    (result_file,) = (folder / "result").glob("*.json")
    return json.loads(result_file.read_text())


def add_gpus(folder: Path, number: int, capability: str = "7.5") -> None:
    """Put an nvidia-smi that finds so many GPUs on the path of the scripts run in ``folder``."""
    commands = folder / ".commands"
    commands.mkdir(exist_ok=True)
    listed, asked = (
        "; ".join([f"echo {line}"] * number) or "true" for line in ("GPU 0: a name", capability)
    )
    (commands / "nvidia-smi").write_text(
        f"#!/bin/sh\ncase $1 in -L) {listed} ;; --query-gpu=compute_cap) {asked} ;; esac\n"
    )
    (commands / "nvidia-smi").chmod(0o755)


def checkpoint_of(result: dict[str, Any], folder: Path) -> Path:
    return folder / result["checkpoint"]


# ---------------------------------------------------------------------------------------- icl.sh


def test_icl_arguments(tmp_path: Path) -> None:
    argv = passed_arguments(tmp_path, script=ICL, MODEL="facebook/opt-13b", TASK="CB", SEED="4")
    expected = {
        "model_name": "facebook/opt-13b",
        "task_name": "CB",
        "trainer": "none",
        "num_train": "32",
        "num_eval": "1000",
        "train_set_seed": "4",
    }
    assert {name: value_of(argv, name) for name in expected} == expected
    # Without a seed every example gets demonstrations of its own.
    argv = passed_arguments(tmp_path, script=ICL, MODEL="facebook/opt-13b")
    assert not {"--train_set_seed", "--seed", "--num_train_sets", "--data_dir"} & {*argv}
    argv = passed_arguments(tmp_path, script=ICL, TRAIN="0", EVAL="7", DATA_DIR="some where")
    assert value_of(argv, "num_train") == "0" and value_of(argv, "num_eval") == "7"
    assert value_of(argv, "data_dir") == "some where" and value_of(argv, "model_name") == str(MODEL)
    assert value_of(passed_arguments(tmp_path, script=ICL), "data_dir") == str(SAMPLES)
    assert value_of(passed_arguments(tmp_path, "--num_train", "0", script=ICL), "num_train") == "0"


def test_icl_from_a_folder_with_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    model = folder / "a model"
    shutil.copytree(MODEL, model)
    env = {"MODEL": str(model), "DATA_DIR": str(SAMPLES), "EVAL": "6"}
    finish(folder, monkeypatch, ICL, "--num_train", "0", **env)
    accuracy, result = capsys.readouterr().out.splitlines()
    assert accuracy.startswith("zero-shot accuracy: ") and accuracy.endswith("(6 examples)")
    name = re.escape("result: result/SST2-a model-none-0-shot-")
    assert re.fullmatch(name + r"(set0-)?seed\d+-[0-9a-f]{8}\.json", result)


@pytest.mark.parametrize("task", ["SST2", "Copa", "SQuAD"])
def test_icl_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    arguments = ["--predictions_file", "p.jsonl"]
    if task == "SQuAD":
        arguments += ["--max_new_tokens", "4"]
    result = finish(tmp_path, monkeypatch, ICL, *arguments, TASK=task, EVAL="4")
    assert result["settings"]["num_train"] == 32
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4


# ----------------------------------------------------------------------------------- finetune.sh


def test_finetune_arguments(tmp_path: Path) -> None:
    argv = passed_arguments(tmp_path, script=FINETUNE, MODEL="facebook/opt-13b")
    expected = {
        "model_name": "facebook/opt-13b",
        "task_name": "SST2",
        "trainer": "regular",
        "num_train_epochs": "5",
        "per_device_train_batch_size": "8",
        "learning_rate": "1e-5",
        "lr_scheduler_type": "linear",
        "num_train": "1000",
        "num_dev": "500",
        "num_eval": "1000",
        "seed": "0",
        "train_set_seed": "0",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": "1",
    }
    assert {name: value_of(argv, name) for name in expected} == expected
    assert {"--load_best_model_at_end", "--train_as_classification"} <= {*argv}
    assert not {"--data_dir", "--fp16", "--fsdp", "--max_steps"} & {*argv}


def test_every_variable_of_finetune_reaches_run_py(tmp_path: Path) -> None:
    values = {
        "TASK": ("RTE", "task_name"),
        "MODEL": ("a/b", "model_name"),
        "DATA_DIR": ("some where", "data_dir"),
        "EPOCH": ("3", "num_train_epochs"),
        "BS": ("6", "per_device_train_batch_size"),
        "LR": ("7e-7", "learning_rate"),
        "SEED": ("5", "seed"),
        "TRAIN": ("11", "num_train"),
        "DEV": ("12", "num_dev"),
        "EVAL": ("13", "num_eval"),
    }
    env = {name: value for name, (value, _) in values.items()}
    argv = passed_arguments(tmp_path, "--seed", "9", "--tag", "my tag", script=FINETUNE, **env)
    for name, (value, option) in values.items():
        assert value_of(argv, option) == ("9" if name == "SEED" else value)
    assert value_of(argv, "train_set_seed") == "5" and value_of(argv, "tag") == "my tag"


@pytest.mark.parametrize(
    ("mode", "flags", "learning_rate"),
    [
        ("ft", [], "1e-5"),
        ("prefix", ["--prefix_tuning"], "1e-2"),
        ("lora", ["--lora"], "1e-4"),
    ],
)
def test_modes_of_finetune(tmp_path: Path, mode: str, flags: list[str], learning_rate: str) -> None:
    argv = passed_arguments(tmp_path, script=FINETUNE, MODE=mode)
    assert [word for word in argv if word in ("--lora", "--prefix_tuning")] == flags
    assert value_of(argv, "learning_rate") == learning_rate


@pytest.mark.parametrize(
    ("task", "dev", "classifies"),
    [("sst2", "500", True), ("CB", "100", True), ("Copa", "100", False), ("SQuAD", "500", False)],
)
def test_objective_and_dev_examples(tmp_path: Path, task: str, dev: str, classifies: bool) -> None:
    argv = passed_arguments(tmp_path, script=FINETUNE, TASK=task, MODEL="a/b")
    assert value_of(argv, "num_dev") == dev
    assert ("--train_as_classification" in argv) is classifies


def test_finetune_without_dev_loss(tmp_path: Path) -> None:
    argv = passed_arguments(tmp_path, "--evaluation_strategy", "no", script=FINETUNE)
    assert "--load_best_model_at_end" not in argv


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MODE": "nothing"}, "MODE=nothing: give ft, prefix or lora"),
        ({"NUM_GPU": "two"}, "NUM_GPU=two: give the number of GPUs, at least 1"),
        ({"NUM_GPU": "0"}, "NUM_GPU=0: give the number of GPUs, at least 1"),
        ({"BS": "0"}, "BS=0: give the examples of a step, at least 1"),
        ({"NUM_GPU": "3"}, "BS=8: give a multiple of NUM_GPU=3, the processes that share a step"),
    ],
)
def test_bad_variables_are_refused(tmp_path: Path, env: dict[str, str], message: str) -> None:
    done = run_script(tmp_path, script=FINETUNE, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [".commands"]


def test_precision_where_a_gpu_is(tmp_path: Path) -> None:
    add_gpus(tmp_path, 1)
    gpu = {"CUDA_VISIBLE_DEVICES": "0"}
    argv = passed_arguments(tmp_path, script=FINETUNE, **gpu)
    assert "--fp16" in argv and "--load_float16" not in argv
    add_gpus(tmp_path, 1, capability="8.6")
    argv = passed_arguments(tmp_path, script=FINETUNE, **gpu)
    assert "--bf16" in argv and "--fp16" not in argv
    add_gpus(tmp_path, 1)
    for precision in ("--bf16", "--load_bfloat16"):
        assert "--fp16" not in passed_arguments(tmp_path, precision, script=FINETUNE, **gpu)
    assert "--fp16" not in passed_arguments(tmp_path, script=FINETUNE)
    (tmp_path / ".commands" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert "--fp16" not in passed_arguments(tmp_path, script=FINETUNE, **gpu)


def test_finetune_from_a_folder_with_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "with a space"
    result = finish(folder, monkeypatch, FINETUNE, "--max_steps", "2", **SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "zero-shot accuracy",
        "step 2",
        "checkpoint",
        "dev accuracy",
        "test accuracy",
        *lines[-3:-1],  # the run at a glance
        "result",
    ]
    assert result == json.loads((folder / lines[-1].removeprefix("result: ")).read_text())
    assert result["steps"] == 2 and result["trainer"] == "regular"
    assert (checkpoint_of(result, folder) / "model.safetensors").is_file()
    assert sorted(entry.name for entry in folder.iterdir()) == [".commands", "result"]


def test_a_short_training_beats_zero_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"TRAIN": "128", "DEV": "32", "EVAL": "200", "EPOCH": "2", "LR": "1e-4"}
    result = finish(tmp_path, monkeypatch, FINETUNE, **env)
    assert result["steps"] == 32
    zero_shot = result["metric_before_training"]["accuracy"]
    assert zero_shot < 0.8 and result["metric"]["accuracy"] > 0.95


# The name before transformers 5.23 is passed on, too.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_accumulation_and_gradient_checkpointing_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {
        "plain": (),
        "accumulated": (
            *("--gradient_accumulation_steps", "4"),
            *("--per_device_train_batch_size", "2"),
        ),
        "checkpointed": ("--gradient_checkpointing",),
    }
    checkpoints = {}
    for name, arguments in ways.items():
        folder = tmp_path / name
        line = (*arguments, "--logging_steps", "1", "--no_eval")
        result = finish(folder, monkeypatch, FINETUNE, *line, LR="1e-4", **SMALL)
        assert result["steps"] == 2
        checkpoints[name] = checkpoint_of(result, folder)
    for name in ("accumulated", "checkpointed"):
        losses = [log_of(checkpoints[way], "loss") for way in ("plain", name)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        for key, tensor in weights(checkpoints["plain"]).items():
            # Adam divides a gradient near 0 by itself: its rounding can move a weight by LR.
            difference = (weights(checkpoints[name])[key] - tensor).abs()
            assert difference.mean() < 2e-6 and difference.max() < 5e-4, (name, key)


def test_mixed_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("--logging_steps", "1", "--no_eval")
    losses = {}
    for name, more in {"float32": (), "bfloat16": ("--bf16",)}.items():
        folder = tmp_path / name
        result = finish(folder, monkeypatch, FINETUNE, *line, *more, LR="1e-4", **SMALL)
        checkpoint = checkpoint_of(result, folder)
        losses[name] = log_of(checkpoint, "loss")
        assert all(tensor.dtype == torch.float32 for tensor in weights(checkpoint).values())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


# ------------------------------------------------------------------------------ finetune_fsdp.sh


def launcher_and_arguments(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split what Python gets into what starts the processes, and what run.py gets."""
    index = lines.index(str(ROOT / "run.py"))
    return lines[:index], lines[index + 1 :]


def test_processes_of_finetune(tmp_path: Path) -> None:
    launcher, argv = launcher_and_arguments(
        passed_to_python(tmp_path, script=FINETUNE, NUM_GPU="2")
    )
    assert launcher == ["-P", str(PROCESSES), "--standalone", "--nproc_per_node", "2"]
    assert value_of(argv, "per_device_train_batch_size") == "4" and "--fsdp" not in argv


def test_processes_of_finetune_fsdp(tmp_path: Path) -> None:
    # One process is started by torchrun too: without it the Trainer refuses --fsdp.
    for processes, share in {"4": "3", "1": "12"}.items():
        env = {"NUM_GPU": processes, "BS": "12", "TASK": "Copa", "MODEL": "a/b", "LR": "3e-5"}
        launcher, argv = launcher_and_arguments(
            passed_to_python(tmp_path, "--fsdp_config", "my file.json", script=FSDP, **env)
        )
        assert launcher[-2:] == ["--nproc_per_node", processes]
        assert value_of(argv, "per_device_train_batch_size") == share
        assert argv[-3:] == ["--fsdp", "--fsdp_config", "my file.json"]
        assert value_of(argv, "trainer") == "regular" and value_of(argv, "num_dev") == "100"


@pytest.mark.parametrize(("said", "code"), [("bad input", 2), (None, 1)], ids=["said", "unsaid"])
def test_processes_end_in_few_words(tmp_path: Path, said: str | None, code: int) -> None:
    (tmp_path / "failing.py").write_text(
        f"import sys, utils\nif {said!r}: utils.say_last({said!r})\nsys.exit(2)"
    )
    done = subprocess.run(
        [sys.executable, "-P", PROCESSES, "--nproc_per_node", "2", "--standalone", "failing.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (code, "")
    if said:
        assert done.stderr == f"{said}\n"
    else:
        assert "exitcode  : 2" in done.stderr  # torchrun's report


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_processes_get_a_signal_and_its_time(tmp_path: Path, name: str) -> None:
    (tmp_path / "saving.py").write_text(
        "import signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda *_: (print('saved'), sys.exit(130)))\n"
        "print('ready', flush=True)\ntime.sleep(100)"
    )
    process = start(["saving.py"], tmp_path, "-P", script=PROCESSES)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=60) == ("saved\n", "") and process.returncode == 130


def test_fsdp_of_the_bundled_model_is_not_evaluated_before(tmp_path: Path) -> None:
    flag = "--eval_before_training"
    assert flag not in passed_to_python(tmp_path, script=FSDP, NUM_GPU="2")
    assert flag in passed_to_python(tmp_path, script=FINETUNE, NUM_GPU="2")


def test_fsdp_takes_all_gpus(tmp_path: Path) -> None:
    done = run_script(tmp_path, script=FSDP)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: no NVIDIA GPU found: run finetune.sh, or give NUM_GPU for other GPUs\n"
    )
    add_gpus(tmp_path, 8)
    lines = passed_to_python(tmp_path, script=FSDP, CUDA_VISIBLE_DEVICES="4,7")
    assert lines[lines.index("--nproc_per_node") + 1] == "2" and "--fp16" in lines


# ---------------------------------------------------------------------------------- all scripts


@pytest.mark.parametrize("name", ["icl.sh", "finetune.sh", "finetune_fsdp.sh"])
def test_copy_of_the_repository_in_a_folder_with_spaces(tmp_path: Path, name: str) -> None:
    repository = tmp_path / "a copy of it"
    repository.mkdir()
    for script in (name, "settings.sh", "finetune.sh"):
        shutil.copy(ROOT / script, repository / script)
    lines = passed_to_python(tmp_path, script=repository / name, NUM_GPU="1")
    assert str(repository / "run.py") in lines
    assert value_of(lines, "model_name") == str(repository / "data" / "tiny-opt")
