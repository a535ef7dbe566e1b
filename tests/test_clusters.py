"""Pseudo-classes: the clustering and its measures by hand, features of boxes, and `aligndet clusters` end to end."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from tiny_detectors import tiny_detector
from torchvision.ops import roi_align
from transformers import AutoModelForObjectDetection

from aligndet_hf import cli
from aligndet_hf.commands import clusters as command
from aligndet_hf.commands.clusters import ClustersArguments, cluster_proposals
from aligndet_hf.data.columns import proposals_feature, validate_proposals
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.synthetic import make_synthetic_dataset, write_synthetic_folder
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.evaluation import feature_files
from aligndet_hf.evaluation.box_features import BoxFeatures, BoxImages, mean_in_boxes
from aligndet_hf.proposals import clusters as pure
from aligndet_hf.proposals.clusters import (
    Clustering,
    choose_num_clusters,
    cluster_agreement,
    fit_clusters,
    match_labels,
)
from aligndet_hf.reporting import pseudo_classes
from aligndet_hf.reporting.pseudo_classes import cluster_report, draw_clusters

# ---- the clustering ----


def blobs(count: int = 5, members: int = 60, size: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points about `count` far centres, shuffled, and the blob of each."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, 10, (count, size))
    owner = rng.permutation(np.repeat(np.arange(count), members))
    points = centers[owner] + rng.normal(0, 0.5, (len(owner), size))
    return points.astype(np.float32), owner


def test_known_clusters_are_recovered():
    points, owner = blobs()
    clustering = fit_clusters(points, num_clusters=5, num_components=8, seed=0)
    found = clustering.assign(points)
    assert found.dtype == np.int32 and set(found) == set(range(5))
    assert len(set(zip(found, owner, strict=True))) == 5  # one cluster per blob, one blob per cluster
    others, other_owner = blobs(members=90)  # other points about the same centres
    assert not np.array_equal(others[:300], points)
    pairs = set(zip(clustering.assign(others), other_owner, strict=True))
    assert pairs == set(zip(found, owner, strict=True))


def test_inertia_is_the_mean_squared_distance():
    points, owner = blobs()
    clustering = fit_clusters(points, num_clusters=5, num_components=24, seed=0)
    means = np.stack([points[owner == blob].mean(axis=0) for blob in range(5)])
    expected = ((points - means[owner]) ** 2).sum(axis=1).mean()
    assert clustering.inertia == pytest.approx(expected, rel=0.05)  # mini-batches stop near the means


def test_the_same_seed_gives_the_same_clusters():
    points = np.random.default_rng(0).normal(size=(800, 16)).astype(np.float16)
    one, two, other = (fit_clusters(points, 12, 6, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.centers, two.centers)
    np.testing.assert_array_equal(one.assign(points), two.assign(points))
    assert not np.array_equal(one.assign(points), other.assign(points))


@pytest.mark.parametrize("count", [1, 7, 16])
def test_the_pca_is_that_of_scikit_learn(count, monkeypatch):
    from sklearn.decomposition import PCA

    monkeypatch.setattr(pure, "_CHUNK", 100)
    rng = np.random.default_rng(1)
    points = (rng.normal(size=(330, 16)) @ rng.normal(size=(16, 16)) + 3).astype(np.float32)
    clustering = fit_clusters(points, 2, count, 0)
    reference = PCA(count).fit(points)
    signs = np.sign((clustering.components * reference.components_).sum(axis=1))
    np.testing.assert_allclose(clustering.components * signs[:, None], reference.components_, atol=1e-4)
    np.testing.assert_allclose(clustering.project(points) * signs, reference.transform(points), atol=1e-3)
    assert clustering.explained_variance == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-5)


def test_features_are_read_in_chunks():
    points, _ = blobs(members=pure._CHUNK)

    class Stored:
        """Features on a disk: only slices of a bounded length can be had."""

        shape, read = points.shape, 0

        def __len__(self):
            return len(points)

        def __getitem__(self, rows: slice):
            assert rows.stop - rows.start <= pure._CHUNK
            self.read += rows.stop - rows.start
            return points[rows]

    stored = Stored()
    clustering = fit_clusters(stored, 5, 3, 0)
    np.testing.assert_array_equal(clustering.centers, fit_clusters(points, 5, 3, 0).centers)
    assert stored.read == 2 * len(points)


def test_too_few_features_and_few_dimensions():
    with pytest.raises(ValueError, match="10 clusters need at least as many boxes, there are 9"):
        fit_clusters(np.zeros((9, 4)), 10, 2, 0)
    clustering = fit_clusters(np.arange(12.0).reshape(4, 3), 2, 128, 0)
    assert clustering.components.shape == (3, 3)
    assert fit_clusters(np.ones((6, 2)), 1, 2, 0).assign(np.ones((3, 2))).tolist() == [0, 0, 0]


def test_the_number_of_clusters_grows_with_the_boxes():
    assert [choose_num_clusters(n) for n in (0, 2, 200, 15_000, 131_072, 10**7)] == [1, 1, 10, 87, 256, 256]


def test_nearest_centre():
    clustering = Clustering(np.array([1.0, 0.0]), np.array([[0.0, 1.0]]), np.array([[-5.0], [0.0], [9.0]]), 1.0, 0.0)
    assert clustering.assign(np.array([[7, -3], [7, -2], [0, 4], [0, 5], [0, 4.5]])).tolist() == [0, 1, 1, 2, 1]


# ---- its measures ----


def test_agreement_by_hand():
    mutual = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    numbers = cluster_agreement(np.array([7, 7, 7, 3, 3, 3]), np.array([0, 0, 1, 1, 1, 0]))
    assert numbers["purity"] == pytest.approx(4 / 6)
    assert numbers["balanced_purity"] == pytest.approx(4 / 6)
    assert numbers["nmi"] == pytest.approx(mutual / math.log(2))
    assert numbers["ami"] < numbers["nmi"]

    one = cluster_agreement(np.zeros(10, int), np.array([0] * 8 + [1] * 2))
    assert one == pytest.approx({"purity": 0.8, "balanced_purity": 0.5, "nmi": 0, "ami": 0})
    same = cluster_agreement(np.array([4, 4, 9, 9, 1]), np.array([2, 2, 0, 0, 1]))
    assert same == pytest.approx({"purity": 1, "balanced_purity": 1, "nmi": 1, "ami": 1})


def test_balanced_purity_counts_every_class_alike():
    # 8 of class 0 and 2 of class 1; of these 6 and 1 in cluster 0. Weighted: 0.75 and 0.5; 0.25 and 0.5.
    numbers = cluster_agreement(np.array([0] * 6 + [1] * 2 + [0, 1]), np.array([0] * 8 + [1] * 2))
    assert numbers["purity"] == pytest.approx((6 + 2) / 10)
    assert numbers["balanced_purity"] == pytest.approx((0.75 + 0.5) / 2)


def test_labels_of_the_best_overlap():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 21], [2, 0, 10, 10], [50, 50, 5, 5]], np.float32)
    objects = np.array([[0, 0, 10, 10], [3, 0, 10, 10]], np.float32)
    # The second overlaps with exactly one half, the third with less, the fourth with 2/3 and 9/11.
    assert match_labels(boxes, objects, np.array([4, 6])).tolist() == [4, 4, -1, 6, -1]
    assert match_labels(boxes, objects[:0], np.array([])).tolist() == [-1] * 5
    assert match_labels(boxes[:0], objects, np.array([4, 6])).tolist() == []


# ---- features of boxes ----


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    return BoxFeatures(build_detector("detr", backbone="resnet10t", strides=(16, 32)), [16, 32])


def scene(left: int, top: int, color: int = 200, side: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A patch of one colour on grey, and its box."""
    image = torch.full((3, 384, 512), 90, dtype=torch.uint8)
    image[0, top : top + side, left : left + side] = color
    corners = torch.tensor([[left, top, left + side, top + side]]) / torch.tensor([512, 384, 512, 384])
    return image, corners


