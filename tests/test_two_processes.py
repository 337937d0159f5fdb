"""Two processes evaluate and train as one does: each with half of the examples, or of the weights.

Loading the libraries takes longer than all of these runs: one launch does them one after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    ROOT,
    SAMPLES,
    assert_same_tensors,
    command,
    finish,
    keep_steps,
    launch_two_processes,
    log_of,
    start,
    training,
    weights,
)
from test_scripts import finish as finish_script

from training import processes
from training.journal import JOURNAL
from training.processes import check_same
from utils import InputError

# One process of pytest-xdist runs all of this module.
pytestmark = pytest.mark.xdist_group("two processes")

# Notes what each process ends a training with. accelerate shards on accelerators only: this lets it
# shard on CPUs, as it does where there are GPUs; everything else is the same code.
NOTING = """
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialise = AcceleratorState.__init__
train = trainer.ObjectiveTrainer.train

def initialise_sharded(self, *arguments, fsdp_plugin=None, **settings):
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

def train_and_note(self, *arguments, **named):
    train(self, *arguments, **named)
    name = f"rank{os.environ['RANK']}"
    with open(name + ".json", "w") as file:
        json.dump(self.state.log_history, file)
    if not self.is_fsdp_enabled:
        torch.save(self.model.state_dict(), name + ".pt")

AcceleratorState.__init__ = initialise_sharded
trainer.ObjectiveTrainer.train = train_and_note
import training.recording
training.recording.CHECK_EVERY = 2
"""


def evaluation(folder: Path, task: str) -> list[str]:
    """A command line; 7 examples are an odd number for two processes."""
    return command(
        task,
        num_eval=7,
        num_train=4,
        train_set_seed=0,
        per_device_eval_batch_size=3,
        max_new_tokens=6 if task == "SQuAD" else None,
        result_file=folder / f"{task}.json",
        predictions_file=folder / f"{task}.jsonl",
    )


def answers(folder: Path) -> list[str]:
    """A command line that answers rows of a file."""
    return command(
        predict_file=SAMPLES / "sst2/validation.jsonl",
        predictions_file=folder / "answers.jsonl",
        num_eval=None,
    )


FIRST_ORDER = {"trainer": "regular", "hessian_smooth_type": None, "max_steps": 2, "save_steps": 2}
# The projected gradient and the curvature magnify the rounding of the losses, by 1/2μ and 1/2μ²:
# hence a large μ and a small α. 11 dev examples are an odd number for two processes.
ZEROTH_ORDER = {
    "zo_eps": 1e-2,
    "hessian_smooth_type": "constant1e-4",
    "save_on_interrupt": True,
    "no_eval": None,
    "num_dev": 11,
    "eval_strategy": "steps",
    "eval_steps": 3,
    # The last batch of an epoch is of one example: one process has none.
    "num_train": 9,
}
# A batch of three tokens each, and padding batches.
BROADCAST = {
    **{"trainer": "broadcast", "learning_rate": None, "broadcast_rate": 0.5, "num_train": 9},
    **{"gradient_accumulation_steps": 2, "train_as_classification": None},
}
# The shares of the eval examples differ, 5 and 4: in batches of 4, two forward passes and one.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SHARDED = (
    *("--num_train", "16", "--num_dev", "4", "--num_train_epochs", "1", "--learning_rate", "1e-4"),
    *("--logging_steps", "1", "--per_device_eval_batch_size", "4", "--num_eval", "9"),
    *("--predictions_file", "predictions.jsonl"),
)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, each in one of its own, with what they printed."""
    folder = tmp_path_factory.mktemp("two")
    names = (
        "evaluation",
        "answers",
        "first_order",
        "zeroth_order",
        "resumed",
        "broadcast",
    )
    folders = {name: folder / name for name in (*names, "sharded")}
    for each in folders.values():
        each.mkdir()
    finish(training(folder / "alone", **ZEROTH_ORDER))
    keep_steps(folder / "alone", folders["resumed"], 4)
    sharded = ["--script", "finetune.sh", "--fsdp", *SHARDED]
    half = {"per_device_train_batch_size": 2}
    runs = [
        *(("evaluation", evaluation(folders["evaluation"], task)) for task in ("SST2", "SQuAD")),
        ("answers", answers(folders["answers"])),
        ("first_order", training(folders["first_order"], **FIRST_ORDER | half)),
        ("zeroth_order", training(folders["zeroth_order"], **ZEROTH_ORDER | half)),
        ("resumed", training(folders["resumed"], **ZEROTH_ORDER | half)),
        ("broadcast", training(folders["broadcast"], **BROADCAST | half)),
        ("sharded", sharded),
    ]
    launch_two_processes(folder, NOTING, [(folders[name], line) for name, line in runs])
    return folder


