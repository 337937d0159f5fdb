"""One picture of runs: dev loss and dev metric over forward passes and over seconds.

Needs matplotlib, which is loaded only when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.tables import Loaded, differing_settings, shown_setting
from utils import InputError, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What lies above the axes, and below them.
HEIGHTS = {"dev_loss": "dev loss", "dev_metric": "dev {metric}"}
WIDTHS = {"passes": "forward passes", "seconds": "seconds of training"}
BACKWARD = 2


@dataclass(frozen=True)
class Curve:
    """The course of one setting: at every step that all of its runs have, means and deviations.

    Attributes:
        label: the setting.
        widths: mean forward passes, or seconds, at each step, (steps,).
        means: of the loss or the metric, (steps,).
        deviations: sample standard deviations over the runs, (steps,); 0 for a single run.
        runs: how many.
    """

    label: str
    widths: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    runs: int


def curves(loaded: Sequence[Loaded], height: str, width: str) -> list[Curve]:
    """Return the course of every setting in which runs differ; none of runs without one.

    Args:
        loaded: runs of one task, finished or not.
        height: "dev_loss" or "dev_metric".
        width: "passes" or "seconds".
    """
    names = differing_settings(loaded)
    settings: dict[tuple[str, ...], list[Loaded]] = {}
    for each in loaded:
        key = tuple(shown_setting(each.settings.get(name)) for name in names)
        settings.setdefault(key, []).append(each)
    found = []
    for key, runs in settings.items():
        points = [_points(run.result.get("history", {}), height, width) for run in runs]
        points = [each for each in points if each]
        if not points:
            continue
        steps = sorted(set.intersection(*({*each} for each in points)))
        if not steps:
            continue
        at = np.array([[each[step] for step in steps] for each in points])
        label = ", ".join(f"{n} {value}" for n, value in zip(names, key, strict=True))
        spread = at[:, :, 1].std(axis=0, ddof=1) if len(points) > 1 else np.zeros(len(steps))
        widths, means = at[:, :, 0].mean(axis=0), at[:, :, 1].mean(axis=0)
        found.append(Curve(label or "the runs", widths, means, spread, len(points)))
    return found


def _points(history: Mapping[str, Any], height: str, width: str) -> dict[int, tuple[float, float]]:
    """Return width and height by step, where a run has both, and both are finite."""
    points = {}
    for step, value in history.get(height, {}).items():
        at = _width(history, step, width)
        if value is not None and at is not None:
            points[int(step)] = (at, value)
    return points


def _width(history: Mapping[str, Any], step: str, width: str) -> float | None:
    if width == "seconds":
        return history.get("seconds", {}).get(step)
    forward = history.get("forward_passes", {}).get(step)
    if forward is None:
        return None
    return forward + BACKWARD * history.get("backward_passes", {}).get(step, 0)


def draw(loaded: Sequence[Loaded], path: Path) -> None:
    """Draw the courses of runs into a file, of the kind that its ending names.

    Raises:
        InputError: matplotlib is not installed or knows no such kind of file, the runs are of
            several tasks, or none has dev losses.
        NotWritten: the file cannot be written.
    """
    tasks = list(dict.fromkeys(each.result["task"] for each in loaded))
    if len(tasks) > 1:
        raise InputError(
            f"--plot {path}: a picture shows one task, these are {', '.join(tasks)}; give the "
            "results of one"
        )
    shown = {
        (height, width): found
        for height in HEIGHTS
        for width in WIDTHS
        if (found := curves(loaded, height, width))
    }
    heights = [height for height in HEIGHTS if any(key[0] == height for key in shown)]
    widths = [width for width in WIDTHS if any(key[1] == width for key in shown)]
    if not shown:
        raise InputError(
            f"--plot {path}: no run has dev losses (--num_dev, --eval_strategy) with the forward "
            "passes until then"
        )
    labels = max(shown.values(), key=len)
    size = (5 * len(widths), 3 * len(heights) + 0.25 * len(labels))
    figure = new_figure(path, size)
    axes = figure.subplots(len(heights), len(widths), squeeze=False, sharex="col", sharey="row")
    metric = _metric_name(loaded)
    for row, height in enumerate(heights):
        for column, width in enumerate(widths):
            panel = axes[row, column]
            _draw_panel(panel, shown.get((height, width), []), height == "dev_loss")
            if column == 0:
                panel.set_ylabel(HEIGHTS[height].format(metric=metric))
            if row == len(heights) - 1:
                backward = any(each.result.get("backward_passes") for each in loaded)
                remark = " (a backward pass as two)" if backward and width == "passes" else ""
                panel.set_xlabel(WIDTHS[width] + remark)
    handles, names = axes[0, 0].get_legend_handles_labels()
    # Below the axes, where it hides nothing.
    figure.legend(handles, names, loc="outside lower center", frameon=False, fontsize=8)
    figure.suptitle(f"{tasks[0]}: {_runs_of(labels)}", fontsize=10)
    save_figure(figure, path)


def _draw_panel(panel: Axes, found: Sequence[Curve], is_loss: bool) -> None:
    for curve in found:
        label = curve.label
        (line,) = panel.plot(
            curve.widths, curve.means, label=label, marker="o", markersize=3, linewidth=1.3
        )
        low, high = curve.means - curve.deviations, curve.means + curve.deviations
        if is_loss:
            # A logarithm has no room for what is not above 0.
            low = np.maximum(low, curve.means / 10)
        panel.fill_between(curve.widths, low, high, alpha=0.15, linewidth=0, color=line.get_color())
    if is_loss and all((curve.means > 0).all() for curve in found):
        panel.set_yscale("log")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _runs_of(found: Sequence[Curve]) -> str:
    counts = sorted({curve.runs for curve in found})
    if counts == [1]:
        return "single runs"
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"mean ± standard deviation of {number} runs"


def _metric_name(loaded: Sequence[Loaded]) -> str:
    names = (next(iter(each.result["metric"])) for each in loaded if each.result.get("metric"))
    return next(names, "metric")
