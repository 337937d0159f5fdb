"""Error broadcast in plain lines: read it first, copy it; the tests compare the fast step with it.

For decoders whose blocks add to one residual stream without a norm behind their matrices (OPT,
Llama, Qwen, Mistral), in full precision, with the language-model loss of chosen tokens.
``error_broadcast.py`` has the formulas, more families, half precision and other losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def step(
    model: nn.Module,
    matrices: Sequence[nn.Linear],
    final_norm: nn.Module,
    input_ids: Tensor,
    scored: tuple[Tensor, Tensor],
    targets: Tensor,
    kappa: float = 1.0,
    damping: float = 0.1,
) -> float:
    """Do one step; returns the mean loss before it.

    Args:
        model: a causal language model in evaluation mode.
        matrices: those that write to the residual stream, of the upper blocks: o_proj or out_proj
            of the attention, down_proj or fc2 of the MLP.
        final_norm: the norm between the last block and the head.
        input_ids: (texts, length).
        scored: rows and columns of the S tokens that predict a target.
        targets: (S,).
        kappa: κ, how many times the step takes the errors away; let it fall to 0.
        damping: λ.
    """
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept[module] = arguments[0].reshape(*input_ids.shape, -1)[scored]

    hooks = [module.register_forward_pre_hook(keep) for module in (*matrices, final_norm)]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    with torch.enable_grad():
        state = kept[final_norm].requires_grad_()
        logits = model.get_output_embeddings()(final_norm(state))
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        e, delta = torch.autograd.grad(loss, [logits, state])
    delta = delta * (e.square().sum(1) / delta.square().sum(1))[:, None]
    for matrix in matrices:
        x = kept[matrix]
        products = x @ x.T / len(x)
        ridge = damping * products.trace() / len(x) * torch.eye(len(x)).to(x)
        whitened = torch.linalg.solve(products + ridge, x)
        matrix.weight -= kappa / len(matrices) * delta.T @ whitened / len(x)
    return loss.item() / len(targets)
