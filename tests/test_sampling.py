"""The draws of examples: those of MeZO's experiments, row by row."""

import logging

import numpy as np
import pytest
from running import SAMPLES

from task_data.loading import load_samples
from task_data.sampling import (
    draw_example_sets,
    permutation_subset,
    sample_train_dev,
    with_a_correct_option,
)
from tasks import get_task
from utils import InputError


def in_context(train, validation, num_train):
    draws = {"num_dev": 0, "num_eval": None, "num_train_sets": None, "train_set_seed": None}
    (drawn,) = draw_example_sets(train, validation, num_train=num_train, in_context=True, **draws)
    return drawn


def test_permutation_subset_is_numpys():
    population = list(range(100, 150))
    drawn = permutation_subset(population, 8, seed=13)
    np.random.seed(13)
    assert drawn == [population[i] for i in np.random.permutation(50)[:8]]
    assert drawn != permutation_subset(population, 8, seed=14)


def test_permutation_subset_of_known_rows():
    # RandomState's stream is frozen by numpy: these are the rows every paper's seed 0 means.
    assert permutation_subset(list(range(10)), 10, seed=0) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]


def test_sampling_leaves_the_global_random_state_alone():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    permutation_subset(list(range(10)), 3, seed=0)
    in_context(list(range(10)), list(range(3)), num_train=2)
    assert np.random.rand() == expected


def test_permutation_subset_bounds():
    assert sorted(permutation_subset([1, 2, 3], 9, seed=0)) == [1, 2, 3]
    assert permutation_subset([1, 2, 3], 0, seed=0) == []


def test_nothing_to_draw_from():
    assert permutation_subset([], 0, seed=0) == []
    assert sample_train_dev([], 0, 0, seed=0) == ([], [])
    for draw in (lambda: permutation_subset([], 4, 0), lambda: sample_train_dev([], 4, 2, 0)):
        with pytest.raises(
            InputError, match=r"nothing to draw [46] examples from: give --train_file"
        ):
            draw()


def test_train_and_dev_are_one_draw(caplog):
    for n, num_train, num_dev in ((1000, 20, 10), (50, 20, 0), (50, 0, 20), (30, 20, 10)):
        order = np.random.RandomState(3).permutation(n)[: num_train + num_dev].tolist()
        train, dev = sample_train_dev(list(range(n)), num_train, num_dev, seed=3)
        assert (train, dev) == (order[:num_train], order[num_train:])
    assert not caplog.records


def test_more_than_there_is(caplog):
    order = np.random.RandomState(0).permutation(250).tolist()
    with caplog.at_level(logging.WARNING):
        train, dev = sample_train_dev(list(range(250)), 1000, 100, seed=0)
    assert (train, dev) == (order[:150], order[150:])
    (record,) = caplog.records
    assert record.message == (
        "only 250 examples for --num_train 1000 and --num_dev 100: num_train is 150"
    )


def test_more_demonstrations_than_there_are(caplog):
    """All are shown, in another order before every example."""
    drawn = in_context([*range(9)], [*range(2)], num_train=10**8)
    assert [len(shown) for shown in drawn.demonstrations] == [9, 9]
    (record,) = caplog.records
    assert record.message == "only 9 examples for --num_train 100000000: num_train is 9"


def record_sample(index, answers):
    row = {"passage": "Ada met Bob.", "query": "@placeholder left.", "entities": ["Ada", "Bob"]}
    return get_task("ReCoRD").sample(row | {"answers": answers}, index)


def test_rows_without_a_correct_option_are_not_trained_on(caplog):
    """The draw is the one with them, and evaluation has them."""
    samples = [record_sample(i, ["Ada"] if i % 3 else ["Ada Lovelace"]) for i in range(30)]
    draws = {"num_train": 12, "num_dev": 6, "num_eval": 30, "num_train_sets": None}
    (drawn,) = draw_example_sets(samples, samples, train_set_seed=4, in_context=False, **draws)
    order = np.random.RandomState(4).permutation(30).tolist()
    assert [sample.id for sample in drawn.train] == [i for i in order[:12] if i % 3]
    assert [sample.id for sample in drawn.dev] == [i for i in order[12:18] if i % 3]
    assert [sample.id for sample in drawn.evaluation] == order
    left_out = sum(i % 3 == 0 for i in order[:18])
    (record,) = caplog.records
    assert record.message == (
        f"{left_out} of 18 training and dev examples are left out: none of their options is correct"
    )
    with pytest.raises(InputError, match="none of the 2 training examples has a correct answer"):
        with_a_correct_option([samples[0], samples[3]], [])
    generated = load_samples(get_task("SQuAD"), str(SAMPLES))[0][:2]
    assert with_a_correct_option(generated, []) == (generated, [])


def test_numbers_that_do_not_fit():
    for num_dev in (50, 51):
        with pytest.raises(InputError, match=f"{num_dev} dev .* of 50: lower --num_dev"):
            sample_train_dev(list(range(50)), 10, num_dev, seed=0)


def test_every_eval_example_has_demonstrations_of_its_own():
    train, validation = list(range(100, 150)), list(range(5))
    seeds = [2732, 9845, 3264, 4859, 9225]
    assert np.random.RandomState(0).randint(0, 10000, 5).tolist() == seeds
    drawn = in_context(train, validation, num_train=4)
    assert drawn.evaluation == permutation_subset(validation, 5, seed=0)
    assert drawn.demonstrations == [permutation_subset(train, 4, seed) for seed in seeds]
