"""Tokens that several texts begin with: whether a model may read them once, and what it then keeps.

What it keeps are keys and values, those of prefix-tuning among them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from language_model.adapters import KeysAndValues, prefix_length, prefix_of, without_adapter
from language_model.packing import common_prefix_length

logger = logging.getLogger(__name__)

# Tokens that texts must share for reading them once to be worth a forward pass of its own.
SHORTEST_PREFIX = 16


def can_share_prompt(model: PreTrainedModel, length: int) -> bool:
    """Tell whether the options of an example may share their prompt's tokens in one sequence.

    ``length`` is that of the longest text. It takes attention that reads a 4-D mask, and nothing
    else that mixes tokens: a recurrent layer or a convolution would carry one option into the next.
    Where a window slides over the keys, the mask would have to slide with it: texts that are longer
    than the window go one option at a time.
    """
    config = without_adapter(model).config.get_text_config(decoder=True)
    reason = why_not_attention_alone(model)
    if reason is None and config._attn_implementation not in ("sdpa", "eager"):
        reason = f"attention implementation {config._attn_implementation}"
    elif reason is None and not fits_window(model, length):
        window = config.sliding_window
        reason = f"its sliding window of {window} tokens is shorter than the longest text"
    if reason:
        _warn_once(reason)
    return reason is None


def fits_window(model: PreTrainedModel, length: int) -> bool:
    """Tell whether all layers see a whole text of ``length`` tokens and the prefix before it."""
    config = without_adapter(model).config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    return not window or length + prefix_length(model) <= window


def why_not_attention_alone(model: PreTrainedModel) -> str | None:
    """Return why a mask and position ids do not decide alone what a token sees; None if they do.

    Padding on the left then changes the text behind it.
    """
    model = without_adapter(model)
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    other_layers = layers - {"full_attention", "sliding_attention"}
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not take a 4-D attention mask"
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    if first_position(model):
        return f"{type(model).__name__} counts positions from its padding token"
    return None


def first_position(model: PreTrainedModel) -> int:
    """Return the position of a text's first token: 0, or behind the padding token (RoBERTa)."""
    for name, module in without_adapter(model).named_modules():
        padding = getattr(module, "padding_idx", None)
        if "position" in name and padding is not None:
            return padding + 1
    return 0


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("scoring every option in a sequence of its own: %s", reason)


# ------------------------------------------------------------------------- keys and values


@dataclass(frozen=True)
class ReadPrefix:
    """What every text begins with, and its keys and values, (1, heads, tokens, head size) each.

    Attributes:
        tokens: the texts' first tokens, which the model has read.
        layers: keys and values of each layer: those of prefix-tuning, then those of ``tokens``.
    """

    tokens: tuple[int, ...]
    layers: KeysAndValues

    @classmethod
    def read(cls, model: PreTrainedModel, tokens: Sequence[int]) -> ReadPrefix:
        """Run the model on the tokens, once."""
        layers = prefix_of(model)
        if tokens:
            output = without_adapter(model)(
                input_ids=torch.tensor([tokens], device=model.device),
                past_key_values=cache_of(layers),
                use_cache=True,
                logits_to_keep=1,
            )
            layers = tuple((layer.keys, layer.values) for layer in output.past_key_values.layers)
        return cls(tuple(tokens), layers)

    @property
    def virtual_tokens(self) -> int:
        """How many positions prefix-tuning takes before the tokens."""
        return self.layers[0][0].shape[2] - len(self.tokens) if self.layers else 0

    def cache(self, rows: int = 1, room: int = 0) -> DynamicCache:
        """Return a new cache that forward passes of so many rows may extend; see ``cache_of``."""
        return cache_of(self.layers, rows, room)


class LayerWithRoom(DynamicLayer):
    """Keys and values of a layer, with room for ``room`` tokens after those that come first.

    transformers' own layer copies all keys and values for every token that is generated.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.places: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, (rows, heads, tokens, head size); return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.places is None or self.places[0].shape[-2] < end:
            old = self.keys, self.values
            shape = (*key_states.shape[:-2], end + self.room)
            self.places = tuple(
                new.new_empty((*shape, new.shape[-1])) for new in (key_states, value_states)
            )
            if start:
                for place, values in zip(self.places, old, strict=True):
                    place[..., :start, :] = values
        for place, values in zip(self.places, (key_states, value_states), strict=True):
            place[..., start:end, :] = values
        self.keys, self.values = (place[..., :end, :] for place in self.places)
        return self.keys, self.values


def cache_of(layers: KeysAndValues, rows: int = 1, room: int = 0) -> DynamicCache:
    """Return a cache with the same keys and values in every row, and room for further tokens."""
    cache = DynamicCache()
    if room:
        cache.layer_class_to_replicate = functools.partial(LayerWithRoom, room)
    for number, (keys, values) in enumerate(layers):
        of_rows = (part.expand((rows, *part.shape[1:])) for part in (keys, values))
        cache.update(*of_rows, number)
    return cache


def read_shared_prefix(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], limit: int
) -> ReadPrefix | None:
    """Read the tokens that all texts begin with, at most ``limit``; None if it would not pay."""
    length = min(common_prefix_length(texts), limit)
    if len(texts) < 2 or length < SHORTEST_PREFIX:
        return None
    return ReadPrefix.read(model, texts[0][:length])
