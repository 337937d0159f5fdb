"""Text that a model writes behind a prompt."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from language_model.adapters import without_adapter
from language_model.batches import run_in_batches
from language_model.precision import not_finite
from language_model.shared_tokens import (
    ReadPrefix,
    can_share_prompt,
    first_position,
    fits_window,
    read_shared_prefix,
    why_not_attention_alone,
)
from utils import InputError

# float32 tables of the vocabulary that beam search holds for each beam at once.
TABLES_OF_A_BEAM = 3


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated; the defaults are greedy.

    Whatever is not set here is off, whatever the model's own generation settings say, but for its
    end tokens.

    Attributes:
        max_new_tokens: tokens of a text at most.
        eos_token: the text that ends an answer, beside the end tokens of model and tokenizer. It
            may be a part of a token, or several of them; it is no part of the answer.
        sampling: draw tokens at random, from ``top_k`` and ``top_p`` at ``temperature``.
        num_beams: beams of a beam search; 1 is none.
    """

    max_new_tokens: int = 50
    eos_token: str = "\n"
    sampling: bool = False
    temperature: float = 1.0
    num_beams: int = 1
    top_k: int | None = None
    top_p: float = 0.95


def check_generation(
    settings: GenerationSettings,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    max_length: int,
) -> None:
    """Check that answers can end, and that there is room for the prompt and the beams.

    Args:
        settings: how text will be generated.
        tokenizer: the model's own.
        config: the model's.
        max_length: tokens of prompt and answer at most.

    Raises:
        InputError: one of these is not so.
    """
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
    config = config.get_text_config(decoder=True)
    beams = settings.num_beams
    needed, there = beams * bytes_of_a_beam(config, max_length), memory()
    if beams > 1 and needed > there:
        raise InputError(
            f"--num_beams {beams}: the beams of an example take up to {needed / 1e9:.1f} GB, of "
            f"{there / 1e9:.1f} GB of memory; give at most {beams * there // needed}, or a smaller "
            "--max_length"
        )


def bytes_of_a_beam(config: PreTrainedConfig, length: int) -> int:
    """Return the least memory of a beam: keys and values of its tokens, in 16 bits, and scores."""

    def of_every_layer(name: str) -> int:
        try:
            return getattr(config, name, None) or 0
        except RuntimeError:  # the layers differ in it
            return 0

    heads = of_every_layer("num_attention_heads")
    head_size = of_every_layer("head_dim") or of_every_layer("hidden_size") // max(1, heads)
    key_value_heads = of_every_layer("num_key_value_heads") or heads
    of_a_token = 2 * of_every_layer("num_hidden_layers") * key_value_heads * head_size
    return 2 * length * of_a_token + TABLES_OF_A_BEAM * 4 * config.vocab_size


