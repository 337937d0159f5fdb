"""Noise and μ of losses whose noise and derivatives are known in closed form."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest

from training.scales import choose_scales, measure_noise
from utils import InputError


def rounded_to_float32(loss: float) -> float:
    return float(np.float32(loss))


def rounded_to_bfloat16(loss: float) -> float:
    bits = np.float32(loss).view(np.uint32)
    nearest = (int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) & 0xFFFF0000
    return float(np.uint32(nearest).view(np.float32))


def number(*key: object) -> float:
    """A number from the normal distribution that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return statistics.NormalDist().inv_cdf((int.from_bytes(digest[:6]) + 0.5) / 2**48)


@dataclass(frozen=True)
class Known:
    """A loss with known derivatives along each direction, and with noise of known size.

    Slopes differ by direction and a little by batch, as gradients of batches do.
    """

    seed: int = 0
    noise: float = 0.0
    base: float = 0.97
    slope: float = 16.0
    curvature: float = 945.0
    third: float = 0.0
    fourth: float = 0.0
    rounding: Callable[[float], float] = float

    def slope_of(self, batch: int, direction: int) -> float:
        own = number(self.seed, "batch", batch, direction)
        return self.slope * (number(self.seed, "direction", direction) + 0.3 * own)

    def curvature_of(self, batch: int, direction: int) -> float:
        return self.curvature * (1 + 0.1 * number(self.seed, "curvature", batch, direction))

    def smooth(self, batch: int, direction: int, t: float) -> float:
        low = self.slope_of(batch, direction) * t + self.curvature_of(batch, direction) * t**2
        return self.base + low + self.third * t**3 / 6 + self.fourth * t**4 / 24

    def __call__(self, batch: int, direction: int, t: float) -> float:
        rounding = self.noise * number(self.seed, "noise", batch, direction if t else None, t)
        return self.rounding(self.smooth(batch, direction, t) + rounding)


class Levelling(Known):
    """A loss whose second difference over μ² is 945 near 0, 662 at 1e-2 and less beyond."""

    def smooth(self, batch: int, direction: int, t: float) -> float:
        w = 197.0
        bend = 2 * self.curvature_of(batch, direction) * (1 - math.cos(w * t)) / w**2
        return self.base + self.slope_of(batch, direction) * math.sin(w * t) / w + bend


# --- noise

ROUNDED = {"base": 0.8, "third": 1e4, "fourth": 1e6}


def test_noise_of_known_size_is_found() -> None:
    known = [(Known(noise=noise, third=1e4, fourth=1e6), noise) for noise in (1e-9, 1e-6, 1e-3)]
    # The error of rounding to multiples of a unit is spread evenly over it.
    known += [
        (Known(rounding=rounded_to_float32, **ROUNDED), 2**-24 / math.sqrt(12)),
        (Known(rounding=rounded_to_bfloat16, **ROUNDED), 2**-8 / math.sqrt(12)),
    ]
    for loss, truth in known:
        found = [measure_noise(replace(loss, seed=seed)) for seed in range(40)]
        ratios = np.array([noise for noise, _ in found]) / truth
        assert np.mean((ratios > 1 / 3) & (ratios < 3)) >= 0.95, loss
        assert 0.7 < np.median(ratios) < 1.3, loss
        assert np.mean([settled for _, settled in found]) > 0.8, loss


def test_another_spacing_is_tried() -> None:
    loss = Known(rounding=lambda loss: round(loss / 1e-6) * 1e-6)
    for spacing in (1e-2, 1e-10):
        noise, settled = measure_noise(loss, spacing=spacing, tables=6)
        assert settled, spacing
        assert 1 / 3 < noise / 1e-6 * math.sqrt(12) < 3, spacing


def test_a_spacing_between_two_that_fail() -> None:
    # 1e-4 apart, most neighbours are equal; 1e-3 apart, they differ by more than a tenth in all.
    noise, _ = measure_noise(lambda batch, direction, t: rounded_to_bfloat16(0.8 + 15.6 * t))
    assert 1 / 3 < noise / 2**-8 * math.sqrt(12) < 3


def test_noise_is_a_guess_where_no_table_settles() -> None:
    assert measure_noise(lambda batch, direction, t: 1.0) == (0.0, False)


def test_noise_is_measured_closer_where_the_loss_is_not_finite_farther_away() -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return math.nan if t > 5e-4 else Known(noise=1e-4)(batch, direction, t)

    noise, settled = measure_noise(loss)
    assert settled and 1e-4 / 3 < noise < 3e-4


# --- μ


