"""The noise of a loss, and the perturbation scales μ at which its differences are right.

``measure_noise`` and ``choose_scales`` work on one function, ``loss_at(batch, direction,
distance)``: the loss of a batch at θ + distance · u/√h. Batches and directions are numbers from 0.

- Noise: ECnoise (Moré and Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33, 2011).
- μ: Moré and Wild, "Estimating derivatives of noisy simulations", ACM TOMS 38, 2012.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hizoo import HiZOO
from training.journal import Scale
from training.optimizers import check_scale
from training.recording import Recording
from utils import InputError, write_json

LossAt = Callable[[int, int, float], float]

PROBE = "probe.json"
# Relative errors of g and c that are small enough, and the least μ that is taken.
ACCURACY, CURVATURE_ACCURACY, LEAST_SCALE = 0.02, 0.1, 1e-5


def measure_noise(loss_at: LossAt, spacing: float = 1e-4, tables: int = 3) -> tuple[float, bool]:
    """Return the standard deviation ε of the loss's rounding errors, by ECnoise.

    Differences of order k of losses at equally spaced points lose what is smooth in the loss as k
    grows, and keep the noise: σ_k² = (k!)² / (2k)! · mean((Δ^k l)²). The first three σ_k within a
    factor of 4 show ε. If half of the neighbours are equal, the points are too close; if the losses
    differ by a tenth, or no σ_k agree, too far apart. Then another spacing is tried.
    No point is θ: half-precision weights round as they are perturbed, so θ has less noise. With ε
    comes whether a table showed it; otherwise it is a guess.
    """
    too_small = too_large = None
    units, bounds = [], []
    for _ in range(tables):
        losses = np.array([loss_at(0, 0, spacing * (1 + i)) for i in range(9)])
        if not np.isfinite(losses).all():
            too_large = spacing
        elif np.count_nonzero(moves := np.abs(np.diff(losses))) <= moves.size / 2:
            # Errors of rounding to multiples of a unit are spread evenly over it.
            units += [float(moves[moves > 0].min()) / math.sqrt(12)] if moves.any() else []
            too_small = spacing
        else:
            noise, agree = _noise_of_differences(losses)
            if agree and np.ptp(losses) <= 0.1 * np.abs(losses).max():
                return noise, True
            bounds.append(noise)
            too_large = spacing
        spacing = math.sqrt((too_small or too_large / 100) * (too_large or too_small * 100))
    return min(units or bounds, default=0.0), False


def _noise_of_differences(losses: np.ndarray) -> tuple[float, bool]:
    """Return the σ that three orders of differences agree on, or the least σ and False."""
    levels, both_signs, gamma, differences = [], [], 1.0, losses
    for order in range(1, len(losses)):
        differences = np.diff(differences)
        gamma *= order / (2 * (2 * order - 1))
        levels.append(math.sqrt(gamma * np.mean(differences**2)))
        both_signs.append(differences.min() < 0 < differences.max())
    for start in range(len(levels) - 2):
        three = levels[start : start + 3]
        if both_signs[start] and max(three) <= 4 * min(three):
            return float(root_mean_square(np.array(three))), True
    return min(level for level in levels if level > 0), False


def noise_of_curvatures(scales: np.ndarray, values: np.ndarray) -> float:
    """Return the ε that c shows, (directions, scales), where it falls faster than 1/μ; 0 elsewhere.

    The c of any loss falls no faster: that of a kink is as 1/μ. The c of noise is as 1/μ².
    """
    sizes = root_mean_square(values)
    is_noise = sizes[:-1] * scales[:-1] > 1.5 * sizes[1:] * scales[1:]
    return float((sizes * scales**2)[:-1][is_noise].max(initial=0.0)) * 2 / math.sqrt(6)


class Difference:
    """g or c over μ, and what spoils it: noise / μ^power, and bend · μ² of higher derivatives.

    ``values`` are at several μ, (directions, scales); ``power`` is 1 for g and 2 for c. ``size`` is
    their root mean square without noise, 0 where noise hides them.
    """

    def __init__(self, scales: np.ndarray, values: np.ndarray, noise: float, power: int) -> None:
        self.noise, self.power, self.size, self.bend = noise, power, 0.0, 0.0
        sigma = noise / scales**power
        for low, high in itertools.combinations(range(len(scales)), 2):
            change = float(root_mean_square(values[:, high] - values[:, low]))
            # ε is known to a factor of about 2.
            if change > 4 * math.hypot(sigma[low], sigma[high]):
                self.bend = max(self.bend, change / (scales[high] ** 2 - scales[low] ** 2))
        squares = np.mean(values**2, axis=0)
        best = int(np.argmin(np.hypot(sigma, self.bend * scales**2)))
        if (squares > 4 * sigma**2).any():
            self.size = math.sqrt(max(0.0, squares[best] - sigma[best] ** 2))

    def error(self, scale: float) -> float | None:
        """Return the error relative to the size, None if noise hides it."""
        if not self.size:
            return None
        noise = self.noise / scale**self.power / self.size
        bend = self.bend * scale**2 / self.size
        # Noise makes c, an absolute value, larger.
        return math.hypot(noise, bend) if self.power == 1 else math.hypot(1, noise) - 1 + bend

    def best_scale(self, accuracy: float) -> float:
        """Return the μ at which noise reaches the accuracy, or that of least error if smaller."""
        if not self.size:
            return math.inf
        share = accuracy if self.power == 1 else math.sqrt((1 + accuracy) ** 2 - 1)
        scale = (self.noise / (share * self.size)) ** (1 / self.power)
        if self.bend:
            # Where the derivative of noise² / μ^2p + bend² μ⁴ is 0.
            ratio = math.sqrt(self.power / 2) * self.noise / self.bend
            scale = min(scale, ratio ** (1 / (self.power + 2)))
        return max(scale, LEAST_SCALE)


@dataclass(frozen=True)
class Scales:
    """The μ of g and of c, and what they come from."""

    noise: float
    settled: bool  # whether a difference table showed the noise; otherwise it is a guess
    eps: float
    curvature_eps: float
    error: float | None  # of g at eps, relative; None: noise hides g
    curvature_error: float | None  # of the mean of c at curvature_eps
    scales: tuple[float, ...]  # every μ that was measured, rising
    slopes: tuple[float, ...]  # root mean square of g at each
    curvatures: tuple[float, ...]  # mean of c at each
    passes: int

    def lines(self) -> Iterator[str]:
        """Yield the lines to print."""
        yield (
            f"probe: noise of the loss {self.noise:.2g}{'' if self.settled else ' (a guess)'}; "
            f"μ of g {self.eps:.2g}, of c {self.curvature_eps:.2g}; {self.passes} forward passes"
        )
        goals = (("g", self.error, ACCURACY), ("c", self.curvature_error, CURVATURE_ACCURACY))
        for name, error, goal in goals:
            if error is None:
                yield f"probe: {name} is rounding noise at every μ up to {self.scales[-1]:.2g}"
            elif error > 2 * goal:
                yield f"probe: {name} is right to {error:.0%} at best: smaller μ are too noisy"


class Fit:
    """g and c, fitted to the losses l+ and l- at several ``scales`` (rising) and l0.

    ``s`` is the c of each direction and μ with its sign.
    """

    def __init__(
        self, scales: list[float], measured: dict[float, np.ndarray], base: np.ndarray, noise: float
    ) -> None:
        self.scales = np.array(scales)
        plus, minus = np.stack([measured[scale] for scale in scales], axis=-1)
        self.g = (plus - minus) / (2 * self.scales)
        self.s = (plus + minus - 2 * base[:, None]) / (2 * self.scales**2)
        self.noise = max(noise, noise_of_curvatures(self.scales, self.s))
        self.of_g = Difference(self.scales, self.g, self.noise / math.sqrt(2), 1)
        self.of_c = Difference(self.scales, self.s, self.noise * math.sqrt(6) / 2, 2)

    def best_scales(self, limit: float) -> tuple[float, float]:
        """Return μ of g and of c, at most ``limit``."""
        eps = min(self.of_g.best_scale(ACCURACY), limit)
        return eps, min(self.of_c.best_scale(CURVATURE_ACCURACY), limit)

    def wanted(self, largest: float) -> set[float]:
        """Return the μ to measure next; ``largest`` is the largest that was tried."""
        # Larger ones are tried as long as losses are finite.
        eps, eps_of_c = self.best_scales(self.scales[-1] * (4 if self.scales[-1] == largest else 1))
        # The loss does not bend over a μ that is below all measured ones: g need not be measured.
        best = {eps_of_c, max(eps, self.scales[0])}
        return {float(f"{b:.3g}") for b in best if np.abs(np.log2(self.scales / b)).min() > 1}


def choose_scales(
    loss_at: LossAt, start: Sequence[float] = (1e-3, 4e-3), directions: int = 5, rounds: int = 5
) -> Scales:
    """Choose the smallest μ at which g is right, and the smallest at which c is.

    With losses l+ and l- at ±μ and l0 at θ, of noise ε:

        g = (l+ - l-) / 2μ           noise ε / √2 μ       bend l''' μ² / 6
        c = |l+ + l- - 2 l0| / 2μ²   noise √6 ε / 2μ²     bend l'''' μ² / 24

    Size and bend come from g and c at ``start`` and give μ in closed form. A μ farther than a
    factor of 2 from all measured ones is measured too, and the closed form is taken again.

    Raises:
        InputError: the losses do not show any μ.
    """
    taken = functools.cache(loss_at)
    base = np.array([taken(k, 0, 0.0) for k in range(directions)])
    if not np.isfinite(base).all():
        raise InputError(
            f"no μ can be chosen: the loss is {base[~np.isfinite(base)][0]} before any step; look "
            "at the data, the model and its dtype"
        )
    noise, settled = measure_noise(taken)
    measured: dict[float, np.ndarray] = {}
    wanted, fit = set(start), None
    for _ in range(rounds):
        for scale in wanted:
            measured[scale] = np.array(
                [[taken(k, k, sign * scale) for k in range(directions)] for sign in (1, -1)]
            )
        finite = sorted(scale for scale, losses in measured.items() if np.isfinite(losses).all())
        if len(finite) < 2:
            wanted = {min(measured) / 4}
            continue
        fit = Fit(finite, measured, base, noise)
        if not (wanted := fit.wanted(max(measured))):
            break
    if fit is None:
        raise InputError(
            f"no μ can be chosen: the loss is not finite at μ = {max(measured):.2g} and below; "
            "look at the model and its dtype"
        )
    if not fit.g.any() and not fit.s.any():
        raise InputError(
            f"no μ can be chosen: no perturbation up to μ = {fit.scales[-1]:.2g} changes the loss; "
            "are there weights to train that it depends on?"
        )
    eps, eps_of_c = (float(f"{best:.3g}") for best in fit.best_scales(fit.scales[-1]))
    eps_of_c = eps_of_c if fit.of_c.size else eps
    return Scales(
        noise=fit.noise,
        settled=settled,
        eps=eps,
        curvature_eps=eps_of_c,
        error=fit.of_g.error(eps),
        curvature_error=fit.of_c.error(eps_of_c),
        scales=tuple(fit.scales.tolist()),
        slopes=tuple(root_mean_square(fit.g).tolist()),
        curvatures=tuple(np.abs(fit.s).mean(axis=0).tolist()),
        passes=taken.cache_info().misses,
    )


def root_mean_square(values: np.ndarray) -> np.ndarray:
    """Return it over the first axis."""
    return np.sqrt(np.mean(values**2, axis=0))


@contextlib.contextmanager
def kept_weights(model: nn.Module, optimizer: HiZOO) -> Iterator[None]:
    """Keep the weights bit for bit: in place, perturbing and back rounds, so they are copied."""
    in_place = optimizer.layers is None
    shifted = [p.detach() for p in model.parameters() if p.requires_grad and in_place]
    copies = [parameter.to("cpu", copy=True) for parameter in shifted]
    try:
        yield
    finally:
        optimizer.restore()
        for parameter, copy in zip(shifted, copies, strict=True):
            parameter.copy_(copy)


@dataclass(eq=False)
class ChooseScale(TrainerCallback):
    """Chooses μ before the first step, ``--zo_eps auto``: the larger of that of g and that of c."""

    loss_at: LossAt
    recording: Recording
    file: Path  # of the probe

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: HiZOO, **_: Any
    ) -> None:
        """Choose it; a resumed run has it in its checkpoint or journal."""
        recorded = self.recording.take(Scale, 0)
        if recorded is None and state.global_step == 0:
            with kept_weights(model, optimizer):
                scales = choose_scales(self.loss_at)
            eps = max(scales.eps, scales.curvature_eps * optimizer.wants_curvature)
            self.recording.write(Scale(0, eps))
            if args.process_index == 0:
                write_json(self.file, asdict(scales))
                for line in scales.lines():
                    tqdm.write(line)  # above the bar
        else:
            eps = recorded.eps if recorded else optimizer.param_groups[0]["eps"]
        for group in optimizer.param_groups:
            group["eps"] = eps
        if recorded:
            check_scale(optimizer, str(self.recording.path))
