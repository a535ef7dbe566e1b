"""Features of the boxes of an image from a frozen backbone, and the images that it sees."""

import hashlib
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data.arrow_boxes import usable_boxes
from ..data.bit_depth import pixel_window
from ..data.collate import normalize_images, pad_images
from ..data.errors import ImageError
from ..data.images import decode_image, image_name
from ..data.views import resize_image, view_shape
from ..detectors.backbones import get_backbone, image_statistics
from ..detectors.build import build_detector

_SAMPLES = 8  # of a feature map, along each side of a box
# Pixels of a batch. A CPU gains from batches of small images only: the maps of larger ones leave its cache.
_BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**23}


def around_backbone(backbone: str, backbone_weights: str | None, strides: list[int]):
    """A detector for its backbone only, with feature maps of these strides: so any family will do."""
    return build_detector("detr", backbone=backbone, backbone_weights=backbone_weights, strides=tuple(sorted(strides)))


class BoxFeatures:
    """
    Features of boxes: RoIAlign (He et al., 2017) of the feature maps of a frozen backbone, averaged over each box.

    Args:
        detector (`PreTrainedModel`): A detector; its backbone is used, in evaluation mode.
        strides (`list[int]`): Strides of the feature maps to take, in pixels.
        normalize (`bool`, *optional*, defaults to `True`): Whether to scale the features of each stride to length 1.
        device (`str`, *optional*, defaults to `"cpu"`): Where to compute.

    Attributes:
        sizes (`list[int]`): The numbers per box of each stride.
        size (`int`): D, all of them.

    Raises:
        `ValueError`: if the detector has no backbone, or the backbone no feature map of a stride.
    """

    def __init__(self, detector, strides: list[int], normalize: bool = True, device: str = "cpu"):
        self.backbone = get_backbone(detector).eval().to(device)
        if not list(self.backbone.parameters()):
            raise ValueError(f"detectors of type {detector.config.model_type!r} have no backbone of their own")
        self.mean, self.std = image_statistics(detector.config)
        self.normalize, self.device = normalize, device
        side = 256
        maps = self.feature_maps(torch.zeros(1, 3, side, side, device=device))
        found = {round(side / feature_map.shape[-1]): level for level, feature_map in enumerate(maps)}
        if missing := [stride for stride in strides if stride not in found]:
            raise ValueError(
                f"the backbone has no feature map of stride {missing[0]}, it has {sorted(found)}: strides"
            )
        # Padded sizes are multiples of it, so that every cell of a feature map stands for as many pixels.
        self.multiple = max(found)
        self.levels = [found[stride] for stride in strides]
        self.sizes = [maps[level].shape[1] for level in self.levels]
        self.size = sum(self.sizes)

    @torch.inference_mode()
    def feature_maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """All feature maps [B, C, h, w] of normalised images [B, 3, H, W]; `levels` are the ones of the strides."""
        maps = self.backbone(pixel_values)
        return list(getattr(maps, "feature_maps", maps))  # transformers' wrapper, or timm's own network

    def __call__(self, image: torch.Tensor, boxes: torch.Tensor) -> np.ndarray:
        """
        The features of the boxes of one image.

        Args:
            image (`torch.Tensor` [3, h, w]): uint8.
            boxes (`torch.Tensor` [N, 4]): Corners xyxy, relative to the image (0 to 1).

        Returns:
            `np.ndarray` float32 [N, D].
        """
        return self.of_images([image], [boxes])[0]

    def of_images(self, images: list[torch.Tensor], boxes: list[torch.Tensor]) -> list[np.ndarray]:
        """
        The features of the boxes of several images. Images of one padded size go through the backbone together.

        Args:
            images (`list[torch.Tensor]`): uint8 [3, h, w] each.
            boxes (`list[torch.Tensor]`): [N, 4] each, corners xyxy, relative to the image (0 to 1).

        Returns:
            `list[np.ndarray]`: float32 [N, D] each. The same list of images gives the same numbers; in another list
            the last digits may differ.
        """
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            height, width = (-(-side // self.multiple) * self.multiple for side in image.shape[1:])
            by_size.setdefault((height, width), []).append(index)
        found = [None] * len(images)
        pixels = _BATCH_PIXELS.get(torch.device(self.device).type, _BATCH_PIXELS["cuda"])
        for (height, width), indices in by_size.items():
            size = max(1, pixels // (height * width))
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                vectors = self._of_batch([images[index] for index in batch], [boxes[index] for index in batch])
                for index, values in zip(batch, vectors, strict=True):
                    found[index] = values
        return found

    @torch.inference_mode()
    def _of_batch(self, images: list[torch.Tensor], boxes: list[torch.Tensor]) -> list[np.ndarray]:
        """[`of_images`] of images that have one size after padding."""
        pixel_values, mask = (tensor.to(self.device) for tensor in pad_images(images, self.multiple))
        maps = self.feature_maps(normalize_images(pixel_values, mask, self.mean, self.std))
        padded = torch.tensor([mask.shape[2], mask.shape[1]] * 2, device=self.device)
        found = []
        for number, (image, corners) in enumerate(zip(images, boxes, strict=True)):
            size = torch.tensor([image.shape[2], image.shape[1]] * 2, device=self.device)
            corners, levels = corners.to(self.device) * (size / padded), []
            for level in self.levels:
                pooled = mean_in_boxes(maps[level][number], corners)
                levels.append(F.normalize(pooled, dim=1) if self.normalize else pooled)
            found.append(torch.cat(levels, dim=1).cpu().numpy())
        return found

    def weights_hash(self) -> str:
        """A hash of the backbone's tensors: 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def mean_in_boxes(feature_map: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """
    RoIAlign with one output per box, as a matrix product: the samples of a box are a grid, so that the weights of the
    cells are products of weights along x and along y.

    Args:
        feature_map (`torch.Tensor` [C, h, w]): The map.
        corners (`torch.Tensor` [N, 4]): xyxy, relative to the map (0 to 1).

    Returns:
        `torch.Tensor` [N, C]: what torchvision's `roi_align` gives, aligned and with `_SAMPLES` samples along a side.
    """
    height, width = feature_map.shape[1:]
    along_x = _cell_weights(corners[:, 0] * width, corners[:, 2] * width, width)
    along_y = _cell_weights(corners[:, 1] * height, corners[:, 3] * height, height)
    weights = (along_y[:, :, None] * along_x[:, None, :]).flatten(1)
    return weights @ feature_map.flatten(1).T


def _cell_weights(starts: torch.Tensor, ends: torch.Tensor, cells: int) -> torch.Tensor:
    """The part of each cell in the mean of linear samples of each interval [N]: [N, cells], which sum to 1."""
    steps = (torch.arange(_SAMPLES, device=starts.device) + 0.5) / _SAMPLES
    places = starts[:, None] + (ends - starts)[:, None] * steps - 0.5  # the centre of the first cell is 0
    distances = places.clamp(0, cells - 1)[:, :, None] - torch.arange(cells, device=starts.device)
    return (1 - distances.abs()).clamp(min=0).mean(dim=1)


@dataclass(eq=False)
class BoxImages(Dataset):
    """
    Resized images with their usable boxes.

    An item is `{"image", "boxes", "kept"}`: uint8 [3, h, w], the boxes (float32 [n, 4], corners xyxy relative to the
    image) and their indices among the boxes of the row (int64 [n]); or `{"file", "reason"}` for an image that
    cannot be read.

    Args:
        sources (`dict[str, datasets.Dataset]`): The splits, with the columns `image` (not decoded) and `column`.
        rows (`list[tuple[str, int]]`): Split and row of each item.
        short_side (`int`): Shorter side of the images, in pixels; the longer one has at most 5/3 of it.
        column (`str`, *optional*, defaults to `"proposals"`): Which boxes: that column's field `bbox`.
        enlarge (`bool`, *optional*, defaults to `True`): Whether smaller images are enlarged to `short_side`.
    """

    sources: dict[str, datasets.Dataset]
    rows: list[tuple[str, int]]
    short_side: int
    column: str = "proposals"
    enlarge: bool = True

    def __post_init__(self):
        columns, sources = ["image", self.column], self.sources
        self.windows = {name: pixel_window(source) for name, source in sources.items()}
        self.sources = {name: source.select_columns(columns).with_format("arrow") for name, source in sources.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        split, row = self.rows[index]
        table = self.sources[split][row]
        value = table["image"][0].as_py()
        try:
            image = decode_image(value, self.windows[split])
        except ImageError as error:
            return {"file": image_name(value), "reason": str(error)}
        height, width = image.shape[:2]
        boxes, kept = usable_boxes(table[self.column], width, height)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / (width, height, width, height)
        short_side = self.short_side if self.enlarge else min(self.short_side, height, width)
        shape = view_shape(height, width, "shortest_edge", short_side, max_size=self.short_side * 5 // 3)
        image = resize_image(image, *shape)
        return {
            "image": torch.from_numpy(image).permute(2, 0, 1),
            "boxes": torch.from_numpy(corners.astype(np.float32)),
            "kept": torch.from_numpy(kept),
        }
