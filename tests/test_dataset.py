import os
import pickle
import signal
import subprocess
from io import BytesIO

import cv2
import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from aligndet_hf.data.collate import collate_labelled, collate_views
from aligndet_hf.data.columns import objects_feature, proposals_feature
from aligndet_hf.data.dataset import LabelledImages, ProposalViews
from aligndet_hf.data.errors import DataError, ImageError
from aligndet_hf.data.sampling import EpochBatchSampler, SampleKey
from aligndet_hf.data.views import ViewConfig
from aligndet_hf.processes import init_worker

HEIGHT, WIDTH = 60, 90
NAN = float("nan")
PLAIN = ViewConfig([60], flip_probability=0.0, color=False)  # leaves the pictures as they are


def picture(seed, height=HEIGHT, width=WIDTH):
    file = BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def proposal_dataset(boxes_per_row, clusters=False):
    proposals = [{"bbox": boxes, "score": np.linspace(1, 0, len(boxes)).tolist()} for boxes in boxes_per_row]
    if clusters:
        proposals = [row | {"cluster": [(7 * n) % 5 for n in range(len(row["bbox"]))]} for row in proposals]
    features = datasets.Features(image=datasets.Image(), proposals=proposals_feature(clusters))
    images = [picture(seed) for seed in range(len(boxes_per_row))]
    return datasets.Dataset.from_dict({"image": images, "proposals": proposals}, features=features)


def boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(0, 30, (count, 2)), rng.uniform(5, 25, (count, 2))], axis=1).round(2).tolist()


@pytest.fixture(scope="module")
def twelve():
    return proposal_dataset([boxes(12, seed) for seed in range(6)], clusters=True)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, dict):
            assert_equal(value, second[key])
        elif isinstance(value, list):
            for one, other in zip(value, second[key], strict=True):
                assert_equal(one, other)
        else:
            assert torch.equal(value, second[key]), key


# ---- views with proposals ----


def test_item_of_a_plain_view():
    """Values by hand: nothing is resized, flipped or coloured."""
    dataset = proposal_dataset([[[9, 6, 18, 12], [0, 0, 90, 60]]])
    item = ProposalViews(dataset, PLAIN, seed=0, max_proposals=5)[SampleKey(0, 0, 0)]
    assert set(item) == {"image", "labels", "momentum_image", "momentum_labels"}
    expected = np.array(PIL.Image.open(BytesIO(picture(0)["bytes"])))
    for prefix in ("", "momentum_"):
        image, labels = item[f"{prefix}image"], item[f"{prefix}labels"]
        assert image.dtype == torch.uint8 and image.shape == (3, HEIGHT, WIDTH)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
        torch.testing.assert_close(labels["boxes"], torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]]))
        assert labels["boxes"].dtype == torch.float32
        assert labels["class_labels"].dtype == labels["proposal_ids"].dtype == torch.int64
        assert labels["class_labels"].tolist() == [0, 0] and labels["proposal_ids"].tolist() == [0, 1]


def test_two_views_differ_and_show_the_same_proposals(twelve):
    view = ViewConfig([40, 50, 60, 70])
    views = ProposalViews(twelve, view, seed=0, max_proposals=50)
    sizes, flips = set(), set()
    for epoch in range(30):
        item = views[SampleKey(1, epoch, epoch)]
        ids = item["labels"]["proposal_ids"]
        assert torch.equal(ids, item["momentum_labels"]["proposal_ids"]) and ids.tolist() == list(range(12))
        for labels in (item["labels"], item["momentum_labels"]):
            cx, cy, w, h = np.array(twelve[1]["proposals"]["bbox"]).T
            x = (cx + w / 2) / WIDTH
            flipped = not np.allclose(labels["boxes"][:, 0], x, atol=1e-3)
            np.testing.assert_allclose(labels["boxes"][:, 0], 1 - x if flipped else x, atol=1e-3)
            np.testing.assert_allclose(labels["boxes"][:, 3], h / HEIGHT, atol=1e-3)
            flips.add(flipped)
        sizes.add((item["image"].shape[1], item["momentum_image"].shape[1]))
    assert flips == {True, False}
    assert len(sizes) > 8 and any(first != second for first, second in sizes)


