"""Tokens to option log-probabilities, with logits only where a scored token is predicted.

The score of an option is the mean log-probability of its tokens; the largest wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from language_model.batches import not_finite, run_in_batches
from language_model.encoding import EncodedExample, EncodedOption
from language_model.packing import collate, pack
from language_model.shared_tokens import can_share_prompt, read_shared_prefix

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


def option_sums(token_log_probabilities: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability and the number of scored tokens of every option."""
    options = batch["read_options"].to(token_log_probabilities.device)
    zeros = token_log_probabilities.new_zeros(len(batch["option_examples"]))
    sums = zeros.index_add(0, options, token_log_probabilities)
    return sums, zeros.index_add(0, options, torch.ones_like(token_log_probabilities))


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
        sums, _ = option_sums(values, batch)
        if not sums.isfinite().all():
            raise not_finite("scores of the options", model)
        totals = iter(sums.tolist())
        for example in chosen:
            counts = (len(option.targets) for option in example.options)
            results[example.options] = [(next(totals), count) for count in counts]

    run_in_batches(score, lengths, batch_size, progress)
    return [results[example.options] for example in examples]
