"""Samples to tokens, and tokens to option log-probabilities, losses and generated text.

The score of an option is the mean log-probability of its tokens; the largest wins (DESIGN of the
prompts: templates.py). An example becomes one sequence: the tokens that all its options share,
once, and behind them a branch for each option's own tokens. An attention mask lets a branch see
the shared tokens and itself, and position ids continue from the shared tokens, so that every
log-probability is the one that the option gets when it is scored alone. Logits are made only where
a scored token is predicted.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks import Sample, Task
from utils import InputError

logger = logging.getLogger(__name__)

DEMONSTRATION_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class EncodedOption:
    """Tokens of demonstrations, prompt and option; the last ``scored`` of them are the option's."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def targets(self) -> range:
        """Indices of the scored tokens. The first token of a text is never predicted."""
        return range(max(1, len(self.tokens) - self.scored), len(self.tokens))


@dataclass(frozen=True)
class EncodedExample:
    """All options of an example, in the task's order, and the index of the correct one."""

    options: tuple[EncodedOption, ...]
    correct: int = 0


@dataclass(frozen=True)
class PackedSequence:
    """Tokens that go through the model once, for one or several options.

    Attributes:
        tokens, positions: token and position ids, of one length.
        branches: 0 for the shared tokens, then 1, 2, … for the options' own.
        reads: (option, index in ``tokens``, target): there the log-probability of ``target`` counts
            for ``option``.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    reads: tuple[tuple[int, int, int], ...]


# ------------------------------------------------------------------------------- text to tokens


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens.

    Attributes:
        max_length: tokens of a whole text at most, with those to be generated; a longer text loses
            tokens on the left, after its first.
        max_new_tokens: room that a prompt for generation leaves.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_new_tokens: int = 0

    def options(
        self,
        sample: Sample,
        demonstrations: Sequence[Sample] = (),
        candidates: Sequence[Any] | None = None,
        content_free: bool = False,
    ) -> EncodedExample:
        """Encode every candidate behind the prompt, or behind the content-free prompt of SFC."""
        task = self.task
        prompt_of = task.content_free_prompt if content_free else task.prompt
        option_of = task.content_free_option if content_free else task.option
        candidates = sample.candidates if candidates is None else candidates
        prompt = prompt_of(sample)
        before = self._demonstrations(demonstrations)
        prompt_length = len(self._tokens(prompt.strip(" ")))
        encoded = []
        for candidate in candidates:
            text = (prompt + option_of(sample, candidate)).strip(" ")
            # Where the tokenizer merges an option into its prompt, its last token is still scored.
            scored = max(1, len(self._tokens(text)) - prompt_length)
            tokens = self._tokens(self._whole_text(before, text))
            if len(tokens) <= scored:
                # No start-of-text token of its own, and no prompt: something has to come first.
                tokens = [self._start_token(), *tokens]
            encoded.append(EncodedOption(self._cut(tokens, self.max_length), scored))
        correct = next((i for i, c in enumerate(candidates) if c in sample.correct), 0)
        return EncodedExample(tuple(encoded), correct)

    def correct_option(self, sample: Sample, only_option: bool = True) -> EncodedExample:
        """Encode the correct answer alone, for language-model training.

        With ``only_option`` False every token after the first is trained on, the prompt's too.
        """
        (option,) = self.options(sample, candidates=sample.correct[:1]).options
        scored = option.scored if only_option else len(option.tokens) - 1
        return EncodedExample((EncodedOption(option.tokens, scored),))

    def prompt(self, sample: Sample, demonstrations: Sequence[Sample] = ()) -> tuple[int, ...]:
        """Encode the prompt that an answer is generated behind."""
        text = self._whole_text(
            self._demonstrations(demonstrations), self.task.prompt(sample).strip(" ")
        )
        return self._cut(self._tokens(text), self.max_length - self.max_new_tokens)

    def _demonstrations(self, samples: Sequence[Sample]) -> str:
        texts = (
            (self.task.prompt(sample) + self.task.option(sample, sample.correct[0])).strip()
            for sample in samples
        )
        return DEMONSTRATION_SEPARATOR.join(texts).strip()

    def _whole_text(self, demonstrations: str, text: str) -> str:
        return (demonstrations + DEMONSTRATION_SEPARATOR + text).lstrip().strip(" ")

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _start_token(self) -> int:
        tokenizer = self.tokenizer
        token = tokenizer.bos_token_id
        return tokenizer.eos_token_id if token is None else token

    def _cut(self, tokens: list[int], length: int) -> tuple[int, ...]:
        if len(tokens) <= length:
            return tuple(tokens)
        return (tokens[0], *tokens[len(tokens) - length + 1 :])


# ---------------------------------------------------------------------------- tokens to batches


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all the sequences begin with."""
    shortest = min(map(len, sequences))
    for index in range(shortest):
        if len({sequence[index] for sequence in sequences}) > 1:
            return index
    return shortest


