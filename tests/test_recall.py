"""Recall of proposals: by hand, against pycocotools, and the command."""

import contextlib
import io
import json

import datasets
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet_hf import cli
from aligndet_hf.commands.recall import (
    LIMITS,
    BoxStatistics,
    RecallArguments,
    RecallMeter,
    format_recall,
    measure_recall,
)
from aligndet_hf.data.columns import proposals_feature
from aligndet_hf.data.errors import DataError
from aligndet_hf.proposals.controls import grid_boxes, random_boxes


def proposal_recall(proposals, objects, areas=None, image_sizes=None, limits=LIMITS):
    """What a meter says of lists of images."""
    meter = RecallMeter(limits)
    given = [values or [None] * len(objects) for values in (areas, image_sizes)]
    for values in zip(proposals, objects, *given, strict=True):
        meter.update(*values)
    return meter.compute()


def test_by_hand():
    objects = [[0, 0, 10, 10], [50, 50, 40, 40], [200, 0, 100, 100]]  # small, medium, large
    proposals = [
        [0, 0, 10, 6],  # IoU 0.6 with the first: found up to 0.6, by 3 of 10 thresholds
        [300, 300, 5, 5],
        [0, 0, 10, 10],  # the first is taken where the threshold is 0.6 or less; else it finds it
        [50, 50, 40, 32],  # IoU 0.8: 7 of 10
    ]
    results = proposal_recall([proposals, []], [objects, []], limits=(1, 2, 3, 10))
    assert results["images"] == 2 and results["boxes_per_image"] == 2
    assert results["all"]["objects"] == 3
    assert [results["all"][f"recall@{k}"] for k in (1, 2, 3, 10)] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])
    assert [results["all"][f"AR@{k}"] for k in (1, 2, 3, 10)] == pytest.approx([0.1, 0.1, 1 / 3, (1 + 0.7) / 3])
    assert results["small"] == {"objects": 1} | {f"recall@{k}": 1.0 for k in (1, 2, 3, 10)} | {
        "AR@1": pytest.approx(0.3),
        "AR@2": pytest.approx(0.3),
        "AR@3": 1.0,
        "AR@10": 1.0,
    }
    assert results["medium"]["AR@10"] == pytest.approx(0.7) and results["large"]["AR@10"] == 0
    assert results["below 0.1"]["objects"] == 0 and results["below 0.1"]["AR@10"] == -1


def test_precision_by_hand():
    objects = [[0, 0, 10, 10], [50, 50, 10, 10]]
    proposals = [
        [0, 0, 10, 10],  # right
        [0, 0, 10, 5],  # IoU 0.5 with the same object: right too
        [50, 50, 10, 4],  # IoU 0.4
        [100, 100, 10, 10],
        [50, 50, 10, 9],  # right, but the fifth
    ]
    wrong = [[200, 200, 10, 10]]
    results = proposal_recall([proposals, wrong, wrong * 2], [objects, objects[:1], []])["all"]
    assert [results[f"precision@{k}"] for k in (1, 4, 10)] == pytest.approx([1 / 3, 2 / 7, 3 / 8])
    # The third image has no object: none could be found in it.
    assert [results[f"images@{k}"] for k in (1, 4, 10)] == [0.5, 0.5, 0.5]
    nothing = proposal_recall([[]], [[]])["all"]
    assert nothing["precision@1"] == -1 and nothing["images@1"] == -1


def test_one_box_finds_one_object():
    twins = [[0, 0, 10, 10], [0, 0, 10, 10]]
    assert proposal_recall([[[0, 0, 10, 10]]], [twins])["all"]["recall@10"] == 0.5
    assert proposal_recall([[[0, 0, 10, 10]] * 2], [twins])["all"]["recall@10"] == 1


def test_sizes_by_the_given_areas_and_by_the_image():
    objects = [[0, 0, 40, 40], [0, 0, 30, 30], [0, 0, 29, 30]]
    results = proposal_recall([[]], [objects], areas=[[32**2, 96**2, 1]], image_sizes=[(100, 100)])
    counts = {name: results[name]["objects"] for name in list(results)[2:]}
    # Both bounds of an area belong to it, as in pycocotools; of the bounds of a relative size the lower one.
    assert counts == {
        "all": 3,
        "small": 2,
        "medium": 2,
        "large": 1,
        "below 0.1": 0,
        "0.1 to 0.3": 1,
        "above 0.3": 2,
    }
    unknown = proposal_recall([[]], [objects], areas=[[None, float("nan"), 1e5]])  # width times height
    assert [unknown[name]["objects"] for name in ("small", "medium", "large")] == [1, 1, 1]


