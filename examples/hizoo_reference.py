"""The textbook step of HiZOO (arXiv 2402.15173), to read first and to copy.

``hizoo.py`` does the same with its noise in place of torch's, without memory for u or θ ± μ u/√h
beside one chunk, and several times faster. ``tests/test_reference.py`` holds one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class HiZOOReference(torch.optim.Optimizer):
    """HiZOO in plain lines; ``hessian_smooth=0`` is MeZO at the price of one more forward pass."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-6,
        eps: float = 1e-3,
        hessian_smooth: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "alpha": hessian_smooth, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.seed, self.steps = seed, 0

    def noise(self, parameter: Tensor, number: int) -> Tensor:
        """Return u of the ``number``-th parameter in this step, in its shape and dtype."""
        # No two of (seed, step, number) may share a sum in a long run; hizoo.py hashes them.
        generator = torch.Generator().manual_seed((self.seed * 10**6 + self.steps) * 10**4 + number)
        return torch.randn(parameter.shape, generator=generator).to(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Do one step; ``closure`` returns the loss of a batch. Returns the loss at θ."""
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        trained = [(group, p) for group, p in pairs if p.requires_grad]
        theta = [p.clone() for _, p in trained]
        u = [self.noise(p, number) for number, (_, p) in enumerate(trained)]
        h = [self.state[p].setdefault("h", torch.ones_like(p)) for _, p in trained]

        def loss_at(sign: float) -> float:
            for i, (group, p) in enumerate(trained):
                p.copy_(theta[i] + sign * group["eps"] * u[i] / h[i].sqrt())
            return float(closure())

        center, plus, minus = loss_at(0.0), loss_at(1.0), loss_at(-1.0)
        for i, (group, p) in enumerate(trained):
            eps, alpha = group["eps"], group["alpha"]
            g = (plus - minus) / (2 * eps)
            c = abs(plus + minus - 2 * center) / (2 * eps**2)
            h[i].copy_((1 - alpha) * h[i] + alpha * c * h[i] * u[i] ** 2)
            change = g * u[i] / h[i].sqrt() + group["weight_decay"] * theta[i]
            p.copy_(theta[i] - group["lr"] * change)
        self.steps += 1
        return center
