"""Accuracy, exact match and F1: pure functions over a prediction and its acceptable answers.

Every metric is a fraction between 0 and 1; a set's is the mean over its examples. Exact match and
F1 are those of the SQuAD v1.1 evaluation (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    if not values:
        raise ValueError("no examples to score")
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, 0 for one value."""
    if len(values) < 2:
        return 0.0
    center = mean(values)
    variance = sum((value - center) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def accuracy(prediction: Any, golds: Collection[Any]) -> float:
    """Return 1.0 if the prediction is among the acceptable answers, else 0.0."""
    return float(prediction in golds)


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


def _token_f1(prediction: str, gold: str) -> float:
    predicted = Counter(normalize_answer(prediction).split())
    expected = Counter(normalize_answer(gold).split())
    shared = (predicted & expected).total()
    if shared == 0:
        return 0.0
    # The harmonic mean of shared/predicted (precision) and shared/expected (recall).
    return 2 * shared / (predicted.total() + expected.total())
