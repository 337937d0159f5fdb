"""Encoded examples to batches: each distinct token once, in rows that hold little padding.

An example becomes one sequence: the tokens that all its options share, once, and behind them a
branch for each option's own tokens. An attention mask lets a branch see the shared tokens and
itself, and position ids continue from the shared tokens, so that every log-probability is the one
that the option gets when it is scored alone. Several short sequences share a row in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from language_model.encoding import EncodedExample, EncodedOption

# Rows of several sequences hold so many tokens at least, where there are enough, and twice as many
# at most: attention looks at all of a row, and up to there that costs next to nothing.
ROW_TOKENS = 128
# Sequences share rows if fewer than this part of the tokens and their padding are left.
LITTLE_SAVED = 0.95


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
    """Put the examples' sequences into rows.

    With ``share_prompt`` short sequences stand behind one another in a row, where that leaves less
    to pad, and do not see each other; the padding is on the left. Without, it is on the right,
    where no causal model sees it, whatever its layers are, and positions are left to the model.

    Returns:
        ``input_ids``, and with ``share_prompt`` ``position_ids``: (rows, length).
        ``attention_mask``: (rows, length), or
        (rows, 1, length, length), True where a query (third dimension) sees a key, if a row holds
        several sequences or branches. ``read_rows``, ``read_columns``, ``targets``: (scored
        tokens,): where each is predicted, and which it is. ``read_options``: (scored tokens,): its
        option's number in the batch. ``option_examples``: (options,): the example of each option.
        ``correct``: (examples,): the number within its example of the correct option.
        ``acceptable``: (options,) of bool: whether an option counts as right; several of an example
        may.
    """
    sequences, first_options, option_examples, acceptable = [], [], [], []
    for number, example in enumerate(examples):
        packed = pack(example, share_prompt)
        sequences += packed
        first_options += [len(option_examples)] * len(packed)
        option_examples += [number] * len(example.options)
        right = {example.correct, *example.also_correct}
        acceptable += [option in right for option in range(len(example.options))]
    lengths = [len(sequence.tokens) for sequence in sequences]
    rows = fill_rows(lengths) if share_prompt else [[number] for number in range(len(sequences))]
    length = max(sum(lengths[number] for number in row) for row in rows)
    shape = (len(rows), length)
    tokens, positions = torch.full(shape, pad_token), torch.zeros(shape, dtype=torch.long)
    branches, owners = torch.full(shape, -1), torch.full(shape, -1)
    reads = []
    for number, row in enumerate(rows):
        column = length - sum(lengths[sequence] for sequence in row) if share_prompt else 0
        for owner in row:
            sequence, place = sequences[owner], slice(column, column + lengths[owner])
            tokens[number, place] = torch.tensor(sequence.tokens)
            positions[number, place] = torch.tensor(sequence.positions)
            branches[number, place] = torch.tensor(sequence.branches)
            owners[number, place] = owner
            first = first_options[owner]
            reads += [(number, column + i, first + o, target) for o, i, target in sequence.reads]
            column = place.stop
    # In the order of the options, whatever row they are in.
    reads.sort(key=lambda read: read[2])
    read_rows, read_columns, read_options, targets = torch.tensor(reads).unbind(1)
    return {
        "input_ids": tokens,
        **({"position_ids": positions} if share_prompt else {}),
        "attention_mask": attention_mask(branches, owners),
        "read_rows": read_rows,
        "read_columns": read_columns,
        "targets": targets,
        "read_options": read_options,
        "option_examples": torch.tensor(option_examples),
        "correct": torch.tensor([example.correct for example in examples]),
        "acceptable": torch.tensor(acceptable),
    }


def fill_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Distribute sequences over rows; returns their numbers, row by row.

    Of the numbers of rows whose length fits, the one that leaves the least to pad. Where little
    would be saved, each sequence keeps a row of its own: a mask for every pair of tokens costs more
    than one for the padding.
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


def attention_mask(branches: Tensor, owners: Tensor) -> Tensor:
    """Return who sees whom, from the branch and the sequence of every token (-1 for padding)."""
    alone = (owners == owners.amax(1, keepdim=True)) | (owners < 0)
    if not (branches > 0).any() and alone.all():
        return (owners >= 0).long()
    query, key = branches.unsqueeze(2), branches.unsqueeze(1)
    same = owners.unsqueeze(2) == owners.unsqueeze(1)
    visible = same & (key >= 0) & ((key == 0) | (key == query))
    causal = torch.ones(visible.shape[1:], dtype=torch.bool).tril()
    # Padding sees itself: a row of the softmax must not be empty.
    itself = torch.eye(visible.shape[1], dtype=torch.bool)
    return ((visible & causal) | itself).unsqueeze(1)


def collate_behind(
    prefix: int, examples: Sequence[EncodedExample], virtual_tokens: int = 0
) -> dict[str, Tensor]:
    """Put what follows the first ``prefix`` tokens of every example into one row, without padding.

    Returns:
        As ``collate``, without what is correct, for examples that all begin with the same
        ``prefix`` tokens, which the model has in its cache behind ``virtual_tokens`` of
        prefix-tuning. ``attention_mask`` (1, 1, length, virtual_tokens + prefix + length) shows
        these to every query, and of the rest only the query's own example.
    """
    tokens, positions, branches, owners, reads, option_examples = [], [], [], [], [], []
    for number, example in enumerate(examples):
        (sequence,) = pack(example)
        shift = len(tokens) - prefix
        first_option = len(option_examples)
        reads += [(first_option + o, i + shift, target) for o, i, target in sequence.reads]
        option_examples += [number] * len(example.options)
        tokens += sequence.tokens[prefix:]
        positions += (virtual_tokens + position for position in sequence.positions[prefix:])
        branches += sequence.branches[prefix:]
        owners += [number] * (len(tokens) - len(owners))
    branch, owner = torch.tensor(branches), torch.tensor(owners)
    own = owner.unsqueeze(1) == owner
    visible = own & ((branch == 0) | (branch.unsqueeze(1) == branch))
    cached = torch.ones(len(tokens), virtual_tokens + prefix, dtype=torch.bool)
    read_options, columns, targets = torch.tensor(reads).unbind(1)
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": torch.cat([cached, visible.tril()], dim=1)[None, None],
        "read_rows": torch.zeros_like(columns),
        "read_columns": columns,
        "targets": targets,
        "read_options": read_options,
        "option_examples": torch.tensor(option_examples),
    }
