"""
The detection criterion with its matching against transformers' own losses.

    python benchmarks/criterion.py
    python benchmarks/criterion.py --device cuda

Forward and backward on random predictions of all decoder layers: DETR's loss, and RT-DETR's with the proposals of its
encoder and with denoising queries as in training. Both compute the same loss; `waits` counts how often the CPU has to
wait for the GPU.
"""

from collections.abc import Callable
from functools import partial

import common
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.loss.loss_utils import LOSS_MAPPING

from aligndet_hf.detectors.criterion import detection_loss

STOCK = {"detr": "ForObjectDetection", "rt_detr": "RTDetrForObjectDetection"}
DENOISING_GROUPS = 3


def make_predictions(model_type: str, layers: int, images: int, queries: int, boxes: int, classes: int, device: str):
    """The keyword arguments of a loss function, as a detector in training passes them, and the leaves of its graph."""
    generator = torch.Generator().manual_seed(0)
    fields = {} if model_type == "detr" else {"backbone_config": {"model_type": "rt_detr_resnet"}}
    config = AutoConfig.for_model(model_type, num_labels=classes, num_queries=queries, **fields)
    config.auxiliary_loss = True

    def random_boxes(*shape: int) -> Tensor:
        return torch.rand(*shape, 4, generator=generator).mul(0.5).add(0.1).to(device)

    def predictions(*shape: int, columns: int) -> list[Tensor]:
        logits = torch.randn(*shape, columns, generator=generator).to(device)
        return [logits.requires_grad_(), random_boxes(*shape).requires_grad_()]

    labels = [
        {
            "class_labels": torch.randint(classes, (boxes,), generator=generator).to(device),
            "boxes": random_boxes(boxes),
        }
        for _ in range(images)
    ]
    common_arguments = {"labels": labels, "device": torch.device(device), "config": config}
    if model_type == "detr":
        logits, pred_boxes = leaves = predictions(layers, images, queries, columns=classes + 1)
        last, last_boxes = logits[-1], pred_boxes[-1]
        arguments = {"outputs_class": logits, "outputs_coord": pred_boxes}
    else:
        denoising = 2 * boxes * DENOISING_GROUPS
        logits, pred_boxes = leaves = predictions(images, layers, denoising + queries, columns=classes)
        encoder = predictions(images, queries, columns=classes)
        leaves = [*leaves, *encoder]
        positive = torch.cat([2 * boxes * group + torch.arange(boxes) for group in range(DENOISING_GROUPS)]).to(device)
        last, last_boxes = logits[:, -1], pred_boxes[:, -1]
        arguments = {"outputs_class": logits, "outputs_coord": pred_boxes}
        arguments |= {"enc_topk_logits": encoder[0], "enc_topk_bboxes": encoder[1]}
        arguments["denoising_meta_values"] = {
            "dn_positive_idx": [positive] * images,
            "dn_num_group": DENOISING_GROUPS,
            "dn_num_split": [denoising, queries],
        }
    return common_arguments | arguments | {"logits": last, "pred_boxes": last_boxes}, leaves


def loss_and_gradients(loss_function: Callable, arguments: dict, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss and its gradients with respect to all predictions."""
    loss, *_ = loss_function(**arguments)
    return loss, *torch.autograd.grad(loss, leaves)


def main(words: list[str] | None = None) -> dict:
    parser = common.parser(__file__, __doc__, repeats=15)
    sizes = {"layers": 6, "images": 8, "queries": 300, "boxes": 30, "classes": 80}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args(words)
    results: dict = {"sizes": {name: getattr(arguments, name) for name in sizes}, "rows": {}, "times faster": {}}
    results["largest relative difference"] = {}
    for model_type, stock in STOCK.items():
        inputs, leaves = make_predictions(model_type, *results["sizes"].values(), arguments.device)
        functions = {
            f"{model_type}, one computation": partial(loss_and_gradients, detection_loss, inputs, leaves),
            f"{model_type}, stock": partial(loss_and_gradients, LOSS_MAPPING[stock], inputs, leaves),
        }
        ours, theirs = (function() for function in functions.values())
        results["largest relative difference"][model_type] = max(
            ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(ours, theirs, strict=True)
        )
        times = common.interleaved(functions, arguments.repeats, arguments.device)
        results["times faster"][model_type] = common.times_faster(times, *functions)
        for name, row in common.summary(times).items():
            row |= {"extra MB": common.peak_memory(functions[name], arguments.device) / 1e6}
            results["rows"][name] = row | {"waits": common.waits(functions[name], arguments.device)}
    return common.report(__file__, arguments, results, "transformers", "scipy")


if __name__ == "__main__":
    main()