def pycocotools_recall(proposals, objects, areas) -> np.ndarray:
    """Recall `[thresholds, areas, limits]` as COCOeval has it for detections without classes."""
    sides = []
    for boxes in (objects, proposals):
        side = COCO()
        annotations = [
            {"image_id": image, "category_id": 1, "bbox": box.tolist(), "iscrowd": 0, "place": place}
            for image, rows in enumerate(boxes)
            for place, box in enumerate(rows)
        ]
        for number, annotation in enumerate(annotations, start=1):
            annotation |= {"id": number, "area": annotation["bbox"][2] * annotation["bbox"][3]}
            annotation["score"] = -float(annotation["place"])
            if boxes is objects:
                annotation["area"] = areas[annotation["image_id"]][annotation["place"]]
        images = [{"id": image} for image in range(len(boxes))]
        side.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
        side.createIndex()
        sides.append(side)
    evaluation = COCOeval(*sides, "bbox")
    evaluation.params.useCats, evaluation.params.maxDets = 0, list(LIMITS)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["recall"][:, 0]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(4, 40))
def test_equal_to_pycocotools(seed, side):
    """Whole numbers on a small canvas: many equal overlaps, and boxes that several objects compete for."""
    rng = np.random.default_rng(seed)
    objects, proposals = [], []
    for _ in range(3):
        boxes = np.concatenate([rng.integers(0, side, (60, 2)), rng.integers(1, 3 * side, (60, 2))], axis=1) * 1.0
        objects.append(boxes[: rng.integers(1, 12)])
        near = np.repeat(objects[-1], 6, axis=0) + rng.integers(-side // 4, side // 4 + 1, (6 * len(objects[-1]), 4))
        near[:, 2:] = near[:, 2:].clip(1)
        proposals.append(rng.permutation(np.concatenate([boxes, near])))
    areas = [rng.choice([5.0, 32.0**2, 3000.0, 96.0**2, 1e5], len(boxes)) for boxes in objects]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = pycocotools_recall(proposals, objects, areas)
    results = proposal_recall(proposals, objects, areas)
    for place, group in enumerate(["all", "small", "medium", "large"]):
        for number, limit in enumerate(LIMITS):
            assert results[group][f"AR@{limit}"] == pytest.approx(expected[:, place, number].mean())
            assert results[group][f"recall@{limit}"] == pytest.approx(expected[0, place, number])


def test_bad_arguments():
    with pytest.raises(ValueError, match="no image"):
        RecallMeter().compute()
    with pytest.raises(ValueError, match="output_dir"):
        RecallArguments(dataset="x", num_pictures=1)


def test_statistics():
    statistics = BoxStatistics()
    statistics.update(np.array([[0, 0, 5, 5], [0, 0, 50, 50], [0, 0, 20, 10]], dtype=np.float32), (100, 100))
    statistics.update(np.zeros((0, 4), dtype=np.float32), (10, 10))
    between = BoxStatistics()
    between.update(np.array([[0, 0, 96, 96], [0, 0, 32, 32]], dtype=np.float32), (100, 100))
    shares = between.compute()["share"]
    assert [shares[name] for name in ("small", "medium", "large")] == [0, 0.5, 0.5]  # a box has one size
    assert statistics.compute()["per_image"] == {"min": 0, "median": 1.5, "mean": 1.5, "max": 3}
    share = statistics.compute()["share"]
    assert share["small"] == pytest.approx(2 / 3) and share["medium"] == pytest.approx(1 / 3) and share["large"] == 0
    assert [share[name] for name in ("below 0.1", "0.1 to 0.3", "above 0.3")] == pytest.approx([1 / 3] * 3)


def test_table_has_a_row_for_each_list_and_a_block_for_each_size():
    meter = RecallMeter()
    meter.update([[0, 0, 10, 10]], [[0, 0, 10, 10]])
    lines = format_recall({"ours": meter.compute(), "control": meter.compute()}).splitlines()
    assert [line.strip() for line in lines if line.endswith("objects)")] == ["all (1 objects)", "small (1 objects)"]
    assert sum(line.strip().startswith("control") and line.count("100.0") == 10 for line in lines) == 2
    assert lines[-1].split() == ["control", *["100.0"] * 6] and "boxes on an object" in lines[-4]


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures; the proposals are the objects but for a crowd and one without an area, and one more."""
    objects = [
        {"bbox": [[10, 10, 30, 20], [0, 0, 60, 40]], "category": [0, 0], "iscrowd": [0, 1]},
        {"bbox": [[5, 5, 8, 8], [9, 9, 0, 4]], "category": [0, 0], "iscrowd": [0, 0]},
        {"bbox": [], "category": [], "iscrowd": []},
    ]
    proposals = [
        {"bbox": [[1, 1, 9, 9], [10, 10, 30, 20]], "score": [2, 1]},
        {"bbox": [[5, 5, 8, 8]], "score": [1]},
        {"bbox": [], "score": []},
    ]
    features = {
        "image": datasets.Image(),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
            "category": datasets.List(datasets.Value("int64")),
            "iscrowd": datasets.List(datasets.Value("int64")),
        },
        "proposals": proposals_feature(with_clusters=False),
    }
    pictures = [PIL.Image.new("RGB", (60, 40), color) for color in ("red", "green", "blue")]
    columns = {"image": pictures, "objects": objects, "proposals": proposals}
    saved = tmp_path_factory.mktemp("data") / "saved"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(saved)
    return saved


def test_command(folder, tmp_path, capsys):
    argv = ["recall", "--dataset", str(folder), "--output_dir", str(tmp_path / "out"), "--num_pictures", "2"]
    assert cli.main([*argv, "--disable_tqdm", "--seed", "3"]) == 0
    record = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert record["boxes"]["per_image"] == {"min": 0, "median": 1, "mean": 1, "max": 2}
    found = record["recall"]["proposals"]
    assert found["all"]["objects"] == 2 and found["all"]["AR@10"] == 1 and found["images"] == 3
    assert found["0.1 to 0.3"]["objects"] == 1 and found["above 0.3"]["objects"] == 1

    objects = [[[10, 10, 30, 20]], [[5, 5, 8, 8]], []]
    lists = {
        "random": [random_boxes((40, 60), 1000, 3 + row) for row in range(3)],
        "grid": [grid_boxes((40, 60))] * 3,
    }
    for name, boxes in lists.items():
        assert record["recall"][name] == proposal_recall(boxes, objects, image_sizes=[(40, 60)] * 3)
    assert record["recall"]["grid"]["all"]["AR@1000"] > record["recall"]["grid"]["all"]["AR@10"]
    printed = capsys.readouterr().out
    assert "3 rows, 3 boxes in 'proposals'" in printed and "all (2 objects)" in printed
    for name in ("recall.png", "proposals.png"):
        with PIL.Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").resize((40, 40)).getcolors(1600)) > 5


def test_without_labels_boxes_are_counted_and_drawn(folder, tmp_path, capsys):
    datasets.load_from_disk(str(folder)).remove_columns("objects").save_to_disk(str(tmp_path / "plain"))
    run = {"output_dir": str(tmp_path / "out"), "num_pictures": 9, "num_boxes": 1, "disable_tqdm": True}
    results = measure_recall(RecallArguments(dataset=str(tmp_path / "plain"), **run))
    assert list(results) == ["boxes"] and results["boxes"]["per_image"]["max"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["proposals.png", "recall.json", "run.json"]
    assert "without labels there is no recall" in capsys.readouterr().out


def test_without_proposals_the_fix_is_named(folder, tmp_path):
    datasets.load_from_disk(str(folder)).remove_columns("proposals").save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(DataError, match="no column 'proposals'.*aligndet proposals"):
        measure_recall(RecallArguments(dataset=str(tmp_path / "plain")))


def test_broken_images_are_named(folder, tmp_path):
    broken = datasets.load_from_disk(str(folder)).cast_column("image", datasets.Image(decode=False)).to_list()
    broken[1]["image"]["bytes"] = b"broken"
    features = datasets.load_from_disk(str(folder)).features
    datasets.Dataset.from_list(broken, features=features).save_to_disk(str(tmp_path / "broken"))
    with pytest.raises(DataError, match="row 1, column 'image'"):
        measure_recall(RecallArguments(dataset=str(tmp_path / "broken"), disable_tqdm=True))
