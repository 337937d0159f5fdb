"""FZOO, plainly written, to compare with hizoo.py: torch only.

optimizer = FZOO(model.parameters(), lr=1e-6)
for batch in batches:
    loss = optimizer.step(lambda: model(**batch).loss)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


class FZOO:
    """N one-sided directions of ±1, the step divided by the losses' standard deviation.

    Dang et al., 2025, arXiv 2506.09034. A step takes N + 1 forward passes:

        l0 = L(θ)     l_i = L(θ + μ u_i)     u_i of ±1, i = 1..N
        θ  <- θ - η Σ (l_i - l0) u_i / (μ N σ)     σ² = Σ (l_i - mean)² / (N - 1)

    The scale of the loss cancels: with d parameters a step is about η √(d/N) / μ long. Directions
    run one after another here; the paper runs them as one batch.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        eps: float = 1e-3,
        seed: int = 0,
        directions: int = 8,
    ) -> None:
        self.parameters = list(parameters)
        self.lr, self.eps, self.seed, self.directions = lr, eps, seed, directions
        self.steps = 0

    def direction(self, number: int) -> Iterator[Tensor]:
        """Yield a direction of this step, one parameter's numbers at a time."""
        generator = torch.Generator(self.parameters[0].device)
        generator.manual_seed((self.seed * 1_000_003 + self.steps) * 1_009 + number)
        for p in self.parameters:
            bits = torch.randint(0, 2, p.shape, device=p.device, generator=generator)
            yield (2 * bits - 1).to(p.dtype)

    def shift(self, number: int, scale: float) -> None:
        """Add ``scale`` times a direction to the parameters."""
        for parameter, noise in zip(self.parameters, self.direction(number), strict=True):
            parameter.add_(noise, alpha=scale)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Take a step; returns the loss before it."""
        center, losses = float(closure()), []
        for number in range(self.directions):
            self.shift(number, self.eps)
            losses.append(float(closure()))
            self.shift(number, -self.eps)
        spread = float(torch.tensor(losses, dtype=torch.float64).std())
        if spread > 0:  # otherwise no direction differs from another
            for i, loss in enumerate(losses):
                self.shift(i, -self.lr * (loss - center) / (self.eps * self.directions * spread))
        self.steps += 1
        return center
