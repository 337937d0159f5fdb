"""The step from the curvature (``lr="auto"``), and when c is measured."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from oracle_hizoo import OracleHiZOO, read_noise
from test_hizoo import SEED, largest_difference, make_loss, make_parameters, oracle_noise
from torch import Tensor, nn

from hizoo import HiZOO, Layers
from zeroth_order import chunks

SETTINGS = {
    "step of MeZO": {"lr": "auto", "hessian_smooth": 0.0, "curvature_every": 1},
    "every third step": {"lr": "auto", "hessian_smooth": 0.0, "curvature_every": 3},
    "step of HiZOO": {"lr": "auto", "hessian_smooth": 1e-2},
    "three directions": {"lr": "auto", "hessian_smooth": 1e-3, "num_samples": 3},
    "two directions, every second": {
        **{"hessian_smooth": 1e-2, "curvature_every": 2, "num_samples": 2, "lr": "auto"},
    },
    "low rank, every second": {
        **{"hessian_smooth": 1e-2, "curvature_every": 2, "hessian": "lowrank"},
    },
}


# float64 shows the mathematics, float32 that nothing is lost by rounding.
IN_FLOAT32 = ("step of HiZOO", "two directions, every second")
ORACLE_CASES = [
    pytest.param(
        *(dtype, settings),
        id=f"{dtype}-{name}".removeprefix("torch."),
        marks=[pytest.mark.slow] if dtype == torch.float32 and name not in IN_FLOAT32 else [],
    )
    for dtype in (torch.float32, torch.float64)
    for name, settings in SETTINGS.items()
]


@pytest.mark.parametrize(("dtype", "settings"), ORACLE_CASES)
def test_steps_follow_the_oracle(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    parameters = make_parameters(dtype)
    lr = 1e-3 if "lr" in settings else 1e-4
    eps = 1e-3 if dtype == torch.float64 else 1e-2
    optimizer = HiZOO(parameters, **{"lr": lr, "eps": eps, "seed": SEED} | settings)
    optimizer.param_groups[0]["lr"] = lr
    oracle = OracleHiZOO(
        parameters,
        eps,
        settings["hessian_smooth"],
        [lr] * 5,
        [0.0] * 5,
        settings.get("hessian") == "lowrank",
        "lr" in settings,
        settings.get("curvature_every", 1),
    )
    start = [parameter.detach().clone() for parameter in parameters]
    samples = settings.get("num_samples", 1)
    for step in range(30):
        loss = make_loss(step % 4)
        optimizer.step(lambda loss=loss: loss(parameters))
        oracle.step([loss], [oracle_noise(step, direction) for direction in range(samples)])
    moved = largest_difference(parameters, start)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    assert largest_difference(parameters, oracle.parameters) < tolerance * moved


def count_passes(parameters: list[Tensor], steps: int, **settings: Any) -> list[int]:
    """Forward passes of every step, without the repeated one of the first."""
    passes = []
    optimizer = HiZOO(parameters, **{"lr": 0.0, "eps": 1e-2, **settings})
    for _ in range(steps):
        calls = []
        optimizer.step(lambda calls=calls: calls.append(0) or float(parameters[0].detach().sum()))
        passes.append(len(calls))
    return [passes[0] - 1, *passes[1:]]


def test_forward_passes_of_a_step() -> None:
    parameters = [nn.Parameter(torch.linspace(-1, 1, 50))]
    by_curvature = {"lr": "auto", "hessian_smooth": 0.0}
    assert count_passes(parameters, 12, **by_curvature) == [3] * 11 + [2]
    assert count_passes(parameters, 5, **by_curvature, curvature_every=2) == [3, 3, 3, 2, 3]
    assert count_passes(parameters, 3, **by_curvature, curvature_every=1, num_samples=2) == [5] * 3
    assert count_passes(parameters, 3, hessian_smooth=1e-3) == [3] * 3


@pytest.mark.parametrize("name", ["every third step", "two directions, every second"])
def test_state_dict_resumes_bit_for_bit(name: str) -> None:
    whole, half = make_parameters(), make_parameters()
    arguments = {"lr": 1e-3, "eps": 1e-2, **SETTINGS[name]}
    uninterrupted, resumed = HiZOO(whole, **arguments), HiZOO(half, **arguments)
    for batch in range(12):
        uninterrupted.step(functools.partial(make_loss(batch), whole))
    with torch.no_grad():
        for own, trained in zip(half, whole, strict=True):
            own.copy_(trained)
    resumed.load_state_dict(uninterrupted.state_dict())
    for batch in range(12, 20):
        for optimizer, parameters in ((uninterrupted, whole), (resumed, half)):
            optimizer.step(functools.partial(make_loss(batch), parameters))
    assert all(torch.equal(p, q) for p, q in zip(whole, half, strict=True))
    for name in ("mean_curvature", "measured_steps"):
        assert resumed.param_groups[0][name] == uninterrupted.param_groups[0][name]


def test_a_step_on_a_parabola_is_a_part_of_the_best_one() -> None:
    """Along u the loss a Σ(x - 1)² is lowest at η = 1 / 2c: lr 1 goes there in one step."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = HiZOO([parameter], lr="auto", hessian_smooth=0.0, curvature_every=1)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.param_groups[0]["measured_steps"] = 10**9  # neither slow at first nor averaged
    for _ in range(200):
        optimizer.step(lambda: 3 * float((parameter.detach() - 1).square().sum()))
    assert float(parameter.detach()) == pytest.approx(1, abs=1e-4)


def test_a_flat_loss_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(10))
    optimizer = HiZOO([parameter], lr="auto", hessian_smooth=0.0)
    for _ in range(3):
        optimizer.step(lambda: 0.0)
    torch.testing.assert_close(parameter.detach(), torch.ones(10), rtol=0, atol=1e-6)
    assert optimizer.learning_rate(optimizer.param_groups[0]) == 0


@pytest.mark.parametrize("layerwise", [False, True])
def test_losses_along_a_direction(layerwise: bool) -> None:
    model = nn.Linear(6, 1, bias=False)
    layers = Layers(model) if layerwise else None
    optimizer = HiZOO(model.parameters(), eps=1e-2, hessian_smooth=0.0, layers=layers)
    inputs, before = torch.ones(1, 6), model.weight.detach().clone()
    for direction, distance in ((0, 0.3), (4, -2.0), (4, 0.0)):
        found = optimizer.loss_along(lambda: float(model(inputs)), distance, direction)
        u = read_noise(optimizer, direction)[0].view(-1)
        expected = float(before.double().sum() + distance * u.sum())
        assert found == pytest.approx(expected, abs=1e-5)
    optimizer.restore()
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=1e-6)
    optimizer.estimate(lambda: float(model(inputs)))
    with pytest.raises(RuntimeError, match="would lose the estimate"):
        optimizer.loss_along(lambda: 0.0, 0.1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CACHED_CHUNK", 256)
