"""Nearest neighbours: right on clean classes, chance on noise, and honest about groups."""

import warnings

import numpy as np
import pytest

from aligndet_hf.evaluation.knn import knn_accuracy

RNG = np.random.default_rng(0)
LABELS = np.repeat([0, 1, 2], [60, 25, 15])


def test_directions_that_tell_the_classes_are_all_that_counts():
    features = np.eye(3)[LABELS] + 0.05 * RNG.normal(size=(100, 3))
    result = knn_accuracy(features * RNG.uniform(0.1, 10, size=(100, 1)), LABELS)
    assert result == {"accuracy": 1.0, "balanced_accuracy": 1.0, "majority": 0.6}


def test_noise_gives_chance_and_a_seed_the_same_result():
    features = RNG.normal(size=(100, 8))
    result = knn_accuracy(features, LABELS, k=5, seed=1)
    assert result == knn_accuracy(features, LABELS, k=5, seed=1)
    assert 0.2 < result["balanced_accuracy"] < 0.5


def test_samples_of_one_group_do_not_answer_for_each_other():
    groups = np.arange(100) // 2
    labels = RNG.integers(2, size=50)[groups]
    features = RNG.normal(size=(50, 8))[groups]  # Equal within a group, noise otherwise.
    assert knn_accuracy(features, labels)["accuracy"] > 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert knn_accuracy(features, labels, groups=groups)["accuracy"] < 0.7


@pytest.mark.parametrize(
    "features, labels, message",
    [
        (np.ones((9, 2)), np.arange(9), "9 samples"),
        (np.ones((20, 2)), np.zeros(20), "1 classes"),
        (np.ones((20, 2)), np.zeros(19), "20 features, 19 labels"),
    ],
)
def test_too_little_is_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(features, labels)