def pack(example: EncodedExample, share_prompt: bool = True) -> list[PackedSequence]:
    """Lay out an example's options for the model: in one sequence, or each in its own.

    The last token of an option is predicted but never read by the model, so options of one token
    need nothing beyond their prompt.
    """
    numbered = list(enumerate(example.options))
    groups = [numbered] if share_prompt else [[pair] for pair in numbered]
    return [_pack_group(group) for group in groups]


def _pack_group(options: list[tuple[int, EncodedOption]]) -> PackedSequence:
    shared = common_prefix_length([option.tokens[:-1] for _, option in options])
    tokens = list(options[0][1].tokens[:shared])
    positions, branches, reads = list(range(shared)), [0] * shared, []
    for branch, (number, option) in enumerate(options, start=1):
        start = len(tokens)
        tokens += option.tokens[shared:-1]
        positions += range(shared, len(option.tokens) - 1)
        branches += [branch] * (len(tokens) - start)
        for target in option.targets:
            source = target - 1
            index = source if source < shared else start + source - shared
            reads.append((number, index, option.tokens[target]))
    return PackedSequence(tuple(tokens), tuple(positions), tuple(branches), tuple(reads))


def collate(
    examples: Sequence[EncodedExample], pad_token: int = 0, share_prompt: bool = True
) -> dict[str, Tensor]:
    """Pad the examples' sequences on the left and stack them.

    Returns:
        ``input_ids``, ``position_ids``: (rows, length). ``attention_mask``: (rows, length), or
        (rows, 1, length, length), True where a query (third dimension) sees a key, if there are
        branches. ``read_rows``, ``read_columns``, ``targets``: (scored tokens,): where each is
        predicted, and which it is. ``read_options``: (scored tokens,): its option's number in the
        batch. ``option_examples``: (options,): the example of each option. ``correct``:
        (examples,): the number within its example of the correct option.
    """
    sequences, reads, option_examples = [], [], []
    for number, example in enumerate(examples):
        first_option = len(option_examples)
        option_examples += [number] * len(example.options)
        for sequence in pack(example, share_prompt):
            row = len(sequences)
            sequences.append(sequence)
            reads += [(row, first_option + o, i, target) for o, i, target in sequence.reads]
    length = max(len(sequence.tokens) for sequence in sequences)

    def stack(lists: Iterator[Sequence[int]], padding: int) -> Tensor:
        return torch.tensor([[padding] * (length - len(values)) + list(values) for values in lists])

    branches = stack((sequence.branches for sequence in sequences), -1)
    read_rows, read_options, indices, targets = torch.tensor(reads).unbind(1)
    padding = torch.tensor([length - len(sequence.tokens) for sequence in sequences])
    return {
        "input_ids": stack((sequence.tokens for sequence in sequences), pad_token),
        "position_ids": stack((sequence.positions for sequence in sequences), 0),
        "attention_mask": attention_mask(branches),
        "read_rows": read_rows,
        "read_columns": indices + padding[read_rows],
        "targets": targets,
        "read_options": read_options,
        "option_examples": torch.tensor(option_examples),
        "correct": torch.tensor([example.correct for example in examples]),
    }


def attention_mask(branches: Tensor) -> Tensor:
    """Return who sees whom, from the branch of every token (-1 for padding); see ``collate``."""
    if not (branches > 0).any():
        return (branches == 0).long()
    query, key = branches.unsqueeze(2), branches.unsqueeze(1)
    visible = (key == 0) | ((key == query) & (key > 0))
    causal = torch.ones(visible.shape[1:], dtype=torch.bool).tril()
    # Padding sees itself: a row of the softmax must not be empty.
    itself = torch.eye(visible.shape[1], dtype=torch.bool)
    return ((visible & causal) | itself).unsqueeze(1)


# --------------------------------------------------------------- batches to log-probabilities


def token_log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probability of every scored token of a batch, float32, (scored tokens,)."""
    head = model.get_output_embeddings()

    def keep_predicting_positions(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        hidden = arguments[0]
        rows, columns = batch["read_rows"], batch["read_columns"]
        return hidden[rows.to(hidden.device), columns.to(hidden.device)]

    # The head of the model itself, with whatever the family does to its logits, on few positions.
    hook = head.register_forward_pre_hook(keep_predicting_positions)
    try:
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=model_mask(model, batch["attention_mask"]),
            use_cache=False,
        ).logits
    finally:
        hook.remove()
    targets = batch["targets"].to(logits.device)
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def model_mask(model: nn.Module, mask: Tensor) -> Tensor:
    """Return ``mask`` as every layer of the model takes it: additive if it is 4-D."""
    if mask.dim() == 2:
        return mask
    additive = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return additive.masked_fill_(~mask, torch.finfo(model.dtype).min)


def option_sums(token_log_probabilities: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability and the number of scored tokens of every option."""
    device = token_log_probabilities.device
    options = batch["read_options"].to(device)
    zeros = torch.zeros(len(batch["option_examples"]), device=device)
    sums = zeros.index_add(0, options, token_log_probabilities)
    return sums, zeros.index_add(0, options, torch.ones_like(token_log_probabilities))


