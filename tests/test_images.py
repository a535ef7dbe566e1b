from io import BytesIO

import cv2
import datasets
import numpy as np
import PIL.Image
import pytest

from aligndet_hf.data.errors import DataError, ImageError
from aligndet_hf.data.images import decode_image, image_size, read_header


def encode(image, format="PNG", **options):
    file = BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


@pytest.fixture
def pixels():
    """A picture of 20 x 30 with different channels and no symmetry."""
    rows, columns = np.mgrid[:20, :30]
    return np.stack([rows * 12, columns * 8, rows * 4 + columns * 2], axis=2).astype(np.uint8)


def test_png_comes_back_exactly_from_every_kind_of_value(pixels, tmp_path):
    image = PIL.Image.fromarray(pixels)
    content = encode(image)
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    values = [content, str(path), path, image, pixels]
    values += [
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": content, "path": "x.png"},
    ]
    for value in values:
        decoded = decode_image(value)
        assert decoded.dtype == np.uint8 and decoded.flags.writeable
        np.testing.assert_array_equal(decoded, pixels)
        assert image_size(value) == (20, 30)


def test_greyscale_rgba_and_palette(pixels):
    grey = pixels[:, :, 0]
    decoded = decode_image(encode(PIL.Image.fromarray(grey)))
    np.testing.assert_array_equal(decoded, np.repeat(grey[:, :, None], 3, axis=2))
    rgba = np.concatenate([pixels, np.full((20, 30, 1), 7, dtype=np.uint8)], axis=2)
    np.testing.assert_array_equal(
        decode_image(encode(PIL.Image.fromarray(rgba))), pixels
    )  # the alpha channel is dropped
    palette = PIL.Image.fromarray(pixels).quantize(16)
    np.testing.assert_array_equal(decode_image(encode(palette)), np.array(palette.convert("RGB")))
    bilevel = PIL.Image.fromarray(grey > 100)
    assert set(np.unique(decode_image(encode(bilevel)))) == {0, 255}


def test_cmyk(pixels):
    content = encode(PIL.Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)
    decoded = decode_image(content)
    assert decoded.shape == (20, 30, 3)
    assert np.abs(decoded.astype(int) - pixels).mean() < 6  # a wrong inversion would give about 100


def test_16_bit_greys_are_scaled(pixels):
    grey = pixels[:, :, 1]
    wide = grey.astype(np.uint16) * 8 + 7000
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    window = (7000, 7000 + 8 * 255)
    for value in (encode(PIL.Image.fromarray(wide)), encode(PIL.Image.fromarray(wide), "TIFF"), wide, wide[..., None]):
        np.testing.assert_array_equal(decode_image(value, window), expected)
        np.testing.assert_array_equal(decode_image(value)[:, [0, -1]], np.full((20, 2, 3), [[[0] * 3, [255] * 3]]))
    for value in (wide.astype(np.float32) / 10, encode(PIL.Image.fromarray(wide.astype(np.float32) / 10), "TIFF")):
        np.testing.assert_array_equal(decode_image(value, (700, 904)), expected)


def test_levels_beyond_the_window_are_cut():
    levels = np.array([[-5, 10, 15, 20, 99, np.nan, np.inf, -np.inf]], dtype=np.float32)
    assert decode_image(levels, (10, 20))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0, 255, 0]
    assert decode_image(np.full((2, 2), 7000, np.uint16))[0, 0].tolist() == [0, 0, 0]  # nothing to scale
    assert decode_image(np.full((2, 2), np.nan, np.float32))[0, 0].tolist() == [0, 0, 0]


def test_16_bit_colours_keep_their_upper_bits_as_pillow_has_it(pixels):
    wide = pixels.astype(np.uint16) * 256 + 37
    _, content = cv2.imencode(".png", wide[:, :, ::-1])
    for value in (content.tobytes(), wide):
        np.testing.assert_array_equal(decode_image(value), pixels)
    assert read_header(content.tobytes()).has_wide_colors and not read_header(content.tobytes()).is_deep


def test_greys_of_8_bits_are_never_scaled(pixels):
    content = encode(PIL.Image.fromarray(pixels[:, :, 0] // 2))
    np.testing.assert_array_equal(decode_image(content, (10, 20))[:, :, 0], pixels[:, :, 0] // 2)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_as_datasets_does(pixels, orientation, format):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    content = encode(PIL.Image.fromarray(pixels), format, exif=exif)
    expected = np.array(datasets.Image().decode_example({"bytes": content, "path": None}))
    decoded = decode_image(content)
    np.testing.assert_array_equal(decoded, expected)
    assert decoded.shape[:2] == ((30, 20) if orientation >= 5 else (20, 30))
    assert image_size(content) == decoded.shape[:2]


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated_file_is_named(pixels, tmp_path, format):
    path = tmp_path / "broken.img"
    content = encode(PIL.Image.fromarray(np.tile(pixels, (10, 10, 1))), format)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="broken.img"):
        decode_image({"bytes": None, "path": str(path)})
    assert image_size(path) == (200, 300)  # the header is whole


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0" + b"\0" * 40]
)
def test_corrupt_content_is_one_clear_error(content):
    for read in (decode_image, image_size):
        with pytest.raises(ImageError, match=r"scan_7\.jpg"):
            read({"bytes": content, "path": "scan_7.jpg"})
    assert issubclass(ImageError, DataError) and issubclass(DataError, ValueError)


def test_missing_file_none_and_odd_values(tmp_path):
    with pytest.raises(ImageError, match="gone.jpg"):
        decode_image(str(tmp_path / "gone.jpg"))
    for value in (None, {"bytes": None, "path": None}, 3):
        for read in (decode_image, image_size):
            with pytest.raises(ImageError, match="Cannot read the image"):
                read(value)
    for array in (
        np.zeros((4, 4, 3)),
        np.array([["a"]]),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ):
        with pytest.raises(ImageError):
            decode_image(array)


def test_one_pixel():
    np.testing.assert_array_equal(decode_image(encode(PIL.Image.new("RGB", (1, 1), (1, 2, 3)))), [[[1, 2, 3]]])
