"""The textbook HiZOO step in float64: no chunks, no threads, nothing in place, nothing clever.

It reads its noise from the optimizer under test, so that both see the same directions, and follows
the five lines of the module docstring of ``hizoo.py`` word for word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hizoo import HiZOO
from zeroth_order.noise import chunk_key, counters, hashed, mix_seed, standard_normals


def read_noise(optimizer: HiZOO, direction: int = 0) -> list[Tensor]:
    """u of the optimizer's coming step as whole float64 tensors, one per parameter."""
    group = optimizer.param_groups[0]
    stream = mix_seed(group["seed"], group["step"], direction)
    noise = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Of the first half of the rows and of the second one; the row in the middle is alone.
            index = torch.arange(parameter.numel(), dtype=torch.int32)
            bits = hashed(counters(chunk_key(stream, len(noise), 0), index))
            height = parameter.shape[0] if parameter.dim() else 1
            pairs = bits.view(height, -1)[: (height + 1) // 2]
            whole = torch.cat(standard_normals(pairs))[:height]
            noise.append(whole.double().view(parameter.shape))
    return noise


def weighted_mean(values: Sequence[float], least_part: float = 0.0) -> float:
    """Plain mean of the first 20 values; each later one counts a twentieth, the ones before less.

    After every value the mean is at least ``least_part`` of it.
    """
    mean = 0.0
    for count, value in enumerate(values, start=1):
        part = 1 / min(count, 20)
        mean = max((1 - part) * mean + part * value, least_part * value)
    return mean


@dataclass
class OracleHiZOO:
    """Parameters and h in float64; ``step`` follows the paper's formulas directly.

    ``losses`` are functions from a list of parameters to a float, one per accumulated batch.
    """

    parameters: list[Tensor]
    eps: float
    hessian_smooth: float
    lr: Sequence[float]
    weight_decay: Sequence[float]
    low_rank: bool = False
    is_auto: bool = False
    every: int = 1
    hessians: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [parameter.detach().double().clone() for parameter in self.parameters]
        self.hessians = [torch.ones_like(parameter) for parameter in self.parameters]
        matrices = [p.reshape(-1, p.shape[-1]) if p.dim() > 1 else None for p in self.parameters]
        self.rows = [None if m is None else torch.ones_like(m[:, 0]) for m in matrices]
        self.steps = 0
        # c of every step that measured it.
        self.curvatures: list[float] = []
        self.columns = [None if m is None else torch.ones_like(m[0]) for m in matrices]

    def _average_low_rank(self, i: int, measured: Tensor, alpha: float) -> Tensor:
        """h of HiZOO-L: moving averages of row and column means, as an outer product."""
        matrix = measured.reshape(-1, measured.shape[-1])
        self.rows[i] = (1 - alpha) * self.rows[i] + alpha * matrix.mean(dim=1)
        self.columns[i] = (1 - alpha) * self.columns[i] + alpha * matrix.mean(dim=0)
        outer = torch.outer(self.rows[i], self.columns[i]) / self.rows[i].mean()
        return outer.reshape(measured.shape)

    def step(
        self,
        losses: Sequence[Callable[[list[Tensor]], float]],
        directions: Sequence[list[Tensor]],
    ) -> None:
        """One step; ``directions`` holds u for every sample, each a list of tensors."""

        def mean_loss(parameters: list[Tensor]) -> float:
            return sum(loss(parameters) for loss in losses) / len(losses)

        def two_sides(direction: list[Tensor]) -> tuple[float, float]:
            shift = [self.eps * u / h**0.5 for u, h in zip(direction, self.hessians, strict=True)]
            plus = mean_loss([p + z for p, z in zip(self.parameters, shift, strict=True)])
            return plus, mean_loss([p - z for p, z in zip(self.parameters, shift, strict=True)])

        gradients, curvatures = [], []
        center = mean_loss(self.parameters)
        number, samples = self.steps, len(directions)
        measured_now = number < self.every or number % self.every == 0
        for direction in directions:
            plus, minus = two_sides(direction)
            gradients.append((plus - minus) / (2 * self.eps))
            curvatures.append(abs(plus + minus - 2 * center) / (2 * self.eps**2))
        if measured_now:
            self.curvatures.append(sum(curvatures) / samples)
        self.steps += 1
        rate = 1.0
        if self.is_auto:
            rate = min(1.0, len(self.curvatures) / 5) * samples
            rate /= 2 * weighted_mean(self.curvatures, least_part=0.3)
        alpha = self.hessian_smooth if measured_now else 0.0
        for i, (parameter, hessian) in enumerate(zip(self.parameters, self.hessians, strict=True)):
            squares = [u[i] ** 2 for u in directions]
            measured = sum(c * hessian * s for c, s in zip(curvatures, squares, strict=True))
            if self.low_rank and parameter.dim() > 1:
                hessian = self._average_low_rank(i, measured / samples, alpha)
            else:
                hessian = (1 - alpha) * hessian + alpha * measured / samples
            estimate = sum(
                g * u[i] / hessian**0.5 for g, u in zip(gradients, directions, strict=True)
            )
            self.parameters[i] = parameter - self.lr[i] * rate * (
                estimate / samples + self.weight_decay[i] * parameter
            )
            self.hessians[i] = hessian
