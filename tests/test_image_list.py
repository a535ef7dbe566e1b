"""One list of images from files, folders, patterns, videos, data sets and memory."""

import os
import pickle

import cv2
import datasets
import numpy as np
import PIL.Image
import pytest

from aligndet_hf.data.errors import DataError, ImageError
from aligndet_hf.data.image_list import list_images
from aligndet_hf.data.synthetic import make_synthetic_dataset


def write_image(path, value, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)
    return path


def write_video(path, values, size=(48, 64)):
    """One grey frame for each value, without loss."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 25, size[::-1])
    for value in values:
        writer.write(np.full((*size, 3), value, dtype=np.uint8))
    writer.release()
    return path


def test_a_folder_its_names_and_its_order(tmp_path):
    for name, value in {"b.png": 2, "a.png": 1, "deep/c.png": 3, ".hidden/d.png": 4}.items():
        write_image(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("no image")
    images = list_images(tmp_path)
    assert images.names == ["a.png", "b.png", "deep/c.png"] and images.ids == [1, 2, 3]
    assert [int(images.read(index)[0, 0, 0]) for index in range(3)] == [1, 2, 3]
    assert images.value(2) == {"bytes": None, "path": str(tmp_path / "deep/c.png")}


def test_patterns_files_and_memory_in_the_order_given(tmp_path):
    for name, value in {"x/a.png": 1, "x/b.png": 2, "y/a.png": 3}.items():
        write_image(tmp_path / name, value)
    array, grey = np.full((4, 4, 3), 9, dtype=np.uint8), PIL.Image.new("L", (4, 4), 8)
    images = list_images([array, tmp_path / "y/a.png", str(tmp_path / "x/*.png"), grey])
    assert [int(images.read(index).max()) for index in range(5)] == [9, 3, 1, 2, 8]
    assert images.value(0) is None
    # two are called a.png, two have no name
    assert images.names == ["000000-image.png", "000001-a.png", "000002-a.png", "000003-b.png", "000004-image.png"]
    assert list_images(str(tmp_path / "*/a.png")).names == ["x/a.png", "y/a.png"]


def test_a_video_gives_its_frames_in_order_however_they_are_asked_for(tmp_path):
    path = write_video(tmp_path / "drive.avi", [10 * number for number in range(20)])
    images = list_images(path)
    assert images.names[:2] == ["drive.avi/000000.jpg", "drive.avi/000001.jpg"] and len(images) == 20
    order = [0, 1, 2, 7, 19, 3, 4, 0]
    assert [int(images.read(index).mean().round()) for index in order] == [10 * index for index in order]
    other = pickle.loads(pickle.dumps(images))
    assert int(other.read(5).mean().round()) == 50


def test_a_video_that_ends_early_is_read_as_far_as_it_goes_and_named(tmp_path):
    path = write_video(tmp_path / "drive.avi", range(0, 200, 5))
    assert list_images(path).faults == []
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    write_image(tmp_path / "a.png", 1)
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    images = list_images(tmp_path)
    frames = [name for name in images.names if name.startswith("drive.avi/")]
    assert 10 < len(frames) < 40
    assert int(images.read(images.names.index(frames[-1])).mean().round()) == 5 * (len(frames) - 1)
    assert [fault["file"] for fault in images.faults] == ["broken.mp4", "drive.avi"]
    assert f"{40 - len(frames)} frames before" in images.faults[1]["reason"]


def test_a_data_set_keeps_its_ids_and_the_names_of_its_files():
    dataset = make_synthetic_dataset(3, seed=0, image_size=(40, 48))
    images = list_images(dataset.map(lambda row: {"image_id": row["image_id"] + 70}))
    assert images.ids == [70, 71, 72] and images.names == ["000000.jpg", "000001.jpg", "000002.jpg"]
    assert images.read(1).shape == (40, 48, 3) and images.value(1)["bytes"][:2] == b"\xff\xd8"
    assert list_images([dataset, dataset]).ids == [1, 2, 3, 4, 5, 6]  # the same ids twice say nothing


def test_a_saved_data_set_is_found_by_its_folder(tmp_path):
    dataset = make_synthetic_dataset(4, seed=0, image_size=(40, 48))
    splits = {"train": dataset.select(range(3)), "test": dataset.select([3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(list_images(tmp_path / "saved")) == 4 and len(list_images(tmp_path / "saved", "test")) == 1


def test_a_split_of_a_folder_is_that_split_alone(tmp_path):
    for name, level in (("train/a.png", 1), ("train/b.png", 2), ("validation/c.png", 3)):
        write_image(tmp_path / name, level)
    assert len(list_images(tmp_path)) == 3
    images = list_images(tmp_path, "validation")
    assert len(images) == 1 and int(images.read(0).mean()) == 3
    with pytest.raises(DataError, match="no split 'valid'; found train, validation"):
        list_images(tmp_path, "valid")
    with pytest.raises(DataError, match="split 'train': what is given has no splits"):
        list_images([tmp_path / "train/a.png", str(tmp_path / "train/*.png")], "train")


def test_the_identity_changes_with_the_images(tmp_path):
    path = write_image(tmp_path / "a.png", 1)
    before = list_images(tmp_path).identity()
    assert list_images(tmp_path).identity() == before
    write_image(path, 200, size=(60, 80))
    assert list_images(tmp_path).identity() != before
    first, second = (np.full((4, 4, 3), value, dtype=np.uint8) for value in (1, 2))
    assert list_images(first).identity() != list_images(second).identity()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jpg: there is no such file"):
        list_images(str(tmp_path / "nothing.jpg"))
    with pytest.raises(DataError, match=r"\*\.jpg: no image and no video has a name like this"):
        list_images(str(tmp_path / "*.jpg"))
    with pytest.raises(DataError, match="there is no image to look at"):
        list_images([])
    with pytest.raises(DataError, match="expected images as paths, arrays"):
        list_images([3])
    with pytest.raises(DataError, match="expected images as paths, arrays"):
        list_images({"image": "a.jpg"})
    with pytest.raises(DataError, match="https://mine.example/a.jpg.id=3: images are not downloaded"):
        list_images("https://mine.example/a.jpg?id=3")
    with pytest.raises(DataError, match="no column 'image'"):
        list_images(datasets.Dataset.from_dict({"picture": ["a.jpg"]}))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        list_images(tmp_path / "bad.png").read(0)


def test_names_of_a_data_set_stay_inside_the_output():
    """Somebody else's data set may name any file, and `predict` writes files by these names."""
    names = ["/etc/a.png", "../../b.png", "C:\\mine\\..\\c.png", "12:30.png", "..", None]
    rows = {"image": [PIL.Image.new("RGB", (8, 8))] * len(names), "file_name": names}
    found = list_images(datasets.Dataset.from_dict(rows)).names
    assert found == ["etc/a.png", "b.png", "mine/c.png", "12:30.png", "000004.jpg", "000005.jpg"]


def test_a_folder_of_links_to_elsewhere_says_what_to_give(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "links").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.jpg")
    os.symlink(tmp_path / "photos" / "a.jpg", tmp_path / "links" / "a.jpg")
    with pytest.raises(
        DataError, match=r"no image to look at. .*links/a.jpg: a link to a file outside .*: give the fol"
    ):
        list_images(tmp_path / "links")


def test_a_transform_of_a_data_set_is_not_applied():
    dataset = make_synthetic_dataset(1, seed=0, image_size=(32, 40))
    images = list_images(dataset.with_transform(lambda batch: {"image": [None] * len(batch["image"])}))
    assert np.array_equal(images.read(0), list_images(dataset).read(0))
    with pytest.raises(DataError, match="expected images as paths, .*IterableDataset"):
        list_images(dataset.to_iterable_dataset())
