"""Tables and pictures of what methods.py has measured.

    python benchmarks/methods_table.py FILE.json … [--passes 0 50 100 200 400 1000]
    python benchmarks/methods_table.py FILE.json … --methods "mezo lr=1e-6" "broadcast passes=50"
    python benchmarks/methods_table.py FILE.json … --plot FILE.png     of one model and task

A cell holds dev loss and accuracy, each the mean of the seeds and its standard error; n is given
where the cell lacks some of the seeds. They are those of the first point at or after the column's
passes, less than a step of the method later. "Diverged" are seeds whose loss is not finite. A run
whose method names its ``passes`` stands in that column alone. Linear probing stands in the first
column that it can afford.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from methods_files import SHARED, read_file

from utils import InputError, exit_code, new_figure, save_figure

COLUMNS = (0, 50, 100, 200, 400, 1000)
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
MODES = {"ft": "all weights", "head": "head tuning", "lora": "LoRA", "prefix": "prefix-tuning"}
# How people say every setting, in this order.
SETTINGS = {
    "mode": "{}",
    "lr": "learning rate {}",
    "kappa": "κ {}",
    "alpha": "α {}",
    "hessian": "{} Hessian",
    "n": "{} directions",
    "eps": "μ {}",
    "every": "c every {} steps",
    "damping": "λ {}",
    "from": "blocks from {} of the depth on",
    "matrices": "matrices {}",
    "decay": "{} decay",
    "hold": "constant for {} of the steps",
    "batch": "{} examples a step",
    "passes": "{} passes",
}


def settings_of(method: str) -> dict[str, Any]:
    """Return the kind of a method and its settings, numbers as numbers.

    Raises:
        InputError: the kind or a setting is unknown.
    """
    kind, *pairs = method.split() or [""]
    if kind not in NAMES:
        raise InputError(f"unknown kind {kind!r} in {method!r}: choose one of {', '.join(NAMES)}")
    settings: dict[str, Any] = {"method": method, "kind": kind}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise InputError(f"unknown setting {name!r} in {method!r}: choose one of {known}")
        try:
            settings[name] = float(value)
        except ValueError:
            settings[name] = value
    return settings


def short(value: float) -> str:
    """Return a number as people write it: 1e-6."""
    return f"{value:g}".replace("e-0", "e-")


def label(method: str) -> str:
    """Return a method as people say it, with all its settings."""
    settings = settings_of(method)
    words = [NAMES[settings["kind"]]]
    for name, phrase in SETTINGS.items():
        if name in settings:
            value = settings[name]
            text = short(value) if isinstance(value, float) else MODES.get(value, value)
            words.append(phrase.format(text))
    return ", ".join(words)


def mean_and_error(values: Sequence[float]) -> str:
    """Return a mean, and its standard error if it is not 0."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    texts = [f"{value:.3f}".removeprefix("0") for value in (statistics.mean(values), error)]
    return texts[0] if texts[1] == ".000" else " ± ".join(texts)


