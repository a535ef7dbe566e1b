"""
The work of `aligndet clusters` on an image, with what it cost before side by side: the backbone saw every image twice,
small ones enlarged, one at a time, and torchvision's RoIAlign averaged the boxes.

    python benchmarks/clusters.py --backbone resnet50

Images are noise and boxes random: the time depends on their sizes and numbers only. Times are milliseconds per image,
`ratio` is the time before over the time now, and `difference` the largest one between the features of both where
images keep their size.
"""

import argparse

import common
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from aligndet_hf.data.collate import normalize_images, pad_images
from aligndet_hf.data.views import resize_image, view_shape
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.evaluation.box_features import BoxFeatures

SIZES = {"224 x 224": (224, 224), "480 x 640": (480, 640)}
SHORT_SIDE = 448


def before(features: BoxFeatures, image: torch.Tensor, boxes: torch.Tensor):
    """Features as they were computed: padded to multiples of 64, averaged by RoIAlign."""
    with torch.inference_mode():
        pixel_values, mask = pad_images([image], 64)
        maps = features.feature_maps(normalize_images(pixel_values, mask, features.mean, features.std))
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        padded = torch.tensor([mask.shape[2], mask.shape[1]] * 2)
        levels = []
        for level in features.levels:
            cells = torch.tensor([maps[level].shape[3], maps[level].shape[2]] * 2)
            scaled = boxes * (size / padded * cells)
            pooled = roi_align(maps[level], [scaled], output_size=1, sampling_ratio=8, aligned=True).flatten(1)
            levels.append(F.normalize(pooled, dim=1))
        return torch.cat(levels, dim=1).numpy()


def sized(image: torch.Tensor, enlarge: bool) -> torch.Tensor:
    height, width = image.shape[1:]
    side = SHORT_SIDE if enlarge else min(SHORT_SIDE, height, width)
    shape = view_shape(height, width, "shortest_edge", side, max_size=SHORT_SIDE * 5 // 3)
    return torch.from_numpy(resize_image(image.permute(1, 2, 0).numpy(), *shape)).permute(2, 0, 1)


def measure(features: BoxFeatures, size: tuple[int, int], arguments: argparse.Namespace) -> dict:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(4)]
    start = torch.rand(arguments.boxes, 2, generator=generator) * 0.6
    boxes = torch.cat([start, start + 0.05 + torch.rand(arguments.boxes, 2, generator=generator) * 0.35], dim=1)

    def old():
        for _ in ("to fit to", "to assign"):
            for image in images:
                before(features, sized(image, enlarge=True), boxes)

    def new():
        return features.of_images([sized(image, enlarge=False) for image in images], [boxes] * len(images))

    times = common.summary(common.interleaved({"before": old, "now": new}, arguments.repeats, "cpu"))
    image = images[0][:, :192, :192]  # a multiple of 64, which is padded in neither way
    row = {name: found["milliseconds"] / len(images) for name, found in times.items()}
    row["ratio"] = row["before"] / row["now"]
    row["difference"] = float(abs(before(features, image, boxes) - features(image, boxes)).max())
    return row


def main(words: list[str] | None = None) -> dict:
    parser = common.parser(__file__, __doc__, repeats=3)
    parser.add_argument("--backbone", default="resnet50", help="timm name")
    parser.add_argument("--boxes", type=int, default=200, help="boxes of an image")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES), help="of the images")
    arguments = parser.parse_args(words)
    torch.manual_seed(0)
    detector = build_detector("detr", backbone=arguments.backbone, strides=(16, 32))
    features = BoxFeatures(detector, [16, 32])
    rows = {name: measure(features, SIZES[name], arguments) for name in arguments.sizes}
    return common.report(__file__, arguments, {"rows": rows, "backbone": arguments.backbone, "boxes": arguments.boxes})


if __name__ == "__main__":
    main()
