"""Step sizes of losses whose noise, derivatives and best steps are known in closed form."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import probe_plot
from training.scales import SCALES, Losses, choose_scales, measure_noise
from training.step_sizes import MULTIPLES, StepSizes, find_step_sizes, measure_step
from utils import InputError, NotWritten


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


@pytest.mark.parametrize(
    ("loss", "truth"),
    [
        *((Known(noise=noise, third=1e4, fourth=1e6), noise) for noise in (1e-9, 1e-6, 1e-3)),
        # The error of rounding to multiples of a unit is spread evenly over it.
        (Known(rounding=rounded_to_float32, **ROUNDED), 2**-24 / math.sqrt(12)),
        (Known(rounding=rounded_to_bfloat16, **ROUNDED), 2**-8 / math.sqrt(12)),
    ],
)
def test_noise_of_known_size_is_found(loss: Known, truth: float) -> None:
    found = [measure_noise(replace(loss, seed=seed)) for seed in range(40)]
    ratios = np.array([each.noise for each in found]) / truth
    assert np.mean((ratios > 1 / 3) & (ratios < 3)) >= 0.95
    assert 0.7 < np.median(ratios) < 1.3
    assert np.mean([each.settled for each in found]) > 0.8


@pytest.mark.parametrize("spacing", [1e-2, 1e-10])
def test_another_spacing_is_tried(spacing: float) -> None:
    loss = Known(rounding=lambda loss: round(loss / 1e-6) * 1e-6)
    found = measure_noise(loss, spacing=spacing, tables=6)
    assert found.tables > 1
    assert found.settled
    assert found.passes == 9 * found.tables
    assert 1 / 3 < found.noise / 1e-6 * math.sqrt(12) < 3


def test_a_spacing_between_two_that_fail() -> None:
    # 1e-4 apart, most neighbours are equal; 1e-3 apart, they differ by more than a tenth in all.
    found = measure_noise(lambda batch, direction, t: rounded_to_bfloat16(0.8 + 15.6 * t))
    assert found.tables == 3
    assert found.spacing == pytest.approx(math.sqrt(1e-4 * 1e-3))
    assert 1 / 3 < found.noise / 2**-8 * math.sqrt(12) < 3


def test_tables_that_do_not_settle_are_counted_and_said() -> None:
    found = measure_noise(lambda batch, direction, t: 1.0)
    assert (found.noise, found.settled, found.order) == (0.0, False, None)
    assert (found.tables, found.passes) == (3, 27)
    assert "none of 3 difference tables settled" in found.reason


def test_noise_is_measured_closer_where_the_loss_is_not_finite_farther_away() -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return math.nan if t > 5e-4 else Known(noise=1e-4)(batch, direction, t)

    found = measure_noise(loss)
    assert (found.tables, found.spacing) == (3, pytest.approx(1e-5))
    assert 1e-4 / 3 < found.noise < 3e-4


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
        found = choose_scales(loss, noise)
        assert found.reasons == ()
        slopes.append(errors_at(loss, found.scale, 50)[0])
        curvatures.append(errors_at(loss, found.curvature_scale, 50)[1])
    (g, true_g), (c, true_c) = np.hstack(slopes), np.hstack(curvatures)
    assert np.sqrt(np.mean((g - true_g) ** 2)) < 0.02 * np.sqrt(np.mean(true_g**2))
    assert abs(c.mean() - true_c.mean()) < 0.1 * true_c.mean()


def test_they_are_the_smallest_such_scales() -> None:
    noise = 1e-5
    found = choose_scales(Known(noise=noise), noise)
    # ε / √2 μ is 2% of g, and the noise of c adds 10% to its mean where it is about 0.75 of c.
    assert found.scale == pytest.approx(noise / math.sqrt(2) / 0.02 / found.slope, rel=0.5)
    assert found.curvature_scale == pytest.approx(
        math.sqrt(math.sqrt(6) * noise / 2 / (0.9 / math.sqrt(2)) / 945), rel=0.5
    )


def test_c_takes_the_scale_of_g_where_that_serves() -> None:
    found = choose_scales(Known(slope=0.1, curvature=945.0, noise=1e-6), 1e-6)
    assert found.curvature_scale == found.scale
    assert found.curvature_error < 0.1


def test_c_has_a_scale_of_its_own_where_that_of_g_is_too_small() -> None:
    found = choose_scales(Known(noise=1e-6), 1e-6)
    assert found.curvature_scale > 2 * found.scale


@pytest.mark.parametrize("seed", range(6))
def test_a_noise_as_of_bfloat16_wants_a_larger_scale(seed: int) -> None:
    # SmolLM2-135M in bfloat16: the mean of c at 1e-3 is eight times what it is without noise.
    loss = Levelling(seed, noise=7.4e-3)
    found = choose_scales(loss, 7.4e-3)
    assert 2.5e-3 < found.curvature_scale < 7.5e-3
    assert 0.6 < found.curvature / 945 < 1.4
    # No μ makes g right to 2%, and that is said.
    assert found.reasons[0].startswith("g is exact to")


def test_noise_that_grows_with_the_shift_is_noticed() -> None:
    told = 1e-7
    found = choose_scales(Known(noise=1e-4), told)
    assert 0.3e-4 < found.noise < 3e-4
    assert found.scale > 1e-4


def test_the_grid_grows_where_its_largest_scale_is_too_small() -> None:
    noise = 1e-2
    found = choose_scales(Known(noise=noise, slope=1.0, curvature=1.0), noise, most=12)
    assert max(found.distances) > max(SCALES)


def test_scales_at_which_the_loss_is_not_finite_are_left_out() -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return math.inf if abs(t) > 5e-3 else Known(noise=1e-6)(batch, direction, t)

    found = choose_scales(loss, 1e-6)
    assert max(found.distances) < 5e-3
    assert found.reasons == ()


def test_a_loss_without_curvature() -> None:
    found = choose_scales(lambda batch, direction, t: 0.5 + 4 * t, 0.0)
    assert found.slope == pytest.approx(4)
    json.dumps(found.as_dict(), allow_nan=False)


def test_scales_reuse_what_is_known() -> None:
    losses = Losses(Known(noise=1e-6))
    first = choose_scales(losses, 1e-6)
    assert first.passes == losses.passes == 5 * (1 + 2 * len(first.distances))
    again = choose_scales(losses, 1e-6)
    assert again == replace(first, passes=0)


# --- the step


def best_step(loss: Known, pairs: int) -> float:
    """t* of losses that are quadratic."""
    rows = [
        (
            loss.slope_of(k, k) * loss.slope_of(pairs + k, k),
            loss.slope_of(k, k) ** 2 * loss.curvature_of(pairs + k, k),
        )
        for k in range(pairs)
    ]
    falls, bends = np.array(rows).sum(axis=0)
    return falls / (2 * bends)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_step_of_a_quadratic(seed: int) -> None:
    loss = Known(seed)
    found = measure_step(loss, 1e-4)
    assert found.bracketed
    assert found.best == pytest.approx(best_step(loss, 5), rel=0.01)
    assert found.curvature == pytest.approx(945, rel=0.2)
    assert found.part == pytest.approx(2 * found.best * found.curvature)
    assert found.reason is None


def test_the_best_step_with_noise_is_right_to_the_grid() -> None:
    loss = Known(noise=1e-3)
    found = measure_step(loss, 2e-3, noise=1e-3)
    assert 0.5 < found.best / best_step(loss, 5) < 2


@pytest.mark.parametrize("start", [1e-6, 5e-5, 0.03])
def test_the_grid_of_steps_grows_both_ways(start: float) -> None:
    loss = Known(curvature=945)
    given = [start, 2 * start, 4 * start]
    found = measure_step(loss, 1e-4, distances=given, widenings=12)
    assert set(given) <= set(found.distances)
    assert found.bracketed
    assert found.best == pytest.approx(best_step(loss, 5), rel=0.01)


def test_a_loss_that_still_falls_at_the_end_is_said() -> None:
    found = measure_step(Known(), 1e-4, distances=[1e-8], widenings=2)
    assert found.distances == (1e-8, 2e-8, 4e-8)
    assert (found.best, found.bracketed) == (4e-8, False)
    assert "still falls at t = 4e-08" in found.reason


def test_a_step_that_is_not_finite_is_too_large() -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return math.nan if abs(t) > 6e-3 else Known(base=0.8)(batch, direction, t)

    found = measure_step(loss, 1e-4)
    assert found.too_large is not None
    assert max(found.distances) < found.too_large
    everything_too_large = measure_step(loss, 1e-4, distances=[1.0], widenings=10)
    assert everything_too_large.best < 1e-3


def test_a_fall_within_the_noise_is_said() -> None:
    found = measure_step(Known(slope=0.5), 1e-2, noise=0.1)
    assert "no more than its rounding noise" in found.reason


def test_a_curve_without_a_minimum_is_said() -> None:
    # The batches that g is not measured on rise where g's own fall.
    def loss(batch: int, direction: int, t: float) -> float:
        return 1.0 + (10 * t if batch < 5 else -10 * t) + 100 * t**2

    found = measure_step(loss, 1e-3)
    assert found.best is found.part is None and not found.bracketed
    assert found.reason.startswith("no step lowers the loss of other batches, from t = ")
    assert "\n" not in found.reason and "μ = 0.001" in found.reason


# --- errors, and all three together


def not_finite(batch: int, direction: int, t: float) -> float:
    return math.nan


@pytest.mark.parametrize(
    "measure",
    [
        measure_noise,
        lambda loss: choose_scales(loss, 1e-6),
        lambda loss: measure_step(loss, 1e-3),
        find_step_sizes,
    ],
)
def test_losses_that_are_not_finite_are_an_error(measure: Callable) -> None:
    with pytest.raises(InputError, match="the loss of its batch 0 is nan before any step"):
        measure(not_finite)


def test_a_batch_of_a_pair_that_is_not_finite_is_named() -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return math.inf if batch == 7 else 1 + t + t**2

    with pytest.raises(InputError, match="batch 7 is inf before any step"):
        measure_step(loss, 1e-3)


def test_a_scale_at_which_the_loss_is_not_finite_is_an_error() -> None:
    def loss(batch: int, direction: int, t: float) -> float:
        return 1 + t if abs(t) < 1e-3 else math.nan

    with pytest.raises(InputError, match=r"not finite at μ = 0\.01"):
        measure_step(loss, 1e-2)
    with pytest.raises(InputError, match=r"not finite from μ = 0\.001 on"):
        choose_scales(loss, 1e-6, scales=[1e-4, 1e-3, 1e-2])


def test_a_loss_that_no_shift_changes_is_an_error() -> None:
    with pytest.raises(InputError, match="no shift of the weights changes the loss"):
        choose_scales(lambda batch, direction, t: 1.0, 0.0)


@pytest.mark.parametrize(
    "measure",
    [
        lambda loss: measure_noise(loss, spacing=0.0),
        lambda loss: measure_noise(loss, points=3),
        lambda loss: measure_noise(loss, tables=0),
        lambda loss: choose_scales(loss, -1.0),
        lambda loss: choose_scales(loss, math.nan),
        lambda loss: choose_scales(loss, 0.0, directions=0),
        lambda loss: choose_scales(loss, 0.0, scales=[1e-3, 1e-2]),
        lambda loss: choose_scales(loss, 0.0, scales=[1e-3, 1e-2, 1e-2]),
        lambda loss: measure_step(loss, 0.0),
        lambda loss: measure_step(loss, 1e-3, curvature_scale=-1.0),
        lambda loss: measure_step(loss, 1e-3, pairs=1),
        lambda loss: measure_step(loss, 1e-3, distances=[]),
        lambda loss: measure_step(loss, 1e-3, distances=[0.0, 1.0]),
    ],
)
def test_numbers_that_make_no_sense_are_errors(measure: Callable) -> None:
    with pytest.raises(InputError) as error:
        measure(Known())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "loss",
    [
        Known(noise=1e-7),
        Levelling(noise=7e-3),
        Levelling(noise=1e-3),
        Known(third=1e6, fourth=1e8, rounding=rounded_to_float32),
        Known(slope=4.0, curvature=60.0, rounding=rounded_to_bfloat16),
    ],
)
def test_all_three_stay_under_200_passes_and_ask_nothing_twice(loss: Known) -> None:
    asked = []

    def counted(batch: int, direction: int, t: float) -> float:
        asked.append((batch, direction if t else None, t))
        return loss(batch, direction, t)

    found = find_step_sizes(counted)
    assert found.passes == len(asked) == len(set(asked))
    assert found.passes == found.noise.passes + found.scales.passes + found.step.passes
    assert found.passes < 200
    assert found.step.best > 0
    text = json.dumps(replace(found, learning_rate=math.inf).as_dict(), allow_nan=False)
    assert json.loads(text)["learning_rate"] is None
    assert json.loads(text)["step"]["best"] == found.step.best


def test_the_most_passes_that_three_can_take() -> None:
    # Tables, then every μ of the grid and three more, then every step and six more.
    assert 3 * 9 + 5 * (1 + 2 * 10) + 5 * (1 + len(MULTIPLES) + 6) < 200


# --- the picture


@pytest.fixture(scope="module")
def found() -> StepSizes:
    return replace(find_step_sizes(Levelling(noise=1e-3)), learning_rate=5e-5)


def test_the_picture_is_drawn_with_what_was_chosen(found: StepSizes, tmp_path: Path) -> None:
    probe_plot.draw(found, tmp_path / "folder" / "probe.svg")
    # Text is drawn as outlines, and what it says is kept in comments.
    picture = (tmp_path / "folder" / "probe.svg").read_text()
    for text in (
        f"t* = {found.step.best:.2g}",
        "η taken = 5e-05",
        f"% at μ = {found.scales.scale:.3g}",
    ):
        assert text in picture


def test_a_picture_of_what_was_not_found(tmp_path: Path) -> None:
    step = measure_step(Known(), 1e-4, distances=[1e-8], widenings=2)
    scales = choose_scales(lambda batch, direction, t: 0.5 + 4 * t, 0.0)
    noise = measure_noise(Known())
    probe_plot.draw(StepSizes(noise, scales, step, 100), tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 10_000


def test_a_kind_of_picture_that_there_is_not(found: StepSizes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a name that ends in \.png, \.pdf or \.svg"):
        probe_plot.draw(found, tmp_path / "probe.text")


def test_a_picture_without_matplotlib(
    found: StepSizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="needs matplotlib"):
        probe_plot.draw(found, tmp_path / "probe.png")


def test_a_picture_that_cannot_be_written(found: StepSizes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritten, match=r"probe\.png could not be written"):
        probe_plot.draw(found, tmp_path / "file" / "probe.png")
