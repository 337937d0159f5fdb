"""Encoded examples to batches: each token once, short sequences in one row."""

from __future__ import annotations

import pytest
import torch

from language_model import packing
from language_model.encoding import EncodedExample, EncodedOption


def test_common_prefix_length() -> None:
    for one, other, length in (([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([], [1], 0)):
        assert packing.common_prefix_length([one, other]) == length


BRANCHING = EncodedExample(
    (EncodedOption((2, 10, 11, 20, 21), 2), EncodedOption((2, 10, 11, 30, 31, 32), 3)), correct=1
)
SINGLE_TOKENS = EncodedExample((EncodedOption((2, 7, 8), 1), EncodedOption((2, 7, 9), 1)))


def test_pack() -> None:
    (packed,) = packing.pack(BRANCHING)
    assert packed == packing.PackedSequence(
        tokens=(2, 10, 11, 20, 30, 31),
        positions=(0, 1, 2, 3, 3, 4),
        branches=(0, 0, 0, 1, 2, 2),
        reads=((0, 2, 20), (0, 3, 21), (1, 2, 30), (1, 4, 31), (1, 5, 32)),
    )
    assert packing.pack(BRANCHING, share_prompt=False)[1] == packing.PackedSequence(
        (2, 10, 11, 30, 31), (0, 1, 2, 3, 4), (0,) * 5, ((1, 2, 30), (1, 3, 31), (1, 4, 32))
    )
    assert packing.pack(SINGLE_TOKENS) == [
        packing.PackedSequence((2, 7), (0, 1), (0, 0), ((0, 1, 8), (1, 1, 9)))
    ]


def test_collate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "ROW_TOKENS", 1)  # a row for each sequence
    batch = packing.collate([SINGLE_TOKENS, BRANCHING], pad_token=1)
    mask = batch.pop("attention_mask")
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 1, 1, 1, 2, 7], [2, 10, 11, 20, 30, 31]],
        "position_ids": [[0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 3, 4]],
        "read_rows": [0, 0, 1, 1, 1, 1, 1],
        "read_columns": [5, 5, 2, 3, 2, 4, 5],
        "targets": [8, 9, 20, 21, 30, 31, 32],
        "read_options": [0, 1, 2, 2, 3, 3, 3],
        "option_examples": [0, 0, 1, 1],
        "correct": [0, 1],
        "acceptable": [True, False, False, True],
    }
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 6, 6)
    drawn = ["".join(".x"[seen] for seen in row) for row in mask.flatten(0, 2).tolist()]
    assert drawn[:6] == ["x.....", ".x....", "..x...", "...x..", "....x.", "....xx"]
    assert drawn[6:] == ["x.....", "xx....", "xxx...", "xxxx..", "xxx.x.", "xxx.xx"]
    plain = packing.collate([SINGLE_TOKENS, BRANCHING], share_prompt=False)
    mask = [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert plain["attention_mask"].tolist() == mask and "position_ids" not in plain


def test_sequences_that_share_a_row() -> None:
    batch = packing.collate([SINGLE_TOKENS, BRANCHING], pad_token=1)
    mask = batch.pop("attention_mask")
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 10, 11, 20, 30, 31, 2, 7]],
        "position_ids": [[0, 1, 2, 3, 3, 4, 0, 1]],
        "read_rows": [0] * 7,
        "read_columns": [7, 7, 2, 3, 2, 4, 5],
        "targets": [8, 9, 20, 21, 30, 31, 32],
        "read_options": [0, 1, 2, 2, 3, 3, 3],
        "option_examples": [0, 0, 1, 1],
        "correct": [0, 1],
        "acceptable": [True, False, False, True],
    }
    drawn = ["".join(".x"[seen] for seen in row) for row in mask.flatten(0, 2).tolist()]
    assert drawn[2:] == ["xxx.....", "xxxx....", "xxx.x...", "xxx.xx..", "......x.", "......xx"]


def test_rows_are_filled_so_that_little_is_padded() -> None:
    # The longest first, each into the emptiest row: 110 and 110.
    assert packing.spread_evenly([20, 90, 30, 80], 2) == [[1, 0], [3, 2]]
    # Two rows of 150 pad nothing; three rows of 110 would pad 30.
    assert packing.fill_rows([40, 100, 90, 20, 20, 30]) == [[1, 5, 3], [2, 0, 4]]
    # Nothing to gain: every row would be as long.
    assert packing.fill_rows([100, 100, 90]) == [[0], [1], [2]]
    assert packing.fill_rows([500]) == [[0]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 200, (20,), generator=generator).tolist()
        rows = packing.fill_rows(lengths)
        assert sorted(number for row in rows for number in row) == list(range(20))
        widths = [sum(lengths[number] for number in row) for row in rows]
        assert max(widths) <= 2 * packing.ROW_TOKENS + max(lengths)
        assert len(rows) * max(widths) <= 20 * max(lengths)
