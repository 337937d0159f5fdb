"""Accuracy, exact match and F1: pure functions over predictions and their acceptable answers.

Every metric is a fraction between 0 and 1. Without examples, or without gold answers for each, it
is a ValueError. Exact match and F1 are those of the SQuAD v1.1 evaluation (Rajpurkar et al. 2016,
arXiv 1606.05250, section 6.1).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    if not values:
        raise ValueError("no examples to score")
    return sum(values) / len(values)


def accuracy(predictions: Sequence[Any], golds: Sequence[Collection[Any]]) -> float:
    """Return the fraction of predictions that are among their example's acceptable answers."""
    pairs = zip(predictions, golds, strict=True)
    return mean([float(prediction in answers) for prediction, answers in pairs])


def normalize_answer(text: str) -> str:
    """Return the text in lower case, without punctuation or articles, its words one space apart."""
    # Punctuation goes first: "the-cat" is the one word "thecat", and "'the' cat" loses its article.
    text = text.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def exact_match(prediction: str, golds: Collection[str]) -> float:
    """Return 1.0 if the normalised prediction equals any normalised gold answer, else 0.0."""
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(gold) for gold in golds))


def f1(prediction: str, golds: Collection[str]) -> float:
    """Return the best token F1 of the prediction over the gold answers.

    Tokens are the words left by ``normalize_answer``, counted as a multiset. Without a shared
    token the value is 0, as in SQuAD v1.1: also where normalisation leaves nothing of either side.
    """
    return max(_token_f1(prediction, gold) for gold in golds)


def mean_exact_match(predictions: Sequence[str], golds: Sequence[Collection[str]]) -> float:
    """Return the mean of ``exact_match`` over examples."""
    return _mean_over_examples(exact_match, predictions, golds)


def mean_f1(predictions: Sequence[str], golds: Sequence[Collection[str]]) -> float:
    """Return the mean of ``f1`` over examples."""
    return _mean_over_examples(f1, predictions, golds)


def _token_f1(prediction: str, gold: str) -> float:
    predicted = Counter(normalize_answer(prediction).split())
    expected = Counter(normalize_answer(gold).split())
    shared = (predicted & expected).total()
    if shared == 0:
        return 0.0
    # The harmonic mean of shared/predicted (precision) and shared/expected (recall).
    return 2 * shared / (predicted.total() + expected.total())


def _mean_over_examples(
    metric: Callable[[str, Collection[str]], float],
    predictions: Sequence[str],
    golds: Sequence[Collection[str]],
) -> float:
    pairs = zip(predictions, golds, strict=True)
    return mean([metric(prediction, answers) for prediction, answers in pairs])
