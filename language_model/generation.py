"""Text that a model writes behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from language_model.adapters import without_adapter
from language_model.batches import run_in_batches
from language_model.shared_tokens import (
    ReadPrefix,
    can_share_prompt,
    read_shared_prefix,
    why_not_attention_alone,
)


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated; the defaults are greedy. ``eos_token`` ends it, as the model's own."""

    max_new_tokens: int = 50
    eos_token: str = "\n"
    sampling: bool = False
    temperature: float = 1.0
    num_beams: int = 1
    top_k: int | None = None
    top_p: float = 0.95


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    settings: GenerationSettings,
    batch_size: int,
    progress: str | None,
) -> list[str]:
    """Return the text that the model writes behind every prompt, without spaces at its ends."""
    stop_tokens = [tokenizer.encode(settings.eos_token, add_special_tokens=False)[-1]]
    if tokenizer.eos_token_id is not None:
        stop_tokens.append(tokenizer.eos_token_id)
    sampling = (
        {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        if settings.sampling
        else {"temperature": None, "top_k": None, "top_p": None}
    )
    texts = [""] * len(prompts)
    pad = stop_tokens[-1]
    # Beams reorder the rows of a cache, which generate() then makes itself.
    prefix = ReadPrefix.read(model, ())
    # The new tokens count: a window would see the padding behind the shared tokens, and not those.
    longest = max(map(len, prompts)) + settings.max_new_tokens
    room = 0
    if settings.num_beams == 1 and can_share_prompt(model, longest):
        limit = min(map(len, prompts)) - 1
        prefix = read_shared_prefix(model, prompts, limit) or prefix
        room = settings.max_new_tokens
    shared = prefix.tokens
    # What stands for the tokens of prefix-tuning is never looked at: they are in the cache.
    cached = (*[pad] * prefix.virtual_tokens, *shared)

    given = room or prefix.layers

    def write(indices: list[int]) -> None:
        rows = [prompts[index][len(shared) :] for index in indices]
        length = max(map(len, rows))
        # Padding stands between the shared tokens, which the model has read, and the row's own.
        tokens = [[*cached, *[pad] * (length - len(row)), *row] for row in rows]
        mask = [[1] * len(cached) + [0] * (length - len(row)) + [1] * len(row) for row in rows]
        # The root of sharded weights gathers what stands outside the layers: it must be called.
        generator = model if isinstance(model, FSDPModule) else without_adapter(model)
        output = generator.generate(
            torch.tensor(tokens, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=prefix.cache(len(rows) * settings.num_beams, room) if given else None,
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.sampling,
            num_beams=settings.num_beams,
            eos_token_id=stop_tokens,
            pad_token_id=pad,
            **sampling,
        )
        written = tokenizer.batch_decode(output[:, len(tokens[0]) :], skip_special_tokens=True)
        for index, text in zip(indices, written, strict=True):
            texts[index] = text.strip()

    if why_not_attention_alone(model):
        # Neither padding nor, in RWKV, other rows leave a text alone.
        batch_size = 1
    run_in_batches(write, len(prompts), lambda i: len(prompts[i]), batch_size, progress)
    return texts
