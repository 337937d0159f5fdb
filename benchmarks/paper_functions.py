"""MeZO, HiZOO and HiZOO with a trace-free h on the three test functions of HiZOO's paper.

    python benchmarks/paper_functions.py                      # the table, and paper_functions.png
    python benchmarks/paper_functions.py --seeds 2 --passes 60 --plot paths.png

Zhao et al., ICLR 2025 (arXiv 2402.15173) draw the paths on functions of two numbers. Here every
method has the same number of forward passes, a step with a gradient counting as three. Learning
rate and smoothing are the best of a printed grid by the geometric mean of the loss over seeds of
their own. The paper's start is not in its text: those here are ours.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.colors import LogNorm
from other_methods import TraceFreeHiZOO
from torch import Tensor

from hizoo import HiZOO

matplotlib.use("agg")
PLOT = Path(__file__).with_suffix(".png")
EPS = 1e-3
LARGEST = 1e12
FLOOR = 1e-12  # added to a loss whose logarithm is taken
LEARNING_RATES = tuple(10 ** (number / 2) for number in range(-12, 3))  # 1e-6 to 10
SMOOTHING = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Function:
    """A function of two numbers.

    Attributes:
        name: as it is written.
        value: of x and y, tensors of any shape.
        start: where every path begins.
        minimum: where the function is 0.
        view: the drawn part of the plane: smallest and largest x, smallest and largest y.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    view: tuple[float, float, float, float]


FUNCTIONS = (
    Function(
        "8(x−1)²(1.3x²+2x+1) + ½(y−4)²",
        lambda x, y: 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + (y - 4) ** 2 / 2,
        start=(0.3, 0.0),
        minimum=(1.0, 4.0),
        view=(-0.3, 1.7, -0.8, 5.0),
    ),
    Function(
        "|x| + |y|",
        lambda x, y: x.abs() + y.abs(),
        start=(3.0, 1.3),
        minimum=(0.0, 0.0),
        view=(-1.2, 3.6, -1.2, 2.6),
    ),
    Function(
        "10000x² + y²",
        lambda x, y: 10_000 * x**2 + y**2,
        start=(0.1, 3.0),
        minimum=(0.0, 0.0),
        view=(-0.12, 0.16, -0.8, 3.6),
    ),
)


@dataclass(frozen=True)
class Setting:
    """What is fitted.

    Attributes:
        lr: learning rate η.
        smooth: α of h; 0 for methods without h.
    """

    lr: float
    smooth: float = 0.0


def hizoo_step(point: Tensor, setting: Setting, seed: int) -> Callable[..., object]:
    """Return a step of HiZOO, or of MeZO, by hizoo.py."""
    return HiZOO([point], setting.lr, EPS, setting.smooth, seed=seed).step


def trace_free_step(point: Tensor, setting: Setting, seed: int) -> Callable[..., object]:
    """Return a step of HiZOO whose h grows by c (u² - 1)."""
    return TraceFreeHiZOO([point], setting.lr, EPS, seed, setting.smooth).step


def gradient_step(
    kind: type[torch.optim.Optimizer],
) -> Callable[[Tensor, Setting, int], Callable[..., object]]:
    """Return what makes the steps of an optimizer of torch, which takes a gradient."""

    def make(point: Tensor, setting: Setting, seed: int) -> Callable[..., object]:
        optimizer = kind([point], lr=setting.lr)

        def step(closure: Callable[[], Tensor]) -> None:
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()

        return step

    return make


@dataclass(frozen=True)
class Method:
    """How a path is made.

    Attributes:
        make: returns the step of a point.
        passes: forward passes a step.
        smoothing: the values of α that are tried.
        is_random: whether a path depends on a seed.
        style: of its line.
    """

    make: Callable[[Tensor, Setting, int], Callable[..., object]]
    passes: int
    smoothing: tuple[float, ...] = (0.0,)
    is_random: bool = True
    style: tuple[str, str] = ("tab:gray", "-")


METHODS = {
    "MeZO": Method(hizoo_step, 2, style=("tab:orange", "-")),
    "HiZOO": Method(hizoo_step, 3, SMOOTHING, style=("tab:blue", "-")),
    "HiZOO, trace-free h": Method(trace_free_step, 3, SMOOTHING, style=("tab:red", "-")),
    "gradient descent": Method(
        gradient_step(torch.optim.SGD), 3, is_random=False, style=("black", "--")
    ),
    "Adam": Method(gradient_step(torch.optim.Adam), 3, is_random=False, style=("black", ":")),
}