def language_model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean negative log-probability of the batch's scored tokens."""
    return -token_log_probabilities(model, batch).mean()


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy over the options' mean log-probabilities, averaged over examples."""
    sums, lengths = option_sums(token_log_probabilities(model, batch), batch)
    examples = batch["option_examples"].to(sums.device)
    correct = batch["correct"].to(sums.device)
    counts = torch.bincount(examples, minlength=len(correct))
    first = counts.cumsum(0) - counts
    scores = sums.new_full((len(correct), int(counts.max())), -torch.inf)
    within = torch.arange(len(examples), device=sums.device) - first[examples]
    scores = scores.index_put((examples, within), sums / lengths)
    return nn.functional.cross_entropy(scores, correct)


Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def can_share_prompt(model: PreTrainedModel, length: int) -> bool:
    """Tell whether the options of an example may share their prompt's tokens in one sequence.

    It takes attention that reads a 4-D mask, and nothing else that mixes tokens: a recurrent layer
    or a convolution would carry one option into the next. Where a window slides over the keys, the
    mask would have to slide with it: texts that are longer than the window go one option at a time.
    """
    reason = None
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or ())
    other_layers = layers - {"full_attention", "sliding_attention"}
    if config._attn_implementation not in ("sdpa", "eager"):
        reason = f"attention implementation {config._attn_implementation}"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = f"{type(model).__name__} does not take a 4-D attention mask"
    elif other_layers:
        reason = f"it has layers of type {', '.join(sorted(other_layers))}"
    elif window and window < length:
        reason = f"its sliding window of {window} tokens is shorter than the longest text"
    if reason:
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("scoring every option in a sequence of its own: %s", reason)


# ------------------------------------------------------------------------------------ evaluation


@dataclass(frozen=True)
class Prediction:
    """What the model says about an example: a candidate or a text, and every option's score."""

    answer: Any
    scores: tuple[float, ...] | None = None


@torch.no_grad()
def score_options(
    model: PreTrainedModel, examples: Sequence[EncodedExample], batch_size: int, progress: str
) -> list[list[tuple[float, int]]]:
    """Return (summed log-probability, number of tokens) of every option of every example."""
    longest = max(len(option.tokens) for example in examples for option in example.options)
    share = can_share_prompt(model, longest)
    results: list[list[tuple[float, int]]] = [[] for _ in examples]

    def length(index: int) -> int:
        return sum(len(sequence.tokens) for sequence in pack(examples[index], share))

    for indices in batches_by_length(range(len(examples)), length, batch_size, progress):
        batch = collate([examples[index] for index in indices], share_prompt=share)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        sums, lengths = option_sums(token_log_probabilities(model, batch), batch)
        owners = batch["option_examples"].tolist()
        for owner, total, count in zip(owners, sums.tolist(), lengths.tolist(), strict=True):
            results[indices[owner]].append((total, int(count)))
    return results


def batches_by_length(
    items: Sequence[int], length: Callable[[int], int], batch_size: int, progress: str
) -> Iterator[list[int]]:
    """Yield the items in batches, longest first, so that little is padded; shows a progress bar."""
    order = sorted(items, key=length, reverse=True)
    with tqdm(total=len(order), desc=progress, unit="example", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices
            bar.update(len(indices))


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
    progress: str,
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
    for indices in batches_by_length(
        range(len(prompts)), lambda index: len(prompts[index]), batch_size, progress
    ):
        rows = [prompts[index] for index in indices]
        length = max(map(len, rows))
        pad = stop_tokens[-1]
        tokens = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.sampling,
            num_beams=settings.num_beams,
            eos_token_id=stop_tokens,
            pad_token_id=pad,
            **sampling,
        )
        written = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for index, text in zip(indices, written, strict=True):
            texts[index] = text.strip()
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
        batch_size: examples in a forward pass.
        calibration: "sfc", "icl_sfc" (content-free prompt behind the demonstrations too) or None.
        generation: settings, for the tasks whose answer is generated.
        progress: what the progress bar says.
    """
    pairs = list(zip(samples, demonstrations, strict=True))
    model.eval()
    if encoder.task.generation:
        if calibration:
            raise InputError(f"--{calibration}: {encoder.task.name} has no options to calibrate")
        prompts = [encoder.prompt(sample, shown) for sample, shown in pairs]
        settings = generation or GenerationSettings()
        texts = generate(model, encoder.tokenizer, prompts, settings, batch_size, progress)
        return [Prediction(text) for text in texts]
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
        for sample, index, values in zip(samples, best, scores, strict=True)
    ]
