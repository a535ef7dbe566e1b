"""Nearest neighbours: right on clean classes, chance on noise, and honest about groups."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from aligndet_hf.commands.knn import KnnArguments, knn_accuracy, measure_knn
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.synthetic import write_synthetic_folder

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


# ---- objects ----


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_synthetic_folder(folder, {"train": 12}, seed=0, image_size=(96, 128))
    return folder


def test_objects_are_measured_with_the_weights_and_with_random_ones(scenes, tmp_path, capsys):
    torch.manual_seed(3)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.safetensors")
    settings = {
        "dataset": str(scenes),
        "backbone": "resnet10t",
        "short_side": 96,
        "num_neighbors": 3,
        "disable_tqdm": True,
    }
    weights = str(tmp_path / "weights.safetensors")
    results = measure_knn(KnnArguments(**settings, backbone_weights=weights, output_dir=str(tmp_path / "out")))
    record = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert record["results"] == results and record["num_neighbors"] == 3
    assert results["trained"] != results["random"]
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "other.safetensors")
    others = measure_knn(KnnArguments(**settings, backbone_weights=str(tmp_path / "other.safetensors")))
    assert results["random"] == others["random"] and results["trained"] != others["trained"]
    with pytest.raises(ValueError, match="resnet10t has random weights, which are measured beside trained ones"):
        KnnArguments(**settings)
    printed = capsys.readouterr().out
    assert f"accuracy {100 * results['trained']['accuracy']:.1f}, balanced accuracy" in printed


def test_some_of_many_objects(scenes, tmp_path, capsys):
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.safetensors")
    settings = {"dataset": str(scenes), "backbone": "resnet10t", "short_side": 64, "disable_tqdm": True}
    settings["backbone_weights"] = str(tmp_path / "weights.safetensors")
    measure_knn(KnnArguments(**settings, max_objects=20))
    assert capsys.readouterr().out.count(" 20 objects") == 2


def test_without_labels_there_is_nothing_to_measure(proposal_folder):
    with pytest.raises(DataError, match="objects"):
        measure_knn(KnnArguments(dataset=str(proposal_folder), backbone="resnet10t", backbone_weights="timm"))
    with pytest.raises(ValueError, match="num_neighbors must be positive"):
        KnnArguments(dataset="data", backbone="resnet10t", num_neighbors=0)
