"""
Two views of an image, decoding included, against torchvision's transforms and an image processor.

    python benchmarks/views.py
    python benchmarks/views.py --sizes 640 672 704 736 768 800

All make two views of the same JPEG files with their boxes: a size drawn at random, a flip, and one of the nine colour
operations of AlignDet with the same ranges; or, as full colour, BYOL's and SoCo's jitter of brightness, contrast,
saturation and hue, with grey, blur and solarisation at times. Ours end as uint8 images, which are normalised on the
training device; what the others are documented to return are float images. The times are those of one core.
"""

import io
import random
from dataclasses import replace
from functools import partial

import common
import cv2
import numpy as np
import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.io import decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers import DetrImageProcessor

from aligndet_hf.data.collate import collate_views, normalize_images
from aligndet_hf.data.dataset import ProposalViews
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.sampling import SampleKey
from aligndet_hf.data.soco_views import draw_color
from aligndet_hf.data.synthetic import make_synthetic_dataset
from aligndet_hf.data.views import COLOR_OPERATIONS, ViewConfig, make_view

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FULL = "full colour"
# The nine colour operations, of torchvision, with the ranges of ours.
OPERATIONS = {
    "identity": lambda image: image,
    "autocontrast": F.autocontrast,
    "equalize": F.equalize,
    "solarize": F.solarize,
    "color": F.adjust_saturation,
    "contrast": F.adjust_contrast,
    "brightness": F.adjust_brightness,
    "sharpness": F.adjust_sharpness,
    "posterize": lambda image, bits: F.posterize(image, int(bits)),
}


class OneColorOperation(v2.Transform):
    """One of the nine colour operations, on tensors and PIL images."""

    def make_params(self, flat_inputs: list) -> dict:
        name, (_, span) = random.choice(list(COLOR_OPERATIONS.items()))
        return {"name": name, "values": [] if span is None else [random.uniform(*span)]}

    def transform(self, value, params: dict):
        if isinstance(value, tv_tensors.BoundingBoxes):
            return value
        return OPERATIONS[params["name"]](value, *params["values"])


def full_color(is_first: bool) -> v2.Transform:
    """The colours of BYOL with the numbers of SoCo, as `aligndet_hf.data.soco_views.draw_color` has them."""
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 1.0 if is_first else 0.1),
            v2.RandomSolarize(128, 0.0 if is_first else 0.2),
        ]
    )


def torchvision_view(sizes: list[int], max_size: int, color: v2.Transform, as_float: bool = True) -> v2.Transform:
    """One view as torchvision's tutorials on detection write it."""
    floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)] if as_float else []
    return v2.Compose([v2.RandomShortestSize(sizes, max_size), v2.RandomHorizontalFlip(), color, *floats])


class Loaders:
    """Functions from a row number to two views, of the same images and boxes."""

    def __init__(self, num_images: int, image_size: tuple[int, int], sizes: list[int]):
        scenes = make_synthetic_dataset(num_images, seed=0, image_size=image_size)
        self.jpegs = [row["image"]["bytes"] for row in scenes]
        self.boxes = [torch.tensor(row["objects"]["bbox"]).reshape(-1, 4) for row in scenes]
        self.sizes, self.max_size = sizes, max(sizes) * 5 // 3
        self.view = ViewConfig(sizes, self.max_size)
        self.views = ProposalViews(scenes.rename_column("objects", "proposals"), self.view, seed=0, max_proposals=50)
        self.color = OneColorOperation()
        size = (sizes, self.max_size)
        self.floats = [torchvision_view(*size, self.color)] * 2
        self.uint8 = [torchvision_view(*size, self.color, as_float=False)] * 2
        self.full_color = [torchvision_view(*size, full_color(is_first)) for is_first in (True, False)]
        self.processor = DetrImageProcessor(do_pad=False)

    def ours(self, row: int) -> dict:
        return self.views[SampleKey(row, 0, 0)]

    def ours_as_float(self, row: int) -> list[torch.Tensor]:
        batch = collate_views([self.ours(row)])
        return [
            normalize_images(batch[f"{prefix}pixel_values"], batch[f"{prefix}pixel_mask"], MEAN, STD)
            for prefix in ("", "momentum_")
        ]

    def ours_full_color(self, row: int) -> list:
        rng = np.random.default_rng(row)
        image, boxes = decode_image(self.jpegs[row]), self.boxes[row].numpy()
        views = []
        for is_first in (True, False):
            view, *labels = make_view(image, boxes, rng, replace(self.view, color=False), rng.choice(self.sizes))
            views.append((draw_color(view, rng, is_first), *labels))
        return views

    def torchvision(self, transforms: list[v2.Transform], row: int) -> list:
        image = decode_jpeg(torch.frombuffer(bytearray(self.jpegs[row]), dtype=torch.uint8), mode="RGB")
        boxes = tv_tensors.BoundingBoxes(self.boxes[row], format="XYWH", canvas_size=image.shape[1:])
        return [transform(tv_tensors.Image(image), boxes) for transform in transforms]

    def image_processor(self, row: int) -> list:
        image = PIL.Image.open(io.BytesIO(self.jpegs[row])).convert("RGB")
        views = []
        for _ in range(2):
            view, boxes = self.color(image), self.boxes[row].clone()
            if random.random() < 0.5:
                view = F.horizontal_flip(view)
                boxes[:, 0] = image.width - boxes[:, 0] - boxes[:, 2]
            objects = [
                {"bbox": box, "category_id": 0, "area": box[2] * box[3], "iscrowd": 0} for box in boxes.tolist()
            ]
            size = {"shortest_edge": random.choice(self.sizes), "longest_edge": self.max_size}
            annotations = {"image_id": row, "annotations": objects}
            views.append(self.processor(view, annotations=annotations, size=size, return_tensors="pt"))
        return views


def main(words: list[str] | None = None) -> dict:
    parser = common.parser(__file__, __doc__, repeats=5)
    parser.add_argument("--num_images", type=int, default=36, help="rendered scenes to read in turn")
    parser.add_argument("--image_size", type=int, nargs=2, default=[480, 640], help="their height and width")
    default = [640, 672, 704, 736, 768, 800]
    parser.add_argument("--sizes", type=int, nargs="+", default=default, help="shorter sides of the views in pixels")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    random.seed(0)
    loaders = Loaders(arguments.num_images, tuple(arguments.image_size), arguments.sizes)
    methods = {
        "ours": loaders.ours,
        "ours, as float": loaders.ours_as_float,
        "torchvision": partial(loaders.torchvision, loaders.floats),
        "torchvision, as uint8": partial(loaders.torchvision, loaders.uint8),
        "image processor": loaders.image_processor,
        f"ours, {FULL}": loaders.ours_full_color,
        f"torchvision, {FULL}": partial(loaders.torchvision, loaders.full_color),
    }
    functions = {
        name: lambda load=load: [load(row) for row in range(arguments.num_images)] for name, load in methods.items()
    }
    times = common.interleaved(functions, arguments.repeats)
    rows = common.summary(times)
    for row in rows.values():
        row["milliseconds"] /= arguments.num_images
        row["images/s"] = 1000 / row["milliseconds"]
    results = {
        "image_size": arguments.image_size,
        "sizes": arguments.sizes,
        "rows": rows,
        "times faster": {
            name: common.times_faster(times, f"ours, {FULL}" if FULL in name else "ours", name)
            for name in methods
            if not name.startswith("ours")
        },
    }
    return common.report(__file__, arguments, results, "torchvision", "transformers", "opencv-contrib-python-headless")


if __name__ == "__main__":
    main()
