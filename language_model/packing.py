"""Encoded examples to batches: each distinct token once, in rows that hold little padding.

An example becomes one sequence: the tokens that all its options share, once, and after them a
branch for each option's own tokens. An attention mask lets a branch see the shared tokens and
itself, and position ids continue from the shared tokens, so that every log-probability is the one
that the option gets when it is scored alone. Several short sequences share a row in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

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

    def after(self, prefix: int) -> PackedSequence:
        """Return what follows the first ``prefix`` tokens, none of which predicts a target."""
        reads = tuple((option, index - prefix, target) for option, index, target in self.reads)
        rest = (each[prefix:] for each in (self.tokens, self.positions, self.branches))
        return PackedSequence(*rest, reads)


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all the sequences begin with."""
    shortest = min(map(len, sequences))
    for index in range(shortest):
        if len({sequence[index] for sequence in sequences}) > 1:
            return index
    return shortest


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
    examples: Sequence[EncodedExample], pad_token: int = 0, share_prompt: bool = True
) -> dict[str, Tensor]:
    """Put the examples' sequences into rows.

    With ``share_prompt`` short sequences share rows, where that leaves less to pad, and do not see
    each other; the padding is on the left. Without, it is on the right, where no causal model sees
    it, whatever its layers are, and the model counts positions itself.

    Returns:
        input_ids, and with ``share_prompt`` position_ids: (rows, length).
        attention_mask: (rows, length), or (rows, 1, length, length), True where a query (third
        dimension) sees a key, if a row holds several sequences or branches.
        read_rows, read_columns, targets, read_options: (scored tokens,): where each is predicted,
        which it is, and its option's number in the batch.
        option_examples: (options,): the example of each option.
        acceptable: (options,) of bool: whether an option counts as right.
        correct: (examples,): the number of the correct option within its example.
    """
    sequences = _pack_all(examples, share_prompt)
    rows = [[number] for number in range(len(sequences))]
    if share_prompt:
        rows = fill_rows([len(sequence.tokens) for sequence in sequences])
    batch, branches, owners = _lay_out(sequences, rows, pad_token, pad_left=share_prompt)
    if not share_prompt:
        del batch["position_ids"]
    return {
        **batch,
        "attention_mask": attention_mask(branches, owners),
        "option_examples": _option_examples(examples),
        "correct": torch.tensor([example.correct for example in examples]),
        "acceptable": torch.tensor(
            [
                option == example.correct or option in example.also_correct
                for example in examples
                for option in range(len(example.options))
            ]
        ),
    }


def collate_after(
    prefix: int, examples: Sequence[EncodedExample], virtual_tokens: int = 0
) -> dict[str, Tensor]:
    """Put what follows the first ``prefix`` tokens of every example into one row, without padding.

    Returns:
        As ``collate``, without what is correct, for examples that all begin with the same
        ``prefix`` tokens, which the model has cached after ``virtual_tokens`` of prefix-tuning.
        ``attention_mask`` is (1, 1, length, virtual_tokens + prefix + length).
    """
    sequences = [sequence.after(prefix) for sequence in _pack_all(examples)]
    batch, branches, owners = _lay_out(sequences, [list(range(len(sequences)))])
    batch["position_ids"] += virtual_tokens
    visible = visible_keys(branches, owners)
    cached = torch.ones(1, visible.shape[1], virtual_tokens + prefix, dtype=torch.bool)
    mask = torch.cat([cached, visible], dim=2).unsqueeze(1)
    return {**batch, "attention_mask": mask, "option_examples": _option_examples(examples)}


def _pack_all(
    examples: Sequence[EncodedExample], share_prompt: bool = True
) -> list[PackedSequence]:
    sequences, options = [], 0
    for example in examples:
        sequences += pack(example, share_prompt, options)
        options += len(example.options)
    return sequences


def _option_examples(examples: Sequence[EncodedExample]) -> Tensor:
    return torch.tensor([number for number, each in enumerate(examples) for _ in each.options])


def _lay_out(
    sequences: Sequence[PackedSequence],
    rows: Sequence[Sequence[int]],
    pad_token: int = 0,
    pad_left: bool = True,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Write each row's sequences one after the other.

    Returns:
        The batch without its mask; the branch and the sequence of every token, (rows, length), -1
        for padding.
    """

    def table(values: Callable[[int], Sequence[int]], padding: int) -> Tensor:
        filled = [torch.tensor([v for number in row for v in values(number)]) for row in rows]
        side = "left" if pad_left else "right"
        return pad_sequence(filled, True, padding, side)

    owners = table(lambda number: [number] * len(sequences[number].tokens), -1)
    branches = table(lambda number: sequences[number].branches, -1)
    reads = []
    for row, numbers in enumerate(rows):
        column = int((owners[row] >= 0).nonzero()[0])
        for number in numbers:
            reads += [(o, row, column + i, target) for o, i, target in sequences[number].reads]
            column += len(sequences[number].tokens)
    # In the order of the options, across rows.
    reads.sort(key=itemgetter(0))
    read_options, read_rows, read_columns, targets = torch.tensor(reads).unbind(1)
    batch = {
        "input_ids": table(lambda number: sequences[number].tokens, pad_token),
        "position_ids": table(lambda number: sequences[number].positions, 0),
        "read_rows": read_rows,
        "read_columns": read_columns,
        "targets": targets,
        "read_options": read_options,
    }
    return batch, branches, owners


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
    """Return who sees whom: 2-D where only padding is hidden, else 4-D."""
    alone = (owners == owners.amax(1, keepdim=True)) | (owners < 0)
    if not (branches > 0).any() and alone.all():
        return (owners >= 0).long()
    return visible_keys(branches, owners).unsqueeze(1)


def visible_keys(branches: Tensor, owners: Tensor) -> Tensor:
    """Return which keys every query sees, (rows, length, length), from ``_lay_out``'s tokens."""
    query, key = branches.unsqueeze(2), branches.unsqueeze(1)
    same = owners.unsqueeze(2) == owners.unsqueeze(1)
    visible = same & (key >= 0) & ((key == 0) | (key == query))
    # Padding sees itself: a row of the softmax must not be empty.
    itself = torch.eye(visible.shape[1], dtype=torch.bool)
    return visible.tril() | itself
