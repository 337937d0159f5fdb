"""Tokens to option log-probabilities, losses, predictions and generated text.

The score of an option is the mean log-probability of its tokens; the largest wins (DESIGN of the
prompts: templates.py). Logits are made only where a scored token is predicted; packing.py makes the
batches.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from language_model.adapters import KeysAndValues, prefix_length, prefix_of, without_adapter
from language_model.encoding import EncodedExample, EncodedOption, Encoder
from language_model.packing import collate, collate_behind, common_prefix_length, pack
from tasks import Sample
from utils import InputError

logger = logging.getLogger(__name__)

# Tokens that texts must share for reading them once to be worth a forward pass of its own.
SHORTEST_PREFIX = 16
# Scored tokens whose logits are normalised at once.
LOGIT_ROWS = 256


# --------------------------------------------------------------- batches to log-probabilities


def token_log_probabilities(
    model: nn.Module, batch: dict[str, Tensor], cache: DynamicCache | None = None
) -> Tensor:
    """Return the log-probability of every scored token of a batch, float32, (scored tokens,).

    ``cache`` holds the keys and values of the tokens that the batch begins behind.
    """
    # DistributedDataParallel hides the model's own methods.
    head = getattr(model, "module", model).get_output_embeddings()

    def keep_predicting_positions(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        hidden = arguments[0]
        rows, columns = batch["read_rows"], batch["read_columns"]
        return hidden[rows.to(hidden.device), columns.to(hidden.device)]

    # The head of the model itself, with whatever the family does to its logits, on few positions.
    hook = head.register_forward_pre_hook(keep_predicting_positions)
    try:
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch.get("position_ids"),
            attention_mask=model_mask(model, batch["attention_mask"]),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
    finally:
        hook.remove()
    targets = batch["targets"].to(logits.device)
    # A part after the other: a copy of all logits would take as much memory as they do.
    parts = zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return -torch.cat(
        [nn.functional.cross_entropy(part.float(), ids, reduction="none") for part, ids in parts]
    )


def model_mask(model: nn.Module, mask: Tensor) -> Tensor:
    """Return ``mask`` as every layer of the model takes it: additive if it is 4-D."""
    if mask.dim() == 2:
        return mask
    dtype = next(model.parameters()).dtype
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)


def option_sums(token_log_probabilities: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability and the number of scored tokens of every option."""
    device = token_log_probabilities.device
    options = batch["read_options"].to(device)
    zeros = torch.zeros(len(batch["option_examples"]), device=device)
    sums = zeros.index_add(0, options, token_log_probabilities)
    return sums, zeros.index_add(0, options, torch.ones_like(token_log_probabilities))


def can_share_prompt(model: PreTrainedModel, length: int) -> bool:
    """Tell whether the options of an example may share their prompt's tokens in one sequence.

    ``length`` is that of the longest text. It takes attention that reads a 4-D mask, and nothing
    else that mixes tokens: a recurrent layer or a convolution would carry one option into the next.
    Where a window slides over the keys, the mask would have to slide with it: texts that are longer
    than the window go one option at a time.
    """
    config = without_adapter(model).config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    reason = why_not_attention_alone(model)
    if reason is None and config._attn_implementation not in ("sdpa", "eager"):
        reason = f"attention implementation {config._attn_implementation}"
    elif reason is None and window and window < length + prefix_length(model):
        reason = f"its sliding window of {window} tokens is shorter than the longest text"
    if reason:
        _warn_once(reason)
    return reason is None


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
    for name, module in model.named_modules():
        if "position" in name and getattr(module, "padding_idx", None) is not None:
            return f"{type(model).__name__} counts positions from its padding token"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("scoring every option in a sequence of its own: %s", reason)


# ------------------------------------------------------------------------------------ evaluation


@dataclass(frozen=True)
class Prediction:
    """What the model says about an example: a candidate or a text, and every option's score."""

    answer: Any
    scores: tuple[float, ...] | None = None


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


@torch.no_grad()
def score_options(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    batch_size: int,
    progress: str | None,
) -> list[list[tuple[float, int]]]:
    """Return (summed log-probability, number of tokens) of every option of every example.

    Demonstrations that all examples share are read once; equal options (content-free prompts) too,
    whichever of them is correct.
    """
    distinct = list({example.options: example for example in examples}.values())
    options = [option for example in distinct for option in example.options]
    share = can_share_prompt(model, max(len(option.tokens) for option in options))
    prefix = None
    if share and len(distinct) > 1:
        # What predicts a scored token is not in the prefix.
        limit = min(option.targets.start - 1 for option in options)
        prefix = read_shared_prefix(model, [option.tokens[:-1] for option in options], limit)
    results: dict[tuple[EncodedOption, ...], list[tuple[float, int]]] = {}

    def length(index: int) -> int:
        return sum(len(sequence.tokens) for sequence in pack(distinct[index], share))

    def score(indices: list[int]) -> None:
        chosen = [distinct[index] for index in indices]
        if prefix:
            batch = collate_behind(len(prefix.tokens), chosen, prefix.virtual_tokens)
            cache = prefix.cache()
        else:
            batch, cache = collate(chosen, share_prompt=share), None
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        sums, lengths = option_sums(token_log_probabilities(model, batch, cache), batch)
        results.update({example.options: [] for example in chosen})
        owners = batch["option_examples"].tolist()
        for owner, total, count in zip(owners, sums.tolist(), lengths.tolist(), strict=True):
            results[chosen[owner].options].append((total, int(count)))

    run_in_batches(score, len(distinct), length, batch_size, progress)
    return [results[example.options] for example in examples]


