"""Detections on a list of images, one after the other: decoded in workers, in tiles if wanted, in batches."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import BaseImageProcessor

from ..data.arrow_boxes import clean_boxes
from ..data.bit_depth import window_of
from ..data.collate import collate_labelled
from ..data.errors import ImageError
from ..data.image_list import ImageList
from ..data.masks import place_run_lengths
from ..processes import init_worker
from .detections import predict_batches, prepare_image
from .tiles import merge_views, tile_corners

_JPEG_QUALITY = 95


@dataclass(kw_only=True)
class Tiling:
    """
    How to look at images in tiles; see [`~aligndet_hf.evaluation.tiles.tile_corners`].

    Attributes:
        tile_size (`int`): Side of a tile in pixels of the image.
        overlap (`float`): The least share of its side that a tile has in common with the next one.
        whole_image (`bool`): Whether the detector looks at the whole image as well, for what no tile holds.
        iou_threshold (`float`): See [`~aligndet_hf.evaluation.tiles.merge_views`].
    """

    tile_size: int
    overlap: float = 0.2
    whole_image: bool = True
    iou_threshold: float = 0.5

    def corners(self, height: int, width: int) -> np.ndarray:
        """Where the views of an image of this size are: int64 [n, 4], xyxy in pixels."""
        tiles = tile_corners(height, width, self.tile_size, self.overlap)
        if self.whole_image and len(tiles) > 1:
            tiles = np.concatenate([tiles, [[0, 0, width, height]]])
        return tiles


@dataclass
class Prediction:
    """
    What a detector finds in an image.

    Attributes:
        index (`int`): Place of the image in the list.
        size (`tuple[int, int]`): Its height and width in pixels.
        boxes (`np.ndarray`): float32 `[n, 4]`, absolute xywh inside the image, best score first.
        scores (`np.ndarray`): float32 `[n]`.
        labels (`np.ndarray`): int64 `[n]`, classes of the detector.
        best_score (`float`): The best score in the image, also if it is too low for a box.
        error (`str`, *optional*): Why the image could not be read.
        masks (`np.ndarray`, *optional*): The masks `[n]` of a detector that predicts them: run lengths of COCO in the
            image, see [`~aligndet_hf.data.masks.run_lengths`].
        encoded (`bytes`, *optional*): The image as JPEG, if it is in no file and this was asked for.
    """

    index: int
    size: tuple[int, int] = (0, 0)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.float32))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    best_score: float = 0.0
    error: str | None = None
    masks: np.ndarray | None = None
    encoded: bytes | None = None


@dataclass(eq=False)
class ImageViews(IterableDataset):
    """
    The views of images, prepared for a detector: of each image the whole, or its tiles. Several workers take turns.

    An item is what [`~aligndet_hf.evaluation.detections.prepare_image`] makes, with `view`: the `index` of the image,
    its `size`, the `corners` of all its views and, with the first one, the image `encoded` where that is asked for.
    For an image that cannot be read there is only `view`, with its `error`.

    Args:
        images ([`ImageList`]): The images.
        indices (`Sequence[int]`): Which of them.
        image_processor (`BaseImageProcessor`): The detector's.
        tiling ([`Tiling`], *optional*): How to cut the images.
        encode (`bool`, *optional*, defaults to `False`): Whether to encode images that are in no file of their own.
    """

    images: ImageList
    indices: Sequence[int]
    image_processor: BaseImageProcessor
    tiling: Tiling | None = None
    encode: bool = False

    def __post_init__(self):
        self.images.window = window_of(self.image_processor)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        for index in self.indices[worker.id :: worker.num_workers] if worker else self.indices:
            try:
                image = self.images.read(index)
            except ImageError as error:
                yield {"view": {"index": index, "error": str(error)}}
                continue
            size = image.shape[:2]
            corners = self.tiling.corners(*size) if self.tiling else np.array([[0, 0, size[1], size[0]]])
            encoded = _encode(image) if self.encode and self.images.value(index) is None else None
            for x1, y1, x2, y2 in corners:
                item = prepare_image(np.ascontiguousarray(image[y1:y2, x1:x2]), self.image_processor, index)
                yield item | {"view": {"index": index, "size": size, "corners": corners, "encoded": encoded}}
                encoded = None


def _encode(image: np.ndarray) -> bytes:
    import cv2  # here: images that are files need no OpenCV, which takes 20 MB

    _, encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return encoded.tobytes()


def _collate(items: list[dict]) -> dict:
    readable = [item for item in items if "image" in item]
    batch = collate_labelled(readable) if readable else {}
    return batch | {"views": [item["view"] for item in items]}


def predict_images(
    detector,
    image_processor,
    images: ImageList,
    indices: Sequence[int],
    *,
    score_threshold: float = 0.3,
    tiling: Tiling | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    encode: bool = False,
    masks: bool = True,
) -> Iterator[Prediction]:
    """
    Detects objects in images, and holds no more than a few batches at a time.

    Args:
        detector (`PreTrainedModel`): Any detector, on its device.
        image_processor (`BaseImageProcessor`): The detector's.
        images ([`ImageList`]): The images.
        indices (`Sequence[int]`): Which of them.
        score_threshold (`float`, *optional*, defaults to 0.3): Lowest score of a box.
        tiling ([`Tiling`], *optional*): How to cut the images into tiles; whole images if not given.
        batch_size (`int`, *optional*, defaults to 8): Images, or tiles, per forward pass.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and resize; 0: this one.
        encode (`bool`, *optional*, defaults to `False`): See [`ImageViews`].
        masks (`bool`, *optional*, defaults to `True`): Whether masks are wanted, of a detector that predicts them.

    Yields:
        [`Prediction`]: for every image, in the order of `indices` if there are no workers, else nearly in it.
    """
    loader = DataLoader(
        ImageViews(images, indices, image_processor, tiling, encode),
        batch_size=batch_size,
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=init_worker,
    )
    faults, coming = deque(), deque()  # of the batch that is on its way through the detector

    def batches():
        for batch in loader:
            for view in batch.pop("views"):
                (faults if "error" in view else coming).append(view)
            if batch:
                yield batch

    unfinished = {}
    found_masks = {"masks": masks, "lowest_mask_score": score_threshold}
    for _, found in predict_batches(detector, batches(), image_processor, **found_masks):
        while faults:
            yield Prediction(**faults.popleft())
        for prediction in found:
            view = coming.popleft()
            kept = prediction["scores"] >= score_threshold
            parts, scores, encoded = unfinished.setdefault(view["index"], ([], [], view["encoded"]))
            scores.append(float(prediction["scores"].max(initial=0.0)))
            parts.append({name: values[kept] for name, values in prediction.items()})
            if len(parts) == len(view["corners"]):
                del unfinished[view["index"]]
                if len(parts) > 1:
                    _place_masks(parts, view["corners"], view["size"])
                merged = merge_views(parts, view["corners"], view["size"], tiling.iou_threshold if tiling else 1.0)
                yield _prediction(view["index"], view["size"], merged, max(scores), encoded)
    while faults:
        yield Prediction(**faults.popleft())


def _place_masks(parts: list[dict], corners: np.ndarray, size: tuple[int, int]) -> None:
    """Masks in the views of an image, if there are any, as masks in the image."""
    for part, (left, top, *_) in zip(parts, corners, strict=True):
        for number, mask in enumerate(part.get("masks", ())):
            part["masks"][number] = place_run_lengths(mask, left, top, *size)


def _prediction(
    index: int, size: tuple[int, int], found: dict, best_score: float, encoded: bytes | None
) -> Prediction:
    """What was found, as boxes xywh inside the image; boxes without a part in it are left out."""
    xywh = np.concatenate([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], axis=1)
    boxes, kept = clean_boxes(xywh, size[1], size[0])
    scores, labels = found["scores"][kept].astype(np.float32), found["labels"][kept].astype(np.int64)
    masks = found["masks"][kept] if "masks" in found else None
    return Prediction(index, size, boxes, scores, labels, best_score, masks=masks, encoded=encoded)