def test_features_do_not_depend_on_the_position(features):
    reference = features(*scene(160, 128))
    assert reference.shape == (1, features.size) and features.size == 256 + 512
    assert np.linalg.norm(reference) == pytest.approx(math.sqrt(2), rel=1e-5)  # each stride has length 1
    other = features(*scene(160, 128, color=20))
    image, box = scene(160, 128)
    beside = features(image, box + torch.tensor([0.3, 0, 0.3, 0]))
    for left, top in ((256, 128), (160, 192), (192, 160)):
        moved = features(*scene(left, top))
        assert np.abs(moved - reference).max() < 0.1 * min(
            np.abs(other - reference).max(), np.abs(beside - reference).max()
        )


def test_features_do_not_depend_on_the_size_of_the_image(features):
    image, _ = scene(160, 128)
    reference, other = features(*scene(160, 128)), features(*scene(160, 128, color=20))
    for height, width in ((373, 491), (330, 512)):
        corners = torch.tensor([[160, 128, 256, 224]]) / torch.tensor([width, height, width, height])
        cut = features(image[:, :height, :width], corners)
        assert np.abs(cut - reference).max() < 0.1 * np.abs(other - reference).max()


def test_features_of_several_boxes_are_those_of_each(features):
    image, box = scene(160, 128)
    boxes = torch.cat([box, torch.tensor([[0, 0, 1, 1], [0.2, 0.5, 0.21, 0.51]])])
    together = features(image, boxes)
    for row, one in zip(together, boxes, strict=True):
        np.testing.assert_allclose(features(image, one[None])[0], row, atol=1e-6)
    assert np.isfinite(together).all()