def run_in_batches(
    function: Callable[[list[int]], None],
    count: int,
    length: Callable[[int], int],
    batch_size: int,
    progress: str | None,
) -> None:
    """Call ``function`` with the numbers below ``count`` in batches, the longest examples first.

    So little is padded. A batch that does not fit into memory is halved until it does. Shows a
    progress bar with examples per second, in one process, unless ``progress`` is None.
    """
    waiting = sorted(range(count), key=length, reverse=True)
    hidden = progress is None or process_index() > 0
    with tqdm(total=count, desc=progress, unit="example", leave=False, disable=hidden) as bar:
        while waiting:
            indices = waiting[:batch_size]
            try:
                function(indices)
            except (RuntimeError, MemoryError) as error:
                if len(indices) == 1 or not is_lack_of_memory(error):
                    raise
            else:
                waiting = waiting[len(indices) :]
                bar.update(len(indices))
                continue
            # Only here does the error no longer hold the tensors of the batch that did not fit.
            batch_size = len(indices) // 2
            logger.warning(
                "%s: %d examples at a time, for lack of memory", progress or "loss", batch_size
            )
            clear_device_cache(garbage_collection=True)


def is_lack_of_memory(error: Exception) -> bool:
    """Tell whether a smaller batch might go through."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(
        error
    )


def process_index() -> int:
    """Return this process's number among those that ``torchrun`` started, 0 alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


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


def predict(
    model: PreTrainedModel,
    encoder: Encoder,
    samples: Sequence[Sample],
    demonstrations: Sequence[Sequence[Sample]],
    batch_size: int,
    calibration: str | None = None,
    generation: GenerationSettings | None = None,
    progress: str = "evaluation",
) -> list[Prediction]:
    """Return the model's answer to every sample.

    Args:
        model: a causal language model.
        encoder: the task and the tokenizer.
        samples: the examples.
        demonstrations: for every sample, the examples shown before it.
        batch_size: examples in a forward pass, at most.
        calibration: "sfc", "icl_sfc" (content-free prompt behind the demonstrations too) or None.
        generation: settings, for the tasks whose answer is generated.
        progress: what the progress bar says.
    """
    model.eval()
    if encoder.task.generation and calibration:
        raise InputError(f"--{calibration}: {encoder.task.name} has no options to calibrate")
    pairs = list(zip(samples, demonstrations, strict=True))
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if isinstance(model, FSDPModule):
        # Every forward pass gathers sharded weights: all processes must run the same ones.
        processes = 1
    own = pairs[process_index() % processes :: processes]
    arguments = (model, encoder, own, batch_size)
    if not own:
        predictions = []
    elif encoder.task.generation:
        predictions = _generated(*arguments, generation or GenerationSettings(), progress)
    else:
        predictions = _chosen(*arguments, calibration, progress)
    if processes == 1:
        return predictions
    parts: list[list[Prediction]] = [[] for _ in range(processes)]
    torch.distributed.all_gather_object(parts, predictions)
    return [parts[number % processes][number // processes] for number in range(len(pairs))]


Pairs = Sequence[tuple[Sample, Sequence[Sample]]]


def _generated(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Pairs,
    batch_size: int,
    settings: GenerationSettings,
    progress: str,
) -> list[Prediction]:
    prompts = [encoder.prompt(sample, shown) for sample, shown in pairs]
    texts = generate(model, encoder.tokenizer, prompts, settings, batch_size, progress)
    return [Prediction(text) for text in texts]


def _chosen(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Pairs,
    batch_size: int,
    calibration: str | None,
    progress: str,
) -> list[Prediction]:
    encoded = [encoder.options(sample, shown) for sample, shown in pairs]
    scored = score_options(model, encoded, batch_size, progress)
    scores = [[total / count for total, count in options] for options in scored]
    if calibration:
        content_free = [
            encoder.options(sample, shown if calibration == "icl_sfc" else (), content_free=True)
            for sample, shown in pairs
        ]
        priors = score_options(model, content_free, batch_size, f"{progress} ({calibration})")
        scores = [
            [total - prior for (total, _), (prior, _) in zip(options, of_prompt, strict=True)]
            for options, of_prompt in zip(scored, priors, strict=True)
        ]
    best = [max(range(len(values)), key=values.__getitem__) for values in scores]
    return [
        Prediction(sample.candidates[index], tuple(values))
        for (sample, _), index, values in zip(pairs, best, scores, strict=True)
    ]
