"""Other zeroth-order methods, plainly written, to be compared with hizoo.py: torch only.

    optimizer = FZOO(model.parameters(), lr=1e-4)
    for batch in batches:
        loss = optimizer.step(lambda: model(**batch).loss)
        print(loss, optimizer.passes)

Each keeps to the formulas of its paper. Directions are drawn again from their seeds, weights are
shifted in place and back, and nothing is tuned for speed. Compare methods at equal ``passes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Closure = Callable[[], Tensor]
# Coefficients of Newton and Schulz' iteration in Muon: five steps bring singular values near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class ForwardOnly:
    """What the methods share: seeds of directions, shifts along them, and the count of passes.

    Args:
        parameters: what is trained.
        lr: learning rate η.
        eps: perturbation scale μ.
        seed: all directions are a function of it and of the step's number.

    Attributes:
        passes: forward passes so far.
        steps: steps so far.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, eps: float = 1e-3, seed: int = 0
    ) -> None:
        self.parameters = list(parameters)
        self.lr, self.eps, self.seed = lr, eps, seed
        self.passes = self.steps = 0

    def draw(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        """Return a parameter's part of a direction: numbers from N(0, 1)."""
        return torch.randn(
            parameter.shape, dtype=parameter.dtype, device=parameter.device, generator=generator
        )

    def generator(self, number: int, step: int | None = None) -> torch.Generator:
        """Return the generator of a direction, by its number and the step's."""
        step = self.steps if step is None else step
        generator = torch.Generator(self.parameters[0].device)
        return generator.manual_seed(((self.seed * 1_000_003) + step) * 1_009 + number)

    def direction(self, number: int) -> Iterator[Tensor]:
        """Yield a direction u of this step, one parameter's part at a time."""
        generator = self.generator(number)
        for parameter in self.parameters:
            yield self.draw(parameter, generator)

    def shift(self, number: int, scale: float) -> None:
        """Add ``scale`` times a direction to the parameters."""
        for parameter, noise in zip(self.parameters, self.direction(number), strict=True):
            parameter.add_(noise, alpha=scale)

    def loss(self, closure: Closure) -> float:
        """Run a forward pass."""
        self.passes += 1
        return float(closure())

    def loss_along(self, number: int, scale: float, closure: Closure) -> float:
        """Return the loss at θ + ``scale`` u."""
        self.shift(number, scale)
        loss = self.loss(closure)
        self.shift(number, -scale)
        return loss


class FZOO(ForwardOnly):
    """FZOO: N one-sided directions of ±1, the step divided by the losses' standard deviation.

    Dang et al., 2025, arXiv 2506.09034. A step takes N + 1 forward passes:

        l0 = L(θ)     l_i = L(θ + μ u_i)     u_i of ±1, i = 1..N
        θ  <- θ - η Σ (l_i - l0) u_i / (μ N σ)     σ² = Σ (l_i - mean)² / (N - 1)

    The scale of the loss is of no consequence: with d parameters a step is about η √(d/N) / μ long,
    so η is 1 / μ times smaller than that of normalised gradient descent. Here the directions run
    one after another; the paper runs them as one batch.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        eps: float = 1e-3,
        seed: int = 0,
        directions: int = 8,
    ) -> None:
        super().__init__(parameters, lr, eps, seed)
        self.directions = directions

    def draw(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        """Return -1 and 1, equally likely."""
        bits = torch.randint(0, 2, parameter.shape, device=parameter.device, generator=generator)
        return (2 * bits - 1).to(parameter.dtype)

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """Take a step; returns the loss before it."""
        center = self.loss(closure)
        losses = [self.loss_along(i, self.eps, closure) for i in range(self.directions)]
        spread = float(torch.tensor(losses, dtype=torch.float64).std())
        if spread > 0:  # otherwise no direction differs from another
            for i, loss in enumerate(losses):
                self.shift(i, -self.lr * (loss - center) / (self.eps * self.directions * spread))
        self.steps += 1
        return center


class ZOMuon(ForwardOnly):
    """ZO-Muon: each matrix moves within a random subspace, by an orthogonalised estimate.

    arXiv 2602.17155. A step takes N + 1 forward passes. For a matrix W (m×n), with P (m×r) of
    orthonormal columns, redrawn every 100 steps:

        u_i ~ N(0, 1), r×n     g_i = (L(W + μ P u_i) - L(W)) / μ     i = 1..N
        W <- W - η P NewtonSchulz5(Σ g_i u_i / N)

    All parameters are shifted at once. A tensor of more dimensions counts as a matrix of its first
    one. Vectors, such as biases and norms, are perturbed by a plain u_i ~ N(0, I) and take MeZO's
    step, with a learning rate of their own: v <- v - η' Σ g_i u_i / N.

    Args:
        parameters: what is trained.
        lr: η, of matrices.
        eps: μ.
        seed: of all directions and subspaces.
        vector_lr: η', of all else.
        rank: r; a matrix of fewer rows has a P of as many columns.
        directions: N.
        redrawn: steps between two draws of P. All P are kept in between: m×r numbers a matrix.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-2,
        eps: float = 1e-3,
        seed: int = 0,
        vector_lr: float = 1e-6,
        rank: int = 64,
        directions: int = 4,
        redrawn: int = 100,
    ) -> None:
        super().__init__(parameters, lr, eps, seed)
        self.vector_lr, self.rank = vector_lr, rank
        self.directions, self.redrawn = directions, redrawn
        self.subspaces: list[Tensor | None] = []

    def draw_subspaces(self) -> None:
        """Draw P of every matrix; None stands for a vector."""
        # No direction has this number.
        generator = self.generator(number=self.directions)
        self.subspaces = []
        for parameter in self.parameters:
            if parameter.dim() < 2:
                self.subspaces.append(None)
                continue
            rows = parameter.shape[0]
            normal = torch.randn(
                (rows, min(self.rank, rows)), device=parameter.device, generator=generator
            )
            self.subspaces.append(torch.linalg.qr(normal).Q.to(parameter.dtype))

    def small_direction(self, number: int) -> Iterator[Tensor]:
        """Yield u_i of each parameter, within a matrix's subspace."""
        generator = self.generator(number)
        for parameter, subspace in zip(self.parameters, self.subspaces, strict=True):
            if subspace is None:
                yield self.draw(parameter, generator)
            else:
                yield self.draw(subspace.T @ parameter.flatten(1), generator)

    def direction(self, number: int) -> Iterator[Tensor]:
        """Yield P u_i of each matrix, u_i of each vector."""
        small = self.small_direction(number)
        for parameter, subspace, noise in zip(self.parameters, self.subspaces, small, strict=True):
            yield noise if subspace is None else (subspace @ noise).view_as(parameter)

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """Take a step; returns the loss before it."""
        if self.steps % self.redrawn == 0:
            self.draw_subspaces()
        center = self.loss(closure)
        slopes = [
            (self.loss_along(i, self.eps, closure) - center) / self.eps
            for i in range(self.directions)
        ]
        directions = [self.small_direction(i) for i in range(self.directions)]
        for parameter, subspace, *noises in zip(
            self.parameters, self.subspaces, *directions, strict=True
        ):
            estimate = sum(slope * noise for slope, noise in zip(slopes, noises, strict=True)).div(
                self.directions
            )
            if subspace is None:
                parameter.sub_(estimate, alpha=self.vector_lr)
            else:
                move = subspace @ newton_schulz(estimate)
                parameter.sub_(move.view_as(parameter), alpha=self.lr)
        self.steps += 1
        return center


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return a matrix of the same singular vectors, whose singular values are all near 1.

    As in Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): X, of norm 1 at
    first, becomes a X + b (X Xᵀ) X + c (X Xᵀ)² X in each step.
    """
    first, third, fifth = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if is_tall else matrix
    result = result / (result.norm() + 1e-7)
    for _ in range(steps):
        square = result @ result.T
        result = first * result + (third * square + fifth * square @ square) @ result
    return result.T if is_tall else result


class TraceFreeHiZOO(ForwardOnly):
    """HiZOO (arXiv 2402.15173) whose h grows by c (u² - 1) in place of c u².

    One step, which takes three forward passes:

        l0 = L(θ)     l+ = L(θ + μ u/√h)     l- = L(θ - μ u/√h)
        g  = (l+ - l-) / 2μ                   c  = |l+ + l- - 2 l0| / 2μ²
        h  <- (1-α) h + α c h (u² - 1), at least h / 2
        θ  <- θ - η g u/√h                    with the new h

    Where no curvature is negative, c has the mean ½ Σ H_j / h_j, of which c u² takes a share for
    every entry: h then grows by the whole trace of H. The mean of c (u_j² - 1) is H_j / h_j, that
    of entry j alone (Stein's identity), so h moves towards H itself, with more noise. The bound
    keeps h positive.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        eps: float = 1e-3,
        seed: int = 0,
        hessian_smooth: float = 1e-8,
    ) -> None:
        super().__init__(parameters, lr, eps, seed)
        self.hessian_smooth = hessian_smooth
        # h - 1: near 1 float32 would swallow a small α.
        self.offsets = [torch.zeros_like(parameter) for parameter in self.parameters]

    def direction(self, number: int) -> Iterator[Tensor]:
        """Yield u/√h."""
        for noise, offset in zip(super().direction(number), self.offsets, strict=True):
            yield noise / (1 + offset).sqrt()

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """Take a step; returns the loss before it."""
        center = self.loss(closure)
        plus = self.loss_along(0, self.eps, closure)
        minus = self.loss_along(0, -self.eps, closure)
        gradient = (plus - minus) / (2 * self.eps)
        curvature = abs(plus + minus - 2 * center) / (2 * self.eps**2)
        for offset, noise in zip(self.offsets, super().direction(0), strict=True):
            growth = curvature * (noise.square() - 1) - 1
            offset.add_((1 + offset) * (self.hessian_smooth * growth).clamp(min=-0.5))
        self.shift(0, -self.lr * gradient)
        self.steps += 1
        return center
