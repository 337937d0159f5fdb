"""How much faster a replay is than the training that it repeats, in processor time.

    python benchmarks/replay_speed.py [--model_name data/tiny-opt] [--steps 60]

One core; the bundled SST2 samples, 16 examples a step. What a run and a replay take to start, as
one of a single step shows, is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import replay
import run
from training.journal import FILE, read_journal

METHODS = {
    "HiZOO": ("--hessian_smooth_type", "constant1e-5"),
    "HiZOO, bfloat16 layer by layer": ("--hessian_smooth_type", "constant1e-5", "--load_bfloat16"),
    "MeZO": ("--hessian_smooth_type", "constant0"),
}


def seconds_of(command: list[str], main: Callable[[list[str]], int]) -> float:
    """Return the processor time of a command in this process."""
    began = time.process_time()
    assert main(command) == 0
    return time.process_time() - began


def training(model: str, folder: Path, steps: int, *more: str) -> list[str]:
    """Return run.py's arguments of a training run without checkpoints."""
    line = ["--task_name", "SST2", "--data_dir", str(ROOT / "data/samples"), "--model_name", model]
    line += ["--trainer", "zo", "--train_as_classification", "--num_train", "200", "--no_eval"]
    line += ["--per_device_train_batch_size", "16", "--learning_rate", "1e-4", "--max_steps"]
    line += [str(steps), "--save_strategy", "no", "--disable_tqdm", "True", "--logging_steps"]
    line += ["1000", "--output_dir", str(folder), "--result_file", str(folder / "result.json")]
    return [*line, *more]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name", default=str(ROOT / "data/tiny-opt"))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print("| method | training, steps a second | replay | times | bytes a step |")
    print("|---|---|---|---|---|")
    for name, more in METHODS.items():
        with tempfile.TemporaryDirectory() as temporary:
            few, many = Path(temporary, "few"), Path(temporary, "many")
            start = seconds_of(training(options.model_name, few, 1, *more), run.main)
            trained = seconds_of(training(options.model_name, many, options.steps, *more), run.main)
            line = ["--journal", str(many / FILE), "--verify"]
            begun = seconds_of([*line, "--steps", "1"], replay.main)
            replayed = seconds_of(line, replay.main)
            journal = read_journal(many / FILE)
            size = (journal.ends[0][-2] - journal.ends[0][0]) / (options.steps - 1)
        rates = [(options.steps - 1) / seconds for seconds in (trained - start, replayed - begun)]
        print(
            f"| {name} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.1f} | {size:g} |"
        )


if __name__ == "__main__":
    main()
