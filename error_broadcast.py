"""Error broadcast: fine-tuning by one forward pass a step, without a backward pass through a block.

    optimizer = ErrorBroadcast(model)
    for batch in batches:
        loss = optimizer.step(lambda: model(**batch).loss)

When to use it: the loss is differentiable in the logits (answers, classes) and the model is a
decoder whose blocks add to one residual stream. When not: rewards, F1, adapters; HiZOO and MeZO
take any objective and any weight.

A step sees S scored positions. Of the forward pass it keeps, at those positions only, the inputs
X (S x n) of each trained matrix W and the last residual state h. Gradients are computed from h on:
through the final norm, the head and the loss.

    e_i = ∂L/∂logits_i      δ_i = ∂L/∂h_i                the error of a position, and at the stream
    δ̂_i = δ_i |e_i|² / |δ_i|²                            a step of -δ̂_i changes the logits by -e_i
    X̃   = (X Xᵀ/S + λ tr(X Xᵀ)/S² I)⁻¹ X                 whitened inputs
    W   <- W - κ/P δ̂ᵀ X̃ / S                              P: the number of trained matrices

The residual stream hands δ to every block unchanged, so it stands for the gradient at the output
of each attention (o) and each MLP (d); where a norm follows the matrix (Gemma 2 and 3), it goes
through that norm's Jacobian. Whitened, the step of a position hardly changes the outputs at the
others. All steps together take the share κ of each error away, to first order: κ needs no search.
``examples/error_broadcast_reference.py`` is this step in 25 plain lines.

Sources: direct feedback alignment (Nøkland, 2016, arXiv 1609.01596) broadcasts the error by random
matrices; FOOF (Benzing, 2022, arXiv 2201.12250) whitens the inputs of backpropagated gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroth_order.noise import ROUNDING, mix_seed
from zeroth_order.residual_stream import (
    PassRecord,
    Reads,
    Writer,
    find_blocks,
    find_head,
    writers_of,
)
from zeroth_order.rounding import add_product
from zeroth_order.signals import signals_wait


def whitened(inputs: Tensor, damping: float) -> Tensor:
    """Return (X Xᵀ/S + λ tr(X Xᵀ)/S² I)⁻¹ X of inputs X, (S, n); solves min(S, n) equations."""
    positions, features = inputs.shape
    rows = inputs if positions <= features else inputs.T
    products = rows @ rows.T / positions
    limits = torch.finfo(inputs.dtype)
    # A smaller λ would be lost in rounding.
    ridge = max(damping / positions, 100 * limits.eps) * inputs.square().sum() / positions
    products.diagonal().add_(ridge.clamp_min(limits.tiny))
    solved = torch.cholesky_solve(rows, torch.linalg.cholesky(products))
    return solved if positions <= features else solved.T


def scaled(errors: Tensor, squares: Tensor) -> Tensor:
    """Return δ |e|² / |δ|² of δ, (S, m), and |e|², (S, 1)."""
    lengths = errors.square().sum(dim=1, keepdim=True)
    return errors * (squares / lengths.clamp_min(torch.finfo(errors.dtype).tiny))


class ErrorBroadcast(torch.optim.Optimizer):
    """Trains the matrices that write to the residual stream, in the upper blocks.

    No other weight changes, and none without ``requires_grad``. A step takes one forward pass and
    keeps no state. ``step(closure)`` is a whole step; several ``estimate(closure)`` before one
    ``step()`` are that of one large batch.

    Args:
        model: a decoder of transformers, in evaluation mode.
        lr: κ, how many times each error a step takes away. Let it fall to 0 from 200 / steps, at
            most 4.
        damping: λ.
        first: the share of the blocks, from the bottom, that are not trained.
        matrices: "o" (of the attention), "d" (of the MLP), or both.
        max_tokens: scored positions of a batch at most; of more, so many are drawn.
        seed: of these draws, and of the rounding of half-precision weights.

    Attributes:
        gather: returns the rows of all processes that share a batch.
        was_skipped: whether the last step changed nothing, since an error was not finite.

    Raises:
        UnknownStream: the model is of another architecture.
        ValueError: an argument is out of its bounds.
    """

    # What accelerate asks for: it then wraps nothing.
    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 0.1,
        first: float = 0.5,
        matrices: Sequence[str] = ("o", "d"),
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        bounds = {
            f"lr {lr}: must be at least 0, and finite": 0 <= lr < float("inf"),
            f"damping {damping}: must be above 0": damping > 0,
            f"first {first}: must be at least 0 and below 1": 0 <= first < 1,
            f"max_tokens {max_tokens}: must be at least 1": max_tokens >= 1,
            f"matrices {matrices}: o, d or both": "".join(sorted(matrices)) in ("o", "d", "do"),
        }
        problems = [problem for problem, holds in bounds.items() if not holds]
        if problems:
            raise ValueError("; ".join(problems))
        self.model, self.max_tokens, self.seed = model, max_tokens, seed
        blocks, self.final_norm = find_blocks(model)
        self.blocks = blocks[int(first * len(blocks)) :]
        # All that write to the stream from the first block on, and those that may be trained.
        found = [writers_of(block) for block in self.blocks]
        self.all_writers = [writer for of_block in found for writer in of_block.values()]
        self.writers = [of_block[kind] for of_block in found for kind in matrices]
        self._trained = self._trained_writers()
        self.gather: Callable[[Tensor], Tensor] = nn.Identity()
        self._batches: list[dict[Writer, tuple[Tensor, Tensor]]] = []
        self._stream_is_checked = self.was_skipped = False
        settings = {"lr": lr, "damping": damping, "step": 0}
        super().__init__([writer.matrix.weight for writer in self._trained], settings)

    def estimate(
        self, closure: Callable[[], Tensor], weight: float | None = None, reads: Reads | None = None
    ) -> float:
        """Run a forward pass, and keep the inputs and the errors of its scored positions.

        Args:
            closure: runs the model once and returns a mean loss.
            weight: what the loss is the mean over; None: the scored positions. A batch of weight 0
                counts for nothing.
            reads: rows and columns of the positions that the head reads, one for each row of its
                input; None: the head reads every position.

        Raises:
            UnknownStream: the stream is not the sum of what the blocks write.
            ValueError: the loss is not differentiable in the logits, or ``reads`` is wrong.
        """
        step = self.param_groups[0]["step"]
        if not self._batches:  # between steps weights may be frozen
            self._trained = self._trained_writers()
        draws = mix_seed(self.seed, step, len(self._batches)) >> 1
        record = PassRecord(reads, self.max_tokens, torch.Generator().manual_seed(draws))
        with self._hooks(record, self._trained if self._stream_is_checked else self.all_writers):
            loss = closure()
            squares, errors = record.errors(loss, weight)
        if not self._stream_is_checked:
            self._stream_is_checked = record.check_stream(self.all_writers, self.model)
        counted = slice(0 if weight == 0 else None)
        of_stream, batch = scaled(errors, squares)[counted], {}
        for w in self._trained:
            at_output = of_stream
            if w.norm is not None:
                at_output = scaled(w.errors(record.outputs[w], errors), squares)[counted]
            batch[w] = record.inputs[w][counted].to(errors.dtype), at_output
        self._batches.append(batch)
        return loss.item()

    def _trained_writers(self) -> list[Writer]:
        trained = [writer for writer in self.writers if writer.matrix.weight.requires_grad]
        if not trained:
            raise ValueError("no matrix that writes to the stream requires a gradient")
        return trained

    @property
    def optimizer(self) -> ErrorBroadcast:
        """Itself: accelerate looks here for what it would have wrapped."""
        return self

    @contextlib.contextmanager
    def _hooks(self, record: PassRecord, writers: Sequence[Writer]) -> Iterator[None]:
        """Let a forward pass leave what a step needs, and no weight ask for a gradient."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        handles = [
            self.blocks[0].register_forward_pre_hook(record.see_stream, with_kwargs=True),
            self.final_norm.register_forward_pre_hook(record.cut),
            find_head(self.model).register_forward_hook(record.see_logits),
        ]
        for writer in writers:
            see = functools.partial(record.see_writer, writer)
            handles.append(writer.matrix.register_forward_hook(see))
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, **kwargs: Any) -> float | None:
        """Apply the estimates made since the last step; with ``closure``, make one first.

        Returns the loss of ``closure``, None without. A step whose errors are not finite changes
        nothing. A signal (Ctrl-C) that arrives within the update waits for its end. ``kwargs``: of
        ``estimate``.
        """
        loss = None if closure is None else self.estimate(closure, **kwargs)
        if not self._batches:
            raise RuntimeError(
                "step() needs a closure, or estimate(closure) before it; with transformers take "
                "ForwardOnlyMixin (forward_only.py), a plain Trainer calls neither"
            )
        group = self.param_groups[0]
        rounding = mix_seed(self.seed, group["step"], ROUNDING)
        share, device = group["lr"] / len(self._trained), self._trained[0].weight.device.type
        with signals_wait(), torch.autocast(device, enabled=False):
            joined = self._joined_batches()
            finite = all(bool((x.square().sum() + e.sum()).isfinite()) for x, e in joined.values())
            for number, (writer, (inputs, errors)) in enumerate(joined.items()):
                if finite and len(errors):
                    scale = -share / len(errors)
                    moved = whitened(inputs, group["damping"]).mul_(scale)
                    add_product(writer.weight, errors, moved, rounding, number)
            self._batches.clear()
            group["step"] += 1
            self.was_skipped = not finite
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on a state after a whole step; estimates from before are forgotten."""
        self._batches.clear()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: as in ``HiZOO``, more than torch's own."""
        return {n: v for n, v in vars(self).items() if n != "step" and not n.endswith("_hooks")}

    def _joined_batches(self) -> dict[Writer, tuple[Tensor, Tensor]]:
        """Return inputs, (S, n), and errors, (S, m), of all batches and processes."""
        gathered: dict[tuple[int, ...], Tensor] = {}

        def gather(parts: Sequence[Tensor]) -> Tensor:
            # Matrices without a norm behind them have the same errors.
            same = tuple(map(id, parts))
            if same not in gathered:
                gathered[same] = self.gather(torch.cat(parts))
            return gathered[same]

        joined = {}
        for writer in self._trained:
            inputs, errors = zip(*(batch[writer] for batch in self._batches), strict=True)
            device = writer.weight.device
            joined[writer] = gather(inputs).to(device), gather(errors).to(device)
        return joined
