"""Step sizes from forward passes alone: how far to go along -g u, with the μ that g and c want.

Like ``differences.py``, this works on one function, ``loss_at(batch, direction, distance)``.

- ``measure_step``: how far θ - t g u lowers the loss of a batch that g has not seen.
- ``find_step_sizes``: the noise of the loss, μ of g and of c, and the step, with no point evaluated
  twice; by default 197 forward passes at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training.scales import (
    SCALES,
    LossAt,
    Losses,
    Noise,
    Result,
    Scales,
    choose_scales,
    measure_noise,
    rises_from_0,
    root_mean_square,
)
from utils import InputError

# Where no step is given, distances begin at these multiples of the one that the curvature proposes.
MULTIPLES = tuple(2.0**power for power in range(-4, 2))


@dataclass(frozen=True)
class Step(Result):
    """How far a step goes, from the loss of other batches at θ - t g u.

    Attributes:
        best: t*, where the mean change of the loss is lowest; None: no t lowers it.
        bracketed: it rises again beyond; otherwise ``best`` is the largest t that was tried.
        part: k* = t* · 2c̄: in a rule η = k / 2c̄ this k would take t*.
        curvature: c̄, the mean of c over the pairs.
        curvature_standard_error: of that mean.
        slope: root mean square of g over the pairs.
        distances: every t that was measured, rising.
        changes: the mean change of the loss at each.
        standard_errors: of these means.
        too_large: the least t at which a loss was not finite; None if there was none.
        pairs: of batches.
        passes: forward passes that this took.
        reason: one line, if there is no minimum, or it is not bracketed, or hidden by noise.
    """

    best: float | None
    bracketed: bool
    part: float | None
    curvature: float
    curvature_standard_error: float
    slope: float
    distances: tuple[float, ...]
    changes: tuple[float, ...]
    standard_errors: tuple[float, ...]
    too_large: float | None
    pairs: int
    passes: int
    reason: str | None


@dataclass(frozen=True)
class StepSizes(Result):
    """All that the probe has found.

    Attributes:
        noise: of the loss.
        scales: of g and c.
        step: t* and its curve.
        passes: forward passes of all three.
        learning_rate: the η that a run takes from this; None: none was taken yet.
    """

    noise: Noise
    scales: Scales
    step: Step
    passes: int
    learning_rate: float | None = None


def find_step_sizes(
    loss_at: LossAt,
    *,
    spacing: float = 1e-4,
    scales: Sequence[float] = SCALES,
    directions: int = 5,
    pairs: int = 5,
) -> StepSizes:
    """Measure the noise, then choose μ of g and c, then measure the step with them.

    Args:
        loss_at: the loss at a point; it is asked for batches up to the larger of ``directions``
            and 2 ``pairs``, and for directions up to the larger of ``directions`` and ``pairs``.
        spacing: of the first difference table.
        scales: the grid of μ.
        directions: over which g and c are averaged at each μ.
        pairs: of batches, over which the curve of the step is averaged.

    Raises:
        InputError: as ``measure_noise``, ``choose_scales`` and ``measure_step``.
    """
    losses = Losses.of(loss_at)
    before = losses.passes
    noise = measure_noise(losses, spacing=spacing)
    chosen = choose_scales(losses, noise.noise, directions=directions, scales=scales)
    step = measure_step(
        losses,
        chosen.scale,
        curvature_scale=chosen.curvature_scale,
        noise=noise.noise,
        pairs=pairs,
    )
    return StepSizes(noise, chosen, step, losses.passes - before)


def measure_step(
    loss_at: LossAt,
    scale: float,
    *,
    curvature_scale: float | None = None,
    noise: float = 0.0,
    pairs: int = 5,
    distances: Sequence[float] | None = None,
    widenings: int = 6,
) -> Step:
    """Measure how far to go along -g u: where batches that g has not seen have the lowest loss.

    Pair k is batch k, which gives g along direction k, and batch ``pairs`` + k, whose loss at
    θ - t g u counts, relative to that at θ. If the lowest of these means is the last one, the grid
    of t grows upwards; if all rise, downwards. t* is the vertex of the parabola through the lowest
    mean and its two neighbours, of which θ itself, with a change of 0, may be one.

    On a quadratic loss the step that lowers the same batch most is 1 / 2c. So the curvature's own
    proposal is t = 1 / 2c̄, and t* = k* / 2c̄ says which part of it other batches bear.

    Args:
        loss_at: the loss at a point.
        scale: μ of g.
        curvature_scale: μ of c; None: that of g.
        noise: ε_f; a fall that it explains is not searched around.
        pairs: of batches.
        distances: the grid of t, rising; None: from 1/16 to 2 times 1 / 2c̄.
        widenings: at most so many t beside the grid.

    Raises:
        InputError: a number makes no sense, or a loss at θ or at ±μ is not finite.
    """
    curvature_scale = scale if curvature_scale is None else curvature_scale
    if distances is not None and not (len(distances) and rises_from_0(distances)):
        raise InputError(f"distances {list(distances)}: give t that rise, over 0")
    if not (0 < scale < math.inf and 0 < curvature_scale < math.inf and pairs >= 2):
        raise InputError(
            f"scale {scale}, curvature_scale {curvature_scale}, pairs {pairs}: the curve of a step "
            "takes positive μ, and at least 2 pairs for a standard error"
        )
    losses = Losses.of(loss_at)
    before = losses.passes
    g = np.array([_slope(losses, k, scale) for k in range(pairs)])
    c = np.array([_curvature(losses, k, curvature_scale) for k in range(pairs)])
    curvature = float(c.mean())
    unit = 1 / (2 * curvature) if curvature > 0 else scale
    curve = _Curve(losses, g, [losses.here(pairs + k) for k in range(pairs)])
    curve.measure([unit * multiple for multiple in MULTIPLES] if distances is None else distances)
    # What rounding alone makes of a mean: two standard deviations.
    floor = 2 * math.sqrt(2 / pairs) * noise
    for _ in range(widenings):
        t = curve.next_distance(floor)
        if t is None:
            break
        curve.measure([t])
    best, at_end = curve.lowest()
    t, means = curve.means()
    if best is None:
        reason = (
            f"no step lowers the loss of other batches, from t = {curve.tried()[0]:.3g} to "
            f"{curve.tried()[-1]:.3g}: the direction or μ = {scale:.3g} is bad, or the batches "
            "have little in common"
        )
    elif at_end:
        reason = f"the loss still falls at t = {best:.3g}, the largest that was tried"
    elif means.min() >= -floor:
        reason = f"t* = {best:.3g} is a guess: the loss falls by no more than its rounding noise"
    else:
        reason = None
    return Step(
        best=best,
        bracketed=best is not None and not at_end,
        part=None if best is None else best * 2 * curvature,
        curvature=curvature,
        curvature_standard_error=float(c.std(ddof=1) / math.sqrt(pairs)),
        slope=float(root_mean_square(g)),
        distances=tuple(t.tolist()),
        changes=tuple(means.tolist()),
        standard_errors=tuple(curve.standard_errors().tolist()),
        too_large=curve.too_large,
        pairs=pairs,
        passes=losses.passes - before,
        reason=reason,
    )


def _slope(losses: Losses, k: int, scale: float) -> float:
    return _finite_at(losses, k, scale, losses(k, k, scale) - losses(k, k, -scale)) / (2 * scale)


def _curvature(losses: Losses, k: int, scale: float) -> float:
    second = losses(k, k, scale) + losses(k, k, -scale) - 2 * losses.here(k)
    return abs(_finite_at(losses, k, scale, second)) / (2 * scale**2)


def _finite_at(losses: Losses, k: int, scale: float, difference: float) -> float:
    losses.here(k)
    if not math.isfinite(difference):
        raise InputError(
            f"the loss of batch {k} is not finite at μ = {scale:.3g} from θ; give a smaller μ"
        )
    return difference


class _Curve:
    """Changes of the other batches' losses over t."""

    def __init__(self, losses: Losses, g: np.ndarray, base: list[float]) -> None:
        self.losses, self.g, self.base = losses, g, np.array(base)
        self.changes: dict[float, np.ndarray] = {}
        self.too_large: float | None = None

    def measure(self, distances: Iterable[float]) -> None:
        """Measure the changes at some t, rising, up to the first where one is not finite."""
        pairs = len(self.g)
        for t in distances:
            shifted = [self.losses(pairs + k, k, -t * self.g[k]) for k in range(pairs)]
            if not np.isfinite(shifted).all():
                self.too_large = t
                return
            self.changes[t] = np.array(shifted) - self.base

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return t, rising, and the mean change at each."""
        t = sorted(self.changes)
        return np.array(t), np.array([self.changes[each].mean() for each in t])

    def standard_errors(self) -> np.ndarray:
        deviations = [self.changes[t].std(ddof=1) for t in sorted(self.changes)]
        return np.array(deviations) / math.sqrt(len(self.g))

    def next_distance(self, floor: float) -> float | None:
        """Return the t to measure next; None: the minimum is bracketed, or noise hides it."""
        t, means = self.means()
        if not t.size:
            return self.too_large / 4
        lowest = int(np.argmin(means))
        still_falls = lowest == len(t) - 1 and means[lowest] <= floor
        if (still_falls or np.abs(means).max() <= floor) and self.too_large is None:
            return float(t[-1]) * 2
        return float(t[0]) / 2 if means[0] > floor and means[lowest] >= -floor else None

    def tried(self) -> list[float]:
        """Return every t, rising, the one that was too large too."""
        return sorted([*self.changes, *([] if self.too_large is None else [self.too_large])])

    def lowest(self) -> tuple[float | None, bool]:
        """Return t*, and whether it is the largest t, with nothing known of those beyond.

        None: no mean is below 0.
        """
        t, means = self.means()
        if not t.size or means.min() >= 0:
            return None, False
        index = int(np.argmin(means))
        if index == len(t) - 1:
            return float(t[index]), self.too_large is None
        return _vertex([0.0, *t][index : index + 3], [0.0, *means][index : index + 3]), False


def _vertex(t: Sequence[float], values: Sequence[float]) -> float:
    """Return where the parabola through three points is lowest; the middle one is below both."""
    left, right = t[1] - t[0], t[2] - t[1]
    down, up = (values[1] - values[0]) / left, (values[2] - values[1]) / right
    # Slopes in the middles of both intervals: between them the slope is linear.
    return float((t[0] + t[1]) / 2 - down * (left + right) / 2 / (up - down))
