"""Evaluation: what samples share is read once, batches shrink to fit, processes share the work.

Scores are compared with test_scoring.py's oracle, one option at a time, and the tokens that go
through the model are counted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle_scoring import (
    WINDOWED,
    Oracle,
    assert_equal_predictions,
    assert_equal_sums,
    log_probabilities,
    model_of,
    samples_of,
)
from tiny_models import (
    OTHER_FAMILIES,
    newline_writing_model,
    of_families,
    tiny_model,
    tiny_tokenizer,
)
from transformers import PreTrainedModel

from language_model import scoring
from language_model.batches import run_in_batches
from language_model.encoding import EncodedExample, EncodedOption, Encoder
from language_model.generation import GenerationSettings, generate
from language_model.scoring import predict
from language_model.shared_tokens import SHORTEST_PREFIX
from tasks import Sample, get_task

SUM_TOLERANCE = 1e-4
SHOWN = {"SST2": 6, "CB": 6, "Copa": 6, "ReCoRD": 3, "SQuAD": 3, "DROP": 3}
CHOICES = [
    ("SST2", None),
    ("CB", "sfc"),
    ("Copa", "icl_sfc"),
    pytest.param("SST2", "icl_sfc", marks=pytest.mark.slow),
    pytest.param("Copa", None, marks=pytest.mark.slow),
    pytest.param("ReCoRD", "sfc", marks=pytest.mark.slow),
]


def draw_shared(task: str, number: int) -> tuple[list[Sample], list[list[Sample]]]:
    """Return validation samples of different answers, and the same demonstrations for each."""
    train, validation = samples_of(task)
    return validation[:number], [train[: SHOWN[task]]] * number


@contextmanager
def forward_shapes(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Collect (rows, tokens in a row) of every forward pass."""
    shapes: list[tuple[int, int]] = []

    def note(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        shapes.append(tuple(arguments["input_ids"].shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def count(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * length for rows, length in shapes)


def shared_length(texts: Sequence[Sequence[int]]) -> int:
    columns = zip(*texts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def shared_tokens(examples: Sequence[Sequence[tuple[list[int], int]]]) -> tuple[int, int]:
    """Return the length of what all options can share, and what is left, each token once.

    An example is its options' tokens, and how many at the end are scored. The token before those
    predicts the first, and the last of all is never read.
    """
    options = [option for example in examples for option in example]
    prefix = shared_length([tokens[:-1] for tokens, _ in options])
    prefix = min(prefix, *(len(tokens) - scored - 1 for tokens, scored in options))
    rest = 0
    for example in examples:
        inner = shared_length([tokens[:-1] for tokens, _ in example])
        rest += inner - prefix + sum(len(tokens) - 1 - inner for tokens, _ in example)
    return prefix, rest


# -------------------------------------------------------------------- scores behind a shared prefix


@functools.cache
@torch.no_grad()
def read_alone(family: str, tokens: tuple[int, ...], scored: int) -> torch.Tensor:
    """The oracle's answer for one text: several cases have the same demonstrations and options."""
    return log_probabilities(model_of(family), tokens, scored)


@dataclass(frozen=True, kw_only=True)
class FamilyOracle(Oracle):
    """The oracle for a family's model, which reads every text once."""

    family: str

    def log_probabilities(self, *text: Any, **how: Any) -> torch.Tensor:
        tokens, scored = self.tokens(*text, **how)
        return read_alone(self.family, tuple(tokens), scored)


@of_families
@pytest.mark.parametrize(("task", "calibration"), CHOICES)
def test_shared_demonstrations_are_read_once(
    family: str, task: str, calibration: str | None
) -> None:
    samples, shown = draw_shared(task, 5)
    model, setting = model_of(family), (get_task(task), tiny_tokenizer(), 1024)
    oracle, encoder = FamilyOracle(model, *setting, family=family), Encoder(*setting)
    expected = oracle.predict(samples, shown, calibration)
    texts = [[oracle.tokens(s, shown[0], c) for c in s.candidates] for s in samples]
    prefix, rest = shared_tokens(texts)
    assert prefix > 5 * SHORTEST_PREFIX
    sums = [
        [(read_alone(family, tuple(tokens), scored).sum().item(), scored) for tokens, scored in of]
        for of in texts
    ]
    encoded = [encoder.options(*pair) for pair in zip(samples, shown, strict=True)]
    for batch_size in (1, 2, 5):
        with forward_shapes(model) as shapes:
            found = scoring.score_options(model, encoded, batch_size, "")
        assert_equal_sums(found, sums)
        assert shapes[0] == (1, prefix)
        assert count(shapes) == prefix + rest
        assert len(shapes) == 1 + -(-5 // batch_size)
        predictions = predict(model, encoder, samples, shown, batch_size, calibration)
        tolerance = SUM_TOLERANCE if calibration else 1e-5
        assert_equal_predictions(predictions, expected, tolerance)


def test_different_demonstrations_are_padded() -> None:
    samples, shown = draw_shared("SST2", 4)
    train = samples_of("SST2")[0]
    shown = [train[6 * index : 6 * index + 6] for index in range(4)]
    for family in ("opt", "llama"):
        model, setting = model_of(family), (get_task("SST2"), tiny_tokenizer(), 1024)
        expected = Oracle(model, *setting).predict(samples, shown)
        with forward_shapes(model) as shapes:
            found = predict(model, Encoder(*setting), samples, shown, 3)
        assert_equal_predictions(found, expected)
        assert [rows for rows, _ in shapes] == [3, 1]


@of_families
def test_a_cut_that_takes_the_shared_tokens_away(family: str) -> None:
    samples, shown = draw_shared("Copa", 6)
    model, setting = model_of(family), (get_task("Copa"), tiny_tokenizer(), 50)
    oracle = Oracle(model, *setting)
    texts = [[oracle.tokens(s, shown[0], c) for c in s.candidates] for s in samples]
    assert shared_tokens(texts)[0] < SHORTEST_PREFIX
    with forward_shapes(model) as shapes:
        found = predict(model, Encoder(*setting), samples, shown, 3)
    assert_equal_predictions(found, oracle.predict(samples, shown))
    assert [rows for rows, _ in shapes] == [3, 3]


PREFIX = (2, *range(100, 129))
BEHIND_THE_PREFIX = {
    # Only the last tokens differ: the token that predicts them must not be in the prefix.
    "last token": [[((*PREFIX, 200), 1)], [((*PREFIX, 201), 1)], [((*PREFIX, 202), 1)]],
    "directly behind": [
        [((*PREFIX, 200, 9), 2), ((*PREFIX, 201, 9, 10), 3)],
        [((*PREFIX, 202), 1), ((*PREFIX, 203, 11), 2)],
    ],
    "scored and shared": [[((*PREFIX, 200), 6)], [((*PREFIX, 201, 12), 2)]],
}


@of_families
def test_tokens_scored_behind_the_prefix(family: str) -> None:
    model = model_of(family)
    for name, case in BEHIND_THE_PREFIX.items():
        prefix, rest = shared_tokens(case)
        examples = [EncodedExample(tuple(EncodedOption(*o) for o in options)) for options in case]
        with torch.no_grad():
            expected = [
                [(log_probabilities(model, *option).sum().item(), option[1]) for option in options]
                for options in case
            ]
        for batch_size in (1, 3):
            with forward_shapes(model) as shapes:
                assert_equal_sums(scoring.score_options(model, examples, batch_size, ""), expected)
            assert shapes[0] == (1, prefix) and count(shapes) == prefix + rest, name


@pytest.mark.parametrize(
    ("family", "overrides"), [*WINDOWED.items(), *((family, {}) for family in OTHER_FAMILIES)]
)
def test_families_that_cannot_share_are_right(family: str, overrides: dict[str, Any]) -> None:
    samples, shown = draw_shared("Copa", 4)
    model, setting = tiny_model(family, **overrides), (get_task("Copa"), tiny_tokenizer(), 1024)
    with forward_shapes(model) as shapes:
        found = predict(model, Encoder(*setting), samples, shown, 3)
    assert_equal_predictions(found, Oracle(model, *setting).predict(samples, shown))
    assert [rows for rows, _ in shapes] == [6, 2]  # two options an example


def test_equal_content_free_prompts_are_scored_once() -> None:
    samples, shown = draw_shared("SST2", 8)
    assert len({sample.correct[0] for sample in samples}) == 2
    model, setting = model_of("opt"), (get_task("SST2"), tiny_tokenizer(), 1024)
    with forward_shapes(model) as without:
        predict(model, Encoder(*setting), samples, shown, 3)
    for calibration, before in (("sfc", []), ("icl_sfc", shown[0])):
        with forward_shapes(model) as shapes:
            predict(model, Encoder(*setting), samples, shown, 3, calibration)
        tokens, _ = Oracle(model, *setting).tokens(samples[0], before, 1, content_free=True)
        assert shapes == [*without, (1, len(tokens) - 1)], calibration


# ------------------------------------------------------------------------------------- generation


@of_families
def test_generation_behind_shared_demonstrations(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = newline_writing_model(family), tiny_tokenizer()
    samples, shown = draw_shared("DROP", 6)
    encoder = Encoder(get_task("DROP"), tokenizer, 1024, 8)
    prompts = [encoder.prompt(*pair) for pair in zip(samples, shown, strict=True)]
    assert len({len(prompt) for prompt in prompts}) > 2
    prefix = shared_length(prompts)
    settings = GenerationSettings(max_new_tokens=8)
    with monkeypatch.context() as patched, forward_shapes(model) as alone:
        patched.setattr("language_model.shared_tokens.SHORTEST_PREFIX", 10**9)
        expected = generate(model, tokenizer, prompts, settings, 1, "")
    assert [length for _, length in alone if length > 1] == sorted(map(len, prompts), reverse=True)
    assert len(set(expected)) > 1
    assert len(alone) < 6 * 8  # a newline stops a text
    for batch_size in (1, 4):
        with forward_shapes(model) as shapes:
            found = predict(model, encoder, samples, shown, batch_size, generation=settings)
        assert [prediction.answer for prediction in found] == expected
        assert not any("\n" in text for text in expected)
        longest = sorted(map(len, prompts), reverse=True)[::batch_size]
        read = [length for _, length in shapes if length > 1]
        assert read == [prefix, *(length - prefix for length in longest)]
    for other in (
        GenerationSettings(max_new_tokens=4, num_beams=2),
        GenerationSettings(max_new_tokens=4, sampling=True, temperature=0.7),
    ):
        texts = generate(model, tokenizer, prompts, other, 4, "")
        assert len(texts) == 6 and not any("\n" in text for text in texts)


@pytest.mark.parametrize("family", WINDOWED)
def test_generated_tokens_count_for_a_sliding_window(family: str) -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(get_task("SQuAD"), tokenizer, 1024, 12)
    prompts = [encoder.prompt(*pair) for pair in zip(*draw_shared("SQuAD", 6), strict=True)]
    window = {"sliding_window": max(map(len, prompts))}
    model = tiny_model(family, **{**WINDOWED[family], **window})
    settings = GenerationSettings(max_new_tokens=12)
    expected = [generate(model, tokenizer, [p], settings, 1, "")[0] for p in prompts]
    assert generate(model, tokenizer, prompts, settings, 4, "") == expected


# ------------------------------------------------------------------------------- lack of memory


def test_a_batch_that_does_not_fit_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [3, 9, 1, 7, 5, 8, 2, 4]
    tried: list[int] = []
    done: list[int] = []

    def work_with(error: Exception) -> Callable[[list[int]], None]:
        def work(indices: list[int]) -> None:
            tried.append(len(indices))
            if len(indices) > 1:
                raise error
            done.extend(indices)

        return work

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.OutOfMemoryError("a device of its own words"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ):
        for seen in (tried, done, caplog.records):
            seen.clear()
        run_in_batches(work_with(error), lengths, 5, "SST2")
        assert done == sorted(range(8), key=lengths.__getitem__, reverse=True), error
        assert list(dict.fromkeys(tried)) == [5, 2, 1]  # and never a larger one again
        said = [f"SST2: {size} examples at a time, for lack of memory" for size in (2, 1)]
        assert [record.message for record in caplog.records] == said


def test_what_a_smaller_batch_does_not_help_is_raised() -> None:
    def fail_with(error: Exception) -> Callable[[list[int]], None]:
        def work(indices: list[int]) -> None:
            tried.append(len(indices))
            raise error

        return work

    tried: list[int] = []
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_in_batches(fail_with(RuntimeError("size mismatch")), range(8), 4, "")
    assert tried == [4]
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        run_in_batches(fail_with(torch.OutOfMemoryError("full")), range(8), 4, "")
    assert tried == [4, 2, 1]


@pytest.mark.parametrize("share", [True, False])
def test_scores_after_lack_of_memory(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, shown = draw_shared("Copa", 7)
    model, setting = model_of("llama"), (get_task("Copa"), tiny_tokenizer(), 1024)
    read, failed = scoring.token_log_probabilities, []

    def read_two(model: Any, batch: dict[str, Any], cache: Any = None) -> torch.Tensor:
        values = read(model, batch, cache)
        examples = len(batch["option_examples"].unique())
        if examples > 2:
            failed.append(examples)
            raise torch.OutOfMemoryError("full")
        return values

    monkeypatch.setattr(scoring, "token_log_probabilities", read_two)
    if not share:
        monkeypatch.setattr("language_model.shared_tokens.SHORTEST_PREFIX", 10**9)
    found = predict(model, Encoder(*setting), samples, shown, 7)
    assert failed == [7, 3]
    assert_equal_predictions(found, Oracle(model, *setting).predict(samples, shown))
