"""The optimizer against the textbook step in float64, and what its interface promises."""

from __future__ import annotations

import pytest
import torch
from oracle_hizoo import OracleHiZOO, read_noise
from torch import Tensor, nn

import hizoo
from hizoo import HiZOO

SHAPES = [(37, 19), (50,), (3, 4, 5), (), (1, 700)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and packets, so that small parameters are cut in every possible way."""
    monkeypatch.setattr(hizoo, "CPU_TILE_ELEMENTS", 64)
    monkeypatch.setattr(hizoo, "PACKET_ELEMENTS", 200)


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def make_loss(batch: int = 0):
    """A smooth loss with gradient and curvature of order one, evaluated in float64."""
    generator = torch.Generator().manual_seed(100 + batch)
    targets = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

    def loss(parameters: list[Tensor]) -> float:
        pairs = zip(parameters, targets, strict=True)
        return sum(
            0.2 * ((p.double() - t).square().mean() + 0.05 * (p.double() * t).pow(3).sum()).item()
            for p, t in pairs
        )

    return loss


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(
        (a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smooth", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize(
    "decay, groups, batches, samples",
    [(0.0, 1, 1, 1), (0.1, 2, 1, 1), (0.1, 2, 3, 1), (0.1, 2, 2, 3)],
)
def test_fifty_steps_follow_the_oracle(dtype, smooth, decay, groups, batches, samples) -> None:
    parameters = make_parameters(dtype)
    first, rest = parameters[:2], parameters[2:]
    if groups == 2:
        groups_of_parameters = [
            {"params": first, "lr": 2e-4, "weight_decay": decay},
            {"params": rest},
        ]
        lr, weight_decay = [2e-4] * 2 + [1e-4] * 3, [decay] * 2 + [0.0] * 3
    else:
        groups_of_parameters, lr, weight_decay = parameters, [1e-4] * 5, [decay] * 5
    # float32 rounds the shifted weights: a larger shift keeps the second difference's digits.
    eps = 1e-3 if dtype == torch.float64 else 1e-2
    optimizer = HiZOO(
        groups_of_parameters, lr=1e-4, eps=eps, hessian_smooth=smooth, num_samples=samples, seed=5
    )
    oracle = OracleHiZOO(parameters, eps, smooth, lr, weight_decay)
    losses = [make_loss(batch) for batch in range(batches)]
    start = [parameter.detach().clone() for parameter in parameters]
    for _ in range(50):
        noise = [read_noise(optimizer, draw, dtype) for draw in range(samples)]
        oracle.step(losses, noise)
        for loss in losses:
            optimizer.estimate(lambda loss=loss: loss(parameters))
        optimizer.step()
    moved = largest_difference(start, oracle.parameters)
    relative_bound = 1e-8 if dtype == torch.float64 else 2e-3
    assert moved > 1e-3
    assert largest_difference(parameters, oracle.parameters) < relative_bound * moved
    for parameter, hessian in zip(parameters, oracle.hessians, strict=True):
        offset = optimizer.state[parameter].get("hessian_minus_one", torch.zeros(()))
        change = (hessian - 1).abs().max().item()
        assert (change > 0) == (smooth > 0)
        error = (offset.double() - (hessian - 1)).abs().max().item()
        assert error <= (1e-6 if dtype == torch.float64 else 5e-3) * change
