"""Evaluation images among the training images: the same files, copies, and what only looks related."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest

from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.leakage import difference_hash, find_leaks, fingerprints, look_for_leaks
from aligndet_hf.data.synthetic import write_synthetic_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six training images, and evaluation images of which 1 is a file of them, 2 a copy, 3 flipped, 4 no image."""
    folder = tmp_path_factory.mktemp("leakage")
    write_synthetic_folder(folder, {"train": 6, "validation": 1}, seed=0, image_size=(240, 320))
    for split in ("train", "validation"):
        (folder / split / "metadata.jsonl").unlink()
    train, validation = (sorted((folder / split).glob("*.jpg")) for split in ("train", "validation"))
    validation[0].rename(folder / "validation" / "0_own.jpg")
    (folder / "validation" / "1_same.jpg").write_bytes(train[3].read_bytes())
    image = PIL.Image.open(train[5])
    image.resize((200, 150)).save(folder / "validation" / "2_copy.jpg", quality=40)
    PIL.Image.fromarray(np.asarray(image)[:, ::-1]).save(folder / "validation" / "3_flipped.png")
    (folder / "validation" / "4_broken.png").write_text("no picture")
    return folder


def test_files_and_copies_are_found(folder):
    seen, held_out = (
        fingerprints(load_dataset_source(folder, split), disable_tqdm=True) for split in ("train", "validation")
    )
    assert (len(seen.names), seen.num_unreadable) == (6, 0) and (len(held_out.names), held_out.num_unreadable) == (
        4,
        1,
    )
    same, copy = find_leaks(seen, held_out)
    assert same["image"].endswith("1_same.jpg") and same["seen"] == seen.names[3]
    assert same["same_file"] and same["distance"] == 0
    assert copy["image"].endswith("2_copy.jpg") and copy["seen"] == seen.names[5]
    assert not copy["same_file"] and 0 < copy["distance"] < 32
    assert [leak["image"] for leak in find_leaks(seen, held_out, max_distance=0)] == [same["image"]]
    others = [leak["image"] for leak in find_leaks(seen, held_out, max_distance=256)]
    assert others == held_out.names  # everything has a closest image
    nothing = fingerprints(load_dataset_source(folder, "train").select([]), disable_tqdm=True)
    assert find_leaks(nothing, held_out) == [] and find_leaks(seen, nothing) == []


def test_images_without_names_are_counted_one_by_one(folder, tmp_path):
    files = sorted((folder / "train").glob("*.jpg"))
    images = [{"bytes": path.read_bytes(), "path": None} for path in files]
    dataset = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=False))
    datasets.DatasetDict({"validation": dataset}).save_to_disk(tmp_path / "data")
    seen = [(str(folder), "validation", ""), (str(folder), "train", "")]
    found = look_for_leaks((str(tmp_path / "data"), "validation", None), seen, [], tmp_path / "leakage.json")
    assert found["images"] == 6 and found["training_images"] == [4, 6] and found["unreadable"] == 1
    assert [(leak["image"], leak["same_file"]) for leak in found["leaks"]] == [("<bytes>", True)] * 6
    assert [leak["seen"] for leak in found["leaks"]] == list(map(str, files))  # of all data sets the closest image


def test_the_hash_tells_brightness_rising_to_the_right():
    ramp = np.repeat(np.linspace(0, 255, 34).astype(np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    assert difference_hash(ramp).tolist() == [255] * 32
    assert difference_hash(ramp[:, ::-1]).tolist() == [0] * 32
    half = np.concatenate([ramp[:16], ramp[:16, ::-1]])
    assert difference_hash(half).tolist() == [255] * 16 + [0] * 16


@pytest.mark.parametrize("change", ["brighter", "jpeg", "smaller"])
def test_the_hash_hardly_minds_what_copies_go_through(folder, change):
    for path in (folder / "train").glob("*.jpg"):
        image = decode_image(path)
        if change == "brighter":
            copy = np.clip(image.astype(int) + 20, 0, 255).astype(np.uint8)
        else:
            file = io.BytesIO()
            scale = 0.5 if change == "smaller" else 1
            size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
            PIL.Image.fromarray(image).resize(size).save(file, "JPEG", quality=50)
            copy = decode_image(file.getvalue())
        assert np.unpackbits(difference_hash(image) ^ difference_hash(copy)).sum() < 32