def path_of(
    function: Function, method: Method, setting: Setting, seed: int, passes: int
) -> list[tuple[float, float]]:
    """Return the points of a path; it ends early where it leaves the finite numbers."""
    point = torch.tensor(function.start, dtype=torch.float64, requires_grad=True)
    step = method.make(point, setting, seed)
    points = [function.start]
    for _ in range(passes // method.passes):
        step(lambda: function.value(point[0], point[1]))
        points.append(tuple(point.tolist()))
        if not all(abs(number) < 1e6 for number in points[-1]):
            break
    return points


def value_at(function: Function, point: tuple[float, float]) -> float:
    """Return the function's value, or the largest that counts where a path has diverged."""
    value = float(function.value(*torch.tensor(point, dtype=torch.float64)))
    return value if value < LARGEST else LARGEST


def settings_of(method: Method) -> Iterator[Setting]:
    """Yield the grid of a method."""
    for lr, smooth in itertools.product(LEARNING_RATES, method.smoothing):
        yield Setting(lr, smooth)


def fit(function: Function, method: Method, seeds: int, passes: int) -> Setting:
    """Return the setting of the lowest geometric mean of the final losses.

    A median does not see that a third of the paths diverge.
    """

    def mean_logarithm(setting: Setting) -> float:
        return statistics.mean(
            math.log(
                value_at(function, path_of(function, method, setting, seed, passes)[-1]) + FLOOR
            )
            for seed in range(seeds if method.is_random else 1)
        )

    return min(settings_of(method), key=mean_logarithm)


def plot(
    drawn: dict[tuple[str, str], list[list[tuple[float, float]]]],
    passes: int,
    file: Path,
) -> None:
    """Draw a row of contours with paths above, and their losses over forward passes below."""
    figure, axes = pyplot.subplots(
        2, len(FUNCTIONS), figsize=(15, 9), height_ratios=(3, 2), layout="constrained"
    )
    for function, plane, course in zip(FUNCTIONS, *axes, strict=True):
        left, right, bottom, top = function.view
        x, y = torch.meshgrid(
            torch.linspace(left, right, 400), torch.linspace(bottom, top, 400), indexing="xy"
        )
        values = function.value(x, y).clamp(min=1e-3)
        levels = torch.logspace(-2, math.log10(float(values.max())), 16).tolist()
        plane.contourf(x, y, values, levels, norm=LogNorm(), cmap="Greys_r", alpha=0.35)
        plane.contour(x, y, values, levels, norm=LogNorm(), colors="white", linewidths=0.6)
        for name, method in METHODS.items():
            paths = drawn[function.name, name]
            color, line = method.style
            median = median_path(function, paths)
            plane.plot(*zip(*median, strict=True), line, color=color, lw=1.6, label=name)
            plane.plot(*median[-1], "o", color=color, ms=5)
            losses = [
                statistics.median(value_at(function, path[min(i, len(path) - 1)]) for path in paths)
                for i in range(passes // method.passes + 1)
            ]
            counts = [i * method.passes for i in range(len(losses))]
            course.plot(counts, losses, line, color=color, lw=1.6)
        plane.plot(*function.start, "s", color="black", ms=7)
        plane.plot(*function.minimum, "*", color="gold", mec="black", ms=16)
        plane.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y")
        plane.set_title(function.name, fontsize=13)
        course.set_yscale("log")
        course.set(xlabel="forward passes", ylabel="median loss")
        course.set_ylim(1e-7, 1e5)
        course.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=12)
    figure.savefig(file, dpi=110)


def median_path(
    function: Function, paths: list[list[tuple[float, float]]]
) -> list[tuple[float, float]]:
    """Return the path whose last loss is the median."""
    ordered = sorted(paths, key=lambda path: value_at(function, path[-1]))
    return ordered[(len(ordered) - 1) // 2]


def main() -> None:
    """Fit each method on each function, print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=21, help="paths of each method")
    parser.add_argument("--fit_seeds", type=int, default=11, help="to fit a setting on")
    parser.add_argument("--passes", type=int, default=300, help="forward passes of a path")
    parser.add_argument("--plot", type=Path, default=PLOT, help="the picture")
    arguments = parser.parse_args()
    print("learning rates:", " ".join(f"{lr:.1e}" for lr in LEARNING_RATES))
    print("α of HiZOO:", " ".join(f"{smooth:g}" for smooth in SMOOTHING))
    print(f"median of the final loss, {arguments.passes} forward passes, {arguments.seeds} seeds\n")
    print("| function | method | η | α | median | lower and upper quartile |\n|" + "---|" * 6)
    drawn = {}
    for function, (name, method) in itertools.product(FUNCTIONS, METHODS.items()):
        setting = fit(function, method, arguments.fit_seeds, arguments.passes)
        first = arguments.fit_seeds
        seeds = range(first, first + arguments.seeds) if method.is_random else [0]
        paths = [path_of(function, method, setting, seed, arguments.passes) for seed in seeds]
        losses = sorted(value_at(function, path[-1]) for path in paths)
        quarter = len(losses) // 4
        print(
            f"| {function.name} | {name} | {setting.lr:.1e} | {setting.smooth or '':} | "
            f"{statistics.median(losses):.1e} | "
            f"{losses[quarter]:.1e} to {losses[-1 - quarter]:.1e} |",
            flush=True,
        )
        drawn[function.name, name] = paths
    plot(drawn, arguments.passes, arguments.plot)


if __name__ == "__main__":
    main()
