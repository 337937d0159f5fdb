"""Kill a run 50 times with SIGKILL, at random moments, and compare it with one that was left alone.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python tests/by_hand/kills.py FOLDER --processes 1

Takes some minutes. The libraries are loaded once; every start is a fork, which is killed. With more
processes one of them is killed, and the others end as torchrun would end them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import torch
from running import assert_same_tensors, log_of, training, weights

import run
from training.checkpoints import UNFINISHED
from training.journal import JOURNAL, read_journal

RESUMING = r"resuming from (?:\S*checkpoint-(\d+))?(?:, and )?(?:(\d+) steps)?"


def command(folder: Path, steps: int, processes: int) -> list[str]:
    return training(
        folder,
        max_steps=steps,
        save_steps=7,
        save_total_limit=2,
        num_dev=4,
        eval_strategy="steps",
        eval_steps=7,
        num_train=100,
        per_device_train_batch_size=4 // processes,
        disable_tqdm="True",
    )


def start(argv: list[str], output: Path, processes: int) -> list[int]:
    """Start the processes of a run; returns their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            with output.open("a" if rank else "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    os._exit(run.main(argv))
                except BaseException:  # another process is gone, and its connection with it
                    os._exit(1)
        started.append(child)
    return started


def steps_of(folder: Path) -> int:
    found = read_journal(folder / "out" / JOURNAL)
    return found.steps if found else 0


def is_running(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG) == (0, 0)


def kill(children: list[int], draw: random.Random) -> None:
    draw.shuffle(children)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    draw, steps = random.Random(0), 6 * options.kills
    whole, parted = options.folder / "whole", options.folder / "parted"
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    for child in start(
        command(whole, steps, options.processes), options.folder / "0", options.processes
    ):
        assert os.waitpid(child, 0)[1] == 0, (options.folder / "0").read_text()
    argv, output = command(parted, steps, options.processes), options.folder / "1"
    kills = half_checkpoints = 0
    lost: list[int] = []
    print("kill  steps in the journal  checkpoint being written  resumed with  lost")
    known, half = 0, False
    while not (parted / "result.json").is_file():
        children = start(argv, output, options.processes)
        target, deadline = known + draw.randint(0, 9), time.monotonic() + 300
        while all(map(is_running, children)) and steps_of(parted) < target:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if kills < options.kills:
            time.sleep(draw.random() * 0.15)
            kill(children, draw)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        text = output.read_text()
        found = re.search(RESUMING, text)
        if found or known == 0 or kills >= options.kills:
            resumed = sum(int(part or 0) for part in found.groups()) if found else 0
            if kills and (found or "step 1 of" in text):
                lost.append(known - resumed)
                print(f"{kills:4}  {known:20}  {half!s:>24}  {resumed:12}  {known - resumed:4}")
        if kills < options.kills and not (parted / "result.json").is_file():
            kills += 1
        known = steps_of(parted)
        half = (parted / "out" / UNFINISHED).exists()
        half_checkpoints += half
    name = f"out/checkpoint-{steps}"
    assert_same_tensors(weights(whole / name), weights(parted / name))
    states = [torch.load(p / name / "optimizer.pt", weights_only=True) for p in (whole, parted)]
    for key, state in states[0]["state"].items():
        assert_same_tensors(state, states[1]["state"][key])
    for entry in ("loss", "eval_loss", "projected_gradient", "curvature", "step"):
        assert log_of(whole / name, entry) == log_of(parted / name, entry), entry
    print(
        f"{kills} kills, {half_checkpoints} while a checkpoint was written; {sum(lost)} steps lost"
    )
    print("weights, h and log are the same, bit for bit")


if __name__ == "__main__":
    main()
