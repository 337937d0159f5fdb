"""Runs of run.py on the bundled model, in this process or in one of their own."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer

import run
from language_model.loading import (
    leave_out_loading_bars,
    load_config_and_tokenizer,
    load_model,
)
from training.journal import JOURNAL, read_journal
from training.objective_trainer import ObjectiveTrainer
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data" / "tiny-opt"
SAMPLES = ROOT / "data" / "samples"


def refusal_of_loading(model: Path) -> str:
    """What is said of a model that cannot be loaded; nothing if it can."""
    try:
        load_config_and_tokenizer(str(model))
        load_model(str(model), torch.float32)
    except InputError as error:
        return str(error)
    return ""


@functools.cache
def small_model() -> TemporaryDirectory:
    """A folder with an OPT of a tenth of the bundled model's parameters, and random ones."""
    leave_out_loading_bars()
    folder = TemporaryDirectory(prefix="small-opt-")
    tiny_model("opt", dropout=0.0).save_pretrained(folder.name)
    tiny_tokenizer().save_pretrained(folder.name)
    return folder


def command(task: str = "SST2", **arguments: Any) -> list[str]:
    """Arguments of run.py; a value of None leaves the name out, True gives it alone."""
    values = {"task_name": task, "model_name": MODEL, "data_dir": SAMPLES, "num_eval": 6}
    line = []
    for name, value in (values | arguments).items():
        if value is not None:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def training(folder: Path, task: str = "SST2", **arguments: Any) -> list[str]:
    """Arguments of a short HiZOO run of a small model that writes below ``folder`` only."""
    values: dict[str, Any] = {
        "model_name": small_model().name,
        "trainer": "zo",
        "train_as_classification": True,
        "num_train": 12,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_steps": 3,
        "output_dir": folder / "out",
        "result_file": folder / "result.json",
        "no_eval": True,
    }
    if arguments.get("trainer", "zo") == "zo":
        values["hessian_smooth_type"] = "constant1e-2"
    if arguments.get("save_strategy", "steps") != "steps":
        del values["save_steps"]
    evaluates = arguments.get("eval_before_training") or not arguments.get("no_eval", True)
    return command(task, **({"num_eval": 6 if evaluates else None} | values | arguments))


def finish(argv: list[str]) -> dict[str, Any]:
    """Run to the end in this process; return the result JSON."""
    assert run.main(argv) == 0
    return json.loads(Path(argv[argv.index("--result_file") + 1]).read_text())


def let_every_dev_loss_be_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the best checkpoint be the first, not the last."""
    losses = itertools.count()
    evaluate = ObjectiveTrainer.evaluate

    def evaluate_worse(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(self, *args, **kwargs) | {"eval_loss": float(next(losses))}

    monkeypatch.setattr(ObjectiveTrainer, "evaluate", evaluate_worse)


def start(
    argv: list[str], folder: Path, *launcher: str, script: Path = ROOT / "run.py"
) -> subprocess.Popen:
    """Start run.py in a process of its own, with ``folder`` as its working directory."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *argv],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


# Two processes, as torchrun starts them, that do several runs one after another.
BEFORE_RUNS = """
import gc, json, os, sys
gc.disable()  # while the libraries load
import torch
import run, trainer
gc.freeze()
gc.enable()
second = os.fork()
rank = "0" if second else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
"""
RUNS = """
for folder, line in json.loads(sys.argv[1]):
    os.chdir(folder)
    if second:
        print(f"[{os.path.basename(folder)}]", flush=True)
    if code := run.main(line):
        sys.exit(code)
if second:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
"""


def launch_two_processes(
    folder: Path, patches: str, lines: Sequence[tuple[Path, list[str]]]
) -> None:
    """Do runs in two processes, one after another: loading the libraries takes longer than all.

    The second process is a fork of the first, so that they load once. Each run is done in the
    folder beside its arguments, which gets a ``printed.txt``. ``patches`` is executed before them.
    """
    driver = folder / "driver.py"
    driver.write_text(BEFORE_RUNS + patches + RUNS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    done = subprocess.run(
        [sys.executable, str(driver), json.dumps([(str(where), line) for where, line in lines])],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | store,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = re.split(r"^\[(\w+)\]\n", done.stdout, flags=re.MULTILINE)
    for (where, _), name, of_run in zip(lines, printed[1::2], printed[2::2], strict=True):
        assert where.name == name
        with (where / "printed.txt").open("a") as file:
            file.write(of_run)


def keep_steps(whole: Path, parted: Path, steps: int) -> None:
    """Copy the first steps of a run's journal."""
    (parted / "out").mkdir(parents=True)
    content = (whole / "out" / JOURNAL).read_bytes()
    (parted / "out" / JOURNAL).write_bytes(
        content[: read_journal(whole / "out" / JOURNAL).end_of(steps)]
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trainer_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())


def log_of(folder: Path, name: str) -> list[float]:
    """The values that a checkpoint's log has for ``name``, in order."""
    return [row[name] for row in trainer_state(folder)["log_history"] if name in row]


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, h, scheduler and every logged number are the same, bit for bit."""
    assert_same_tensors(weights(first), weights(second))
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key, state in states[0]["state"].items():
        assert_same_tensors(state, states[1]["state"][key])
    schedulers = [
        torch.load(folder / "scheduler.pt", weights_only=True) for folder in (first, second)
    ]
    assert schedulers[0] == schedulers[1]
    for name in ("loss", "learning_rate", "projected_gradient", "curvature", "eval_loss", "step"):
        assert log_of(first, name) == log_of(second, name), name


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below ``folder``, those of files with size and time of change.

    A folder's own time changes when it is locked.
    """
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        if path.is_file()
        else (0, 0)
        for path in sorted(folder.rglob("*"))
    }


def refused_line(
    argv: Sequence[object],
    capsys: pytest.CaptureFixture[str],
    unchanged: Path | None = None,
    main: Callable[[list[str]], int] = run.main,
) -> str:
    """The one line in which a command refuses its arguments.

    It prints nothing else, and changes nothing in a folder, where one is given.
    """
    before = contents(unchanged) if unchanged else {}
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2, argv
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: "), line
    if unchanged:
        assert out == "" and contents(unchanged) == before, argv
    return line.removeprefix("error: ")


def flip_bit(file: Path, place: int | None = None) -> None:
    """Change a bit of a file, in its middle or in a byte of it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    file.write_bytes(content)


def assert_replays(
    whole: Path, folder: Path, last: str, monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> None:
    """A run's journal alone gives its last checkpoint, bit for bit and without forward passes."""
    passes = []
    compute = ObjectiveTrainer.compute_loss

    def count(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> Any:
        passes.append(compute(self, *args, **kwargs))
        return passes[-1]

    (folder / "out").mkdir(parents=True)
    shutil.copy(whole / "out/journal.jsonl", folder / "out")
    with monkeypatch.context() as patched:
        patched.setattr(ObjectiveTrainer, "compute_loss", count)
        result = finish(training(folder, **arguments))
    # Each dev loss is a pass; one more shows whether the model can be perturbed layer by layer.
    assert len(passes) - len(result["history"].get("dev_loss", ())) in (0, 1)
    assert_same_checkpoint(whole / "out" / last, folder / "out" / last)
