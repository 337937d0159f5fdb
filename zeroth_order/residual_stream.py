"""The residual stream of a decoder: the matrices that write to it, and what a pass leaves there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeroth_order.noise import compute_dtype
from zeroth_order.rounding import is_half

# The matrices of a block that write to the stream, as families call them: o of the attention, d of
# the MLP.
NAMES = {
    "o": "self_attn.o_proj self_attn.out_proj self_attn.dense attention.dense "
    "self_attention.dense attn.c_proj attn.out_proj attn.attention.out_proj",
    "d": "mlp.down_proj mlp.fc2 fc2 mlp.dense_4h_to_h mlp.c_proj mlp.fc_out ffn.down_proj",
}
# The norms between them and the stream, in families that have both.
POST_NORMS = {"o": "post_attention_layernorm", "d": "post_feedforward_layernorm"}
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")

# How far the sum of the blocks' outputs may be from the stream, in half and in full precision.
TOLERANCE = {True: 5e-2, False: 1e-3}

Reads = tuple[Tensor, Tensor]


class UnknownStream(ValueError):
    """The blocks do not add to one residual stream, or not by matrices of known names."""


@dataclass(frozen=True, eq=False)
class Writer:
    """A matrix that writes to the stream, and the norm that follows it, if any."""

    matrix: nn.Module
    norm: nn.Module | None

    @property
    def weight(self) -> Tensor:
        """The weight as (outputs, inputs), a view; GPT-2 keeps it transposed."""
        weight = self.matrix.weight.detach()
        return weight if isinstance(self.matrix, nn.Linear) else weight.T

    def errors(self, output: Tensor, of_stream: Tensor) -> Tensor:
        """Return the gradient before the norm, (S, hidden), from that at the stream."""
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            normed = self.norm(output)
        return torch.autograd.grad(normed, output, of_stream.to(normed))[0].to(of_stream)


def find_blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Return a model's blocks, and the norm between the last of them and the head.

    Raises:
        UnknownStream: there are none, or a block lacks one of the matrices, or there is no head.
    """
    find_head(model)
    for module in model.modules():
        norms = [getattr(module, name, None) for name in FINAL_NORMS]
        norm = next((norm for norm in norms if isinstance(norm, nn.Module)), None)
        for blocks in module.children() if norm else ():
            if isinstance(blocks, nn.ModuleList) and all(map(writers_of, blocks)):
                return blocks, norm
    raise UnknownStream(
        f"{type(model).__name__} has no blocks with one output matrix of attention and one of the "
        "MLP, and a norm behind the last block"
    )


