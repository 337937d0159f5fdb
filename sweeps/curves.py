"""A picture of runs: dev loss and dev metric over forward passes and over seconds.

Needs matplotlib, which is loaded only when a picture is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sweeps.results import Outcome, differing_settings
from utils import InputError, new_figure, save_figure

HEIGHTS = {"dev_loss": "dev loss", "dev_metric": "dev {metric}"}
WIDTHS = {"passes": "forward passes", "seconds": "seconds of training"}
# A backward pass costs as much as this many forward passes.
BACKWARD = 2
# matplotlib has ten colors; further lines repeat them in other styles.
COLORS, STYLES = 10, ("-", "--", ":", "-.")


def curves(outcomes: Sequence[Outcome], height: str, width: str) -> dict[str, pd.DataFrame]:
    """Return the course of every setting by its label, for runs of one task, finished or not.

    A course has a row for each step that all of a setting's runs have: "width" and "mean", and the
    "low", "high" and "runs" of the band.
    """
    # The method first, as people say it.
    names = sorted(differing_settings(outcomes), key=lambda name: name != "hessian_smooth_type")
    settings: dict[str, list[pd.DataFrame]] = {}
    for each in outcomes:
        course = pd.DataFrame(each.curves, dtype=float)
        backward = course["backward_passes"].fillna(0)
        course["passes"] = course["forward_passes"] + BACKWARD * backward
        course = course[[width, height]].dropna()
        if len(course):
            pairs = zip(names, each.values(names), strict=True)
            label = ", ".join(_spoken(name, value) for name, value in pairs) or "the runs"
            settings.setdefault(label, []).append(course)
    found = {}
    for label, runs in settings.items():
        steps = pd.concat(runs).groupby(level=0)
        course = steps[height].agg(mean="mean", low="min", high="max", runs="count")
        course = course.assign(width=steps[width].mean())[course["runs"] == len(runs)]
        if len(course):
            found[label] = course
    return found


def _spoken(name: str, value: str) -> str:
    """Return a setting as people say it."""
    if name == "hessian_smooth_type":
        return "MeZO" if value == "constant0" else f"HiZOO, α {value.removeprefix('constant')}"
    return f"{name.replace('_', ' ')} {value}"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the courses of runs.

    Raises:
        InputError: matplotlib is not installed or cannot write such a file, the runs are of several
            tasks, or none has dev losses.
        NotWritten: the file cannot be written.
    """
    tasks = list(dict.fromkeys(each.task for each in outcomes))
    if len(tasks) > 1:
        named = ", ".join(tasks)
        raise InputError(f"--plot {path}: a picture shows one task, give results of one of {named}")
    found = {(h, w): curves(outcomes, h, w) for h in HEIGHTS for w in WIDTHS}
    heights = [height for height in HEIGHTS if any(found[height, width] for width in WIDTHS)]
    widths = [width for width in WIDTHS if any(found[height, width] for height in HEIGHTS)]
    if not heights:
        way_out = "train with --num_dev and --eval_strategy"
        raise InputError(f"--plot {path}: no run has dev losses and their passes; {way_out}")
    labels = list(dict.fromkeys(label for panel in found.values() for label in panel))
    runs = [int(course["runs"].iloc[0]) for panel in found.values() for course in panel.values()]
    has_bands = min(runs) > 1  # bands for all lines or for none
    figure = new_figure(path, (5 * len(widths), 3 * len(heights) + 0.25 * len(labels)))
    from matplotlib.ticker import LogLocator  # new_figure has said if matplotlib is missing

    axes = figure.subplots(len(heights), len(widths), squeeze=False, sharex="col", sharey="row")
    for (row, height), (column, width) in itertools.product(enumerate(heights), enumerate(widths)):
        panel, lines = axes[row, column], found[height, width]
        for label, course in lines.items():
            number = labels.index(label)
            color, line = f"C{number}", STYLES[number // COLORS % len(STYLES)]
            panel.plot("width", "mean", line, data=course, color=color, label=label, marker=".")
            if has_bands:
                band = course["width"], course["low"], course["high"]
                panel.fill_between(*band, color=color, alpha=0.15, linewidth=0)
        if height == "dev_loss" and all((course["low"] > 0).all() for course in lines.values()):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        backward = width == "passes" and any(each.curves["backward_passes"] for each in outcomes)
        panel.set_xlabel(WIDTHS[width] + " (a backward pass as two)" * backward)
        panel.set_ylabel(HEIGHTS[height].format(metric=outcomes[0].metric))
        panel.label_outer()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", frameon=False, fontsize=8)
    number = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    of_runs = f"mean of {number} runs" if max(runs) > 1 else "single runs"
    bands = "; bands from the lowest to the highest" if has_bands else ""
    title = figure.suptitle(f"{tasks[0]}: {of_runs}{bands}", fontsize=10)
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # a dollar sign is one
    save_figure(figure, path)
