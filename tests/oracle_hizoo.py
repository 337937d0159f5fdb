"""The textbook HiZOO step in float64: no tiles, no threads, nothing in place, nothing clever.

It reads its noise from the optimizer under test, so that both see the same directions, and follows
the five lines of the module docstring of ``hizoo.py`` word for word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hizoo import SIGNS, HiZOO, counters, hashed, mix_seed, standard_normals, tile_key


def read_noise(optimizer: HiZOO, draw: int = 0) -> list[Tensor]:
    """u of the optimizer's coming step as whole float64 tensors, one per parameter."""
    stream = optimizer._stream(draw)
    noise = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Of the first half of the rows and of the second one; the row in the middle is alone.
            index = torch.arange(parameter.numel(), dtype=torch.int32)
            bits = hashed(counters(tile_key(stream, len(noise), 0), index))
            height = parameter.shape[0] if parameter.dim() else 1
            pairs = bits.view(height, -1)[: (height + 1) // 2]
            whole = torch.cat(standard_normals(pairs))[:height]
            noise.append(whole.double().view(parameter.shape))
    return noise


def read_signs(optimizer: HiZOO, count: int, draw: int = 0) -> list[list[Tensor]]:
    """r_i s_iᵀ of ``count`` examples of the coming step as whole float64 tensors, by parameter."""
    group = optimizer.param_groups[0]
    stream = mix_seed(group["seed"], group["step"], draw, SIGNS)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    signs: list[list[Tensor]] = []
    for example in range(count):
        of_example = []
        for number, parameter in enumerate(parameters):
            first = example * sum(parameter.shape)
            index = torch.arange(sum(parameter.shape), dtype=torch.int32)
            bits = hashed(counters(tile_key(stream, number, first), index))
            negative = bits < 0
            vectors = torch.where(negative, -1.0, 1.0).double().split(list(parameter.shape))
            of_example.append(vectors[0] if len(vectors) == 1 else torch.outer(*vectors))
        signs.append(of_example)
    return signs


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
    step_size: str = "fixed"
    curvature_eps: float | None = None
    every: int = 1
    clip: float | None = None
    hessians: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [parameter.detach().double().clone() for parameter in self.parameters]
        self.hessians = [torch.ones_like(parameter) for parameter in self.parameters]
        matrices = [p.reshape(p.shape[0], -1) if p.dim() > 1 else None for p in self.parameters]
        self.rows = [None if m is None else torch.ones_like(m[:, 0]) for m in matrices]
        # Of every step so far: c where it was measured, and the mean of g² as it is bounded.
        self.curvatures: list[float] = []
        self.squares: list[float] = []
        self.columns = [None if m is None else torch.ones_like(m[0]) for m in matrices]

    def _average_low_rank(self, i: int, measured: Tensor, alpha: float) -> Tensor:
        """h of HiZOO-L: moving averages of row and column means, as an outer product."""
        matrix = measured.reshape(measured.shape[0], -1)
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

        def two_sides(direction: list[Tensor], eps: float) -> tuple[float, float]:
            shift = [eps * u / h**0.5 for u, h in zip(direction, self.hessians, strict=True)]
            plus = mean_loss([p + z for p, z in zip(self.parameters, shift, strict=True)])
            return plus, mean_loss([p - z for p, z in zip(self.parameters, shift, strict=True)])

        gradients, curvatures = [], []
        center = mean_loss(self.parameters)
        number, samples = len(self.squares), len(directions)
        measured_now = number < self.every or number % self.every == 0
        for direction in directions:
            plus, minus = two_sides(direction, self.eps)
            gradients.append((plus - minus) / (2 * self.eps))
            eps = self.curvature_eps or self.eps
            plus, minus = two_sides(direction, eps)
            curvatures.append(abs(plus + minus - 2 * center) / (2 * eps**2))
        if measured_now:
            self.curvatures.append(sum(curvatures) / samples)
        if self.clip is not None and number >= 5:
            bound = self.clip * weighted_mean(self.squares) ** 0.5
            gradients = [math.copysign(min(abs(g), bound), g) for g in gradients]
        self.squares.append(sum(g * g for g in gradients) / samples)
        rate = 1.0
        if self.step_size == "curvature":
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


@dataclass
class OracleByExample(OracleHiZOO):
    """The same with a direction for every example: one after the other, with its own parameters.

    ``normalize`` divides the examples' g by their standard deviation.
    """

    normalize: bool = False

    def step_by_example(
        self,
        batches: Sequence[Sequence[Callable[[list[Tensor]], float]]],
        weights: Sequence[float],
        directions: Sequence[list[list[Tensor]]],
    ) -> None:
        """One step on batches of examples, whose losses are functions of a list of parameters.

        ``directions`` holds Δ of every sample and every example of the step, in the order of the
        batches, each a list of tensors.
        """
        losses = [loss for batch in batches for loss in batch]
        parts = [
            w / sum(weights) / len(b) for w, b in zip(weights, batches, strict=True) for _ in b
        ]
        number, samples = len(self.squares), len(directions)

        def shifted(delta: list[Tensor], eps: float) -> list[Tensor]:
            triples = zip(self.parameters, delta, self.hessians, strict=True)
            return [p + eps * d / h**0.5 for p, d, h in triples]

        gradients = torch.zeros(samples, len(losses), dtype=torch.float64)
        curvatures = torch.zeros_like(gradients)
        for sample, of_sample in enumerate(directions):
            for i, (loss, delta) in enumerate(zip(losses, of_sample, strict=True)):
                plus, minus = loss(shifted(delta, self.eps)), loss(shifted(delta, -self.eps))
                gradients[sample, i] = (plus - minus) / (2 * self.eps)
                eps = self.curvature_eps or self.eps
                plus, minus = loss(shifted(delta, eps)), loss(shifted(delta, -eps))
                curvature = abs(plus + minus - 2 * loss(self.parameters)) / (2 * eps**2)
                curvatures[sample, i] = curvature
        of_examples = torch.tensor(parts, dtype=torch.float64)
        means = (curvatures * of_examples).sum(1).tolist()
        self.curvatures.append(sum(means) / samples)
        if self.clip is not None and number >= 5:
            bound = self.clip * weighted_mean(self.squares) ** 0.5
            gradients = gradients.clamp(-bound, bound)
        self.squares.append(float((gradients.square() * of_examples).sum()) / samples)
        if self.normalize:
            gradients = gradients / gradients.std(dim=1, correction=0, keepdim=True)
        rate = 1.0
        if self.step_size == "curvature":
            rate = min(1.0, len(self.curvatures) / 5) * samples * len(losses) ** 0.5
            rate /= 2 * weighted_mean(self.curvatures, least_part=0.3)
        for k, (parameter, hessian) in enumerate(zip(self.parameters, self.hessians, strict=True)):
            squares = [of_sample[0][k] ** 2 for of_sample in directions]
            measured = sum(c * hessian * s for c, s in zip(means, squares, strict=True)) / samples
            if self.low_rank and parameter.dim() > 1:
                hessian = self._average_low_rank(k, measured, self.hessian_smooth)
            else:
                hessian = (1 - self.hessian_smooth) * hessian + self.hessian_smooth * measured
            estimate = sum(
                part * g * delta[k] / hessian**0.5
                for of_sample, of_gradients in zip(directions, gradients.tolist(), strict=True)
                for part, g, delta in zip(parts, of_gradients, of_sample, strict=True)
            )
            self.parameters[k] = parameter - self.lr[k] * rate * (
                estimate / samples + self.weight_decay[k] * parameter
            )
            self.hessians[k] = hessian
