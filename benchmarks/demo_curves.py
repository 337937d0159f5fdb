"""Dev loss of the bundled model over forward passes: HiZOO, MeZO and AdamW, three seeds.

    python benchmarks/demo_curves.py                     # runs; demo_curves.json and .png
    python benchmarks/demo_curves.py --only_plot         # draws demo_curves.json again

Every run is one of HiZOO.sh at a fixed learning rate, or of finetune.sh, whose rate falls linearly
to 0; 16 examples a step. It prints its seconds. A step of HiZOO is three forward passes, of MeZO
two; one of AdamW counts as three, a backward pass for twice a forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
FIXED = {"LR": "1e-4", "DIRECTIONS": "1"}
# Script, variables, passes a step, colour.
METHODS: dict[str, tuple[str, dict[str, str], int, str]] = {
    "HiZOO": ("HiZOO.sh", FIXED, 3, "tab:blue"),
    "MeZO": ("HiZOO.sh", FIXED | {"HESSIAN_SMOOTH_TYPE": "constant0"}, 2, "tab:orange"),
    "AdamW": ("finetune.sh", {"BS": "16"}, 3, "tab:gray"),
}
COURSE = ("--eval_strategy", "steps", "--eval_steps", "20", "--save_steps", "400")


def measure(method: str, seed: int) -> dict[str, Any]:
    """Run a method once; returns its dev losses by step, and what it reports at the end."""
    script, variables, passes, _ = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        subprocess.run(
            [
                *("bash", str(HERE.parent / script), "--max_steps", "400", *COURSE),
                *("--save_strategy", "steps", "--output_dir", folder),
                *("--result_file", str(result_file)),
            ],
            env=os.environ | {"SEED": str(seed)} | variables,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        result = json.loads(result_file.read_text())
        state = json.loads((Path(folder) / "checkpoint-400" / "trainer_state.json").read_text())
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    return {
        "method": method,
        "seed": seed,
        "passes_a_step": passes,
        "dev_loss": losses,
        "zero_shot": result["metric_before_training"]["accuracy"],
        "accuracy": result["metric"]["accuracy"],
        "seconds": result["train_seconds"],
    }


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Draw the mean over the seeds of each method, and the range of its seeds."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for method, (_, _, passes, colour) in METHODS.items():
        curves = [run["dev_loss"] for run in runs if run["method"] == method]
        steps = sorted(map(int, curves[0]))
        values = [[curve[str(step)] for curve in curves] for step in steps]
        x = [passes * step for step in steps]
        axes.plot(x, [statistics.mean(each) for each in values], color=colour, label=method)
        lowest, highest = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="forward passes (a backward pass counts as two)", ylabel="dev loss", ylim=0)
    axes.set_title("Bundled model, SST2 samples: mean and range of three seeds", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run every method with every seed, write the numbers and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only_plot", action="store_true", help="draw the numbers that are there")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the numbers and the picture")
    arguments = parser.parse_args()
    numbers = arguments.folder / "demo_curves.json"
    if not arguments.only_plot:
        runs = []
        for method in METHODS:
            for seed in SEEDS:
                runs.append(measure(method, seed))
                shown = {name: value for name, value in runs[-1].items() if name != "dev_loss"}
                last = list(runs[-1]["dev_loss"].values())[-1]
                print(json.dumps({**shown, "last_dev_loss": last}), flush=True)
        numbers.write_text(json.dumps(runs, indent=1) + "\n")
    plot(json.loads(numbers.read_text()), arguments.folder / "demo_curves.png")


if __name__ == "__main__":
    main()