def test_means_in_boxes_are_those_of_roi_align():
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(5, 7, 11, generator=generator)
    start = torch.rand(50, 2, generator=generator) * 0.9
    boxes = torch.cat([start, start + torch.rand(50, 2, generator=generator) * (1 - start)], dim=1)
    boxes[:2] = torch.tensor([[0, 0, 1, 1], [0.99, 0.99, 1, 1]])
    scaled = boxes * torch.tensor([11, 7, 11, 7])
    expected = roi_align(feature_map[None], [scaled], output_size=1, sampling_ratio=8, aligned=True).flatten(1)
    torch.testing.assert_close(mean_in_boxes(feature_map, boxes), expected, atol=1e-5, rtol=0)


def test_features_of_several_images_are_those_of_each(features):
    """In batches of those that have one size after padding, and in the given order."""
    sizes = [(96, 128), (64, 64), (90, 120), (96, 128), (97, 128)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    boxes = [torch.tensor([[0.1, 0.2, 0.5, 0.9]]).repeat(n, 1) for n in range(5)]
    batches, of_batch = [], features._of_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_of_batch", lambda *args: batches.append(len(args[0])) or of_batch(*args))
        together = features.of_images(images, boxes)
    assert batches == [3, 1, 1]
    for image, corners, found in zip(images, boxes, together, strict=True):
        assert found.shape == (len(corners), features.size)
        np.testing.assert_allclose(features(image, corners), found, atol=1e-5)


def test_small_images_stay_as_they_are():
    scenes = make_synthetic_dataset(1, seed=0, image_size=(40, 60)).cast_column("image", datasets.Image(decode=False))
    shapes = [
        tuple(BoxImages({"": scenes}, [("", 0)], side, "objects", enlarge=enlarge)[0]["image"].shape)
        for side, enlarge in ((80, False), (80, True), (20, False))
    ]
    assert shapes == [(3, 40, 60), (3, 80, 120), (3, 20, 30)]


def test_normalization_is_a_choice(features):
    torch.manual_seed(0)
    plain = BoxFeatures(build_detector("detr", backbone="resnet10t", strides=(16, 32)), [16, 32], normalize=False)
    assert plain.weights_hash() == features.weights_hash()
    one, other = plain(*scene(160, 128))[0], features(*scene(160, 128))[0]
    for level in (slice(0, 256), slice(256, None)):
        np.testing.assert_allclose(one[level] / np.linalg.norm(one[level]), other[level], atol=1e-6)


@pytest.mark.parametrize(("family", "strides"), [("detr", [32]), ("conditional_detr", [32]), ("rt_detr", [16, 8])])
def test_backbones_of_detectors(family, strides):
    detector = tiny_detector(family)
    features = BoxFeatures(detector, strides)
    found = features(*scene(64, 64))
    assert found.shape == (1, features.size) and np.ptp(found) > 0
    assert not features.backbone.training
    with pytest.raises(ValueError, match=r"no feature map of stride 4, it has \[.*32\]"):
        BoxFeatures(detector, [4])


def test_detectors_without_a_backbone_are_refused():
    with pytest.raises(ValueError, match="'yolos' have no backbone of their own"):
        BoxFeatures(tiny_detector("yolos"), [32])


# ---- the command ----


@pytest.fixture(scope="module")
def proposed(tmp_path_factory):
    """12 scenes with labels; the proposals are the true boxes and 4 others, the fourth image has none."""
    scenes = make_synthetic_dataset(12, seed=0, image_size=(64, 80))
    others = [[4.0, 6.0, 20.0, 18.0], [30.0, 8.0, 24.0, 30.0], [10.0, 30.0, 40.0, 25.0], [0.0, 0.0, 80.0, 64.0]]
    column = []
    for row, objects in enumerate(scenes["objects"]):
        boxes = [] if row == 3 else objects["bbox"] + others
        column.append({"bbox": boxes, "score": np.linspace(1, 0, len(boxes)).tolist()})
    features = datasets.Features({"proposals": proposals_feature(with_clusters=False)})
    column = datasets.Dataset.from_dict({"proposals": column}, features=features)
    folder = tmp_path_factory.mktemp("proposed") / "scenes"
    datasets.concatenate_datasets([scenes, column], axis=1).save_to_disk(folder)
    (folder / "proposals.json").write_text(
        json.dumps({"dataset": "scenes", "settings": {"mode": "true"}, "versions": {"opencv": "1"}, "skipped": [{}]})
    )
    return folder


@pytest.fixture
def arguments(proposed, detector_folders, tmp_path):
    """A function that gives arguments of a small run, with any of them replaced."""

    def make(output="out", **changes) -> ClustersArguments:
        defaults = {
            "dataset": str(proposed),
            "output_dir": str(tmp_path / output),
            "detector": str(detector_folders("detr")),
            "strides": [32],
            "short_side": 64,
            "num_clusters": 6,
            "pca_dim": 8,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return ClustersArguments(**defaults | changes)

    return make


@pytest.fixture
def counted(monkeypatch):
    """The number of boxes of each image that the backbone sees."""
    seen, of_images = [], BoxFeatures.of_images

    def count(self, images, boxes):
        seen.extend(map(len, boxes))
        return of_images(self, images, boxes)

    monkeypatch.setattr(BoxFeatures, "of_images", count)
    return seen


def rows_of(dataset: datasets.Dataset) -> list[dict]:
    return dataset.cast_column("image", datasets.Image(decode=False)).to_list()


def test_output_is_the_input_with_clusters(proposed, arguments, capsys):
    result = cluster_proposals(arguments())
    before, after = rows_of(datasets.load_from_disk(proposed)), rows_of(result)
    clusters = [row["proposals"].pop("cluster") for row in after]
    assert after == before
    assert [len(values) for values in clusters] == [len(row["proposals"]["score"]) for row in before]
    assert clusters[3] == []
    used = {cluster for values in clusters for cluster in values}
    assert used <= set(range(6)) and len(used) > 3
    assert result.features["proposals"]["cluster"].feature.dtype == "int32"
    assert validate_proposals(load_dataset_source(arguments().output_dir), with_clusters=True).boxes > 50
    printed = capsys.readouterr().out
    assert "in 6 clusters" in printed and "by size" in printed and "shuffled" in printed


def test_clusters_are_those_of_the_features(arguments, detector_folders):
    """Every box has the centre that is nearest to its own features."""
    run = arguments(fit_boxes=40, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Path, "unlink", lambda path, **_: None)
        patch.setattr(command, "put_in_place", lambda results, *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            cluster_proposals(run)
    folder = command.Path(run.output_dir + ".partial")
    scratch = np.fromfile(folder / "scratch.f16", dtype=np.float16).reshape(40, -1)
    assert scratch.shape[1] == 96 and scratch.std() > 0  # as many channels as the last stage of the backbone has
    with np.load(next(folder.glob("clustering-*.npz"))) as stored:
        clustering = Clustering(**stored)
    np.testing.assert_array_equal(fit_clusters(scratch, 6, 8, 5).centers, clustering.centers)
    features = command.load_features(run)
    for row in rows_of(cluster_proposals(run))[:3]:
        image = torch.from_numpy(decode_image(row["image"])).permute(2, 0, 1)
        boxes = torch.tensor(row["proposals"]["bbox"]) / torch.tensor([80.0, 64.0, 80.0, 64.0])
        boxes[:, 2:] += boxes[:, :2]
        found = features(image, boxes).astype(np.float16)
        assert clustering.assign(found).tolist() == row["proposals"]["cluster"]
    assert not folder.exists()


def test_report_is_saved_with_the_data(proposed, arguments):
    result = cluster_proposals(arguments())
    report = json.loads((command.Path(arguments().output_dir) / "proposals.json").read_text())
    assert report["settings"]["mode"] == "true" and report["skipped"] == [{}] and report["dataset"] == "scenes"
    settings = report["settings"]["clusters"]
    assert settings["num_clusters"] == 6 and settings["strides"] == [32] and settings["seed"] == 0
    assert report["versions"]["opencv"] == "1" and "scikit-learn" in report["versions"]["clusters"]
    assert report["statistics"]["train"]["images_without_boxes"] == 1
    record = json.loads(result.info.description.removeprefix("Proposals: "))
    assert record["settings"] == report["settings"]

    numbers = report["clusters"]
    counts = np.bincount([cluster for row in result["proposals"] for cluster in row["cluster"]], minlength=6)
    assert numbers["sizes"] == {
        "min": counts.min(), "median": np.median(counts), "max": counts.max(), "empty": (counts == 0).sum()
    }  # fmt: skip
    assert numbers["boxes"] == counts.sum() and 0 < numbers["explained_variance"] <= 1 and numbers["inertia"] > 0
    agreement = numbers["agreement"]
    true_boxes = sum(len(row["bbox"]) for n, row in enumerate(result["objects"]) if n != 3)
    assert true_boxes <= agreement["matched"] < counts.sum()
    assert agreement["clusters"].keys() == agreement["shuffled"].keys() == agreement["by_size"].keys()


def test_the_same_input_gives_the_same_clusters(arguments):
    one, two, other = (cluster_proposals(arguments(name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert rows_of(one) == rows_of(two) != rows_of(other)
    assert one.info.description == two.info.description


def test_workers_change_nothing(arguments):
    assert rows_of(cluster_proposals(arguments("a"))) == rows_of(
        cluster_proposals(arguments("b", dataloader_num_workers=2))
    )


def test_second_run_does_nothing_and_other_settings_need_overwrite(arguments, counted, capsys):
    first = rows_of(cluster_proposals(arguments()))
    assert len(counted) == 11  # of the 12 images have boxes, and each is seen once
    assert rows_of(cluster_proposals(arguments(overwrite_output_dir=True))) == first
    assert len(counted) == 11 and "Nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="clusters.num_clusters: 6 there, 7 now, clusters.seed: 0 there, 2 now.*over"):
        cluster_proposals(arguments(num_clusters=7, seed=2))
    again = rows_of(cluster_proposals(arguments(num_clusters=7, seed=2, overwrite_output_dir=True)))
    assert len(counted) == 2 * 11 and {c for row in again for c in row["proposals"]["cluster"]} > set(range(5))


def test_the_number_of_clusters_is_chosen_and_told(arguments, capsys):
    result = cluster_proposals(arguments(num_clusters=None))
    boxes = sum(len(row["score"]) for row in result["proposals"])
    number = round((boxes / 2) ** 0.5)
    assert f"{number} clusters, for {boxes} boxes" in capsys.readouterr().out
    report = json.loads((command.Path(arguments().output_dir) / "proposals.json").read_text())
    assert report["settings"]["clusters"]["num_clusters"] == number
    cluster_proposals(arguments(num_clusters=number))
    assert "Nothing to do" in capsys.readouterr().out


def test_another_backbone_is_another_setting(arguments, detector_folders, tmp_path):
    cluster_proposals(arguments())
    folder = tmp_path / "other"
    tiny_detector("detr", seed=1, num_labels=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="clusters.backbone_weights: "):
        cluster_proposals(arguments(detector=str(folder)))


def test_fitting_is_bounded_and_every_image_is_seen_once(arguments, counted, monkeypatch):
    fitted, fit = [], command.fit_clusters

    def record(found, *settings):
        fitted.append((found.shape, len(counted)))
        return fit(found, *settings)

    monkeypatch.setattr(command, "fit_clusters", record)
    cluster_proposals(arguments(fit_boxes=20, fit_boxes_per_image=3))
    assert fitted == [((20, 96), 7)]  # of 7 images, at most 3 boxes of each
    assert len(counted) == 11 and max(counted) > 3  # and the others are seen once too, all boxes of each


def test_interrupted_anywhere_it_continues(arguments, counted, monkeypatch, tmp_path):
    """While features are collected, after the fit, between shards, and before the result is put in place."""
    monkeypatch.setattr(command, "_SHARD_SIZE", 2)
    for module in (command, feature_files):
        monkeypatch.setattr(module, "BATCH", 2)
    few = {"fit_boxes": 20, "fit_boxes_per_image": 3}  # of 7 images
    expected = rows_of(cluster_proposals(arguments("expected", **few)))
    counted.clear()

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    fit, of_images, write = command.fit_clusters, BoxFeatures.of_images, command.write_shard

    def stop_after(number):
        return lambda *args: of_images(*args) if len(counted) < number else kill()

    def write_two(shard, *args, **kwargs):
        return write(shard, *args, **kwargs) if shard.start < 4 else kill()

    seen = []
    for target, name, replacement in [
        (BoxFeatures, "of_images", stop_after(5)),
        (command, "fit_clusters", kill),
        (command, "make_shards", kill),
        (command, "write_shard", write_two),
        (command, "put_in_place", kill),
    ]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(target, name, replacement)
            cluster_proposals(arguments(**few))
        assert not (tmp_path / "out").exists()
        seen.append(len(counted))
        counted.clear()
    # Three batches of two images and the seventh one, with all its boxes; then the four others.
    assert seen == [6, 1, 0, 1, 3]
    assert rows_of(cluster_proposals(arguments(**few))) == expected and not counted
    assert command.fit_clusters is fit and not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_told_while_the_features_are_collected(arguments, monkeypatch, tmp_path):
    """To write through a mapping would end the process with a bus error."""

    def full(path, *args, **kwargs):
        return open("/dev/full" if str(path).endswith("scratch.f16") else path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="if the disk was full, make room and run"):
        patch.setattr(command, "open", full, raising=False)
        cluster_proposals(arguments())
    cluster_proposals(arguments())
    assert not (tmp_path / "out.partial").exists()


def test_damaged_work_is_done_anew(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_SHARD_SIZE", 2)
    monkeypatch.setattr(command, "put_in_place", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        cluster_proposals(arguments())
    work = tmp_path / "out.partial"
    whole = {path.name: path.read_bytes() for path in work.glob("*-*")}
    assert {name.split("-")[0] for name in whole} == {"clustering", "features", "train"}
    for name, content in whole.items():
        half = len(content) // 2
        other = bytes([content[half] ^ 1])
        damaged = content[:half] if "train-000000000" in name else content[:half] + other + content[half + 1 :]
        (work / name).write_bytes(damaged)
    with pytest.raises(InterruptedError):
        cluster_proposals(arguments())
    assert {path.name: path.read_bytes() for path in work.glob("*-*")} == whole
    assert capsys.readouterr().out.count("is damaged, and done anew") == len(whole)


def test_images_that_cannot_be_read_are_left_out_and_listed(proposed, arguments, tmp_path, capsys):
    def spoil(row, index):
        content = row["image"]["bytes"]
        return {"image": {"bytes": {1: b"none", 5: content[:300]}.get(index, content), "path": row["image"]["path"]}}

    scenes = datasets.load_from_disk(proposed).cast_column("image", datasets.Image(decode=False))
    images = [spoil(row, index)["image"] for index, row in enumerate(scenes)]
    column = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    broken = datasets.concatenate_datasets([column, scenes.remove_columns("image")], axis=1)
    broken.save_to_disk(tmp_path / "broken")
    (tmp_path / "broken" / "proposals.json").write_text('{"skipped": [{"split": "old"}], "settings": {}}')
    result = cluster_proposals(arguments(dataset=str(tmp_path / "broken")))
    assert list(result["image_id"]) == [0, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    report = json.loads((tmp_path / "out" / "proposals.json").read_text())
    assert report["skipped"][0] == {"split": "old"}
    assert [(image["split"], image["row"]) for image in report["skipped"][1:]] == [("train", 1), ("train", 5)]
    assert "Left out, for they cannot be read: 2 images" in capsys.readouterr().out


def save_rows(folder, rows: list[dict | None], size=(40, 60)) -> str:
    scenes = make_synthetic_dataset(len(rows), seed=1, image_size=size).remove_columns("objects")
    features = datasets.Features({"proposals": proposals_feature(with_clusters=False)})
    column = datasets.Dataset.from_dict({"proposals": rows}, features=features)
    datasets.concatenate_datasets([scenes, column], axis=1).save_to_disk(folder)
    return str(folder)


def test_boxes_that_cannot_be_used(arguments, tmp_path, counted):
    boxes = [[1, 1, 20, 20], [float("nan"), 1, 5, 5], [9, 9, 0, 4], [30, 20, 50, 90], [70, 1, 5, 5], [2, 2, 30, 30]]
    rows = [
        {"bbox": boxes, "score": [6, 5, 4, 3, 2, 1]},
        None,
        {"bbox": boxes[:1], "score": [1]},
        {"bbox": boxes[3:4], "score": [1]},
    ]
    folder = save_rows(tmp_path / "data", rows)
    result = cluster_proposals(arguments(dataset=folder, num_clusters=3))
    assert counted == [3, 1, 1]
    clusters = [row["cluster"] for row in result["proposals"]]
    assert [len(values) for values in clusters] == [6, 0, 1, 1]
    assert [clusters[0][box] for box in (1, 2, 4)] == [0, 0, 0]
    assert "agreement" not in json.loads((tmp_path / "out" / "proposals.json").read_text())["clusters"]


def test_splits_share_their_clusters(proposed, arguments, tmp_path):
    scenes = datasets.load_from_disk(proposed)
    parts = {"train": scenes.select(range(8)), "validation": scenes.select(range(6, 12))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    both = cluster_proposals(arguments(dataset=str(tmp_path / "both")))
    assert {name: len(split) for name, split in both.items()} == {"train": 8, "validation": 6}
    assert rows_of(both["train"])[6:] == rows_of(both["validation"])[:2]  # the same images
    one = cluster_proposals(arguments("one", dataset=str(tmp_path / "both"), split="validation"))
    assert isinstance(one, datasets.Dataset) and len(one) == 6


# ---- report and pictures ----


def labelled(rows: list[tuple]) -> datasets.Dataset:
    """Rows of boxes, their clusters, objects and their categories."""
    columns = {
        "proposals": [{"bbox": boxes, "score": [0.0] * len(boxes), "cluster": ids} for boxes, ids, _, _ in rows],
        "objects": [{"bbox": objects, "category": categories} for _, _, objects, categories in rows],
    }
    return datasets.Dataset.from_dict(columns)


def test_report_by_hand():
    a, b, c, far = [0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 30, 30], [90, 90, 9, 9]
    dataset = labelled(
        [
            ([a, b, c, far], [0, 0, 1, 3], [a, b, c], [5, 5, 2]),
            ([], [], [a], [5]),
            ([c, a], [0, 1], [], []),
            ([c, b], [1, 1], [b, c], [5, 2]),
        ]
    )
    centers = np.zeros((5, 2), np.float32)
    report = cluster_report({"train": dataset}, Clustering(centers, centers, centers, 0.5, 2.0), seed=0)
    assert report["boxes"] == 8 and report["explained_variance"] == 0.5 and report["inertia"] == 2.0
    assert report["sizes"] == {"min": 0, "median": 1.0, "max": 4, "empty": 2}
    agreement = report["agreement"]
    assert (agreement["matched"], agreement["matched_share"], agreement["majority_share"]) == (5, 5 / 8, 3 / 5)
    # Clusters 0 0 1 1 1, classes 5 5 2 2 5.
    assert agreement["clusters"]["purity"] == pytest.approx(4 / 5)
    assert agreement["clusters"] == cluster_agreement(np.array([0, 0, 1, 1, 1]), np.array([5, 5, 2, 2, 5]))
    assert agreement["by_size"]["purity"] == 1  # the two large boxes are of the one class
    twice = cluster_report({"a": dataset, "b": dataset}, Clustering(centers, centers, centers, 0.5, 2.0), seed=0)
    assert twice["agreement"]["clusters"]["purity"] == pytest.approx(4 / 5) and twice["boxes"] == 16


def test_shuffled_clusters_agree_by_chance():
    rng = np.random.default_rng(0)
    categories = rng.choice(3, 3000, p=[0.8, 0.1, 0.1]).tolist()
    boxes = [[float(20 * n), 0.0, 10.0, 10.0] for n in range(3000)]
    per_row = [slice(start, start + 100) for start in range(0, 3000, 100)]
    ids = [10 * category + int(rng.integers(10)) for category in categories]
    dataset = labelled([(boxes[rows], ids[rows], boxes[rows], categories[rows]) for rows in per_row])
    centers = np.zeros((30, 2), np.float32)
    agreement = cluster_report({"": dataset}, Clustering(centers, centers, centers, 1.0, 0.0), seed=0)["agreement"]
    assert agreement["clusters"]["purity"] == 1 and agreement["clusters"]["ami"] > 0.3
    for control in ("shuffled", "by_size"):
        assert agreement[control]["purity"] == pytest.approx(agreement["majority_share"], abs=0.02)
        assert abs(agreement[control]["ami"]) < 0.01


def test_pictures_show_the_boxes_of_the_largest_clusters(tmp_path, monkeypatch):
    rows = [{"bbox": [[0, 0, 12, 9], [30, 11, 30, 29]], "score": [1, 0.5]}] * 3
    scenes = load_dataset_source(save_rows(tmp_path / "data", rows))
    ids = [[4, 1], [4, 4], [4, 0]]
    column = [{**row, "cluster": values} for row, values in zip(rows, ids, strict=True)]
    clustered = scenes.remove_columns("proposals").add_column("proposals", column)
    drawn = {}
    draw = pseudo_classes.crop_sheet

    def record(crops, path, note):
        drawn.update(crops)
        return draw(crops, path, note)

    monkeypatch.setattr(pseudo_classes, "crop_sheet", record)
    path = draw_clusters({"": clustered}, tmp_path / "sheet.png", 2, seed=0)
    images = [decode_image(row["image"]) for row in scenes]
    assert list(drawn) == ["4: 4 boxes", "0: 1 boxes"]
    first = {crop.tobytes() for crop in drawn["4: 4 boxes"]}
    assert first == {image[:9, :12].tobytes() for image in images} | {images[1][11:40, 30:60].tobytes()}
    assert len({crop.shape for crop in drawn["4: 4 boxes"][:3]}) <= 2 and len(drawn["4: 4 boxes"]) == 4
    assert np.array_equal(drawn["0: 1 boxes"][0], images[2][11:40, 30:60])
    assert decode_image(path).std() > 10


# ---- what is refused ----


def test_bad_input_is_named(proposed, arguments, tmp_path):
    with pytest.raises(DataError, match=r"200 clusters cannot be fitted to 11 boxes .*best 1\). Choose fewer"):
        cluster_proposals(arguments(num_clusters=200, fit_boxes_per_image=1))
    with pytest.raises(DataError, match="holds the input. Choose another output_dir"):
        cluster_proposals(arguments(output_dir=str(proposed)))
    make_synthetic_dataset(2, seed=0).save_to_disk(tmp_path / "bare")
    with pytest.raises(DataError, match="no column 'proposals'.*aligndet proposals"):
        cluster_proposals(arguments(dataset=str(tmp_path / "bare")))
    with pytest.raises(ValueError, match=r"no feature map of stride 8, it has \[32\]"):
        cluster_proposals(arguments(strides=[8]))
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        cluster_proposals(arguments(detector=None, backbone="resnet10t", backbone_weights="nowhere.safetensors"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": None}, "give either backbone_weights .* or a detector"),
        ({"backbone_weights": "timm"}, "give either backbone_weights .* or a detector"),
        ({"backbone": "resnet10t"}, "give either backbone_weights .* or a detector .*, without these two"),
        ({"detector": None, "backbone": "timm/resnet10t"}, "features of a random backbone say little"),
        ({"num_clusters": 0}, "num_clusters must be positive, got 0"),
        ({"strides": []}, "strides must not be empty"),
        ({"fit_boxes": 5}, "6 clusters cannot be fitted to 5 boxes: raise fit_boxes"),
    ],
)
def test_bad_arguments(arguments, change, message):
    with pytest.raises(ValueError, match=message):
        arguments(**change)


# ---- the whole chain ----


def test_from_images_to_a_detector_of_pseudo_classes(tmp_path, detector_folders, capsys):
    """`aligndet proposals`, `clusters` and `pretrain`; without clusters, `--use_clusters true` is one clear error."""
    write_synthetic_folder(tmp_path / "images", {"train": 6}, seed=0, image_size=(64, 80))
    paths = {name: str(tmp_path / name) for name in ("images", "proposals", "clusters", "pretrained")}
    detector, quiet = str(detector_folders("detr")), ["--disable_tqdm", "true"]

    def run(name, source, *flags):
        return cli.main([name, "--dataset", paths[source], *map(str, flags), *quiet])

    pretrain = ["--detector", detector, "--output_dir", paths["pretrained"], "--use_clusters", "true"]
    pretrain += ["--image_sizes", 64, "--max_steps", 1, "--use_cpu", "true", "--write_report", "false"]
    search = ["--source", "opencv", "--mode", "single", "--dataloader_num_workers", 1]
    assert run("proposals", "images", "--output_dir", paths["proposals"], *search) == 0
    assert run("pretrain", "proposals", *pretrain) == 2
    assert "'proposals' has no field 'cluster'" in (error := capsys.readouterr().err) and "aligndet clusters" in error
    cluster = ["--detector", detector, "--strides", 32, "--num_clusters", 5, "--short_side", 64, "--num_pictures", 2]
    assert run("clusters", "proposals", *cluster, "--output_dir", paths["clusters"]) == 0
    assert (tmp_path / "clusters" / "clusters.png").is_file()
    assert run("pretrain", "clusters", *pretrain) == 0

    clusters = [
        cluster for row in datasets.load_from_disk(paths["clusters"])["proposals"] for cluster in row["cluster"]
    ]
    config = AutoModelForObjectDetection.from_pretrained(tmp_path / "pretrained" / "detector").config
    assert config.num_labels == max(clusters) + 1 == 5
    assert config.id2label[4] == "cluster_4"
