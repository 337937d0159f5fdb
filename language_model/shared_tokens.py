"""Tokens that several texts begin with: whether a model may read them once, and their cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from language_model.adapters import (
    KeysAndValues,
    keys_and_values,
    prefix_length,
    prefix_of,
    without_adapter,
)
from language_model.packing import common_prefix_length

logger = logging.get_logger(__name__)

# Tokens that texts must share for reading them once to be worth a forward pass of its own.
SHORTEST_PREFIX = 16


def can_share_prompt(model: PreTrainedModel, length: int) -> bool:
    """Tell whether the options of an example may share their prompt's tokens in one sequence.

    ``length`` is that of the longest text. Sharing needs attention that takes a 4-D mask, and
    nothing else that mixes tokens: a recurrent layer or a convolution would carry one option into
    the next. The mask does not slide as a sliding window does.
    """
    config = _config(model)
    reason = why_not_attention_alone(model)
    if not reason and config._attn_implementation not in ("sdpa", "eager"):
        reason = f"attention implementation {config._attn_implementation}"
    elif not reason and not fits_window(model, length):
        window = config.sliding_window
        reason = f"its sliding window of {window} tokens is shorter than the longest text"
    if reason:
        logger.warning_once("scoring every option in a sequence of its own: %s", reason)
    return reason is None


def fits_window(model: PreTrainedModel, length: int) -> bool:
    """Tell whether all layers see a whole text of ``length`` tokens and the prefix before it."""
    window = getattr(_config(model), "sliding_window", None)
    return not window or length + prefix_length(model) <= window


def why_not_attention_alone(model: PreTrainedModel) -> str | None:
    """Return why mask and position ids alone do not decide what a token sees; None if they do.

    Where they do not, padding on the left changes the text after it.
    """
    base = without_adapter(model)
    kind = type(base).__name__
    layers = set(getattr(_config(model), "layer_types", None) or ())
    other_layers = layers - {"full_attention", "sliding_attention"}
    if not getattr(base, "_supports_attention_backend", False):
        return f"{kind} does not take a 4-D attention mask"
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    if first_position(model):
        return f"{kind} counts positions from its padding token"
    return None


def first_position(model: PreTrainedModel) -> int:
    """Return the position of a text's first token: 0, or after the padding token (RoBERTa)."""
    for name, module in without_adapter(model).named_modules():
        # Other kinds, as XGLM's, add the offset themselves.
        padding = module.padding_idx if isinstance(module, nn.Embedding) else None
        if "position" in name and padding is not None:
            return padding + 1
    return 0


def _config(model: PreTrainedModel) -> PreTrainedConfig:
    return without_adapter(model).config.get_text_config(decoder=True)


@dataclass(frozen=True)
class ReadPrefix:
    """What every text begins with, which the model has read once."""

    tokens: tuple[int, ...]
    layers: KeysAndValues  # of prefix-tuning, then of ``tokens``

    @property
    def virtual_tokens(self) -> int:
        """How many positions prefix-tuning takes before the tokens."""
        return self.layers[0][0].shape[2] - len(self.tokens) if self.layers else 0

    def cache(self, rows: int = 1, room: int = 0) -> DynamicCache:
        """Return a new cache with the same keys and values in every row, and room for more."""
        cache = DynamicCache()
        if room:
            cache.layer_class_to_replicate = functools.partial(LayerWithRoom, room)
        for number, layer in enumerate(self.layers):
            cache.update(*(each.expand(rows, *each.shape[1:]) for each in layer), number)
        return cache


def read_shared_prefix(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], limit: int
) -> ReadPrefix:
    """Read the tokens that all texts begin with, at most ``limit``; none if it would not pay."""
    prefix = ReadPrefix((), prefix_of(model))
    length = min(common_prefix_length(texts), limit)
    if len(texts) < 2 or length < SHORTEST_PREFIX:
        return prefix
    tokens, base = tuple(texts[0][:length]), without_adapter(model)
    layers = keys_and_values(base, torch.tensor(tokens), prefix.cache(), logits_to_keep=1)
    return ReadPrefix(tokens, layers)


class LayerWithRoom(DynamicLayer):
    """Keys and values of a layer, with room for ``room`` tokens after those that come first.

    transformers' own layer copies all keys and values for every token that is generated.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, (rows, heads, tokens, head size); return all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers and end <= self.buffers[0].shape[-2]:
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[..., start:end, :] = new
        else:
            whole = super().update(key_states, value_states)
            self.buffers = [nn.functional.pad(tensor, (0, 0, 0, self.room)) for tensor in whole]
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values
