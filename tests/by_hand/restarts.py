"""Kill a rank of a torchrun job with SIGKILL; torchrun starts all again, and no step is lost.

PYTHONPATH=.:tests OMP_NUM_THREADS=1 python tests/by_hand/restarts.py FOLDER --processes 4
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from running import MODEL, ROOT, assert_same_checkpoint, training

from training.journal import FILE, read_journal

STEPS, KILLS = 40, 2


def launch(argv: list[str], processes: int, output: Path) -> subprocess.Popen:
    """Start torchrun, which may start the processes again as often as one is killed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--max-restarts={KILLS}", f"--nproc_per_node={processes}"]
    with output.open("w") as file:
        return subprocess.Popen(
            [*launcher, str(ROOT / "run.py"), *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )


def children_of(number: int) -> list[int]:
    """Return the processes that a process has started."""
    path = Path(f"/proc/{number}/task/{number}/children")
    return [int(child) for child in path.read_text().split()]


def steps_of(folder: Path) -> int:
    found = read_journal(folder / "out" / FILE)
    return found.steps if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    draw = random.Random(options.processes)
    for name in ("whole", "parted"):
        folder = options.folder / name
        argv = training(
            folder,
            model_name=MODEL,
            max_steps=STEPS,
            save_steps=15,
            num_train=32,
            per_device_train_batch_size=8 // options.processes,
        )
        began = time.monotonic()
        job = launch(argv, options.processes, options.folder / f"{name}.txt")
        for kill in range(KILLS if name == "parted" else 0):
            while steps_of(folder) < (kill + 1) * STEPS // (KILLS + 1):
                assert job.poll() is None
                time.sleep(0.01)
            ranks = [child for child in children_of(job.pid) if b"run.py" in cmdline(child)]
            rank = draw.choice(ranks)
            os.kill(rank, signal.SIGKILL)
            print(f"after {steps_of(folder)} steps: killed process {rank} of {ranks}")
            while any(cmdline(each) for each in ranks):
                time.sleep(0.05)
        assert job.wait() == 0, (options.folder / f"{name}.txt").read_text()
        print(f"{name}: {time.monotonic() - began:.0f} s, {steps_of(folder)} steps")
    lines = (options.folder / "parted.txt").read_text().splitlines()
    print("\n".join(line for line in lines if line.startswith("going on from")))
    last = f"out/checkpoint-{STEPS}"
    assert_same_checkpoint(options.folder / "whole" / last, options.folder / "parted" / last)
    print("weights, h and log are the same, bit for bit")


def cmdline(number: int) -> bytes:
    """Return a process's command line, nothing if it is gone."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


if __name__ == "__main__":
    main()
