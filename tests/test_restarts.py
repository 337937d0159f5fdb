"""Processes that torchrun restarts after one was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ROOT, finish, training, weights

from command_line.starting import take_store_of_restart


def test_only_a_restart_takes_a_new_store() -> None:
    first = {"MASTER_PORT": "100", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for count in ("0", "2"):
        environment = first | {"TORCHELASTIC_RESTART_COUNT": count}
        take_store_of_restart(environment)
        used = environment["TORCHELASTIC_USE_AGENT_STORE"], environment["MASTER_PORT"]
        assert used == (("True", "100") if count == "0" else ("False", "102"))


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False
    )
    return [int(word) for word in found.stdout.split()]


@pytest.mark.slow
def test_a_killed_process_costs_no_step(tmp_path: Path) -> None:
    steps = {"max_steps": 30, "save_steps": 15, "num_train": 24}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = training(tmp_path / "killed", per_device_train_batch_size=1, **steps)
    run = subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "--nproc_per_node", "2", str(ROOT / "run.py"), *argv],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / "killed/out/journal.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 10:
        assert run.poll() is None
        time.sleep(0.02)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    assert run.wait(120) == 0
    finish(training(tmp_path / "whole", per_device_train_batch_size=2, **steps))
    checkpoints = (tmp_path / name / "out/checkpoint-30" for name in ("killed", "whole"))
    first, second = map(weights, checkpoints)
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-3 for name in first)
