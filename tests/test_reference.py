"""``examples/hizoo_reference.py``, the step to read and to copy, does what ``hizoo.py`` does."""

from __future__ import annotations

import pytest
import torch
from oracle_hizoo import read_noise
from torch import Tensor, nn

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
        assert (one - first).abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
