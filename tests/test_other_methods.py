"""Methods that HiZOO is compared with: a step is its formula, written out, and the loss falls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from other_methods import FZOO, ForwardOnly, TraceFreeHiZOO, ZOMuon, newton_schulz


def quadratic() -> tuple[list[Tensor], Callable[[], Tensor]]:
    """A matrix (6, 4) and a vector (5,) in float64, and a loss with other curvatures for each."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (5,))
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    scales = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in shapes]

    def loss() -> Tensor:
        return sum((s * p.square()).sum() for s, p in zip(scales, parameters, strict=True))

    return parameters, loss


def loss_at(
    parameters: list[Tensor], loss: Callable[[], Tensor], direction: list[Tensor], scale: float
) -> float:
    before = [parameter.clone() for parameter in parameters]
    for parameter, part in zip(parameters, direction, strict=True):
        parameter += scale * part
    value = float(loss())
    for parameter, kept in zip(parameters, before, strict=True):
        parameter.copy_(kept)
    return value


def assert_close(parameters: list[Tensor], expected: list[Tensor]) -> None:
    for parameter, value in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter, value, rtol=1e-9, atol=1e-9)


def test_fzoo_is_its_formula() -> None:
    parameters, loss = quadratic()
    optimizer = FZOO(parameters, lr=1e-5, eps=1e-3, seed=3)
    for step in range(2):
        noises = [list(optimizer.direction(i)) for i in range(8)]
        assert {float(x) for noise in noises for part in noise for x in part.flatten()} == {-1, 1}
        center = float(loss())
        losses = torch.tensor(
            [loss_at(parameters, loss, noise, 1e-3) for noise in noises], dtype=torch.float64
        )
        expected = [
            parameter
            - 1e-5
            * sum((losses[i] - center) * noises[i][k] for i in range(8))
            / (8 * 1e-3 * losses.std())
            for k, parameter in enumerate(parameters)
        ]
        assert optimizer.step(loss) == center
        assert_close(parameters, expected)
        assert optimizer.passes == 9 * (step + 1)


def test_fzoo_does_not_depend_on_the_scale_of_the_loss() -> None:
    first, loss = quadratic()
    FZOO(first, lr=1e-5).step(loss)
    second, other_loss = quadratic()
    FZOO(second, lr=1e-5).step(lambda: 1000 * other_loss())
    assert_close(first, second)


def test_fzoo_stands_still_where_no_loss_differs() -> None:
    parameters, _ = quadratic()
    before = [parameter.clone() for parameter in parameters]
    FZOO(parameters, lr=1e-5).step(lambda: torch.tensor(1.0))
    assert_close(parameters, before)


def test_zo_muon_is_its_formula() -> None:
    parameters, loss = quadratic()
    optimizer = ZOMuon(parameters, lr=1e-2, eps=1e-3, seed=3, vector_lr=1e-3, rank=2)
    optimizer.draw_subspaces()
    subspace = optimizer.subspaces[0]
    assert subspace.shape == (6, 2) and optimizer.subspaces[1] is None
    assert torch.allclose(subspace.T @ subspace, torch.eye(2, dtype=torch.float64), atol=1e-6)
    noises = [list(optimizer.small_direction(i)) for i in range(4)]
    assert [part.shape for part in noises[0]] == [(2, 4), (5,)]
    center = float(loss())
    slopes = [
        (loss_at(parameters, loss, [subspace @ u, v], 1e-3) - center) / 1e-3 for u, v in noises
    ]
    matrix = sum(slope * u for slope, (u, _) in zip(slopes, noises, strict=True)) / 4
    vector = sum(slope * v for slope, (_, v) in zip(slopes, noises, strict=True)) / 4
    expected = [
        parameters[0] - 1e-2 * subspace @ newton_schulz(matrix),
        parameters[1] - 1e-3 * vector,
    ]
    assert optimizer.step(loss) == center and optimizer.passes == 5
    assert_close(parameters, expected)


def test_zo_muon_redraws_its_subspaces() -> None:
    parameters, loss = quadratic()
    optimizer = ZOMuon(parameters, rank=2, redrawn=2)
    drawn = []
    for _ in range(4):
        optimizer.step(loss)
        drawn.append(optimizer.subspaces[0])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    assert not torch.allclose(drawn[1], drawn[2])


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (1, 5)])
def test_newton_schulz_keeps_vectors_and_levels_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    levelled = left.T @ newton_schulz(matrix) @ right.T
    values = torch.diagonal(levelled)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert float((levelled - torch.diag(values)).abs().max()) < 1e-9


def test_trace_free_hizoo_is_its_formula() -> None:
    parameters, loss = quadratic()
    smooth = 0.05
    optimizer = TraceFreeHiZOO(parameters, lr=1e-2, eps=1e-3, seed=3, hessian_smooth=smooth)
    hessians = [torch.ones_like(parameter) for parameter in parameters]
    for step in range(3):
        noises = list(ForwardOnly.direction(optimizer, 0))
        scaled = [u / h.sqrt() for u, h in zip(noises, hessians, strict=True)]
        center = float(loss())
        plus, minus = (loss_at(parameters, loss, scaled, scale) for scale in (1e-3, -1e-3))
        gradient, curvature = (plus - minus) / 2e-3, abs(plus + minus - 2 * center) / 2e-6
        hessians = [
            torch.maximum((1 - smooth) * h + smooth * curvature * h * (u * u - 1), h / 2)
            for u, h in zip(noises, hessians, strict=True)
        ]
        expected = [
            parameter - 1e-2 * gradient * u / h.sqrt()
            for parameter, u, h in zip(parameters, noises, hessians, strict=True)
        ]
        assert optimizer.step(loss) == center
        assert_close(parameters, expected)
        assert_close([1 + offset for offset in optimizer.offsets], hessians)
        assert optimizer.passes == 3 * (step + 1)
    assert all(float(h.min()) > 0 for h in hessians)


def test_trace_free_h_moves_towards_the_hessian() -> None:
    """With the weights held still, h of 20x² + y² ends near its second derivatives, 40 and 2."""
    parameter = torch.tensor([0.3, -0.2], dtype=torch.float64)
    optimizer = TraceFreeHiZOO([parameter], lr=0.0, hessian_smooth=5e-3)
    tail = []
    for step in range(3000):
        optimizer.step(lambda: 20 * parameter[0] ** 2 + parameter[1] ** 2)
        if step >= 1000:
            tail.append(1 + optimizer.offsets[0])
    mean = torch.stack(tail).mean(0)
    assert torch.allclose(mean, torch.tensor([40.0, 2.0], dtype=torch.float64), rtol=0.2)


METHODS: dict[str, Callable[[list[Tensor]], FZOO | ZOMuon | TraceFreeHiZOO]] = {
    "FZOO": lambda parameters: FZOO(parameters, lr=3e-5),
    "ZO-Muon": lambda parameters: ZOMuon(parameters, lr=3e-2, vector_lr=3e-2, rank=3, redrawn=10),
    "trace-free HiZOO": lambda parameters: TraceFreeHiZOO(parameters, lr=1e-2, hessian_smooth=1e-3),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_the_loss_falls_the_same_way_each_time(
    make: Callable[[list[Tensor]], FZOO | ZOMuon | TraceFreeHiZOO],
) -> None:
    courses = []
    for _ in range(2):
        parameters, loss = quadratic()
        optimizer = make(parameters)
        torch.rand(1)  # the global generator is neither read nor changed
        courses.append([optimizer.step(loss) for _ in range(300)])
    assert courses[0] == courses[1]
    assert courses[0][-1] < 0.1 * courses[0][0]