def test_an_item_depends_on_seed_epoch_and_index_only(twelve):
    view = ViewConfig([40, 60], crop_scale=(0.6, 1.0))
    options = {"max_proposals": 4, "proposal_sampling": "random"}
    first, second = (ProposalViews(twelve, view, seed=1, **options) for _ in range(2))
    second[SampleKey(0, 0, 0)], second[SampleKey(4, 2, 9)]  # other draws before
    np.random.seed(7), torch.manual_seed(7)
    assert_equal(first[SampleKey(3, 2, 5)], second[SampleKey(3, 2, 5)])
    assert_equal(first[SampleKey(3, 2, 5)], second[SampleKey(3, 2, 6)])  # the batch number matters to "square" only
    item = first[SampleKey(3, 2, 5)]
    others = [first[SampleKey(3, 1, 5)], ProposalViews(twelve, view, seed=2, **options)[SampleKey(3, 2, 5)]]
    for other in others:
        assert item["image"].shape != other["image"].shape or not torch.equal(item["image"], other["image"])


def test_square_views_share_one_size_per_batch(twelve):
    view = ViewConfig([32, 48, 64, 80], resize="square")
    views = ProposalViews(twelve, view, seed=0, max_proposals=4)
    pairs = set()
    for batch in range(12):
        items = [views[SampleKey(index, 0, batch)] for index in range(6)]
        shapes = {(item["image"].shape, item["momentum_image"].shape) for item in items}
        assert len(shapes) == 1
        pairs |= shapes
    assert all(first[1] == first[2] for first, _ in pairs)
    assert len(pairs) > 5 and any(first != second for first, second in pairs)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(twelve, num_workers):
    views = ProposalViews(twelve, ViewConfig([40, 60]), seed=3, max_proposals=4, proposal_sampling="random")

    def batches(workers):
        sampler = EpochBatchSampler(6, 2, seed=3, drop_last=True)
        sampler.set_epoch(1)
        options = {"num_workers": workers, "worker_init_fn": init_worker if workers else None}
        options["timeout"] = 600 if workers else 0
        return list(DataLoader(views, batch_sampler=sampler, collate_fn=collate_views, **options))

    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000), np.uint8), (9, 9), 3)  # starts OpenCV's threads, which a fork loses
    for first, second in zip(batches(0), batches(num_workers), strict=True):
        assert_equal(first, second)


