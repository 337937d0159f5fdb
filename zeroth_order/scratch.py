"""Scratch memory for the weights that modules run with: allocated once and used again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Bytes: weights that lie in one piece each begin where a tensor of their own would.
ALIGNMENT = 64


class Scratch:
    """Pieces of memory; those in ``free`` are not borrowed."""

    def __init__(self) -> None:
        self.free: list[torch.UntypedStorage] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: the memory is allocated anew."""
        return {"free": []}

    def borrow(self, parameters: Sequence[Tensor]) -> dict[Any, Tensor]:
        """Return tensors like some parameters of one device, all in one piece.

        That is the smallest free piece that is large enough. Where none is, the largest makes room
        for a new one.
        """
        if not parameters:
            return {}
        sizes = [-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters]
        device = parameters[0].device
        pieces = [piece for piece in self.free if piece.device == device]
        pieces.sort(key=torch.UntypedStorage.nbytes)
        piece = next((piece for piece in pieces if piece.nbytes() >= sum(sizes)), None)
        taken = piece or (pieces[-1] if pieces else None)
        self.free = [free for free in self.free if free is not taken]
        piece = piece or torch.UntypedStorage(sum(sizes), device=device)
        weights, start = {}, 0
        for parameter, size in zip(parameters, sizes, strict=True):
            empty = torch.empty(0, dtype=parameter.dtype, device=device)
            offset = start // parameter.element_size()
            weights[parameter] = empty.set_(piece, offset, parameter.shape)
            start += size
        return weights

    def give_back(self, weights: dict[Any, Tensor]) -> None:
        """Take back the pieces that borrowed tensors lie in."""
        pieces = [tensor.untyped_storage() for tensor in weights.values()]
        self.free += {piece.data_ptr(): piece for piece in pieces}.values()