def memory() -> int:
    """Return the bytes of memory of all GPUs, or of the machine if it has none."""
    if not torch.cuda.is_available():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.get_device_properties(device).total_memory for device in devices)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    settings: GenerationSettings,
    batch_size: int,
    progress: str | None,
) -> list[str]:
    """Return the text that the model writes behind every prompt, without spaces at its ends.

    A text ends before the first end token or end text.

    Raises:
        NotFinite: a token would be chosen from logits that are not finite.
    """
    ends = end_tokens(model, tokenizer, settings.eos_token)
    pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else (*ends, 0)[0]
    # Beams reorder the rows of a cache, which generate() then makes itself.
    prefix = ReadPrefix.read(model, ())
    # The new tokens count: a window would see the padding behind the shared tokens, and not those.
    longest = max(map(len, prompts)) + settings.max_new_tokens
    room = 0
    if settings.num_beams == 1 and can_share_prompt(model, longest):
        prefix = read_shared_prefix(model, prompts, min(map(len, prompts)) - 1) or prefix
        room = settings.max_new_tokens
    shared = prefix.tokens
    # What stands for the tokens of prefix-tuning is never looked at: they are in the cache.
    cached = (*[pad] * prefix.virtual_tokens, *shared)
    given = room or prefix.layers
    first = first_position(model)
    texts = [""] * len(prompts)

    def write(indices: list[int]) -> None:
        rows = [prompts[index][len(shared) :] for index in indices]
        length = max(map(len, rows))
        # Padding stands between the shared tokens, which the model has read, and the row's own.
        tokens = [[*cached, *[pad] * (length - len(row)), *row] for row in rows]
        mask = [[1] * len(cached) + [0] * (length - len(row)) + [1] * len(row) for row in rows]
        # The root of sharded weights gathers what stands outside the layers: it must be called.
        generator = model if isinstance(model, FSDPModule) else without_adapter(model)
        start = len(tokens[0])
        end_text = EndText(tokenizer, settings.eos_token, start)
        cache = prefix.cache(len(rows) * settings.num_beams, room) if given else None
        shown = torch.tensor(mask, device=model.device)
        # generate() itself counts from 0 in every family.
        positions = {"position_ids": shown.cumsum(-1) - 1 + first} if first else {}
        with only_what_is_asked_for(generator):
            output = generator.generate(
                torch.tensor(tokens, device=model.device),
                attention_mask=shown,
                past_key_values=cache,
                eos_token_id=ends or None,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([FiniteLogits(model)]),
                stopping_criteria=StoppingCriteriaList([end_text]),
                **positions,
                **generation_arguments(settings),
            )
        for index, row in zip(indices, output[:, start:].tolist(), strict=True):
            texts[index] = answer_text(tokenizer, row, ends, settings.eos_token)

    if why_not_attention_alone(model) or (
        prefix.virtual_tokens and not fits_window(model, longest)
    ):
        # Neither padding nor, in RWKV, other rows leave a text alone. A window counts the padding
        # behind the prefix.
        batch_size = 1
    run_in_batches(write, len(prompts), lambda i: len(prompts[i]), batch_size, progress)
    return texts


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens that end an answer: model's, tokenizer's, and ``text`` if it is one.

    Texts of several tokens, and tokens that hold more than ``text``, are left to ``EndText``.
    """
    own = without_adapter(model).generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    of_text = tokenizer.encode(text, add_special_tokens=False)
    if len(of_text) > 1:
        of_text = []
    tokens = (*of_text, *own, tokenizer.eos_token_id)
    return [token for token in dict.fromkeys(tokens) if token is not None]


def answer_text(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], ends: Sequence[int], end_text: str
) -> str:
    """Return the text of generated tokens, up to the first end token or end text."""
    # A beam that ends early is filled up with -1 where there is no end token.
    before_end = itertools.takewhile(lambda token: token >= 0 and token not in ends, tokens)
    text = tokenizer.decode(list(before_end), skip_special_tokens=True)
    return text.partition(end_text)[0].strip()


def generation_arguments(settings: GenerationSettings) -> dict[str, Any]:
    """Return the settings as transformers' ``generate()`` takes them; None is off."""
    names = ("temperature", "top_k", "top_p")
    return {
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "do_sample": settings.sampling,
        **{name: getattr(settings, name) if settings.sampling else None for name in names},
    }


@contextlib.contextmanager
def only_what_is_asked_for(model: PreTrainedModel) -> Iterator[None]:
    """Let a model forget its own generation settings for a while (as ``repetition_penalty``)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class EndText(StoppingCriteria):
    """Ends a row whose generated tokens hold a text, wherever in a token it begins or ends.

    transformers' ``stop_strings`` would first look at every token of the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.start = start
        # A token is a byte at least: so many may hold the text's end. Decoders may take a space
        # from the first.
        self.tokens = len(text.encode()) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows end, (rows,) of bool, from their tokens, (rows, tokens)."""
        start = max(self.start, input_ids.shape[1] - self.tokens)
        texts = self.tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([self.text in text for text in texts], device=input_ids.device)


class FiniteLogits(LogitsProcessor):
    """Stops where a token would be chosen from NaN: the choice would be the first token, always."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits, (rows, vocabulary), as they are."""
        if not scores.amax(-1).isfinite().all():
            raise not_finite("logits", self.model)
        return scores
