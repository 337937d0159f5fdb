"""The obvious way to score: one option, one sequence, no padding, every logit.

It shares no code with scoring.py beyond the templates: it writes the text out, sends it through the
model as ``model(input_ids)`` and reads the log-probabilities off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer, tokenizer_without_start
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from language_model.encoding import EncodedExample, Encoder
from language_model.scoring import Prediction, predict
from task_data.loading import load_samples
from tasks import Sample, Task, get_task

SAMPLES_DIR = Path(__file__).parent.parent / "data" / "samples"
# Largest differences seen: 2.1e-6 for means, 3.9e-5 for sums (of about -100, in float32).
TOLERANCE = 1e-5
SUM_TOLERANCE = 1e-4

model_of = functools.cache(tiny_model)
samples_of = functools.cache(lambda task: load_samples(get_task(task), str(SAMPLES_DIR)))
# Families with a sliding window.
WINDOWED = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24},
    "qwen2": {"sliding_window": 24, "use_sliding_window": True},
}
TOKENIZERS = {
    "start": tiny_tokenizer,
    "no start": functools.cache(tokenizer_without_start),
}


@dataclass(frozen=True)
class Oracle:
    """The rules of scoring, one after the other."""

    model: PreTrainedModel
    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 1024

    def tokens(
        self, sample: Sample, shown: Sequence[Sample], candidate: Any, content_free: bool = False
    ) -> tuple[list[int], int]:
        """Return the tokens of a whole text, and how many at its end are scored."""
        if content_free:
            prompt = self.task.template.content_free_prompt(sample.row)
            option = self.task.template.content_free_option(sample.row, candidate)
        else:
            prompt, option = self.task.prompt(sample), self.task.option(sample, candidate)
        text = ""
        for other in shown:
            answered = self.task.prompt(other) + self.task.option(other, other.correct[0])
            text += answered.strip() + "\n\n"
        text = (text + (prompt + option).strip(" ")).lstrip(" \n")
        with_option = self.tokenizer((prompt + option).strip(" "))["input_ids"]
        scored = len(with_option) - len(self.tokenizer(prompt.strip(" "))["input_ids"])
        tokens = self.tokenizer(text)["input_ids"]
        if scored == len(tokens):
            tokens = [self.tokenizer.eos_token_id, *tokens]
        while len(tokens) > self.max_length:
            del tokens[1]
        return tokens, min(scored, len(tokens) - 1)

    def log_probabilities(self, *text: Any, everything: bool = False, **how: Any) -> Tensor:
        """Return the log-probability of every scored token; of every token after the first."""
        tokens, scored = self.tokens(*text, **how)
        return log_probabilities(self.model, tokens, len(tokens) - 1 if everything else scored)

    @torch.no_grad()
    def predict(
        self,
        samples: Sequence[Sample],
        demonstrations: Sequence[Sequence[Sample]],
        calibration: str | None = None,
    ) -> list[Prediction]:
        predictions = []
        for sample, shown in zip(samples, demonstrations, strict=True):
            scores = []
            for candidate in sample.candidates:
                values = self.log_probabilities(sample, shown, candidate)
                if calibration is None:
                    scores.append(values.mean().item())
                else:
                    before = shown if calibration == "icl_sfc" else []
                    prior = self.log_probabilities(sample, before, candidate, content_free=True)
                    scores.append((values.sum() - prior.sum()).item())
            predictions.append(Prediction(sample.candidates[scores.index(max(scores))], (*scores,)))
        return predictions


def log_probabilities(model: PreTrainedModel, tokens: Sequence[int], scored: int) -> Tensor:
    """Return the log-probabilities of the last ``scored`` tokens."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    table = torch.log_softmax(logits.float(), dim=-1)
    return torch.stack([table[i - 1, tokens[i]] for i in range(len(tokens))[-scored:]])


def assert_equal_predictions(
    found: Sequence[Prediction], expected: Sequence[Prediction], tolerance: float = TOLERANCE
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.answer == other.answer
        assert one.scores == pytest.approx(other.scores, abs=tolerance, rel=0)


def assert_equal_sums(*results: list[list[tuple[float, int]]]) -> None:
    found, expected = ([pair for options in result for pair in options] for result in results)
    assert [count for _, count in found] == [count for _, count in expected]
    sums = [total for total, _ in expected]
    assert [total for total, _ in found] == pytest.approx(sums, abs=SUM_TOLERANCE, rel=0)


def assert_same_as_oracle(
    model: PreTrainedModel, task: str, number: int, max_length: int = 1024
) -> None:
    samples, shown = draw(task, number, 0)
    setting = (get_task(task), tiny_tokenizer(), max_length)
    found = predict(model, Encoder(*setting), samples, shown, 2)
    assert_equal_predictions(found, Oracle(model, *setting).predict(samples, shown))


def encode(task: str, number: int, demonstrations: int) -> list[EncodedExample]:
    encoder = Encoder(get_task(task), tiny_tokenizer(), 1024)
    pairs = zip(*draw(task, number, demonstrations), strict=True)
    return [encoder.options(*pair) for pair in pairs]


def draw(task: str, number: int, demonstrations: int) -> tuple[list[Sample], list[list[Sample]]]:
    """Return validation samples, and for each its own training samples."""
    train, validation = samples_of(task)
    starts = range(0, number * demonstrations, max(1, demonstrations))
    shown = [train[start : start + demonstrations] for start in starts] or [[]] * number
    return validation[:number], shown
