"""Which examples a run trains on, shows and reports on: the draws of MeZO's experiments.

A seed means the same rows here as there (Malladi et al. 2023, arXiv 2305.17333), so that published
numbers compare.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks import Sample
from utils import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExampleSet:
    """Training (or demonstration), dev and eval examples of one run."""

    seed: int
    train: list[Sample]
    dev: list[Sample]
    evaluation: list[Sample]
    demonstrations: list[list[Sample]]  # before each eval example; none after training


def draw_example_sets(
    train: list[Sample],
    validation: list[Sample],
    *,
    num_train: int,
    num_dev: int,
    num_eval: int | None,
    num_train_sets: int | None,
    train_set_seed: int | None,
    in_context: bool,
) -> list[ExampleSet]:
    """Draw the examples of every run; the numbers are those of the command line.

    Each of ``num_train_sets`` runs has a set of its own, drawn with seeds 0, 1, …;
    ``train_set_seed`` draws one. With neither, the seed is 0, and ``in_context``, where the
    examples of ``train`` are shown and not trained on, each eval example has its own.
    """
    if num_train_sets is None and train_set_seed is None and in_context and num_train:
        evaluation = permutation_subset(validation, num_eval, seed=0)
        seeds = np.random.RandomState(0).randint(0, 10000, len(evaluation)).tolist()
        shown = [permutation_subset(train, num_train, seed) for seed in seeds]
        _warn_of_few(len(train), num_train, 0)
        return [ExampleSet(0, [], [], evaluation, shown)]
    sets = []
    for seed in range(num_train_sets) if num_train_sets else [train_set_seed or 0]:
        drawn, dev = sample_train_dev(train, num_train, num_dev, seed)
        if not in_context:
            drawn, dev = with_a_correct_option(drawn, dev)
        evaluation = permutation_subset(validation, num_eval, seed)
        demonstrations = [drawn if in_context else []] * len(evaluation)
        sets.append(ExampleSet(seed, drawn, dev, evaluation, demonstrations))
    return sets


def with_a_correct_option(
    train: list[Sample], dev: list[Sample]
) -> tuple[list[Sample], list[Sample]]:
    """Leave out samples without a correct option, as some rows of ReCoRD are, after the draw.

    So a seed means the same rows. Evaluation keeps them: every answer to them is wrong.
    """
    kept_train, kept_dev = ([s for s in part if has_correct_option(s)] for part in (train, dev))
    if train and not kept_train:
        none = f"none of the {len(train)} training examples has a correct answer"
        raise InputError(f"{none} among its options; give a larger --num_train, or other data")
    total, kept = len(train) + len(dev), len(kept_train) + len(kept_dev)
    if kept < total:
        out = f"{total - kept} of {total} training and dev examples are left out"
        logger.warning(f"{out}: none of their options is correct")
    return kept_train, kept_dev


def has_correct_option(sample: Sample) -> bool:
    """Whether a candidate is correct; always true where answers are generated."""
    return not sample.candidates or not {*sample.candidates}.isdisjoint(sample.correct)


def permutation_subset(samples: Sequence[Sample], k: int | None, seed: int) -> list[Sample]:
    """Return k samples (None, or too many: all) drawn without replacement as MeZO draws them."""
    if k and not samples:
        # Files without examples are refused: this is the user's own data without a training file.
        raise InputError(f"nothing to draw {k} examples from: give --train_file")
    order = np.random.RandomState(seed).permutation(len(samples))[:k]
    return [samples[index] for index in order]


def sample_train_dev(
    samples: Sequence[Sample], num_train: int, num_dev: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Return train and dev samples: one draw of num_train + num_dev, whose last num_dev are dev.

    Where there are fewer, dev stays whole and train is shorter.
    """
    drawn, left = permutation_subset(samples, num_train + num_dev, seed), len(samples) - num_dev
    if num_train > left and left <= 0:
        none = f"{num_dev} dev examples leave none to train on, of {len(samples)}"
        raise InputError(f"{none}: lower --num_dev")
    _warn_of_few(len(samples), num_train, num_dev)
    split = len(drawn) - num_dev
    return drawn[:split], drawn[split:]


def _warn_of_few(available: int, num_train: int, num_dev: int) -> None:
    if num_train + num_dev > available:
        asked = f"--num_train {num_train}" + (f" and --num_dev {num_dev}" if num_dev else "")
        logger.warning(f"only {available} examples for {asked}: num_train is {available - num_dev}")