def errors_at(loss: Known, scale: float, directions: int) -> tuple[np.ndarray, np.ndarray]:
    """g and c at a scale, and what they would be for μ → 0 without noise, by direction."""
    rows = []
    for k in range(directions):
        plus, minus, here = (loss(k, k, way * scale) for way in (1, -1, 0))
        g, c = (plus - minus) / (2 * scale), abs(plus + minus - 2 * here) / (2 * scale**2)
        rows.append((g, loss.slope_of(k, k), c, loss.curvature_of(k, k)))
    g, true_g, c, true_c = np.array(rows).T
    return np.array([g, true_g]), np.array([c, true_c])


@pytest.mark.parametrize("noise", [1e-8, 1e-6, 1e-5])
def test_g_and_c_are_right_at_the_scales_that_are_chosen(noise: float) -> None:
    slopes, curvatures = [], []
    for seed in range(8):
        loss = Known(seed, noise, third=1e6, fourth=1e8)
        found = choose_scales(loss)
        assert found.passes <= 50
        slopes.append(errors_at(loss, found.eps, 50)[0])
        curvatures.append(errors_at(loss, found.curvature_eps, 50)[1])
    (g, true_g), (c, true_c) = np.hstack(slopes), np.hstack(curvatures)
    assert np.sqrt(np.mean((g - true_g) ** 2)) < 0.03 * np.sqrt(np.mean(true_g**2))
    assert abs(c.mean() - true_c.mean()) < 0.12 * true_c.mean()


def test_they_are_the_smallest_such_scales() -> None:
    found = choose_scales(Known(noise=1e-5))
    # ε / √2 μ is 2% of g, and noise of √(1.1² - 1) c adds 10% to c.
    slope, share = found.slopes[-1], math.sqrt(1.1**2 - 1)
    assert found.eps == pytest.approx(found.noise / math.sqrt(2) / 0.02 / slope, rel=0.2)
    assert found.curvature_eps == pytest.approx(
        math.sqrt(math.sqrt(6) * found.noise / 2 / share / 945), rel=0.2
    )
    assert found.curvature_eps > 2 * found.eps


def test_where_g_needs_the_larger_scale() -> None:
    found = choose_scales(Known(slope=0.1, curvature=945.0, noise=1e-6))
    assert found.eps > found.curvature_eps


def test_a_noise_as_of_bfloat16_wants_a_larger_scale() -> None:
    # SmolLM2-135M in bfloat16: the mean of c at 1e-3 is eight times what it is without noise.
    for seed in range(4):
        found = choose_scales(Levelling(seed, noise=7.4e-3))
        assert 2.5e-3 < found.curvature_eps < 1e-2, seed
        # No μ makes g right to 2%, and that is said.
        assert any(line.startswith("probe: g is right to") for line in found.lines()), seed


def test_noise_that_grows_with_the_distance_is_noticed() -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return Known(noise=1e-2 if abs(t) >= 1e-3 else 1e-6)(batch, direction, t)

    found = choose_scales(loss)
    assert 3e-3 < found.noise < 3e-2
    assert found.curvature_eps > 2e-3


def test_larger_scales_are_tried_where_noise_hides_g_and_c() -> None:
    found = choose_scales(Known(noise=1e-2, slope=1.0, curvature=1.0))
    assert found.scales[-1] > 0.1
    assert found.curvature_eps == pytest.approx(0.16, rel=0.5)


@pytest.mark.parametrize("farthest", [5e-3, 5e-4])
def test_scales_at_which_the_loss_is_not_finite_are_left_out(farthest: float) -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return math.inf if abs(t) > farthest else Known(noise=1e-6)(batch, direction, t)

    found = choose_scales(loss)
    assert max(found.scales) < farthest
    assert max(found.eps, found.curvature_eps) < 1e-4


def test_a_loss_without_curvature() -> None:
    found = choose_scales(lambda batch, direction, t: 0.5 + 4 * t)
    assert found.slopes[0] == pytest.approx(4)
    assert found.curvature_error is None and found.curvature_eps == found.eps
    assert "c is rounding noise at every μ" in list(found.lines())[-1]
    json.dumps(asdict(found), allow_nan=False)


def test_no_loss_is_taken_twice() -> None:
    asked = []

    def loss(batch: int, direction: int, t: float) -> float:
        asked.append((batch, direction, t))
        return Levelling(noise=1e-3)(batch, direction, t)

    assert choose_scales(loss).passes == len(asked) == len(set(asked))


ERRORS: dict[str, tuple[Callable, str]] = {
    "not finite": (lambda batch, direction, t: math.nan, "the loss is nan before any step"),
    "nowhere finite": (lambda batch, direction, t: math.nan if t else 1.0, "not finite at μ = 0.0"),
    "flat": (lambda batch, direction, t: 1.0, "no perturbation up to μ = .* changes the loss"),
}


@pytest.mark.parametrize(("loss", "message"), ERRORS.values(), ids=ERRORS)
def test_losses_that_no_scale_can_be_chosen_for(loss: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_scales(loss)
