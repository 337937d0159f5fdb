"""The picture of a probe: the loss over the step, and g and c over μ beside their noise.

Needs matplotlib, which is loaded only when a picture is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.step_sizes import Step, StepSizes
from utils import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS, SLOPE, CURVATURE = "tab:blue", "tab:orange", "tab:green"


def draw(result: StepSizes, path: Path) -> None:
    """Draw what a probe has found into a file, of the kind that its ending names.

    Args:
        result: what ``find_step_sizes`` returns, with the learning rate that the run takes.
        path: of the picture.

    Raises:
        InputError: matplotlib is not installed, or knows no such kind of file.
        NotWritten: the file cannot be written.
    """
    figure = new_figure(path, (10, 4.4))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    _draw_step(figure.add_subplot(grid[:, 0]), result.step, result.learning_rate)
    scales = result.scales
    upper = figure.add_subplot(grid[0, 1])
    _draw_over_scale(
        *(upper, "g, root mean square", SLOPE, scales.distances, scales.slopes),
        *(scales.slope_floors, (scales.scale, scales.error)),
    )
    upper.tick_params(labelbottom=False)
    lower = figure.add_subplot(grid[1, 1], sharex=upper)
    _draw_over_scale(
        *(lower, "c, mean", CURVATURE, scales.distances, scales.curvatures),
        *(scales.curvature_floors, (scales.curvature_scale, scales.curvature_error)),
    )
    lower.set_xlabel("μ")
    save_figure(figure, path)


def _draw_step(axes: Axes, step: Step, learning_rate: float | None) -> None:
    t, mean = np.array(step.distances), np.array(step.changes)
    error = np.array(step.standard_errors)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.fill_between(t, mean - error, mean + error, color=LOSS, alpha=0.2, linewidth=0)
    label = f"mean of {step.pairs} pairs ± standard error"
    axes.plot(t, mean, color=LOSS, marker="o", markersize=4, label=label)
    if step.best is not None:
        beyond = "" if step.bracketed else " or more"
        axes.axvline(step.best, color=LOSS, linestyle=":", label=f"t* = {step.best:.2g}{beyond}")
    if learning_rate is not None:
        label = f"η taken = {learning_rate:.2g}"
        axes.axvline(learning_rate, color="tab:red", linestyle="--", label=label)
    if step.too_large is not None:
        label = f"not finite from {step.too_large:.2g}"
        axes.axvspan(step.too_large, 2 * step.too_large, color="tab:gray", alpha=0.3, label=label)
    # The curve may rise a hundred times as high as it fell: the fall is what is to be seen.
    depth = float((error - mean).max())
    axes.set_ylim(
        -1.15 * depth, min(1.5 * depth, 0.15 * depth + max(0, float((mean + error).max())))
    )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    axes.set(xlabel="t", ylabel="change of the loss")
    axes.set_title("Loss of another batch at θ - t g u", fontsize=10)
    # Below the axes, where it hides nothing.
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_over_scale(
    axes: Axes,
    name: str,
    colour: str,
    scales: tuple[float, ...],
    values: tuple[float, ...],
    floors: tuple[float, ...],
    chosen: tuple[float, float],
) -> None:
    axes.set_xscale("log")
    axes.plot(scales, values, color=colour, marker="o", markersize=4)
    positive = [value for value in values if value > 0]
    if positive:
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 5, max(positive) * 5)
    if max(floors) > 0:
        axes.plot(scales, floors, color="tab:gray", linestyle="--", label="rounding noise alone")
        # Noise far below the values need not be seen, but where it is largest.
        axes.set_ylim(bottom=min([*positive, max(floors)]) / 5)
        axes.legend(frameon=False, fontsize=8)
    scale, error = chosen
    axes.axvline(scale, color=colour, linestyle=":", linewidth=1)
    value = values[scales.index(scale)]
    axes.plot([scale], [value], color=colour, marker="o", markersize=9, linestyle="")
    axes.set_title(f"{name[0]}: within {100 * error:.2g}% at μ = {scale:.3g}", fontsize=10)
    axes.set_ylabel(name, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
