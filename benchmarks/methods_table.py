"""Tables and pictures of what methods.py has measured.

    python benchmarks/methods_table.py FILE.json … [--passes 0 50 100 200 400 1000]
    python benchmarks/methods_table.py FILE.json … --plot FILE.png     of one model and task

A cell holds dev loss and accuracy, each the mean of the seeds and its standard error; n is given
where the cell lacks some of the seeds. A run whose method names its ``passes`` stands in that
column alone. Linear probing stands in the first column that it can afford.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from utils import read_json, write_text_atomically

COLUMNS = (0, 50, 100, 200, 400, 1000)
LONGEST_STEP = 9  # passes: FZOO's
PUBLISHED_RATE = 1e-6  # of MeZO and HiZOO, for models of billions of weights
NAMES = {
    "mezo": "MeZO",
    "hizoo": "HiZOO",
    "curvature": "MeZO, LR=auto",
    "fzoo": "FZOO",
    "adamw": "AdamW",
    "broadcast": "Error broadcast",
    "probing": "Linear probing",
    "zeroshot": "Zero-shot",
}


def settings_of(method: str) -> dict[str, Any]:
    """Return the kind of a method and its settings, numbers as numbers."""
    kind, *pairs = method.split()
    settings: dict[str, Any] = {"method": method, "kind": kind}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            settings[name] = float(value)
        except ValueError:
            settings[name] = value
    return settings


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file of methods.py; none if there is no such file."""
    return read_json(path).get("runs", [])


