"""Samples to answers: the option with the best score, or a generated text.

The score of an option is the mean log-probability of its tokens; the largest wins. Logits are made
only where a scored token is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

from language_model.batches import not_finite, run_in_batches
from language_model.encoding import EncodedExample, EncodedOption, Encoder
from language_model.generation import GenerationSettings, generate
from language_model.packing import collate, pack
from language_model.shared_tokens import can_share_prompt, read_shared_prefix
from tasks import Sample
from utils import InputError, process_index

# Scored tokens whose logits are normalised at once.
LOGIT_ROWS = 256


def token_log_probabilities(
    model: nn.Module, batch: dict[str, Tensor], cache: DynamicCache | None = None
) -> Tensor:
    """Return the log-probability of every scored token of a batch, float32, (scored tokens,).

    ``cache`` holds the keys and values of the tokens before the batch's.
    """

    def keep_predicting_positions(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        hidden = arguments[0]
        return hidden[batch["read_rows"].to(hidden.device), batch["read_columns"].to(hidden.device)]

    # DistributedDataParallel hides the model's own methods.
    head = getattr(model, "module", model).get_output_embeddings()
    # The model's own forward, with whatever its family does to logits, but on few positions.
    with head.register_forward_pre_hook(keep_predicting_positions):
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch.get("position_ids"),
            attention_mask=model_mask(model, batch["attention_mask"]),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
    targets = batch["targets"].to(logits.device)
    # In pieces: a float32 copy of all logits would take as much memory as they do.
    pieces = zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    losses = [nn.functional.cross_entropy(p.float(), ids, reduction="none") for p, ids in pieces]
    return -torch.cat(losses)


def model_mask(model: nn.Module, mask: Tensor) -> Tensor:
    """Return ``mask`` as every layer of the model takes it: additive if it is 4-D."""
    if mask.dim() == 2:
        return mask
    dtype = next(model.parameters()).dtype
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)


def option_sums(of_tokens: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed log-probability of every option, (options,)."""
    zeros = of_tokens.new_zeros(len(batch["option_examples"]))
    return zeros.index_add(0, batch["read_options"].to(of_tokens.device), of_tokens)


@torch.no_grad()
def score_options(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    batch_size: int,
    progress: str | None,
) -> list[list[tuple[float, int]]]:
    """Return (summed log-probability, number of tokens) of every option of every example.

    The model reads demonstrations that all examples share once, and equal options (content-free
    prompts) once.

    Raises:
        NotFinite: a log-probability is NaN or infinite.
    """
    distinct = list({example.options: example for example in examples}.values())
    options = [option for example in distinct for option in example.options]
    share = can_share_prompt(model, max(len(option.tokens) for option in options))
    # The token that predicts the first scored one does not belong to the prefix.
    limit = min(option.targets.start - 1 for option in options)
    texts = [option.tokens[:-1] for option in options]
    prefix = read_shared_prefix(model, texts, limit if share and len(distinct) > 1 else 0)
    read = (len(prefix.tokens), prefix.virtual_tokens) if prefix.tokens else (0, 0)
    results: dict[tuple[EncodedOption, ...], list[tuple[float, int]]] = {}
    packed = (pack(example, share) for example in distinct)
    lengths = [sum(len(sequence.tokens) for sequence in sequences) for sequences in packed]

    def score(indices: list[int]) -> None:
        chosen = [distinct[index] for index in indices]
        batch = collate(chosen, 0, share, *read)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        values = token_log_probabilities(model, batch, prefix.cache() if prefix.tokens else None)
        sums = option_sums(values, batch)
        if not sums.isfinite().all():
            raise not_finite("scores of the options", model)
        totals = iter(sums.tolist())
        for example in chosen:
            counts = (len(option.targets) for option in example.options)
            results[example.options] = [(next(totals), count) for count in counts]

    run_in_batches(score, lengths, batch_size, progress)
    return [results[example.options] for example in examples]


@dataclass(frozen=True)
class Prediction:
    """What the model says about an example: a candidate or a text, and every option's score."""

    answer: Any
    scores: tuple[float, ...] | None = None


def predict(
    model: PreTrainedModel,
    encoder: Encoder,
    samples: Sequence[Sample],
    demonstrations: Sequence[Sequence[Sample]],
    batch_size: int,
    calibration: str | None = None,
    generation: GenerationSettings | None = None,
    progress: str | None = "evaluation",
) -> list[Prediction]:
    """Return the model's answer to every sample, each with ``demonstrations`` of its own.

    ``calibration`` is "sfc", "icl_sfc" (content-free prompt after the demonstrations too) or None;
    ``progress`` is the label of the progress bar, None for no bar.
    """
    model.eval()
    if encoder.task.generation and calibration:
        raise InputError(f"--{calibration}: {encoder.task.name} has no options to calibrate")
    # With FSDP a forward pass gathers weights from all processes: they must run the same ones.
    shares = torch.distributed.is_initialized() and not isinstance(model, FSDPModule)
    processes = torch.distributed.get_world_size() if shares else 1
    pairs = list(zip(samples, demonstrations, strict=True))
    own = pairs[process_index() % processes :: processes]
    if not own:
        predictions = []
    elif encoder.task.generation:
        prompts = [encoder.prompt(sample, shown) for sample, shown in own]
        settings = generation or GenerationSettings()
        texts = generate(model, encoder.tokenizer, prompts, settings, batch_size, progress)
        predictions = [Prediction(text) for text in texts]
    else:
        predictions = _chosen(model, encoder, own, batch_size, calibration, progress)
    gathered = [predictions] * processes
    if processes > 1:
        torch.distributed.all_gather_object(gathered, predictions)
    return [gathered[number % processes][number // processes] for number in range(len(pairs))]


def _chosen(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Sequence[tuple[Sample, Sequence[Sample]]],
    batch_size: int,
    calibration: str | None,
    progress: str | None,
) -> list[Prediction]:
    """Score the options of every sample, and choose the best of each."""
    encoded = [encoder.options(sample, shown) for sample, shown in pairs]
    scored = score_options(model, encoded, batch_size, progress)
    scores = [[total / count for total, count in options] for options in scored]
    if calibration:
        content_free = [
            encoder.options(sample, shown if calibration == "icl_sfc" else (), content_free=True)
            for sample, shown in pairs
        ]
        label = progress and f"{progress} ({calibration})"
        priors = score_options(model, content_free, batch_size, label)
        scores = [
            [total - prior for (total, _), (prior, _) in zip(options, of_prompt, strict=True)]
            for options, of_prompt in zip(scored, priors, strict=True)
        ]
    predictions = []
    for (sample, _), values in zip(pairs, scores, strict=True):
        best = max(range(len(values)), key=values.__getitem__)
        predictions.append(Prediction(sample.candidates[best], tuple(values)))
    return predictions