@pytest.mark.parametrize("task", ["SST2", "SQuAD"])
def test_two_processes_evaluate_as_one(two_processes: Path, tmp_path: Path, task: str) -> None:
    one = finish(evaluation(tmp_path, task))
    two = json.loads((two_processes / "evaluation" / f"{task}.json").read_text())
    assert two["metric"] == one["metric"]
    rows = [
        [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two_processes / "evaluation")
    ]
    assert len({str(row.get("scores", row["prediction"])) for row in rows[0]}) > 2
    for alone, together in zip(*rows, strict=True):
        assert together.pop("scores", None) == pytest.approx(alone.pop("scores", None), abs=1e-5)
        assert together == alone
    assert len({row["id"] for row in rows[0]}) == 7


@pytest.mark.slow
def test_torchrun_starts_them(two_processes: Path, tmp_path: Path) -> None:
    process = start(evaluation(tmp_path, "SST2"), tmp_path, *TORCHRUN)
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert printed.count("result: ") == 1
    rows = [(f / "SST2.jsonl").read_text() for f in (tmp_path, two_processes / "evaluation")]
    assert rows[0] == rows[1]


def test_two_processes_write_once(two_processes: Path) -> None:
    written = {"SST2.json", "SST2.jsonl", "SQuAD.json", "SQuAD.jsonl"}
    assert {path.name for path in (two_processes / "evaluation").glob("*.json*")} == written
    ranks = {"rank0.json", "rank1.json", "rank0.pt", "rank1.pt"}
    written = {"out", "result.json", "printed.txt"} | ranks
    assert {path.name for path in (two_processes / "first_order").iterdir()} == written
    printed = (two_processes / "evaluation" / "printed.txt").read_text()
    assert printed.count("result: ") == 2 and printed.count("(7 examples)") == 2
    assert (two_processes / "first_order" / "printed.txt").read_text().count("result: ") == 1
    assert {path.name for path in (two_processes / "answers").iterdir()} == {
        "answers.jsonl",
        "printed.txt",
    }
    assert (two_processes / "answers" / "printed.txt").read_text().count("predictions: ") == 1


def test_first_order_training(two_processes: Path, tmp_path: Path) -> None:
    folder = two_processes / "first_order"
    assert [path.name for path in (folder / "out").iterdir()] == ["checkpoint-2"]
    logs = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[0] == losses[1] == log_of(folder / "out/checkpoint-2", "loss")
    # Two halves of a batch of four are one batch of four.
    finish(training(tmp_path, **FIRST_ORDER))
    assert losses[0] == pytest.approx(log_of(tmp_path / "out/checkpoint-2", "loss"), abs=1e-4)


def test_zeroth_order_training_keeps_the_same_weights(two_processes: Path) -> None:
    folder = two_processes / "zeroth_order"
    assert (folder / "printed.txt").read_text().count("test accuracy: ") == 1
    assert json.loads((folder / "result.json").read_text())["steps"] == 6
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same_tensors(*ranks)
    # Two halves of a batch of four are one batch of four, up to the rounding of the losses.
    assert_nearly_the_same(two_processes / "alone", folder)


def assert_nearly_the_same(alone: Path, together: Path) -> None:
    one, two = (folder / "out/checkpoint-6" for folder in (alone, together))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=2e-6, rtol=0)
    assert log_of(two, "loss") == pytest.approx(log_of(one, "loss"), abs=1e-4)
    assert log_of(two, "eval_loss") == pytest.approx(log_of(one, "eval_loss"), abs=1e-4)


def test_run_goes_on_with_another_number_of_processes(two_processes: Path, tmp_path: Path) -> None:
    printed = (two_processes / "resumed" / "printed.txt").read_text()
    assert printed.count("resuming from 4 steps of ") == 1
    assert_nearly_the_same(two_processes / "alone", two_processes / "resumed")
    keep_steps(two_processes / "zeroth_order", tmp_path, 4)
    result = finish(training(tmp_path, **ZEROTH_ORDER))
    assert result["resumed_from"] == str(tmp_path / "out" / JOURNAL)
    assert_nearly_the_same(two_processes / "zeroth_order", tmp_path)