def find_head(model: nn.Module) -> nn.Module:
    """Return the language-model head; raise ``UnknownStream`` if there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise UnknownStream(f"{type(model).__name__} has no language-model head")
    return head


def writers_of(block: nn.Module) -> dict[str, Writer]:
    """Return the matrices of a block that write to the stream, "o" and "d"; {} if it lacks one."""
    modules, matrices = dict(block.named_modules()), {}
    for kind, names in NAMES.items():
        matrix = next((modules[name] for name in names.split() if name in modules), None)
        # Adapters wrap it, experts keep theirs as one tensor of three dimensions.
        is_matrix = isinstance(matrix, nn.Linear) or type(matrix).__name__ == "Conv1D"
        if not is_matrix or not matrix.weight.is_floating_point():
            return {}
        matrices[kind] = matrix
    norms = {kind: getattr(block, name, None) for kind, name in POST_NORMS.items()}
    if None in norms.values():
        # Llama's norm of the first name stands before the MLP.
        norms = dict.fromkeys(norms)
    return {kind: Writer(matrix, norms[kind]) for kind, matrix in matrices.items()}


class PassRecord:
    """Keeps what error broadcast needs of one forward pass, at the positions that the loss reads.

    Args:
        reads: rows and columns of the positions that the head reads, one for each row of its input;
            None: the head reads every position, and those without an error are left out.
        limit: positions that are kept at most.
        generator: draws them where there are more.

    Attributes:
        inputs, outputs: of each matrix, (S, n) and (S, hidden).
        stream: before the first trained block, (S, hidden).
        state: the last residual state, where the graph begins, (rows, length, hidden).
        logits: what the head returns.
    """

    def __init__(self, reads: Reads | None, limit: int, generator: torch.Generator) -> None:
        self.reads, self.limit, self.generator = reads, limit, generator
        self.inputs: dict[Writer, Tensor] = {}
        self.outputs: dict[Writer, Tensor] = {}
        self.stream = self.state = self.logits = None
        # Numbers among all rows' positions; None: all are kept until the loss is known.
        self.positions: Tensor | None = None

    def _draw(self, positions: Tensor) -> Tensor:
        order = torch.randperm(len(positions), generator=self.generator)[: self.limit]
        return positions[order.sort().values.to(positions.device)]

    def at_reads(self, values: Tensor) -> Tensor:
        """Return the kept positions of (rows, length, k), or of (rows * length, k)."""
        values = values.detach().reshape(-1, values.shape[-1])
        if self.positions is None:
            return values.clone()  # Falcon adds to a matrix's output in place
        return values[self.positions.to(values.device)]

    def see_stream(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keep the stream before the first trained block."""
        stream = arguments[0] if arguments else named["hidden_states"]
        if self.reads is not None:
            rows, columns = self.reads
            numbers = rows * stream.shape[1] + columns
            # Options of one prompt read the same position.
            positions, self.owner = numbers.unique(return_inverse=True)
            self.chosen = self._draw(torch.arange(len(positions), device=positions.device))
            self.positions = positions[self.chosen]
        self.stream = self.at_reads(stream)

    def see_writer(
        self, writer: Writer, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor
    ) -> None:
        """Keep the inputs of a matrix, and its outputs."""
        self.inputs[writer], self.outputs[writer] = map(self.at_reads, (arguments[0], output))

    def cut(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor | None:
        """Begin the graph at the last residual state."""
        if self.stream is None:
            return None  # NanoChat norms the embeddings, too
        if self.state is not None:
            raise ValueError("the closure must run the model once")
        self.state = arguments[0].detach().requires_grad_()
        return self.state

    def see_logits(self, _: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
        """Keep what the head returns."""
        if self.logits is not None:
            raise ValueError("the closure must run the head once")
        places = len(self.reads[0]) if self.reads else self.state.shape[:-1].numel()
        if logits.shape[:-1].numel() != places:
            raise ValueError(
                f"the head reads {logits.shape[:-1].numel()} positions, not {places}; give "
                "``reads``, the row and the column of each"
            )
        self.logits = logits

    def errors(self, loss: Tensor, weight: float | None) -> tuple[Tensor, Tensor]:
        """Return |e|², (S, 1), and δ, (S, hidden), of a loss that is the mean over ``weight``.

        Raises:
            ValueError: the loss is not differentiable in the logits.
        """
        has_gradient = isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad
        gradients: Sequence[Tensor | None] = [None, None]
        if has_gradient and self.logits is not None and self.logits.requires_grad:
            # Half precision would lose digits of a mean's small gradients.
            summed, at = loss.new_tensor(weight or 1), [self.state, self.logits]
            gradients = torch.autograd.grad(loss, at, summed, allow_unused=True)
        if None in gradients:
            raise ValueError(
                "the closure must run the model with gradients enabled and not compiled, and "
                "return a loss, one number, that is differentiable in the logits"
            )
        of_state, of_logits = gradients
        of_logits = of_logits.flatten(0, -2).to(compute_dtype(self.state.dtype))
        if self.positions is None:
            count = self._keep(of_logits.any(dim=1).nonzero()[:, 0])
        else:
            count = int(self.owner.max()) + 1
            of_positions = of_logits.new_zeros(count, of_logits.shape[1])
            of_logits = of_positions.index_add_(0, self.owner.to(of_logits.device), of_logits)
        rest = count if weight is None else 1
        error = of_logits[self.chosen.to(of_logits.device)] * rest
        delta = self.at_reads(of_state).to(error) * rest
        return error.square().sum(dim=1, keepdim=True).to(delta.device), delta

    def _keep(self, positions: Tensor) -> int:
        """Keep positions of all that were kept, by number; returns how many there are."""
        self.chosen = self.positions = self._draw(positions)
        self.stream = self.at_reads(self.stream)
        for kept in (self.inputs, self.outputs):
            kept.update({writer: self.at_reads(values) for writer, values in kept.items()})
        return len(positions)

    @torch.no_grad()
    def check_stream(self, writers: Sequence[Writer], model: nn.Module) -> bool:
        """Compare the last residual state with the sum of what was written since the first block.

        Returns whether they could be compared: no position, or one that is not finite, tells
        nothing.

        Raises:
            UnknownStream: they differ; names the model.
        """
        last, total = self.at_reads(self.state).double(), self.stream.double()
        for writer in writers:
            output = self.outputs[writer]
            total = total + (writer.norm(output) if writer.norm else output).to(total)
        gap = float((last - total.to(last)).norm() / last.norm())
        if gap > TOLERANCE[is_half(self.state.dtype)]:
            hint = "; call its eval(), which ends dropout" if model.training else ""
            raise UnknownStream(
                f"{type(model).__name__}: the last residual state is not the sum of what attention "
                f"and MLP write to the stream (off by {gap:.1%}){hint}"
            )
        return math.isfinite(gap)