def write_runs(path: Path, shared: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Write a file of methods.py: what all runs share, and a line for each measurement."""
    text = json.dumps(shared, ensure_ascii=False, allow_nan=False)[:-1] + ', "runs": [\n'
    lines = []
    for run in runs:
        rows = [
            json.dumps({name: _short(value) for name, value in r.items()}) for r in run["curve"]
        ]
        rest = json.dumps({name: value for name, value in run.items() if name != "curve"})
        lines.append(rest[:-1] + ', "curve": [\n  ' + ",\n  ".join(rows) + "\n]}")
    write_text_atomically(path, text + ",\n".join(lines) + "\n]}\n")


def _short(value: Any) -> Any:
    """Return a number with the digits that mean something; None for what JSON cannot hold."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if abs(value) < float("inf") else None


def short(value: float) -> str:
    """Return a number as people write it: 1e-6."""
    return f"{value:g}".replace("e-0", "e-")


def label(method: str) -> str:
    """Return a method as people say it."""
    settings = settings_of(method)
    words = [NAMES[settings["kind"]]]
    if settings.get("mode", "ft") != "ft":
        words += [{"head": "head tuning"}.get(settings["mode"], settings["mode"])]
    if "from" in settings and settings["kind"] == "adamw":
        words += [f"blocks from {settings['from']:g} of the depth on"]
    words += [f"learning rate {short(settings['lr'])}"] if "lr" in settings else []
    words += [f"α {short(settings['alpha'])}"] if settings.get("alpha") else []
    words += ["c every tenth step"] if settings.get("every") == 10 else []
    words += ["rate falling to 0"] if settings.get("decay") == "linear" else []
    if settings["kind"] == "broadcast":
        named = {"kappa": "κ", "damping": "λ", "from": "from", "matrices": "matrices"}
        words += [
            f"{word} {settings[name]:g}" if name != "matrices" else f"{word} {settings[name]}"
            for name, word in named.items()
            if name in settings
        ]
        words += ["κ constant in the first half"] if settings.get("hold") == 0.5 else []
    return ", ".join(words)


def mean_and_error(values: Sequence[float]) -> str:
    """Return a mean, and its standard error if it is not 0."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    texts = [f"{value:.3f}".removeprefix("0") for value in (statistics.mean(values), error)]
    return texts[0] if texts[1] == ".000" else " ± ".join(texts)


def cells(
    runs: list[dict[str, Any]], columns: Sequence[int]
) -> dict[str, dict[int, dict[int, Any]]]:
    """Return the measurement of each method, at each number of passes, of each seed."""
    found: dict[str, dict[int, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        words = [word for word in run["method"].split() if not word.startswith("passes=")]
        is_one_budget = len(words) < len(run["method"].split())
        of_run = {}
        for row in run["curve"][-1:] if is_one_budget else run["curve"]:
            too_many = [row["passes"] - column for column in columns]
            fitting = [
                column
                for column, more in zip(columns, too_many, strict=True)
                if 0 <= more < (LONGEST_STEP if column else 1)
                or (words == ["probing"] and more < 0)
            ]
            if fitting:
                of_run[min(fitting)] = row
        for column, row in of_run.items():
            found[" ".join(words)][column][run["seed"]] = row
    return found


def table(runs: list[dict[str, Any]], columns: Sequence[int] = COLUMNS) -> str:
    """Return a Markdown table: a line for each method, a column for each number of passes."""
    found = cells(runs, columns)
    columns = [c for c in columns if any(c in by_column for by_column in found.values())]
    lines = [
        "| method | seeds | " + " | ".join(f"{c} passes" for c in columns) + " | s a pass |",
        "|" + "---|" * (len(columns) + 3),
    ]
    of_seeds = {run["seed"]: run["best_constant"] for run in runs if run.get("best_constant")}
    if constants := list(of_seeds.values()):
        loss, accuracy = (
            mean_and_error([constant[name] for constant in constants])
            for name in ("loss", "accuracy")
        )
        empty = " |" * (len(columns) + 1)
        lines.append(f"| best constant answer: {loss}, {accuracy} | {empty}")
    for method, by_column in found.items():
        texts, most = [], max(map(len, by_column.values()))
        for column in columns:
            rows = [*by_column.get(column, {}).values()]
            names = [n for n in ("loss", "accuracy") if rows and rows[0][n] is not None]
            text = ", ".join(mean_and_error([row[name] for row in rows]) for name in names)
            texts.append(f"{text} (n = {len(rows)})" if 0 < len(rows) < most else text)
        times = [
            row["seconds"] / row["passes"]
            for rows in by_column.values()
            for row in rows.values()
            if row["passes"]
        ]
        seconds = f"{statistics.median(times):.2f}" if times else ""
        lines.append(f"| {label(method)} | {most} | " + " | ".join(texts) + f" | {seconds} |")
    return "\n".join(lines)


def said(method: str) -> str:
    """Return a method as a legend says it."""
    settings = settings_of(method)
    of_papers = settings["kind"] in ("mezo", "hizoo") and settings.get("lr") == PUBLISHED_RATE
    name = label(method).replace(f"learning rate {short(PUBLISHED_RATE)}", "published rate")
    return name if of_papers else name.replace("learning rate", "rate")


def points(
    runs: list[dict[str, Any]], name: str
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Return passes, mean and standard error of a measurement, of each method at each point.

    Runs of a budget (``passes=``) are points of one line, each the end of its run.
    """
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        words = [word for word in run["method"].split() if not word.startswith("passes=")]
        is_one_budget = len(words) < len(run["method"].split())
        for index, row in enumerate(run["curve"]):
            if not is_one_budget or row is run["curve"][-1]:
                place = row["passes"] if is_one_budget else index
                found[" ".join(words)][place].append((row["passes"], row[name]))
    return {
        method: {
            place: (
                statistics.mean(passes for passes, _ in of_seeds),
                statistics.mean(values := [value for _, value in of_seeds]),
                statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0,
            )
            for place, of_seeds in sorted(by_place.items())
        }
        for method, by_place in found.items()
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw dev loss and accuracy over forward passes: mean and standard error of the seeds.

    A dashed line joins the ends of runs of different lengths.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    names = [name for name in ("loss", "accuracy") if runs[0]["curve"][0][name] is not None]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        by_method = points(runs, name)
        budgets = {method.split()[0] for run in runs if " passes=" in (method := run["method"])}
        for number, method in enumerate(m for m in by_method if m != "zeroshot"):
            passes, mean, error = map(torch.tensor, zip(*by_method[method].values(), strict=True))
            how = {"color": f"C{number}", "label": said(method)}
            if len(passes) == 1:
                axes.errorbar(passes, mean, error, marker="D", linestyle="none", capsize=3, **how)
                continue
            dashes = "--" if method.split()[0] in budgets else "-"
            axes.plot(passes, mean, dashes, marker="o", markersize=3, **how)
            axes.fill_between(
                passes, mean - error, mean + error, alpha=0.2, linewidth=0, color=how["color"]
            )
        axes.set(xlabel="forward passes (a backward pass counts as two)", ylabel=f"dev {name}")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print a table for each model and task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="of methods.py --output")
    parser.add_argument("--passes", type=int, nargs="+", default=COLUMNS, help="columns")
    parser.add_argument("--plot", type=Path, help="picture of all runs")
    arguments = parser.parse_args()
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for content in map(read_json, arguments.files):
        runs[content["model"], content["task"]] += content["runs"]
    if arguments.plot:
        draw([run for of_both in runs.values() for run in of_both], arguments.plot)
    for (model, task), of_both in runs.items():
        print(f"\n{model}, {task}\n\n{table(of_both, arguments.passes)}")


if __name__ == "__main__":
    main()