def test_error_broadcast_is_that_of_one_process(two_processes: Path, tmp_path: Path) -> None:
    finish(training(tmp_path, **BROADCAST))
    folder = two_processes / "broadcast"
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same_tensors(*ranks)
    one, two = (each / "out/checkpoint-6" for each in (tmp_path, folder))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=2e-6, rtol=0)
    assert log_of(two, "loss") == pytest.approx(log_of(one, "loss"), abs=1e-4)


def test_sharded_training(
    two_processes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finish_script(tmp_path, monkeypatch, "finetune.sh", " ".join(SHARDED))
    two = two_processes / "sharded"
    assert (two / "printed.txt").read_text().count("test accuracy: ") == 1
    checkpoints = [tmp_path / result["checkpoint"]]
    (result_file,) = (two / "result").glob("*.json")
    checkpoints += [two / json.loads(result_file.read_text())["checkpoint"]]
    # Only a sharded run writes this file.
    assert (checkpoints[1] / "pytorch_model_fsdp.bin").is_file()
    for name in ("loss", "eval_loss"):
        losses = [log_of(checkpoint, name) for checkpoint in checkpoints]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for key, tensor in weights(checkpoints[0]).items():
        assert (weights(checkpoints[1])[key] - tensor).abs().mean() < 2e-6, key
    rows = [
        [json.loads(row) for row in (folder / "predictions.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two)
    ]
    for alone, sharded in zip(*rows, strict=True):
        assert alone["id"] == sharded["id"]
        assert sharded["scores"] == pytest.approx(alone["scores"], abs=1e-3)


# ------------------------------------------------------------------------------ faults of ranks

# Each case forks its ranks anew; a rank that misbehaves does so in its third step.
FAULTS = """
import gc, json, os, signal, socket, sys, time
import run, trainer
step = trainer.ZerothOrderTrainer.training_step
fault = None

def misbehave(self, *arguments, **settings):
    if self.state.global_step == 2 and os.environ["RANK"] == "1":
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 if fault == "stuck" else 0)
    return step(self, *arguments, **settings)

trainer.ZerothOrderTrainer.training_step = misbehave
codes = {}
for fault, ranks in json.loads(sys.argv[1]).items():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = {}
    for rank, line in ranks.items():
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            os.dup2(os.open(f"{fault} {rank}", os.O_WRONLY | os.O_CREAT), 2)
            os._exit(run.main(line))
        started[rank] = child
    ended = {}
    for rank, child in started.items():
        if fault == "stuck" and rank == "1":
            os.kill(child, signal.SIGKILL)
        ended[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    codes[fault] = ended
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_faults_of_ranks_end_in_one_line(tmp_path: Path) -> None:
    def lines(number: int, **other: Any) -> dict[str, list[str]]:
        common = {"ddp_timeout": 4, "save_on_interrupt": True, "max_steps": 20, "save_steps": 20}
        folder = tmp_path / str(number)
        given = {"0": common, "1": common | other}
        return {rank: training(folder, **each) for rank, each in given.items()}

    cases = {
        "differ": lines(1, max_steps=8),
        "killed": lines(2),
        "stuck": lines(3),
        "missing": {"0": lines(4)["0"]},
        "too many": {"2": lines(5)["0"]},
    }
    (tmp_path / "driver.py").write_text(FAULTS)
    done = subprocess.run(
        [sys.executable, "driver.py", json.dumps(cases)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    codes, failures = json.loads(done.stdout.splitlines()[-1]), []
    for fault, rank, code, words in (
        ("differ", "0", 2, "processes of one run differ: --max_steps is 20 in rank 0 and 8 in"),
        ("killed", "0", 1, "rank 0: another process has ended, its own last lines may say why"),
        ("stuck", "0", 1, "another process did not answer for 4 seconds (--ddp_timeout)"),
        ("missing", "0", 1, "another process did not answer for 4 seconds (--ddp_timeout)"),
        ("too many", "2", 1, "there are 2 processes (WORLD_SIZE), numbered from 0 (RANK)"),
    ):
        told = (tmp_path / f"{fault} {rank}").read_text()
        if codes[fault][rank] != code or words not in told or "Traceback" in told:
            failures.append((fault, codes[fault], told))
    assert not failures


def test_settings_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    other: dict[str, Any] = {}
    monkeypatch.setattr(processes, "gather_object", lambda own: [*own, own[0] | other])
    check_same({"--seed": 1, "--lr": None})
    other["--lr"] = 0.1
    with pytest.raises(InputError, match=r"--lr is None in rank 0 and 0\.1 in rank 1; give all"):
        check_same({"--seed": 1, "--lr": None})
