"""Images are opened before anything is trained on, and labels are compared with their sizes."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest

from aligndet_hf.data import pixels
from aligndet_hf.data.columns import objects_feature, validate_objects
from aligndet_hf.data.errors import DataError, ImageError
from aligndet_hf.data.pixels import check_box_format


def encode(height=60, width=100, format="JPEG", mode="RGB", orientation=None, noise=False):
    image = PIL.Image.new(mode, (width, height))
    if noise:
        image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    file, options = io.BytesIO(), {}
    if orientation:
        options["exif"] = PIL.Image.Exif()
        options["exif"][0x0112] = orientation
    image.save(file, format, **options)
    return file.getvalue()


def labelled(images, boxes=None, **columns):
    """A data set of encoded images (or image structs), each with one box, and further columns."""
    boxes = boxes or [[[10, 10, 20, 20]]] * len(images)
    features = {"image": datasets.Image(decode=False), "objects": objects_feature(["cell"])}
    features |= {name: datasets.Value("int64") for name in columns}
    rows = [image if isinstance(image, dict) else {"bytes": image, "path": None} for image in images]
    objects = [{"bbox": b, "category": [0] * len(b), "area": [1.0] * len(b), "id": list(range(len(b)))} for b in boxes]
    return datasets.Dataset.from_dict(
        {"image": rows, "objects": objects, **columns}, features=datasets.Features(features)
    )


def check(*args, **kwargs):
    return validate_objects(labelled(*args, **kwargs), ["cell"], "mine")


# ---- files ----


@pytest.mark.parametrize("limit", [10**9, 0], ids=["all decoded", "ends looked at"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_all_bad_images_are_listed_at_once(monkeypatch, tmp_path, format, limit):
    monkeypatch.setattr(pixels, "MAX_DECODED_PIXELS", limit)
    whole = encode(format=format, noise=True)
    (tmp_path / "cut.img").write_bytes(whole[: len(whole) // 2])
    images = [whole, whole[: len(whole) // 2], whole, {"bytes": None, "path": str(tmp_path / "gone.jpg")}]
    images += [{"bytes": None, "path": str(tmp_path / "cut.img")}, b"", whole]
    with pytest.raises(ImageError) as error:
        check(images)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("mine: 4 of 7 images cannot be read.")
    assert [line.split()[1] for line in lines[1:]] == ["1,", "3,", "4,", "5,"]
    assert "gone.jpg" in lines[2] and "cut.img" in lines[3]
    assert check([whole] * 3).rows == 3


def test_of_many_images_only_the_doubtful_ones_are_decoded(monkeypatch):
    monkeypatch.setattr(pixels, "MAX_DECODED_PIXELS", 0)
    decoded = []
    monkeypatch.setattr(pixels, "decode_image", lambda value, **window: decoded.append(value))
    whole = encode()
    check([whole, whole + b"\0" * 9, encode(format="PNG"), encode(format="TIFF")])
    assert len(decoded) == 2  # one with something behind its end, and one whose end says nothing
    monkeypatch.setattr(pixels, "MAX_DECODED_PIXELS", 4 * 60 * 100)
    check([whole] * 4)
    assert len(decoded) == 6


def test_an_image_of_too_many_pixels_is_named_with_a_way_out(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ImageError, match=r"row 0.*more than 4000 pixels. Make it smaller or cut it into tiles"):
        check([encode()])


def test_long_lists_are_cut():
    with pytest.raises(ImageError, match="60 of 60 images.*"):
        check([b"x"] * 60)
    try:
        check([b"x"] * 60)
    except ImageError as error:
        assert len(str(error).splitlines()) == 52 and str(error).endswith("... and 10 more")


def test_kinds_of_images_are_counted():
    report = check([encode(), encode(), encode(format="PNG", mode="RGBA"), encode(mode="L")])
    assert report.images.kinds == {"JPEG RGB": 2, "PNG RGBA": 1, "JPEG L": 1}
    assert report.images.sizes.tolist() == [[60, 100]] * 4
    assert "note: 1 images have a fourth channel, which is left out, as transformers does (rows 2)" in str(report)


# ---- sizes ----


def test_sizes_that_agree():
    for width, height in ((100, 60), (101, 59), (0, 0), (None, None), (100, None)):
        assert check([encode()] * 2, width=[width] * 2, height=[height] * 2).boxes == 2
    turned = encode(orientation=6)
    assert check([turned], width=[60], height=[100]).boxes == 1  # as everybody sees it


@pytest.mark.parametrize(
    "width, height, orientation, message",
    [
        (50, 30, None, r"width 50 and height 30, but it is 100 pixels wide and 60 high.*Multiply the boxes by 2"),
        (400, 240, None, r"resized later. Multiply the boxes by 0.25"),
        (100, 60, 6, r"without the rotation that their EXIF data ask for"),
        (60, 100, None, r"width and height are exchanged"),
        (100, 80, None, r"other images, or cropped ones"),
    ],
)
def test_sizes_that_disagree_stop_with_the_reason(width, height, orientation, message):
    image = encode(orientation=orientation)
    with pytest.raises(DataError, match=message) as error:
        check([encode(), image], width=[100, width], height=[60, height])
    assert str(error.value).startswith("mine, row 1: ") and "1 of 2 images disagree" in str(error.value)


def test_copies_of_several_sizes():
    with pytest.raises(DataError, match="2 of 2 images disagree.*by the factor of each image"):
        check([encode(), encode(120, 200)], width=[50, 50], height=[30, 30])


# ---- boxes ----


def random_boxes(rng, count, width, height):
    low = rng.uniform(0, (0.6 * width, 0.6 * height), (count, 2))
    return np.concatenate([low, rng.uniform(0.1, 0.4, (count, 2)) * (width, height)], axis=1)


def look(boxes, width, height):
    sizes = np.tile([height, width], (len(boxes), 1))
    return check_box_format(boxes, sizes, np.arange(len(boxes)), "objects", "mine")


@pytest.mark.parametrize("width, height", [(640, 480), (4000, 3000), (300, 900)])
@pytest.mark.parametrize("as_corners", [False, True])
def test_a_scale_of_0_to_1000_is_refused(width, height, as_corners):
    boxes = random_boxes(np.random.default_rng(0), 200, width, height)
    assert look(boxes, width, height) == []
    scaled = boxes / (width, height, width, height) * 1000
    scaled[0] = [900, 900, 100, 100]
    scaled[:, 2:] += scaled[:, :2] * as_corners
    with pytest.raises(DataError, match=r"on a scale of 0 to 1000.*multiply x by the image's width / 1000"):
        look(np.minimum(scaled, 1000), width, height)


def test_images_of_about_1000_pixels_are_not_taken_for_a_scale():
    for size in (1000, 1024, 1100):
        boxes = random_boxes(np.random.default_rng(0), 200, size, size)
        boxes[0] = [0, 0, 1000, 1000]
        assert look(boxes, size, size) == []


def test_boxes_in_the_upper_left_corner_are_told():
    boxes = random_boxes(np.random.default_rng(0), 60, 100, 60)
    assert look(boxes, 100, 60) == []
    (note,) = look(boxes * 0.5, 100, 60)
    assert "drawn on smaller copies?" in note
    assert look(boxes[:49] * 0.5, 100, 60) == []  # too few to tell


def test_a_majority_of_dropped_boxes_stops():
    good, gone = [10, 10, 20, 20], [200, 10, 20, 20]
    assert check([encode()], [[good, gone]]).dropped == {"outside the image": 1}
    with pytest.raises(DataError, match=r"2 of 3 boxes in 'objects' cannot be used(.|\n)*2 boxes, outside the image"):
        check([encode()], [[good, gone, gone]])
    with pytest.raises(DataError, match=r"2 of 3 boxes(.|\n)*1 boxes, no area"):
        check([encode()], [[good, gone, [5, 5, 0, 5]]])