def fitting(run: dict[str, Any], columns: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return a run's measurement in each column that has one."""
    curve, last = run["curve"], run["curve"][-1]
    if run["method"] == "probing":
        return dict([(column, last) for column in sorted(columns) if column >= last["passes"]][:1])
    if "passes" in settings_of(run["method"]):
        curve = [last]
    step = math.ceil(last["passes"] / last["steps"]) if last.get("steps") else 1
    found = {}
    for column in columns:
        row = next((row for row in curve if row["passes"] >= column), None)
        if row and row["passes"] - column < (step if column else 1):
            found[column] = row
    return found


def without_passes(method: str) -> str:
    """Return a method without its number of passes."""
    return " ".join(word for word in method.split() if not word.startswith("passes="))


def cells(
    runs: list[dict[str, Any]], columns: Sequence[int]
) -> dict[str, dict[int, dict[int, Any]]]:
    """Return the measurement of each method, at each number of passes, of each seed."""
    found: dict[str, dict[int, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for column, row in fitting(run, columns).items():
            found[without_passes(run["method"])][column][run["seed"]] = row
    return found


def text_of(rows: list[dict[str, Any]], seeds: int) -> str:
    """Return the text of a cell: the measurements of those seeds that it has."""
    if not rows:
        return ""
    diverged = sum(not math.isfinite(row["loss"]) for row in rows)
    if diverged:
        return "diverged" if diverged == len(rows) else f"{diverged} of {len(rows)} diverged"
    names = [name for name in ("loss", "accuracy") if rows[0][name] is not None]
    text = ", ".join(mean_and_error([row[name] for row in rows]) for name in names)
    return f"{text} (n = {len(rows)})" if len(rows) < seeds else text


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
        most = max(map(len, by_column.values()))
        texts = [text_of([*by_column.get(column, {}).values()], most) for column in columns]
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

    Runs of a budget (``passes=``) are points of one line, each the end of its run. A point where a
    seed's loss is not finite is left out.
    """
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        line = without_passes(run["method"])
        is_one_budget = line != run["method"]
        for index, row in enumerate(run["curve"]):
            if not is_one_budget or row is run["curve"][-1]:
                place = row["passes"] if is_one_budget else index
                value = row[name] if math.isfinite(row["loss"]) else math.nan
                found[line][place].append((row["passes"], value))
    return {
        method: {
            place: (
                statistics.mean(passes for passes, _ in of_seeds),
                statistics.mean(values),
                statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0,
            )
            for place, of_seeds in sorted(by_place.items())
            if all(map(math.isfinite, values := [value for _, value in of_seeds]))
        }
        for method, by_place in found.items()
    }


def colors(number: int) -> list[Any]:
    """Return so many different colours."""
    if number <= 10:
        return [f"C{index}" for index in range(number)]  # matplotlib has ten such
    from matplotlib import colormaps

    return [*colormaps["turbo"].resampled(number)(range(number))]


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw dev loss and accuracy over forward passes: mean and standard error of the seeds.

    A dashed line joins the ends of runs of different lengths.
    """
    figure = new_figure(path, (10, 4.4))
    names = [name for name in ("loss", "accuracy") if runs[0]["curve"][0][name] is not None]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        by_method = {
            method: by_place
            for method, by_place in points(runs, name).items()
            if by_place and method != "zeroshot"
        }
        budgets = {method.split()[0] for run in runs if " passes=" in (method := run["method"])}
        for (method, by_place), color in zip(
            by_method.items(), colors(len(by_method)), strict=True
        ):
            passes, mean, error = map(torch.tensor, zip(*by_place.values(), strict=True))
            how = {"color": color, "label": said(method)}
            if len(passes) == 1:
                axes.errorbar(passes, mean, error, marker="D", linestyle="none", capsize=3, **how)
                continue
            dashes = "--" if method.split()[0] in budgets else "-"
            axes.plot(passes, mean, dashes, marker="o", markersize=3, **how)
            axes.fill_between(
                passes, mean - error, mean + error, alpha=0.2, linewidth=0, color=color
            )
        axes.set(xlabel="forward passes (a backward pass counts as two)", ylabel=f"dev {name}")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, path)


def chosen(runs: list[dict[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return the runs of some methods, in the order of these."""
    return [run for method in methods for run in runs if run["method"] == method]


def main() -> None:
    """Print a table for each model, task and whatever else the runs of a file share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="of methods.py --output")
    parser.add_argument("--passes", type=int, nargs="+", default=COLUMNS, help="columns")
    parser.add_argument(
        "--methods", nargs="+", help="these alone, in this order, as the files name them"
    )
    parser.add_argument("--plot", type=Path, help="picture of the runs, as .png, .pdf or .svg")
    arguments = parser.parse_args()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for shared, runs in map(read_file, arguments.files):
        groups[tuple(shared.values())] += runs
    if arguments.methods:
        present = {run["method"] for runs in groups.values() for run in runs}
        if missing := [method for method in arguments.methods if method not in present]:
            raise InputError(f"--methods: no file has a run of {missing[0]!r}")
        groups = {key: chosen(runs, arguments.methods) for key, runs in groups.items()}
    groups = {key: runs for key, runs in groups.items() if runs}
    if arguments.plot:
        if len(groups) != 1:
            raise InputError("--plot: give files of one model, task and kind of rows")
        draw(*groups.values(), arguments.plot)
    for key, runs in groups.items():
        model, task, *rest = zip(SHARED, key, strict=True)
        special = [f"{name} {value}" for name, value in rest if value != SHARED[name]]
        title = ", ".join([model[1], task[1], *special])
        print(f"\n{title}\n\n{table(runs, arguments.passes)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
