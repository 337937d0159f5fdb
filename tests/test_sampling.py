"""The draws of examples: those of MeZO's experiments, row by row."""

import logging

import numpy as np
import pytest

from sampling import demonstration_seeds, permutation_subset, sample_train_dev
from utils import InputError


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
    demonstration_seeds(3)
    assert np.random.rand() == expected


def test_permutation_subset_bounds():
    assert sorted(permutation_subset([1, 2, 3], 9, seed=0)) == [1, 2, 3]
    assert permutation_subset([1, 2, 3], 0, seed=0) == []
    with pytest.raises(InputError, match="-1"):
        permutation_subset([1, 2, 3], -1, seed=0)


def test_nothing_to_draw_from():
    assert permutation_subset([], 0, seed=0) == []
    assert sample_train_dev([], 0, 0, seed=0) == ([], [])
    for draw in (lambda: permutation_subset([], 4, 0), lambda: sample_train_dev([], 4, 2, 0)):
        with pytest.raises(InputError, match="--num_train 4 needs --train_file"):
            draw()


def test_train_and_dev_are_one_draw():
    population = list(range(1000))
    order = np.random.RandomState(3).permutation(1000)[:30].tolist()
    train, dev = sample_train_dev(population, 20, 10, seed=3)
    assert (train, dev) == (order[:20], order[20:])


def test_no_dev():
    order = np.random.RandomState(3).permutation(50)[:20].tolist()
    assert sample_train_dev(list(range(50)), 20, 0, seed=3) == (order, [])


def test_no_train():
    order = np.random.RandomState(3).permutation(50)[:20].tolist()
    assert sample_train_dev(list(range(50)), 0, 20, seed=3) == ([], order)


def test_exactly_all(caplog):
    train, dev = sample_train_dev(list(range(30)), 20, 10, seed=0)
    assert sorted(train + dev) == list(range(30))
    assert not caplog.records


def test_more_than_there_is(caplog):
    order = np.random.RandomState(0).permutation(250).tolist()
    with caplog.at_level(logging.WARNING):
        train, dev = sample_train_dev(list(range(250)), 1000, 100, seed=0)
    assert (train, dev) == (order[:150], order[150:])
    assert "only 250 examples" in caplog.text
    assert "training on 150" in caplog.text


@pytest.mark.parametrize("num_dev", [50, 51])
def test_dev_would_take_everything(num_dev):
    with pytest.raises(InputError, match=f"{num_dev} dev .* of 50: lower --num_dev"):
        sample_train_dev(list(range(50)), 10, num_dev, seed=0)


def test_negative_numbers():
    with pytest.raises(InputError, match="-5 train"):
        sample_train_dev(list(range(50)), -5, 10, seed=0)
    with pytest.raises(InputError, match="-1 dev"):
        sample_train_dev(list(range(50)), 5, -1, seed=0)


def test_demonstration_seeds():
    np.random.seed(0)
    expected = np.random.randint(0, 10000, 5).tolist()
    assert demonstration_seeds(5) == expected == [2732, 9845, 3264, 4859, 9225]
    assert demonstration_seeds(0) == []
