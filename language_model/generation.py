"""Text that a model generates after prompts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from language_model.adapters import without_adapter
from language_model.batches import not_finite, run_in_batches
from language_model.shared_tokens import (
    can_share_prompt,
    first_position,
    fits_window,
    read_shared_prefix,
    why_not_attention_alone,
)
from utils import InputError


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated; the defaults are greedy.

    The model's own generation settings are ignored, except its end tokens. ``eos_token`` is a text
    that ends an answer too, and is no part of it: a part of a token, or several tokens.
    """

    max_new_tokens: int = 50
    eos_token: str = "\n"
    sampling: bool = False
    temperature: float = 1.0
    num_beams: int = 1
    top_k: int | None = None
    top_p: float = 0.95

    def arguments(self) -> dict[str, Any]:
        """Return the settings as arguments of transformers' ``generate()``."""
        length = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        how = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if not self.sampling:
            # None is off here; in a ``GenerationConfig`` it would be the default, as a top_k of 50.
            how = dict.fromkeys(how)
        return {**length, "do_sample": self.sampling, **how}


def check_generation(
    settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Check that prompts of at most ``max_length`` tokens have room, and that answers can end."""
    if settings.max_new_tokens >= max_length:
        raise InputError(
            f"--max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in a text of "
            f"{max_length} tokens (--max_length)"
        )
    end = settings.eos_token
    if end not in tokenizer.decode(tokenizer.encode(end, add_special_tokens=False)):
        raise InputError(
            f"--eos_token {end!r}: the model's tokenizer has no token for it, so no answer would "
            "end; give an --eos_token that it can write, as in '.', or another model"
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    settings: GenerationSettings,
    batch_size: int,
    progress: str | None,
) -> list[str]:
    """Return the text that the model writes after every prompt, stripped.

    A text ends before the first end token of model or tokenizer, or the end text.

    Raises:
        NotFinite: a token would be chosen from logits that are not finite.
    """
    # FSDP's root gathers the weights outside the layers: it must be called itself.
    generator = model if isinstance(model, FSDPModule) else without_adapter(model)
    own_settings = generator.generation_config
    own = own_settings.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends, default=0)
    # New tokens count: a sliding window would see the padding between shared and own tokens.
    longest = max(map(len, prompts)) + settings.max_new_tokens
    # Beams reorder the rows of a cache, which generate() then makes itself.
    share = settings.num_beams == 1 and can_share_prompt(model, longest)
    prefix = read_shared_prefix(model, prompts, min(map(len, prompts)) - 1 if share else 0)
    room = settings.max_new_tokens if share else 0
    # The model never looks at the tokens of prefix-tuning: their keys and values are cached.
    cached = (*[pad] * prefix.virtual_tokens, *prefix.tokens)
    first = first_position(model)
    texts = [""] * len(prompts)

    def stop(length: int, rows: Tensor, *scores: Any, **others: Any) -> Tensor:
        # The end of a prompt may be the first part of the text at which to stop.
        return stop_at(tokenizer, settings.eos_token)(rows[:, length:], *scores, **others)

    def check_logits(_: Tensor, logits: Tensor) -> Tensor:
        # Of NaN the choice would always be the first token.
        if not logits.amax(-1).isfinite().all():
            raise not_finite("logits", model)
        return logits

    def write(indices: list[int]) -> None:
        rows = [prompts[index][len(prefix.tokens) :] for index in indices]
        length = max(map(len, rows))
        # Padding goes between the shared tokens, which the model has read, and the row's own.
        tokens = [[*cached, *[pad] * (length - len(row)), *row] for row in rows]
        mask = [[1] * len(cached) + [0] * (length - len(row)) + [1] * len(row) for row in rows]
        shown = torch.tensor(mask, device=model.device)
        cache = None
        if room or prefix.layers:
            cache = prefix.cache(len(rows) * settings.num_beams, room)
        output = generator.generate(
            torch.tensor(tokens, device=model.device),
            attention_mask=shown,
            past_key_values=cache,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([check_logits]),
            stopping_criteria=StoppingCriteriaList([functools.partial(stop, len(tokens[0]))]),
            **settings.arguments(),
            # generate() itself counts from 0 in every family.
            **({"position_ids": shown.cumsum(-1) - 1 + first} if first else {}),
        )
        for index, row in zip(indices, output[:, len(tokens[0]) :].tolist(), strict=True):
            # Without an end token, transformers pads beams that stop early with -1.
            written = itertools.takewhile(lambda token: token >= 0 and token not in ends, row)
            text = tokenizer.decode(list(written), skip_special_tokens=True)
            texts[index] = text.partition(settings.eos_token)[0].strip()

    alone = why_not_attention_alone(model)
    if alone or (prefix.virtual_tokens and not fits_window(model, longest)):
        # Padding, and in RWKV other rows, change a text; a window counts padding after the prefix.
        batch_size = 1
    # Not the model's own settings, as its repetition_penalty.
    generator.generation_config = GenerationConfig()
    try:
        run_in_batches(write, [*map(len, prompts)], batch_size, progress)
    finally:
        generator.generation_config = own_settings
    return texts


@functools.lru_cache(maxsize=1)
def stop_at(tokenizer: PreTrainedTokenizerBase, text: str) -> StopStringCriteria:
    """Return what stops at a text; made once: it reads the whole vocabulary (1 s of 128,000)."""
    return StopStringCriteria(tokenizer, [text])
