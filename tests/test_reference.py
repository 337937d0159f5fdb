"""The steps to read and to copy, ``examples/*_reference.py``, do what the fast ones do."""

from __future__ import annotations

import pytest
import torch
from oracle_hizoo import read_noise
from tiny_models import tiny_model
from torch import Tensor, nn

from error_broadcast import ErrorBroadcast
from examples import error_broadcast_reference
from examples.hizoo_reference import HiZOOReference
from hizoo import HiZOO

SETTINGS = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "seed": 3}


class ReferenceWithNoise(HiZOOReference):
    """The reference with the noise of an optimizer that is about to do the same step."""

    fast: HiZOO

    def noise(self, parameter: Tensor, number: int) -> Tensor:
        return read_noise(self.fast)[number].to(parameter)


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2)).double()


@pytest.mark.parametrize("smooth", [0.0, 1e-3])
def test_the_reference_and_the_fast_step_do_the_same(smooth: float) -> None:
    models = small_model(), small_model()
    for model in models:
        model[2].bias.requires_grad_(False)
    fast = HiZOO(models[0].parameters(), hessian_smooth=smooth, **SETTINGS)
    plain = ReferenceWithNoise(models[1].parameters(), hessian_smooth=smooth, **SETTINGS)
    plain.fast = fast
    inputs = torch.randn(7, 5, dtype=torch.float64)
    for _ in range(30):
        plain.step(lambda: models[1](inputs).square().mean())
        fast.step(lambda: models[0](inputs).square().mean())
    for one, other, first in zip(
        models[0].parameters(), models[1].parameters(), small_model().parameters(), strict=True
    ):
        moved = (one - first).abs().max()
        assert moved > 1e-3 if one.requires_grad else moved == 0
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_reference_of_error_broadcast_does_the_same(family: str) -> None:
    models = [tiny_model(family, num_hidden_layers=4).double() for _ in range(2)]
    fast, plain = ErrorBroadcast(models[0], lr=0.5), ErrorBroadcast(models[1])
    ids = torch.randint(4, 400, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    rows, columns = (labels[:, 1:] >= 0).nonzero(as_tuple=True)
    matrices = [writer.matrix for writer in plain.writers]
    for _ in range(3):
        loss = fast.step(lambda: models[0](ids, labels=labels).loss)
        targets = ids[rows, columns + 1]
        same = error_broadcast_reference.step(
            models[1], matrices, plain.final_norm, ids, (rows, columns), targets, kappa=0.5
        )
        assert loss == pytest.approx(same, rel=1e-6)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
