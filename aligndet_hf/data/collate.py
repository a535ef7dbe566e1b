"""Items to batches: padding with a mask, proposal ids unique in the batch, and normalisation on the device."""

import torch


def pad_images(images: list[torch.Tensor], pad_to_multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pads images on the right and at the bottom to one size.

    Args:
        images (`list[torch.Tensor]`): uint8 [3, h, w] each.
        pad_to_multiple (`int`, *optional*, defaults to 1): The padded height and width are multiples of it.

    Returns:
        `tuple`: the images (uint8 [B, 3, H, W], 0 in the padding) and the mask (int64 [B, H, W], 1 on the image). The
        images stay in the layout that they are decoded in, channels last, which is also the faster one for
        convolutions.
    """
    height, width = (
        -(-max(image.shape[axis] for image in images) // pad_to_multiple) * pad_to_multiple for axis in (1, 2)
    )
    pixel_values = torch.zeros(len(images), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for image, padded, mask in zip(images, pixel_values, pixel_mask, strict=True):
        _, h, w = image.shape
        padded[:, :h, :w] = image
        mask[:h, :w] = 1
    return pixel_values, pixel_mask


def collate_views(items: list[dict], pad_to_multiple: int = 1) -> dict:
    """
    Batches items of [`ProposalViews`] into the keyword arguments of `AlignDetForPreTraining.forward`.

    Args:
        items (`list[dict]`): Items of [`ProposalViews`].
        pad_to_multiple (`int`, *optional*, defaults to 1): See [`pad_images`].

    Returns:
        `dict`: `pixel_values` (uint8 [B, 3, H, W]), `pixel_mask` (int64 [B, H, W]) and `labels` (one dictionary per
        image), and the same with the prefix `momentum_`. Boxes stay relative to the unpadded images. `proposal_ids`
        are unique in the batch: both views of an image get the same offset.
    """
    batch = {}
    for prefix in ("", "momentum_"):
        pixel_values, pixel_mask = pad_images([item[f"{prefix}image"] for item in items], pad_to_multiple)
        batch |= {f"{prefix}pixel_values": pixel_values, f"{prefix}pixel_mask": pixel_mask, f"{prefix}labels": []}
    offset = 0
    for item in items:
        used = 0
        for prefix in ("", "momentum_"):
            labels = item[f"{prefix}labels"]
            ids = labels["proposal_ids"]
            batch[f"{prefix}labels"].append(labels | {"proposal_ids": ids + offset})
            used = max(used, int(ids.max()) + 1) if len(ids) else used
        offset += used
    return batch


def collate_soco(items: list[dict]) -> dict:
    """
    Batches items of [`SoCoViews`] into the keyword arguments of `SoCoForPreTraining.forward`: `pixel_values` (uint8
    [B, 3, size, size]), `boxes` ([B, b, 4]), `levels` and `ids` ([B, b]), each a list over the views.
    """
    names = {"images": "pixel_values", "boxes": "boxes", "levels": "levels", "ids": "ids"}
    return {
        name: [torch.stack(views) for views in zip(*(item[key] for item in items), strict=True)]
        for key, name in names.items()
    }


def collate_labelled(items: list[dict], pad_to_multiple: int = 1) -> dict:
    """
    Batches items of [`LabelledImages`] into `pixel_values` (uint8 [B, 3, H, W]), `pixel_mask` (int64 [B, H, W]) and
    `labels` (one dictionary per image; boxes stay relative to the unpadded images).
    """
    pixel_values, pixel_mask = pad_images([item["image"] for item in items], pad_to_multiple)
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": [item["labels"] for item in items]}


def normalize_images(
    pixel_values: torch.Tensor,
    pixel_mask: torch.Tensor | None,
    mean: list[float],
    std: list[float],
    rescale_factor: float = 1 / 255,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """
    Normalises a batch: `(pixel_values * rescale_factor - mean) / std`, and 0 in the padding. Once per batch, after its
    copy to the device: a quarter of the bytes to copy, and no float images in the workers.

    Args:
        pixel_values (`torch.Tensor` [B, 3, H, W]): uint8.
        pixel_mask (`torch.Tensor` [B, H, W], *optional*): 1 on the image, 0 in the padding; `None` without padding.
        mean, std (`list[float]`): Per channel, as in the image processor.
        rescale_factor (`float`, *optional*, defaults to 1/255): As in the image processor.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the result.

    Returns:
        `torch.Tensor` [B, 3, H, W].
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    # A copy that blocks would wait for the device.
    scale, shift = (values.to(pixel_values.device, non_blocking=True) for values in (rescale_factor / std, mean / std))
    normalized = (pixel_values * scale).sub_(shift)
    return (normalized if pixel_mask is None else normalized.mul_(pixel_mask[:, None])).to(dtype)