class Workers:
    """Eight items: the process that loads each."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getpid()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_only_its_parent_ends_a_worker(number):
    """A signal to all processes of a run: it is the run that ends, and that needs its data until then."""
    loader = DataLoader(Workers(), batch_size=None, num_workers=1, worker_init_fn=init_worker)
    items = iter(loader)
    worker = next(items)
    subprocess.run(["kill", f"-{number}", str(worker)], check=True)
    assert list(items) == [worker] * 7
    assert worker != os.getpid()
    items = iter(loader)
    next(items)
    (process,) = items._workers
    process.terminate()
    process.join()
    assert process.exitcode == 0


# ---- which proposals ----


def test_top_takes_the_first(twelve):
    views = ProposalViews(twelve, PLAIN, seed=0, max_proposals=5)
    for epoch in range(3):
        assert views[SampleKey(0, epoch, 0)]["labels"]["proposal_ids"].tolist() == [0, 1, 2, 3, 4]


def test_random_draws_anew_in_each_epoch_and_the_same_for_both_views(twelve):
    views = ProposalViews(twelve, PLAIN, seed=0, max_proposals=5, proposal_sampling="random")
    drawn = []
    for epoch in range(40):
        item = views[SampleKey(2, epoch, epoch)]
        ids = item["labels"]["proposal_ids"].tolist()
        assert ids == item["momentum_labels"]["proposal_ids"].tolist() == sorted(set(ids)) and len(ids) == 5
        expected = np.array(twelve[2]["proposals"]["bbox"])[ids, 3] / HEIGHT
        np.testing.assert_allclose(item["labels"]["boxes"][:, 3], expected, atol=1e-5)
        drawn.append(ids)
    assert len({tuple(ids) for ids in drawn}) > 30
    assert set(np.concatenate(drawn)) == set(range(12))
    few = ProposalViews(twelve, PLAIN, seed=0, max_proposals=50, proposal_sampling="random")
    assert len(few[SampleKey(2, 0, 0)]["labels"]["boxes"]) == 12


def test_clusters_are_the_class_labels_of_their_boxes(twelve):
    views = ProposalViews(twelve, PLAIN, seed=0, max_proposals=4, proposal_sampling="random", use_clusters=True)
    for epoch in range(5):
        labels = views[SampleKey(0, epoch, 0)]["labels"]
        assert labels["class_labels"].tolist() == [(7 * n) % 5 for n in labels["proposal_ids"].tolist()]


def test_unusable_proposals_are_left_out_and_the_others_keep_their_numbers():
    rows = [[[5, 5, NAN, 9], [5, 5, 20, 20], [5, 5, 0, 9], [80, 50, 50, 50], [200, 5, 9, 9], [1, 1, 9, 9]]]
    item = ProposalViews(proposal_dataset(rows), PLAIN, seed=0, max_proposals=2)[SampleKey(0, 0, 0)]
    assert item["labels"]["proposal_ids"].tolist() == [1, 3]  # unusable ones do not count
    torch.testing.assert_close(item["labels"]["boxes"][1], torch.tensor([85 / 90, 55 / 60, 10 / 90, 10 / 60]))


def test_no_proposals():
    dataset = proposal_dataset([[], boxes(3), []])
    views = ProposalViews(dataset, ViewConfig([60], crop_scale=(0.5, 1.0)), seed=0, max_proposals=4)
    items = [views[SampleKey(index, 0, 0)] for index in range(3)]
    assert items[0]["labels"]["boxes"].shape == (0, 4) and items[0]["labels"]["proposal_ids"].shape == (0,)
    batch = collate_views(items)
    assert [len(labels["boxes"]) for labels in batch["labels"]][::2] == [0, 0]


def test_crops_keep_the_boxes_that_both_show(twelve):
    views = ProposalViews(twelve, ViewConfig([60], crop_scale=(0.3, 0.5)), seed=0, max_proposals=50)
    lost = 0
    for epoch in range(20):
        item = views[SampleKey(0, epoch, 0)]
        ids = item["labels"]["proposal_ids"]
        assert torch.equal(ids, item["momentum_labels"]["proposal_ids"])
        lost += 12 - len(ids)
        for labels in (item["labels"], item["momentum_labels"]):
            low = labels["boxes"][:, :2] - labels["boxes"][:, 2:] / 2
            high = labels["boxes"][:, :2] + labels["boxes"][:, 2:] / 2
            assert (low > -1e-5).all() and (high < 1 + 1e-5).all()
    assert 0 < lost < 20 * 12


def test_a_box_too_small_in_one_view_is_left_out_of_that_view_only():
    dataset = proposal_dataset([[[1, 1, 0.02, 30], [5, 5, 20, 20]]], clusters=True)
    views = ProposalViews(dataset, ViewConfig([20, 60]), seed=0, max_proposals=4, use_clusters=True)
    seen = set()
    for epoch in range(20):
        item = views[SampleKey(0, epoch, 0)]
        for prefix in ("", "momentum_"):
            ids = item[f"{prefix}labels"]["proposal_ids"].tolist()
            assert ids == ([0, 1] if item[f"{prefix}image"].shape[1] == 60 else [1])
            assert item[f"{prefix}labels"]["class_labels"].tolist() == [[0, 2][number] for number in ids]
            seen.add(tuple(ids))
    assert seen == {(0, 1), (1,)}


def test_unreadable_image_is_named_with_its_row():
    dataset = proposal_dataset([boxes(2), boxes(2)])
    images = [picture(0), {"bytes": picture(1)["bytes"][:500], "path": "photo_1.png"}]
    dataset = datasets.Dataset.from_dict(
        {"image": images, "proposals": list(dataset["proposals"])}, features=dataset.features
    )
    views = ProposalViews(dataset, PLAIN, seed=0, max_proposals=2)
    views[SampleKey(0, 0, 0)]
    with pytest.raises(ImageError, match="Row 1, column 'image'.*photo_1.png"):
        views[SampleKey(1, 0, 0)]


def test_impossible_arguments(twelve):
    with pytest.raises(DataError, match="no column 'proposals'.*aligndet proposals"):
        ProposalViews(twelve.remove_columns("proposals"), PLAIN, seed=0, max_proposals=4)
    with pytest.raises(ValueError, match="'top' or 'random'"):
        ProposalViews(twelve, PLAIN, seed=0, max_proposals=4, proposal_sampling="best")
    with pytest.raises(ValueError, match="max_proposals"):
        ProposalViews(twelve, PLAIN, seed=0, max_proposals=0)


def test_views_survive_pickling(twelve):
    """As they must for workers that are spawned."""
    views = ProposalViews(twelve, PLAIN, seed=0, max_proposals=4)
    assert_equal(pickle.loads(pickle.dumps(views))[SampleKey(1, 0, 0)], views[SampleKey(1, 0, 0)])


# ---- labelled images ----


@pytest.fixture(scope="module")
def labelled():
    objects = [
        {
            "bbox": [[9, 6, 18, 12], [5, 5, NAN, 9], [80, 50, 50, 50]],
            "category": [2, 0, 1],
            "area": [1.0] * 3,
            "id": [1, 2, 3],
        },
        {"bbox": [], "category": [], "area": [], "id": []},
    ]
    features = datasets.Features(
        image=datasets.Image(), image_id=datasets.Value("int64"), objects=objects_feature(["a", "b", "c"])
    )
    data = {"image": [picture(0), picture(1, 40, 30)], "image_id": [17, 4], "objects": objects}
    return datasets.Dataset.from_dict(data, features=features)


def test_labelled_item_for_evaluation(labelled):
    images = LabelledImages(labelled, ViewConfig([60], flip_probability=0.0, color=False))
    assert len(images) == 2
    item = images[0]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 60, 90)
    assert set(item["labels"]) == {"boxes", "class_labels", "image_id", "orig_size"}
    expected = torch.tensor([[0.2, 0.2, 0.2, 0.2], [85 / 90, 55 / 60, 10 / 90, 10 / 60]])
    torch.testing.assert_close(item["labels"]["boxes"], expected)
    assert item["labels"]["class_labels"].tolist() == [2, 1]
    assert item["labels"]["image_id"].tolist() == [17] and item["labels"]["orig_size"].tolist() == [60, 90]
    empty = images[1]
    assert empty["image"].shape == (3, 80, 60)
    assert empty["labels"]["boxes"].shape == (0, 4) and empty["labels"]["orig_size"].tolist() == [40, 30]
    batch = collate_labelled([item, empty])
    assert batch["pixel_values"].shape == (2, 3, 80, 90)


def test_row_numbers_stand_in_for_image_ids(labelled):
    images = LabelledImages(labelled.remove_columns("image_id"), PLAIN)
    assert [images[row]["labels"]["image_id"].item() for row in range(2)] == [0, 1]


def test_crowds_are_not_trained(labelled):
    features = labelled.features | {"objects": objects_feature(["a", "b", "c"], crowds=True)}
    rows = list(labelled)
    rows[0]["objects"]["iscrowd"], rows[1]["objects"]["iscrowd"] = [1, 0, 0], []
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    view = ViewConfig([60], flip_probability=0.0, color=False)
    before, after = (LabelledImages(data, view)[0]["labels"] for data in (labelled, dataset))
    assert before["class_labels"].tolist() == [2, 1] and after["class_labels"].tolist() == [1]
    torch.testing.assert_close(after["boxes"], before["boxes"][1:])


def test_row_numbers_stand_in_for_ids_that_are_texts(labelled):
    texts = labelled.remove_columns("image_id").add_column("image_id", ["scan b", "scan a"])
    assert [LabelledImages(texts, PLAIN)[row]["labels"]["image_id"].item() for row in range(2)] == [0, 1]


def test_labelled_views_for_training(labelled):
    images = LabelledImages(labelled, ViewConfig([40, 60], crop_scale=(0.5, 1.0)), seed=5)
    items = [images[SampleKey(0, epoch, 0)] for epoch in range(20)]
    assert len({item["image"].shape for item in items}) > 3
    assert {len(item["labels"]["boxes"]) for item in items} >= {1, 2}
    for item in items:
        assert len(item["labels"]["boxes"]) == len(item["labels"]["class_labels"])
        assert item["labels"]["orig_size"].tolist() == [60, 90]
    assert_equal(items[3], LabelledImages(labelled, images.view, seed=5)[SampleKey(0, 3, 9)])


def test_random_views_need_a_sample_key(labelled):
    with pytest.raises(TypeError, match="EpochBatchSampler"):
        LabelledImages(labelled, ViewConfig([40]))[0]


def test_labelled_missing_column(labelled):
    with pytest.raises(DataError, match="no column 'objects'.*did you mean 'object'"):
        LabelledImages(labelled.rename_column("objects", "object"), PLAIN)
