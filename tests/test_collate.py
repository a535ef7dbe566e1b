import pytest
import torch

from aligndet_hf.data.collate import collate_labelled, collate_views, normalize_images, pad_images


def item(size, momentum_size, ids, momentum_ids):
    def labels(ids):
        return {
            "boxes": torch.rand(len(ids), 4),
            "class_labels": torch.zeros(len(ids), dtype=torch.int64),
            "proposal_ids": torch.tensor(ids, dtype=torch.int64),
        }

    return {
        "image": torch.randint(1, 256, (3, *size), dtype=torch.uint8),
        "labels": labels(ids),
        "momentum_image": torch.randint(1, 256, (3, *momentum_size), dtype=torch.uint8),
        "momentum_labels": labels(momentum_ids),
    }


def test_padding_on_the_right_and_at_the_bottom():
    images = [torch.randint(1, 256, (3, *size), dtype=torch.uint8) for size in [(4, 9), (6, 5)]]
    pixel_values, pixel_mask = pad_images(images)
    assert pixel_values.shape == (2, 3, 6, 9) and pixel_values.dtype == torch.uint8
    assert pixel_mask.shape == (2, 6, 9) and pixel_mask.dtype == torch.int64
    normalized = normalize_images(pixel_values, pixel_mask, [0.5] * 3, [0.2] * 3)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (pixel_values, normalized))
    for image, padded, mask in zip(images, pixel_values, pixel_mask, strict=True):
        _, h, w = image.shape
        assert torch.equal(padded[:, :h, :w], image)
        assert padded.sum() == image.sum()  # nothing in the padding
        assert mask[:h, :w].all() and mask.sum() == h * w


@pytest.mark.parametrize("multiple, expected", [(1, (6, 9)), (4, (8, 12)), (3, (6, 9)), (32, (32, 32))])
def test_padding_to_a_multiple(multiple, expected):
    images = [torch.ones((3, *size), dtype=torch.uint8) for size in [(4, 9), (6, 5)]]
    pixel_values, pixel_mask = pad_images(images, multiple)
    assert pixel_values.shape[2:] == pixel_mask.shape[1:] == expected
    assert pixel_mask.sum() == 4 * 9 + 6 * 5


def test_views_of_a_batch():
    items = [item((4, 9), (8, 3), [0, 2], [0, 2]), item((6, 5), (2, 2), [1], [1])]
    batch = collate_views(items, pad_to_multiple=2)
    assert set(batch) == {f"{p}{k}" for p in ("", "momentum_") for k in ("pixel_values", "pixel_mask", "labels")}
    assert batch["pixel_values"].shape == (2, 3, 6, 10) and batch["momentum_pixel_values"].shape == (2, 3, 8, 4)
    assert torch.equal(batch["momentum_pixel_values"][1, :, :2, :2], items[1]["momentum_image"])
    for name in ("labels", "momentum_labels"):
        for labels, source in zip(batch[name], items, strict=True):
            assert labels["boxes"] is source[name]["boxes"]  # still relative to the unpadded view


def test_proposal_ids_are_unique_in_the_batch_and_the_same_in_both_views():
    """Also when one view lost a box, when an image has none, and when ids have gaps."""
    every = [*range(8)]
    pairs = [([0, 1, 5], [0]), ([], []), (every, every), ([2], [0, 2, 7]), ([], [3]), (every, every)]
    items = [item((4, 4), (4, 4), ids, momentum_ids) for ids, momentum_ids in pairs]
    batch = collate_views(items)
    online = [labels["proposal_ids"].tolist() for labels in batch["labels"]]
    momentum = [labels["proposal_ids"].tolist() for labels in batch["momentum_labels"]]
    owners = {}
    for number, (ids, momentum_ids) in enumerate(pairs):
        renamed = dict(zip(ids, online[number], strict=True))
        for old, new in zip(momentum_ids, momentum[number], strict=True):
            assert renamed.setdefault(old, new) == new  # the same proposal, the same id
        for old, new in renamed.items():
            assert owners.setdefault(new, (number, old)) == (number, old)  # another proposal, another id
    assert min(owners) >= 0 and len(owners) == 3 + 8 + 3 + 1 + 8
    assert items[3]["labels"]["proposal_ids"].tolist() == [2]  # the items themselves are left alone


def test_labelled_batch():
    items = [
        {"image": torch.ones(3, 4, 6, dtype=torch.uint8), "labels": {"image_id": torch.tensor([number])}}
        for number in range(2)
    ]
    batch = collate_labelled(items, pad_to_multiple=8)
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["pixel_mask"].sum() == 48
    assert [labels["image_id"].item() for labels in batch["labels"]] == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize(dtype):
    pixel_values, pixel_mask = pad_images(
        [torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in [(4, 9), (6, 5)]]
    )
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    images = normalize_images(pixel_values, pixel_mask, mean, std, dtype=dtype)
    expected = (pixel_values.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert images.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(images.double(), expected * pixel_mask[:, None], atol=tolerance, rtol=tolerance)
    assert (images[0, :, 4:] == 0).all() and (images[1, :, :, 5:] == 0).all()


def test_normalize_as_the_image_processor_does():
    from transformers import AutoImageProcessor, DetrImageProcessor  # noqa: F401

    processor = DetrImageProcessor(do_resize=False, do_pad=False)
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    mask = torch.ones(1, 20, 30, dtype=torch.int64)
    images = normalize_images(image[None], mask, processor.image_mean, processor.image_std, processor.rescale_factor)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
