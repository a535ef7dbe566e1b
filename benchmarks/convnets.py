"""
AlignDet on torchvision's detectors: the contrast of anchors, points or regions, and a step against what it needs.

    python benchmarks/convnets.py
    python benchmarks/convnets.py --device cuda --images 2 --height 800 --width 1216 --backbone resnet50

The contrast has `--rows` rows of each view, of which every one of `--proposals` has ten; beside it the loop of the
official code, id by id. What a step cannot do without are the passes of both views through the backbone, which is
frozen, the online detector with its loss, forward and backward, and the momentum detector as far as its features are
contrasted. The loss under bfloat16 autocast is that of the same step.

The memory of the IoU is what matching `--anchors` (of a RetinaNet at 800 x 1216) with 50 boxes takes at its peak, for
one image and for eight: images are matched one after the other.
"""

from collections.abc import Callable
from functools import partial

import common
import contrastive
import torch

from aligndet_hf import AlignDetForPreTraining
from aligndet_hf.convnets.modeling_torchvision import match_boxes
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.losses import object_contrastive_loss

FAMILIES = ["torchvision_retinanet", "torchvision_fcos", "torchvision_faster_rcnn", "torchvision_mask_rcnn"]
TEMPERATURE = 0.5


def contrasts(rows: int, proposals: int, width: int, device: str) -> dict[str, Callable]:
    """Loss and gradient of one batch of rows, by the name of how they are computed."""
    generator = torch.Generator().manual_seed(0)
    online, momentum = torch.randn(2, rows, width, generator=generator).to(device)
    ids = torch.full((rows,), -1)
    ids[: 10 * proposals] = torch.arange(proposals).repeat_interleave(10)
    others = (momentum, ids.to(device), ids.to(device))
    online.requires_grad_()
    losses = {
        "contrast": partial(object_contrastive_loss, online, *others, TEMPERATURE),
        "official loop": partial(contrastive.loop, contrastive.official_loss, online, *others),
    }
    return {name: partial(contrastive.loss_and_gradient, loss, online) for name, loss in losses.items()}


def make_views(images: int, height: int, width: int, device: str) -> dict:
    """Two views of random images with 20 proposals each."""
    generator = torch.Generator().manual_seed(0)
    labels, views = [], {}
    for image in range(images):
        center, size = torch.rand(2, 20, 2, generator=generator)
        labels.append(
            {
                "boxes": torch.cat([0.2 + 0.6 * center, 0.05 + 0.3 * size], 1).to(device),
                "class_labels": torch.zeros(20, dtype=torch.long, device=device),
                "proposal_ids": torch.arange(20 * image, 20 * image + 20, device=device),
            }
        )
    for prefix in ("", "momentum_"):
        views[f"{prefix}pixel_values"] = torch.randn(images, 3, height, width, generator=generator).to(device)
        views[f"{prefix}labels"] = labels
    return views


def matching(images: int, anchors: int, device: str) -> None:
    """Which of 50 boxes each anchor stands for, in a batch of this size."""
    generator = torch.Generator().manual_seed(0)
    corners = [torch.rand(count, 2, generator=generator) * 700 for count in (anchors, *[50] * images)]
    anchors, *boxes = (torch.cat([corner, corner + 100], 1).to(device) for corner in corners)
    for own in boxes:
        match_boxes(anchors, own, 0.4, 0.5, keep_best=True)


def step(model: AlignDetForPreTraining, views: dict) -> float:
    model.zero_grad()
    loss = model(**views).loss
    loss.backward()
    return loss.item()


def unavoidable(model: AlignDetForPreTraining, views: dict) -> float:
    model.zero_grad()
    with torch.no_grad():
        model.momentum_detector(views["momentum_pixel_values"], None, views["momentum_labels"], True)
    loss = model.online_detector(views["pixel_values"], None, views["labels"]).loss
    loss.backward()
    return loss.item()


def main(words: list[str] | None = None) -> dict:
    parser = common.parser(__file__, __doc__, repeats=5)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--backbone", default="resnet18", help="timm name of the backbone")
    for name, value in {
        "rows": 1024,
        "proposals": 40,
        "images": 2,
        "height": 256,
        "width": 320,
        "anchors": 182403,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args(words)
    device = arguments.device
    functions = contrasts(arguments.rows, arguments.proposals, 256, device)
    (ours, _), (theirs, _) = (function() for function in functions.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    times = common.interleaved(functions, arguments.repeats, device)
    results = {
        "rows": common.summary(times),
        "contrast, times faster": common.times_faster(times, "contrast", "official loop"),
        "IoU, MB": {
            f"{images} images": common.peak_memory(partial(matching, images, arguments.anchors, device), device) / 1e6
            for images in (1, 8)
        },
    }
    views = make_views(arguments.images, arguments.height, arguments.width, device)
    for family in arguments.families:
        torch.manual_seed(0)
        detector = build_detector(family, backbone=arguments.backbone)
        model = AlignDetForPreTraining.from_detector(detector.train()).to(device)
        parts = {f"{family}, step": partial(step, model, views), "unavoidable": partial(unavoidable, model, views)}
        times = common.interleaved(parts, arguments.repeats, device)
        (name, row), (_, bare) = common.summary(times).items()
        row["unavoidable"] = bare["milliseconds"]
        row["times the unavoidable"] = common.times_faster(times, "unavoidable", name)
        full = step(model, views)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            row["loss in bf16 / in float32"] = step(model, views) / full
        results["rows"][name] = row
    return common.report(__file__, arguments, results, "transformers", "torchvision")


if __name__ == "__main__":
    main()
