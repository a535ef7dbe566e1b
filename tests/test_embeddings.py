"""Embeddings of labelled objects: the right query, the right numbers, and the command."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from tiny_detectors import tiny_detector
from transformers import AutoModelForObjectDetection

from aligndet_hf import cli
from aligndet_hf.commands import embeddings as command
from aligndet_hf.commands.embeddings import embed_objects, project, untrained_copy
from aligndet_hf.commands.evaluate import EvaluationImages
from aligndet_hf.data.synthetic import SYNTHETIC_CATEGORIES, make_synthetic_dataset, write_synthetic_folder
from aligndet_hf.detectors.backbones import get_backbone
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.detectors.families import family_of


@pytest.fixture(scope="module")
def scenes():
    dataset = make_synthetic_dataset(3, seed=1, image_size=(64, 80))
    return dataset.cast_column("image", datasets.Image(decode=False))


def boxes_of(scenes, row) -> torch.Tensor:
    """Normalised cxcywh."""
    x, y, width, height = torch.tensor(np.array(scenes[row]["objects"]["bbox"], dtype=np.float32)).T
    return torch.stack([(x + width / 2) / 80, (y + height / 2) / 64, width / 80, height / 64], dim=1)


@pytest.mark.parametrize("model_type", ["detr", "rt_detr", "d_fine", "torchvision_fcos", "torchvision_mask_rcnn"])
def test_of_every_object_the_query_whose_box_fits(scenes, model_type, monkeypatch):
    """A detector that finds every object with a query we know: these are the features that come out, in this order."""
    detector = tiny_detector(model_type, num_labels=7)
    images = EvaluationImages(scenes, SYNTHETIC_CATEGORIES, build_image_processor(detector, 64))
    forward, expected, row = type(detector).forward, [], 0

    def with_known_boxes(self, *args, **kwargs):
        nonlocal row
        outputs = forward(self, *args, **kwargs)
        rows = family_of(self.config).object_rows(self, outputs, None)
        features = rows.features[rows.last].unflatten(0, (len(outputs.pred_boxes), -1))
        for place in range(len(features)):
            truth = boxes_of(scenes, row)
            queries = np.random.default_rng(row).permutation(features.shape[1])[: len(truth)]
            outputs.pred_boxes[place] = torch.tensor([0.01, 0.01, 0.02, 0.02])
            outputs.pred_boxes[place, queries] = truth
            expected.append(features[place, queries].numpy())
            row += 1
        return outputs

    monkeypatch.setattr(type(detector), "forward", with_known_boxes)
    found = embed_objects(detector, images, batch_size=2)
    counts = [len(objects["bbox"]) for objects in scenes["objects"]]
    np.testing.assert_array_equal(found.rows, np.repeat(range(3), counts))
    # The matching is in the order of the queries: compare as sets of (row, label, feature).
    labels = np.concatenate([np.array(objects["category"]) for objects in scenes["objects"]])
    direction = np.random.default_rng(0).normal(size=found.features.shape[1])
    key = np.lexsort([np.concatenate(expected) @ direction, np.repeat(range(3), counts)])
    order = np.lexsort([found.features @ direction, found.rows])
    np.testing.assert_allclose(found.features[order], np.concatenate(expected)[key], rtol=1e-5)
    np.testing.assert_array_equal(found.labels[order], labels[key])
    assert found.missed == 0 and found.ious.min() > 0.98  # clipped and rounded boxes


def test_objects_beyond_the_queries_are_counted(scenes):
    detector = tiny_detector("detr", num_queries=1)
    images = EvaluationImages(scenes, SYNTHETIC_CATEGORIES, build_image_processor(detector, 64))
    found = embed_objects(detector, images)
    objects = sum(len(row["bbox"]) for row in scenes["objects"])
    assert found.rows.tolist() == [0, 1, 2] and found.missed == objects - 3


def test_the_untrained_copy_has_the_backbone_and_nothing_else():
    detector = tiny_detector("detr")
    copied, again = untrained_copy(detector, seed=3), untrained_copy(detector, seed=3)
    kept = {id(tensor) for tensor in get_backbone(copied).parameters()}
    before = dict(detector.named_parameters())
    for name, tensor in copied.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name))
        if tensor.ndim > 1:
            assert torch.equal(tensor, before[name]) == (id(tensor) in kept), name


def test_similar_features_are_near():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 16))
    owner = np.repeat(range(3), 12)
    features = directions[owner] * rng.uniform(1, 9, (36, 1)) + rng.normal(0, 0.05, (36, 16))
    points = project(features, seed=0)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(36) * 1e9
    assert (owner[distances.argmin(axis=1)] == owner).all()
    np.testing.assert_array_equal(points, project(features, seed=0))
    assert project(features[:5]).shape == (5, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    write_synthetic_folder(folder / "data", {"validation": 8, "few": 3}, seed=0, image_size=(64, 80))
    for name, seed in {"one/detector": 0, "two": 1}.items():
        detector = tiny_detector("detr", seed)
        detector.save_pretrained(folder / name)
        build_image_processor(detector, 64).save_pretrained(folder / name)
    return folder


def test_the_command(folder, tmp_path, capsys):
    argv = ["embeddings", "--dataset", str(folder / "data"), "--detector", str(folder / "one"), str(folder / "two")]
    argv += ["--output_dir", str(tmp_path), "--disable_tqdm", "true", "--max_objects", "20"]
    assert cli.main(argv) == 0
    first = json.loads((tmp_path / "embeddings.json").read_text())
    assert list(first["detectors"]) == [command.UNTRAINED, "one", "two"]
    for numbers in first["detectors"].values():
        assert 0 <= numbers["accuracy"] <= 1 and 0 < numbers["iou"] < 1 and numbers["objects"] > 20
    assert "one  " in capsys.readouterr().out and (tmp_path / "embeddings.png").stat().st_size > 10_000
    picture = (tmp_path / "embeddings.png").read_bytes()
    assert cli.main(argv) == 0
    assert (tmp_path / "embeddings.png").read_bytes() == picture
    assert json.loads((tmp_path / "embeddings.json").read_text()) == first
    assert AutoModelForObjectDetection.from_pretrained(folder / "two")  # nothing was written there


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--split", "few"), "split few: .*too few"),
        (("--num_neighbors", "0"), "num_neighbors must be positive"),
        (("--detector", "two", "./two"), "the same detector twice"),
    ],
)
def test_what_cannot_be_compared(folder, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    argv = ["embeddings", "--dataset", "data", "--detector", "two", "--output_dir", str(tmp_path)]
    assert cli.main([*argv, "--untrained", "false", "--disable_tqdm", "true", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
