"""Encoded examples to batches: each distinct token once, in rows that hold little padding.

An example becomes one sequence: the tokens that all its options share, once, and after them a
branch for each option's own tokens. An attention mask lets a branch see the shared tokens and
itself, and position ids continue from the shared tokens, so that every log-probability is the one
that the option gets when it is scored alone. Several short sequences share a row in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from language_model.encoding import EncodedExample, EncodedOption

# A row of several sequences holds at least so many tokens, where there are enough, and at most
# twice as many: attention looks at the whole row, which costs next to nothing up to there.
ROW_TOKENS = 128
# Sequences share rows if that leaves less than this fraction of the tokens and their padding.
LITTLE_SAVED = 0.95


@dataclass(frozen=True)
class PackedSequence:
    """Tokens that go through the model once, for one or several options."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]  # 0 for the shared tokens, then 1, 2, … for the options' own
    # (option, index in ``tokens``, target): where the log-probability of an option's token is read.
    reads: tuple[tuple[int, int, int], ...]


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all the sequences begin with."""
    shortest = min(map(len, sequences))
    different = (i for i in range(shortest) if len({sequence[i] for sequence in sequences}) > 1)
    return next(different, shortest)


def pack(
    example: EncodedExample, share_prompt: bool = True, first_option: int = 0
) -> list[PackedSequence]:
    """Lay out an example's options for the model: in one sequence, or each in its own.

    The last token of an option is predicted but never read by the model, so options of one token
    need nothing beyond their prompt. ``first_option`` is the number of the first option.
    """
    numbered = list(enumerate(example.options, start=first_option))
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
    examples: Sequence[EncodedExample],
    pad_token: int = 0,
    share_prompt: bool = True,
    cached: int = 0,
    virtual_tokens: int = 0,
) -> dict[str, Tensor]:
    """Put the examples' sequences into rows.

    With ``share_prompt`` short sequences share rows, where that leaves less to pad, and the padding
    is on the left. Without, it is on the right, where no causal model sees it, and the model counts
    positions itself. If the model has ``cached`` the first tokens of all examples, after
    ``virtual_tokens`` of prefix-tuning, only what follows them is in the batch, in one row.

    Returns:
        input_ids, and with ``share_prompt`` position_ids: (rows, length).
        attention_mask: (rows, length), or, if a row holds several sequences or branches, (rows, 1,
        length, virtual_tokens + cached + length), True where a query (third dimension) sees a key.
        read_rows, read_columns, targets, read_options: (scored tokens,): where each is predicted,
        which it is, and its option's number in the batch.
        option_examples: (options,): the example of each option.
        acceptable: (options,) of bool: whether an option counts as right.
        correct: (examples,): the number of the correct option within its example.
    """
    sequences: list[PackedSequence] = []
    owners, acceptable = [], []
    for number, example in enumerate(examples):
        sequences += pack(example, share_prompt, len(owners))
        owners += [number] * len(example.options)
        right = {example.correct, *example.also_correct}
        acceptable += [option in right for option in range(len(example.options))]
    lengths = [len(sequence.tokens) - cached for sequence in sequences]
    numbers = range(len(sequences))
    if cached:
        rows = [list(numbers)]
    else:
        rows = fill_rows(lengths) if share_prompt else [[number] for number in numbers]

    def table(values: list[Sequence[Any]], padding: int) -> Tensor:
        filled = [torch.tensor([v for n in row for v in values[n][cached:]]) for row in rows]
        return pad_sequence(filled, True, padding, "left" if share_prompt else "right")

    sequence_of = table([[n] * (cached + length) for n, length in enumerate(lengths)], -1)
    branches = table([sequence.branches for sequence in sequences], -1)
    reads = []
    for row, together in enumerate(rows):
        column = sequence_of.shape[1] - sum(lengths[n] for n in together) if share_prompt else 0
        for n in together:
            start = column - cached
            reads += [(option, row, start + i, target) for option, i, target in sequences[n].reads]
            column += lengths[n]
    # In the order of the options, across rows.
    reads.sort(key=itemgetter(0))
    read_options, read_rows, read_columns, targets = torch.tensor(reads).unbind(1)
    batch = {
        "input_ids": table([sequence.tokens for sequence in sequences], pad_token),
        "attention_mask": (sequence_of >= 0).long(),
        "read_rows": read_rows,
        "read_columns": read_columns,
        "targets": targets,
        "read_options": read_options,
        "option_examples": torch.tensor(owners),
        "correct": torch.tensor([example.correct for example in examples]),
        "acceptable": torch.tensor(acceptable),
    }
    if share_prompt:
        positions = table([sequence.positions for sequence in sequences], 0)
        batch["position_ids"] = positions + virtual_tokens
    if cached or len(rows) < len(sequences) or (branches > 0).any():
        seen = torch.ones(len(rows), 1, branches.shape[1], virtual_tokens + cached).bool()
        batch["attention_mask"] = torch.cat([seen, _visible(branches, sequence_of)], dim=3)
    return batch


def _visible(branches: Tensor, sequence_of: Tensor) -> Tensor:
    """Return which keys every query sees, (rows, 1, length, length), from each token's places."""
    query, key = branches.unsqueeze(2), branches.unsqueeze(1)
    same = sequence_of.unsqueeze(2) == sequence_of.unsqueeze(1)
    visible = same & (key >= 0) & ((key == 0) | (key == query))
    # Padding sees itself: a row of the softmax must not be empty.
    itself = torch.eye(visible.shape[1], dtype=torch.bool)
    return (visible.tril() | itself).unsqueeze(1)


def fill_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Distribute sequences over as many rows as leave the least to pad; returns their numbers.

    Where little would be saved, each sequence keeps a row of its own: a mask for every pair of
    tokens costs more than one for the padding.
    """

    def tokens_with_padding(rows: list[list[int]]) -> int:
        return len(rows) * max(sum(lengths[number] for number in row) for row in rows)

    total, longest = sum(lengths), max(lengths)
    fewest = math.ceil(total / max(2 * ROW_TOKENS, longest))
    most = math.ceil(total / max(ROW_TOKENS, longest))
    choices = (spread_evenly(lengths, count) for count in range(fewest, most + 1))
    together = min(choices, key=tokens_with_padding)
    apart = [[number] for number in range(len(lengths))]
    saves = tokens_with_padding(together) < LITTLE_SAVED * tokens_with_padding(apart)
    return together if saves else apart


def spread_evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Distribute sequences over ``count`` rows: the longest first, each into the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        emptiest = filled.index(min(filled))
        rows[emptiest].append(number)
        filled[emptiest] += lengths[number]
    return rows
