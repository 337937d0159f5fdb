"""The step from the curvature beside fixed learning rates: a table of the runs in runs/.

    python benchmarks/learning_rates.py

For every model and task: t* of the probes (mean of the seeds), the η that `curvature` has taken,
the fixed learning rate of MeZO whose mean dev loss at the end is lowest, and how many steps it
takes, on average over the seeds, to a dev loss that lies nine tenths of the way from the zero-shot
one to the end of that best run. Between two evaluations the loss is taken as a straight line.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
# The name of its probes, the file of its runs, the end of its methods' names, and its title.
CASES = (
    ("tiny-opt_sst2", "tiny_opt_sst2", "", "tiny-opt, SST2"),
    ("", "tiny_opt_sst2", " mode=lora", "tiny-opt, SST2, LoRA"),
    ("", "tiny_opt_sst2", " mode=head", "tiny-opt, SST2, head"),
    ("smollm2_sst2", "smollm2_sst2", "", "SmolLM2, SST2"),
)
PUBLISHED, OURS = "mezo lr=1e-6", "curvature"
WAY = 0.9

Curve = list[dict[str, Any]]


def curves_of(file: str, mode: str) -> dict[str, list[Curve]]:
    """Return the curves of all seeds by method, of those in a mode."""
    found: dict[str, list[Curve]] = {}
    for run in json.loads((RUNS / f"{file}.json").read_text())["runs"]:
        method, _, its_mode = run["method"].partition(" mode=")
        if its_mode == mode.removeprefix(" mode="):
            found.setdefault(method, []).append(run["curve"])
    return found


def final_loss(curves: list[Curve]) -> float:
    """Return the mean of the last dev losses."""
    return statistics.mean(curve[-1]["loss"] for curve in curves)


def steps_to(level: float, curve: Curve) -> float | None:
    """Return after how many steps a curve first is at ``level``; None: never."""
    for before, after in itertools.pairwise(curve):
        if after["loss"] <= level:
            part = (before["loss"] - level) / (before["loss"] - after["loss"])
            return before["steps"] + part * (after["steps"] - before["steps"])
    return None


def shown_steps(level: float, curves: list[Curve]) -> str:
    """Return the mean number of steps to ``level``, or that some run does not come there."""
    steps = [steps_to(level, curve) for curve in curves]
    if None in steps:
        shortest = min(curve[-1]["steps"] for curve in curves)
        return f"> {shortest} ({steps.count(None)} of {len(steps)})"
    return f"{statistics.mean(steps):.0f}"


def row(case: str, file: str, mode: str, title: str) -> str:
    """Return a line of the table."""
    curves = curves_of(file, mode)
    fixed = [method for method in curves if method.split(" lr=")[0] == "mezo"]
    best = min(fixed, key=lambda method: final_loss(curves[method]))
    zero_shot = statistics.mean(curve[0]["loss"] for curve in curves[best])
    level = zero_shot + WAY * (final_loss(curves[best]) - zero_shot)
    probes = [json.loads(path.read_text()) for path in RUNS.glob(f"probes/{case}_float32_*.json")]
    best_steps = [probe["probes"][0]["step"]["best"] for probe in probes]
    etas = [point["eta"] for curve in curves[OURS] for point in curve[1:]]
    cells = [
        title,
        f"{statistics.mean(best_steps):.1e}" if best_steps else "",
        f"{min(etas):.1e} to {max(etas):.1e}",
        best.removeprefix("mezo lr="),
        f"{level:.3f}",
        *(shown_steps(level, curves.get(method, [])) for method in (PUBLISHED, OURS, best)),
        str(len(curves[OURS])),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    names = ["model, task", "t*", "η taken", "best fixed η", "dev loss"]
    names += ["steps at 1e-6", "steps without η", "steps at the best η", "seeds"]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for case in CASES:
        print(row(*case))


if __name__ == "__main__":
    sys.exit(main())
