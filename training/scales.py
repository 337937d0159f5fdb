"""Noise of a loss, and the shifts μ at which its differences give slopes and curvatures.

Everything here works on one function, ``loss_at(batch, direction, distance)``: the loss of a batch
at θ + distance · u of a direction. Batches and directions are numbered from 0; distance 0 is θ
itself. The same point twice must give the same loss.

- ``measure_noise``: ε_f, by the difference table of ECnoise (Moré and Wild, "Estimating
  computational noise", SIAM J. Sci. Comput. 33, 2011).
- ``choose_scales``: the smallest μ at which g and c are right, from ε_f and the truncation errors
  (Moré and Wild, "Estimating derivatives of noisy simulations", ACM TOMS 38, 2012).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from utils import InputError

LossAt = Callable[[int, int, float], float]

# μ from the least to the largest, a factor of 4 apart; between two neighbours lie three candidates.
SCALES = tuple(1e-5 * 4.0**power for power in range(7))
# Of several estimates in a row of the difference table, the largest and the least may differ so.
AGREEMENT = 4.0
# Losses of a table may differ by this part of the largest; a further spacing is this much finer.
RANGE, COARSER = 0.1, 10.0


class Losses:
    """A ``LossAt`` that keeps what it was asked, and counts the forward passes that took.

    Attributes:
        passes: forward passes so far.
    """

    def __init__(self, loss_at: LossAt) -> None:
        self.passes = 0
        self._loss_at = loss_at
        self._known: dict[tuple[int, int | None, float], float] = {}

    @classmethod
    def of(cls, loss_at: LossAt) -> Losses:
        """Return ``loss_at`` itself if it keeps its losses already."""
        return loss_at if isinstance(loss_at, Losses) else cls(loss_at)

    def __call__(self, batch: int, direction: int, distance: float) -> float:
        """Return the loss at a point."""
        # At θ all directions meet.
        key = (batch, direction if distance else None, distance or 0.0)
        if key not in self._known:
            self.passes += 1
            self._known[key] = float(self._loss_at(batch, direction, distance))
        return self._known[key]

    def here(self, batch: int) -> float:
        """Return a batch's loss at θ.

        Raises:
            InputError: it is not finite.
        """
        loss = self(batch, 0, 0.0)
        if not math.isfinite(loss):
            raise InputError(
                f"the probe cannot start: the loss of its batch {batch} is {loss} before any step; "
                "look at the data, the model and its dtype"
            )
        return loss


class Result:
    """What the results have in common."""

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them; what is not finite becomes None."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class Noise(Result):
    """Rounding noise of the loss.

    Attributes:
        noise: ε_f, the standard deviation of what rounding adds to a loss.
        settled: the difference table shows it; otherwise ``noise`` is a guess, for ``reason``.
        spacing: distance of two neighbouring points of the last table.
        order: of the differences that ``noise`` comes from; None where no table settled.
        tables: how many were made.
        passes: forward passes that this took.
        reason: one line, if the table did not settle.
    """

    noise: float
    settled: bool
    spacing: float
    order: int | None
    tables: int
    passes: int
    reason: str | None


@dataclass(frozen=True)
class Scales(Result):
    """The μ of g and of c, and what they were chosen by.

    Attributes:
        scale: μ of g.
        curvature_scale: μ of c; that of g wherever it serves.
        shared_scale: the smallest μ that serves both; None if none does.
        error: of g at its μ, relative to the root mean square of g.
        curvature_error: of the mean of c at its μ, relative to it.
        reasons: one line each for g and c that stay less exact than was asked for.
        slope: root mean square of g without noise.
        curvature: mean of c without noise.
        noise: ε that was reckoned with: ε_f, or more where the losses on the grid show more.
        distances: every μ that was measured, rising.
        slopes: root mean square of g at each.
        curvatures: mean of c at each.
        slope_floors: what slopes would be if the losses were noise alone.
        curvature_floors: what curvatures would be then.
        passes: forward passes that this took.
    """

    scale: float
    curvature_scale: float
    shared_scale: float | None
    error: float
    curvature_error: float
    reasons: tuple[str, ...]
    slope: float
    curvature: float
    noise: float
    distances: tuple[float, ...]
    slopes: tuple[float, ...]
    curvatures: tuple[float, ...]
    slope_floors: tuple[float, ...]
    curvature_floors: tuple[float, ...]
    passes: int


def measure_noise(
    loss_at: LossAt,
    *,
    spacing: float = 1e-4,
    points: int = 9,
    tables: int = 3,
    batch: int = 0,
    direction: int = 0,
) -> Noise:
    """Measure the rounding noise ε_f of the loss by ECnoise's table of differences.

    Of losses at equally spaced points, differences of order k are Δ^k f. What is smooth in f dies
    out as k grows, noise does not: it gives σ_k² = γ_k · mean((Δ^k f)²), γ_k = (k!)² / (2k)!, for
    each k. The least k for which σ_k, σ_{k+1} and σ_{k+2} agree and Δ^k f has both signs shows ε_f;
    the root mean square of the three is taken, which varies less than σ_k, the paper's choice.

    Half or more of the neighbours equal: the points are too close. Losses that differ by more than
    a tenth, or a table that does not settle: they are too far apart. Then another spacing is
    tried, a factor of 10 away, or between the two that are known to be too small and too large. At
    the spacing that settles, the next batch gives one more table, for the root mean square of both.

    The points are at 1 to 9 spacings and not around θ: where half-precision weights round as they
    are shifted, θ itself is free of the noise that every shifted point has.

    Args:
        loss_at: the loss at a point.
        spacing: of the first table's points.
        points: of each table.
        tables: at most so many.
        batch: whose loss it is; that of one more table is the next.
        direction: along which the points lie, likewise.

    Raises:
        InputError: a number makes no sense, or the loss at θ is not finite.
    """
    if not (0 < spacing < math.inf and points >= 4 and tables >= 1):
        raise InputError(
            f"spacing {spacing}, points {points}, tables {tables}: a difference table takes a "
            "positive spacing and at least 4 points"
        )
    losses = Losses.of(loss_at)
    before = losses.passes
    too_small = too_large = None
    units: list[float] = []
    bounds: list[float] = []
    for number in range(1, tables + 1):
        last = spacing
        noise, order, fault = _noise_of_table(losses, batch, direction, last, points)
        if order is not None:
            if number < tables:
                again, confirms, _ = _noise_of_table(losses, batch + 1, direction + 1, last, points)
                noise = float(root_mean_square(np.array([noise, again]))) if confirms else noise
            passes = losses.passes - before
            return Noise(noise, True, last, order, passes // points, passes, None)
        if fault == "too small":
            too_small = last
            units += [noise] if noise > 0 else []
        else:
            too_large = last
            bounds += [noise] if noise > 0 else []
        if too_small is None:
            spacing = last / COARSER
        elif too_large is None:
            spacing = last * COARSER
        else:
            spacing = math.sqrt(too_small * too_large)
    reason = (
        f"the loss's noise is a guess: none of {tables} difference tables settled, the last one "
        f"with points {last:.2g} apart"
    )
    # What the unit of a rounded loss tells is more certain than what differences leave over.
    noise = min(units or bounds, default=0.0)
    return Noise(noise, False, last, None, tables, losses.passes - before, reason)


def _noise_of_table(
    losses: Losses, batch: int, direction: int, spacing: float, points: int
) -> tuple[float, int | None, str]:
    """Return the noise, the order of differences that shows it, and what is wrong with the spacing.

    Without an order the noise is a guess, and 0 if there is nothing to guess it by.
    """
    values = np.array([losses(batch, direction, spacing * (1 + i)) for i in range(points)])
    if not np.isfinite(values).all():
        losses.here(batch)
        return 0.0, None, "too large"
    moves = np.abs(np.diff(values))
    if np.count_nonzero(moves == 0) >= moves.size / 2:
        # Of losses that are rounded to multiples of q, the error is spread evenly over q.
        unit = float(moves[moves > 0].min()) if moves.any() else 0.0
        return unit / math.sqrt(12), None, "too small"
    noise, order = _difference_table(values)
    in_range = np.ptp(values) <= RANGE * np.abs(values).max()
    return noise, order if in_range else None, "too large"


def _difference_table(values: np.ndarray) -> tuple[float, int | None]:
    """Return the noise and the order of differences that shows it.

    If none does, the least σ_k bounds the noise from above, and there is no order.
    """
    levels, both_signs, gamma, differences = [], [], 1.0, values
    for order in range(1, len(values)):
        differences = np.diff(differences)
        gamma *= order / (2 * (2 * order - 1))
        levels.append(math.sqrt(gamma * np.mean(differences**2)))
        both_signs.append(differences.min() < 0 < differences.max())
    for start in range(len(levels) - 2):
        three = levels[start : start + 3]
        if both_signs[start] and max(three) <= AGREEMENT * min(three):
            return float(root_mean_square(np.array(three))), start + 1
    # The moves may be a whole number of units of a rounded loss, each the same.
    return min(level for level in levels if level > 0), None


def choose_scales(
    loss_at: LossAt,
    noise: float,
    *,
    directions: int = 5,
    scales: Sequence[float] = SCALES,
    accuracy: float = 0.02,
    curvature_accuracy: float = 0.1,
    most: int = 10,
) -> Scales:
    """Choose the smallest μ at which g is right, and the smallest at which c is.

    With l+ and l- at ±μ along a direction, and l0 at θ:

        g(μ) = (l+ - l-) / 2μ          = f' + f''' μ²/6 + …    noise: ε_f / (√2 μ)
        s(μ) = (l+ + l- - 2 l0) / 2μ²  = f''/2 + f'''' μ²/24 + …    noise: √6 ε_f / 2μ²
        c(μ) = |s(μ)|

    The noise is Moré and Wild's (2012): variances of independent rounding errors. The terms in μ²
    come from how g and s change between neighbouring μ, which are differences of third and fourth
    order. c takes an absolute value, so noise does not average out but makes the mean larger: for
    normal noise by the mean of |N(s, σ²)|. The error of c is that, and the term in μ²; since it
    grows steeply and ε_f is not known exactly, it is reckoned with √2 ε_f.

    The grid is measured from its largest μ down to where noise hides both g and c, then the μ that
    this proposes between its points and, where the term in μ² counts, the double of it: from
    farther away the term looks smaller than it is. Both answers are μ that were measured.

    Args:
        loss_at: the loss at a point; direction k is measured on batch k.
        noise: ε_f; where the grid shows more noise, that is taken.
        directions: over which g and c are averaged.
        scales: the grid of μ, rising. If the largest is too small, the grid grows upwards.
        accuracy: of g, root mean square over the directions relative to that of g.
        curvature_accuracy: of the mean of c, relative to it.
        most: at most so many μ are measured, the grid's all the same.

    Raises:
        InputError: a number makes no sense, a loss at θ is not finite, too few others are, or no
            shift changes the loss.
    """
    if len(scales) < 3 or not rises_from_0(scales):
        raise InputError(f"scales {list(scales)}: the grid of μ takes at least 3, rising, over 0")
    if directions < 1 or not 0 <= noise < math.inf:
        raise InputError(f"directions {directions}, noise {noise}: give 1 or more, and 0 or more")
    losses = Losses.of(loss_at)
    before = losses.passes
    grid = _Grid(losses, noise, directions)
    candidates = np.concatenate(
        [np.geomspace(low, high, 5) for low, high in itertools.pairwise(scales)]
    )
    candidates = {_rounded(scale) for scale in candidates}
    grid.measure_down(_rounded(scale) for scale in reversed(scales))
    grid.correct_noise()
    goals = (accuracy, curvature_accuracy)
    while len(grid.measured) < most:
        proposed = _choose(grid.errors(sorted(candidates)), goals)
        missing = next((scale for choice in proposed for scale in grid.missing(choice)), None)
        if missing is None:
            break
        grid.measure(missing)
        candidates.add(missing)
    return grid.result(goals, losses.passes - before)


@dataclass(frozen=True)
class _Errors:
    """What g, or the mean of c, is expected to be wrong by at some μ, relative to itself.

    Attributes:
        scales: μ, rising.
        total: the error at each.
        term: the part that the term in μ² has in it.
        size: of g or c without noise.
    """

    scales: np.ndarray
    total: np.ndarray
    term: np.ndarray
    size: float

    def at(self, index: int, goal: float) -> _Choice:
        total, term = float(self.total[index]), float(self.term[index])
        return _Choice(float(self.scales[index]), total, total <= goal, term > goal / 10)

    def smallest(self, goal: float) -> _Choice:
        """Choose the first μ whose error is within the goal; if none is, that of least error."""
        holding = np.flatnonzero(self.total <= goal)
        return self.at(int(holding[0] if holding.size else np.argmin(self.total)), goal)


@dataclass(frozen=True)
class _Choice:
    scale: float
    error: float
    holds: bool
    bends: bool


def _choose(errors: tuple[_Errors, _Errors], goals: tuple[float, float]) -> tuple[_Choice, _Choice]:
    """Return the smallest μ that g, and that c, is right at; c takes g's μ if that is."""
    g = errors[0].smallest(goals[0])
    at_g = errors[1].at(int(np.searchsorted(errors[1].scales, g.scale)), goals[1])
    # Where there is no curvature at all, no μ is better than another.
    return g, at_g if at_g.holds or not errors[1].size else errors[1].smallest(goals[1])


class _Grid:
    """g and s over directions and μ, and the errors that follow from them."""

    def __init__(self, losses: Losses, noise: float, directions: int) -> None:
        self.losses, self.noise, self.directions = losses, noise, directions
        self.base = np.array([losses.here(batch) for batch in range(directions)])
        # Of each μ, the losses at +μ and at -μ of all directions.
        self.measured: dict[float, np.ndarray] = {}

    def measure(self, scale: float) -> None:
        self.measured[scale] = np.array(
            [[self.losses(k, k, way * scale) for k in range(self.directions)] for way in (1, -1)]
        )

    def measure_down(self, scales: Iterable[float]) -> None:
        """Measure at falling μ, at least three with finite losses, until noise hides the rest."""
        finite = 0
        for scale in scales:
            self.measure(scale)
            finite += bool(np.isfinite(self.measured[scale]).all())
            if finite < 3:
                continue
            g, s = self.values(np.array([scale]))
            # ε_f itself is known to a factor of about 2.
            if root_mean_square(g) <= 2 * self.g_noise(scale) and root_mean_square(
                s
            ) <= 2 * self.s_noise(scale):
                return

    def values(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return g and s by direction and μ."""
        plus, minus = np.stack([self.measured[scale] for scale in distances], axis=-1)
        g = (plus - minus) / (2 * distances)
        s = (plus + minus - 2 * self.base[:, None]) / (2 * distances**2)
        return g, s

    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return μ, rising, up to the first where a loss is not finite, and g and s by direction.

        Raises:
            InputError: these are fewer than three, or no shift changes the loss.
        """
        scales = sorted(self.measured)
        finite = [bool(np.isfinite(self.measured[scale]).all()) for scale in scales]
        count = finite.index(False) if False in finite else len(scales)
        if count < 3:
            raise InputError(
                f"no μ can be chosen: the loss is not finite from μ = {scales[count]:.3g} on; give "
                "smaller ones, or look at the model and its dtype"
            )
        distances = np.array(scales[:count])
        g, s = self.values(distances)
        if not g.any() and not s.any():
            raise InputError(
                f"no μ can be chosen: up to {distances[-1]:.3g} no shift of the weights changes "
                "the loss; are there weights to train that it depends on?"
            )
        return distances, g, s

    def correct_noise(self) -> None:
        """Take the noise that the differences of s show, if that is more than ε_f.

        Where weights are rounded as they are shifted, the loss may be noisier at μ than it was in
        the difference table. s(μ') - s(μ) of neighbours is either noise, then it tells the same ε
        for one pair of μ as for the next, or the bend of the curvature, and grows like μ². The
        median leaves out a pair in between.
        """
        distances, _, s = self.table()
        unit = np.hypot(*(math.sqrt(6) / (2 * each**2) for each in (distances[:-1], distances[1:])))
        readings = root_mean_square(np.diff(s, axis=1)) / unit
        count = 1
        while count < len(readings) and readings[count] <= AGREEMENT * readings[:count].max():
            count += 1
        if count > 1:
            self.noise = max(self.noise, float(np.median(readings[:count])))

    def missing(self, choice: _Choice) -> Iterator[float]:
        """Yield the μ that are still to be measured before a choice can be relied on."""
        if choice.scale not in self.measured:
            yield choice.scale
        above = [scale for scale in self.measured if scale > choice.scale]
        if not above and not choice.holds:
            yield _rounded(4 * choice.scale)
        # A little more than 2, since μ are rounded.
        if above and choice.bends and min(above) > 2.1 * choice.scale:
            yield _rounded(2 * choice.scale)

    def errors(self, at: Sequence[float]) -> tuple[_Errors, _Errors]:
        """Return the expected errors of g and c at those μ that lie between the measured ones."""
        distances, g, s = self.table()
        scales = np.array([each for each in at if distances[0] <= each <= distances[-1]])
        pair = np.clip(np.searchsorted(distances, scales, "right") - 1, 0, len(distances) - 2)
        terms, slopes = _without_noise(distances, g, self.g_noise(distances))
        slope = float(root_mean_square(slopes))
        term = terms[pair] * scales**2
        of_g = _Errors(scales, *_relative(slope, np.hypot(self.g_noise(scales), term), term), slope)
        # The directions' s have a sign each, g's have not: of c the mean over them counts, whose
        # noise is smaller.
        signs = np.sign(_without_noise(distances, s, self.s_noise(distances))[1])
        mean = np.mean(signs[:, None] * s, axis=0, keepdims=True)
        mean_noise = self.s_noise(distances) / math.sqrt(self.directions)
        terms, curvatures = _without_noise(distances, mean, mean_noise)
        curvature = abs(float(curvatures[0]))
        term = terms[pair] * scales**2
        noisy = _mean_of_absolute(curvature, math.sqrt(2) * self.s_noise(scales))
        total = noisy - curvature + term
        return of_g, _Errors(scales, *_relative(curvature, total, term), curvature)

    def g_noise(self, scales: np.ndarray | float) -> np.ndarray | float:
        return self.noise / (math.sqrt(2) * scales)

    def s_noise(self, scales: np.ndarray | float) -> np.ndarray | float:
        return math.sqrt(6) * self.noise / (2 * scales**2)

    def result(self, goals: tuple[float, float], passes: int) -> Scales:
        distances, g, s = self.table()
        errors = self.errors(sorted(self.measured))
        for_g, for_c = _choose(errors, goals)
        serves = errors[0].total <= goals[0]
        if errors[1].size:
            serves &= errors[1].total <= goals[1]
        reasons = [
            _reason(name, choice, what)
            for name, choice, what in (("g", for_g, "slope"), ("c", for_c, "curvature"))
            if not choice.holds
        ]
        return Scales(
            scale=for_g.scale,
            curvature_scale=for_c.scale,
            shared_scale=float(errors[0].scales[serves][0]) if serves.any() else None,
            error=for_g.error,
            curvature_error=for_c.error,
            reasons=tuple(reasons),
            slope=errors[0].size,
            curvature=errors[1].size,
            noise=self.noise,
            distances=tuple(distances.tolist()),
            slopes=tuple(root_mean_square(g).tolist()),
            curvatures=tuple(np.abs(s).mean(axis=0).tolist()),
            slope_floors=tuple(self.g_noise(distances).tolist()),
            curvature_floors=tuple(_mean_of_absolute(0.0, self.s_noise(distances)).tolist()),
            passes=passes,
        )


def _reason(name: str, choice: _Choice, what: str) -> str:
    if choice.error > 1:
        return f"{name} is rounding noise at every μ up to the one taken, {choice.scale:.3g}"
    return (
        f"{name} is exact to {choice.error:.2g} of itself at best, at μ = {choice.scale:.3g}: at "
        f"smaller μ rounding spoils it, at larger ones the {what} changes"
    )


def _without_noise(
    distances: np.ndarray, values: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return by pair of neighbouring μ the term in μ², and by direction the value for μ → 0.

    The term is the root mean square over the directions of (v(μ') - v(μ)) / (μ'² - μ²), without
    what noise adds to it. Where noise hides it, at small μ, the term of the next larger pair holds
    as far as the differences allow. At large μ the values may level off, far from those for μ → 0:
    there the term is at least what they have changed by since some smaller μ.

    The values come from the μ at which noise and term together are smallest, and from the μ above
    it, by Richardson's extrapolation if that is worth its noise.
    """
    squares = distances**2
    gaps = np.diff(squares)
    changes = np.sqrt(np.mean((values[:, None, :] - values[:, :, None]) ** 2, axis=0))
    uncertain = np.hypot(noise[None, :], noise[:, None])
    seen = np.sqrt(np.maximum(changes**2 - uncertain**2, 0))
    # Smaller μ than about the half are too noisy to tell.
    near = distances[:, None] > distances[None, :] / 2.1
    clear = np.where(near, np.maximum(seen - 2 * uncertain, 0), 0)
    terms = np.diagonal(seen, 1) / gaps
    for pair in reversed(range(len(terms) - 1)):
        low = max(seen[pair, pair + 1] - uncertain[pair, pair + 1], 0)
        high = seen[pair, pair + 1] + uncertain[pair, pair + 1]
        terms[pair] = np.clip(terms[pair + 1], low / gaps[pair], high / gaps[pair])
    terms = np.maximum(terms, [clear[: i + 1, i].max() / squares[i] for i in range(len(terms))])
    best = int(np.argmin(np.hypot(noise[:-1], terms * squares[:-1])))
    term = (values[:, best + 1] - values[:, best]) / gaps[best] * squares[best]
    if seen[best, best + 1] < uncertain[best, best + 1]:
        return terms, values[:, best]
    return terms, values[:, best] - term


def _mean_of_absolute(means: np.ndarray | float, deviation: np.ndarray) -> np.ndarray:
    """Return the mean of |x| for normal x: the folded normal distribution's."""
    means, deviation = np.broadcast_arrays(np.abs(means), deviation)
    ratio = np.divide(
        means, deviation, out=np.full(means.shape, 40.0), where=deviation > means / 40
    )
    inside = np.vectorize(math.erf, otypes=[float])(ratio / math.sqrt(2))
    return deviation * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2) + means * inside


def rises_from_0(values: Sequence[float]) -> bool:
    """Whether values rise, all over 0 and finite."""
    return all(low < high < math.inf for low, high in itertools.pairwise([0.0, *values]))


def root_mean_square(values: np.ndarray) -> np.ndarray:
    """Return it over the first axis."""
    return np.sqrt(np.mean(values**2, axis=0))


def _rounded(scale: float) -> float:
    """Return a μ with three digits: it is printed, and given again, as it is."""
    return float(f"{scale:.3g}")


def _relative(size: float, *errors: np.ndarray) -> list[np.ndarray]:
    """Return errors relative to a size, without end where that is 0."""
    return [np.full(error.shape, math.inf) if size == 0 else error / size for error in errors]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
