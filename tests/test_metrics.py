"""Metrics against values worked out by hand."""

import pytest

import metrics


def test_accuracy_counts_any_acceptable_answer():
    for prediction, golds, expected in (
        (0, (0,), 1.0),
        (0, (1,), 0.0),
        ("Lee", ("Kim", "Lee"), 1.0),
        ("Ann", ("Kim", "Lee"), 0.0),
    ):
        assert metrics.accuracy(prediction, golds) == expected


def test_normalize_answer():
    normalized = {
        "The Cat": "cat",
        "a cat, an owl and the dog!": "cat owl and dog",
        "  two\n\tspaces  here ": "two spaces here",
        "U.S.A.": "usa",
        "the-cat": "thecat",
        "'the' cat": "cat",
        "theatre banana analog": "theatre banana analog",
        "$1,000.50": "100050",
        "The": "",
        "": "",
        "?!": "",
        "Ångström\N{EN DASH}Unit": "ångström\N{EN DASH}unit",
    }
    assert {text: metrics.normalize_answer(text) for text in normalized} == normalized


def test_exact_match():
    for prediction, golds, expected in (
        (" The Broncos.\n", ("Denver Broncos", "broncos"), 1.0),
        ("Denver", ("Denver Broncos", "Broncos"), 0.0),
        ("", ("Denver",), 0.0),
        ("", ("The",), 1.0),
    ):
        assert metrics.exact_match(prediction, golds) == expected


def test_f1():
    for prediction, golds, expected in (
        ("Denver Broncos", ("the Denver Broncos!",), 1.0),
        # One shared token: precision 1/1, recall 1/2.
        ("broncos", ("Denver Broncos",), 2 / 3),
        # Precision 2/4, recall 2/3.
        ("red fox jumped high", ("quick red fox",), 4 / 7),
        # A multiset: the one "go" of the gold answer counts once. Precision 1/3, recall 1/2.
        ("go go go", ("go home",), 2 / 5),
        ("go go go", ("go go stop",), 2 / 3),
        # The best of several gold answers.
        ("broncos", ("Carolina Panthers", "Denver Broncos", "the Broncos"), 1.0),
        ("panthers", ("broncos",), 0.0),
        ("", ("broncos",), 0.0),
        # Nothing is left of either side: 0 in SQuAD v1.1.
        ("the", ("a",), 0.0),
    ):
        assert metrics.f1(prediction, golds) == pytest.approx(expected)


def test_means_and_their_errors():
    assert metrics.mean([1.0, 0.0, 0.5]) == 0.5
    with pytest.raises(ValueError, match="no examples"):
        metrics.mean([])
    # The sample's standard deviation is 1/2, over the root of three.
    assert metrics.standard_error([1.0, 0.0, 0.5]) == pytest.approx(0.5 / 3**0.5)
    # A proportion: √(p (1 - p) / (n - 1)).
    assert metrics.standard_error([1.0] * 373 + [0.0] * 127) == pytest.approx(0.01949, abs=1e-5)
    assert metrics.standard_error([1.0]) == metrics.standard_error([1.0, 1.0]) == 0
