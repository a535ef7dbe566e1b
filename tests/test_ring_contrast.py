"""The contrast of a box with the ring around it, and proposals in its order."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from aligndet_hf.commands.proposals import ProposalsArguments, _open_source, generate_proposals
from aligndet_hf.data.sources import SOURCES
from aligndet_hf.detectors.backbones import get_backbone
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.evaluation import ring_contrast
from aligndet_hf.evaluation.box_features import BoxFeatures
from aligndet_hf.evaluation.ring_contrast import STRIDES, RingContrast, reranked


class ColourMeans:
    """Instead of a backbone: of every box the exact mean colour, at two strides."""

    sizes = [3, 3]

    def __call__(self, image: torch.Tensor, boxes: torch.Tensor) -> np.ndarray:
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        means = []
        for left, top, right, bottom in (boxes * size).round().int().tolist():
            means.append(image[:, top:bottom, left:right].float().mean((1, 2)))
        return torch.stack(means).repeat(1, 2).numpy()


def test_contrast_by_hand():
    image = np.zeros((192, 192, 3), dtype=np.uint8)
    image[..., 0] = 100  # red, with a green square
    image[64:128, 64:128] = (0, 100, 0)
    boxes = np.array(
        [
            [64, 64, 64, 64],  # the square: nothing green in the ring, cosine 0
            [8, 8, 32, 32],  # red in red
            [0, 0, 192, 192],  # no ring
            [64, 64, 32, 64],  # its left half: of the ring's 64 * 128 - 32 * 64 pixels, 16 * 64 are green
        ],
        dtype=np.float32,
    )
    found = RingContrast(ColourMeans())(image, boxes)
    green, red = 16 * 64, 64 * 128 - 32 * 64 - 16 * 64
    np.testing.assert_allclose(found, [1, 0, 0, 1 - green / np.hypot(green, red)], atol=1e-5)


def test_scores_are_products_and_nms_follows_them():
    def search(images, rows):
        boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 10, 10], [40, 40, 9, 9]], dtype=np.float32)
        return [{"bbox": boxes, "score": np.array([0.9, 0.8, 0.7, -0.1], dtype=np.float32)}] * 2 + [
            {"bbox": boxes[:0], "score": np.zeros(0, dtype=np.float32)}
        ]

    contrasts = iter([np.array([0.1, 0.5, 0.2, 1]), np.array([1, 0.5, 0.2, 1])])
    images = [np.zeros((60, 60, 3), dtype=np.uint8)] * 3
    find = reranked(search, lambda image, boxes: next(contrasts), {"nms_threshold": 0.5, "max_boxes": 2})
    first, second, empty = find(images, [{}] * 3)
    np.testing.assert_allclose(first["score"], [0.8 * 0.5, 0.7 * 0.2], rtol=1e-6)
    assert first["bbox"].tolist() == [[0, 0, 10, 9], [20, 20, 10, 10]]  # the worse of two that overlap has gone
    np.testing.assert_allclose(second["score"], [0.9, 0.7 * 0.2], rtol=1e-6)
    assert len(empty["bbox"]) == 0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a backbone's random weights, with timm's names."""
    torch.manual_seed(0)
    backbone = get_backbone(build_detector("detr", backbone="resnet10t", strides=tuple(STRIDES)))
    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    network = getattr(backbone, "_backbone", backbone)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_the_command_gives_the_products(tmp_path, weights, workers):
    rng = np.random.default_rng(0)
    boxes = [[[4.0, 4, 20, 20], [30, 10, 20, 30], [0, 0, 40, 40]], [[10.0, 10, 30, 20]], []]
    images = []
    for number in range(3):
        images.append(str(tmp_path / f"{number}.png"))
        PIL.Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(images[-1])
    scores = [[0.9, 0.6, 0.5], [0.2], []]
    column = [{"bbox": box, "score": score} for box, score in zip(boxes, scores, strict=True)]
    dataset = datasets.Dataset.from_dict({"image": images, "boxes": column}).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "data"))
    common = {"dataset": str(tmp_path / "data"), "column": "boxes", "disable_tqdm": True, "shard_size": 2}
    ranked = {"rerank": "ring", "backbone": "resnet10t", "backbone_weights": str(weights)}
    result = generate_proposals(
        ProposalsArguments(**common, **ranked, output_dir=str(tmp_path / "out"), dataloader_num_workers=workers)
    )
    detector = build_detector("detr", backbone="resnet10t", backbone_weights=weights, strides=tuple(STRIDES))
    contrast = RingContrast(BoxFeatures(detector, STRIDES, normalize=False))
    for row, path, box, score in zip(result, images, boxes, scores, strict=True):
        expected = np.zeros(0)
        if box:
            pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
            expected = np.array(score) * contrast(pixels, np.array(box, dtype=np.float32))
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(row["proposals"]["score"], expected[order], rtol=1e-4)
        assert row["proposals"]["bbox"] == [box[place] for place in order]
    with pytest.raises(ValueError, match="other settings|overwrite"):
        generate_proposals(ProposalsArguments(**common, output_dir=str(tmp_path / "out"), dataloader_num_workers=0))


def test_a_source_gives_at_least_as_many_boxes_as_are_kept(monkeypatch):
    monkeypatch.setattr(ring_contrast, "ring_features", lambda *names: None)
    monkeypatch.setattr(ring_contrast, "RingContrast", lambda _: lambda image, boxes: np.ones(len(boxes), np.float32))
    opened, source = [], SOURCES["random"]

    def opening(selection, **settings):
        opened.append(selection)
        return source.open(selection=selection, **settings)

    monkeypatch.setitem(SOURCES, "random", source._replace(open=opening))

    def boxes(max_boxes, nms_threshold, **ranking):
        kept = {"max_boxes": max_boxes, "nms_threshold": nms_threshold}
        search = _open_source(ProposalsArguments(dataset="x", output_dir="y", source="random", **kept, **ranking))
        return search([np.zeros((400, 600, 3), np.uint8)], [0])[0]["bbox"].tolist()

    ring = {"rerank": "ring", "backbone": "resnet10t", "backbone_weights": "timm"}
    assert len(boxes(300, 0.95)) > 290
    assert sorted(boxes(300, 0.95, **ring)) == sorted(boxes(300, 0.95))
    few = boxes(5, 0.3, **ring)
    assert len(few) == 5 and opened[-1]["max_boxes"] == 100 and opened[-1]["nms_threshold"] == 0.8


def test_what_rerank_needs(tmp_path):
    with pytest.raises(ValueError, match="rerank ring needs"):
        ProposalsArguments(dataset="x", output_dir="y", rerank="ring", backbone="resnet10t")
    # A checkpoint brings its weights.
    ProposalsArguments(dataset="x", output_dir="y", rerank="ring", backbone=str(tmp_path))
    # A chain gives its backbone to all stages, which is nothing to a search without ranking.
    assert ProposalsArguments(dataset="x", output_dir="y", backbone="resnet10t").backbone is None
