"""
Time of a SoCo step, beside an implementation that pools as the official code does.

    python benchmarks/soco.py

The official arrangement pools every set of boxes (one for each pair of views) from every level of the pyramid, runs
head, projector and predictor on each of them by itself, and compares the boxes that are on their own level. Here each
box is pooled once, from its own level, and all boxes of a view pass the head together. Both are built of the same
modules with the same weights, and take turns. Training keeps its tensors in `channels_last`, which the official code
does not: its arrangement is timed in either layout.

First both losses and all gradients are compared, with fixed statistics in the norms; then whole steps (forward,
backward, AdamW, momentum update) are timed in training mode, where the norms of each see other boxes, and so is the
part that differs, from the feature maps on. Times are medians of the CPU time of one thread.
"""

import argparse
import copy
from collections.abc import Callable

import common
import datasets
import torch
from torch import Tensor
from torchvision.ops import roi_align

from aligndet_hf import SoCoConfig, SoCoForPreTraining
from aligndet_hf.data.collate import collate_soco
from aligndet_hf.data.dataset import SoCoViews
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.sampling import SampleKey
from aligndet_hf.data.synthetic import make_synthetic_dataset
from aligndet_hf.detectors.backbones import build_backbone_config
from aligndet_hf.losses import box_similarity_loss
from aligndet_hf.proposals.selective_search import selective_search

# Name of a row to variant, backbone, sizes of the views and further fields: small ones, and those of the paper.
SMALL = {"fpn_channels": 128, "mlp_dim": 512, "projection_dim": 128, "level_sizes": [24, 48, 96, 128]}
CASES = {
    "fpn, mobilenetv2_100, 128 px": ("fpn", "mobilenetv2_100", [128, 128, 64], SMALL),
    "fpn, resnet50, 224 px": ("fpn", "resnet50", [224, 224, 112], {}),
    "star, resnet50, 224 px": ("star", "resnet50", [224, 224, 192, 112], {}),
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), help="all by default")
    parser.add_argument("--batch_size", type=int, default=2, help="images of a step")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the medians are taken")
    parser.add_argument("--device", default="cpu", help="cpu, with the CPU time of one thread, or cuda")
    parser.add_argument("--output", default="benchmarks/results/soco.json", help="where to write the numbers")
    return parser.parse_args(words)


# ---- the official arrangement ----


def embed_each(maps: list[Tensor], boxes: Tensor, embed: Callable) -> Tensor:
    """One call of `embed` for each level, with all boxes: `[images, levels * boxes, width]`, level by level."""
    images, count, _ = boxes.shape
    index = torch.arange(images, device=boxes.device).repeat_interleave(count)[:, None]
    vectors = []
    for level in maps:
        height, width = level.shape[2:]
        scaled = boxes.flatten(0, 1) * boxes.new_tensor([width, height, width, height])
        pooled = roi_align(level, torch.cat([index, scaled], 1), 7, aligned=True)
        vectors.append(embed(pooled).view(images, count, -1))
    return torch.cat(vectors, 1)


def slots(ids: Tensor, levels: Tensor, num_levels: int, unassigned: int) -> Tensor:
    """The id of each box in the slot of its level, `unassigned` in the others: `[images, levels * boxes]`."""
    each = torch.arange(num_levels, device=ids.device)[:, None]
    return torch.where(levels[:, None] == each, ids[:, None], unassigned).flatten(1)


def official_loss(model: SoCoForPreTraining, batch: dict, maps: list[list[Tensor]], momentum_maps: list) -> Tensor:
    """The loss of one step, from the feature maps of all views on, set of boxes by set of boxes, level by level."""
    boxes, levels, ids = batch["boxes"], batch["levels"], batch["ids"]
    online, momentum, count = model.encoder, model.momentum_encoder, boxes[1].shape[1]

    def queries(pooled):
        return model.predictor(online.projector(online.head(pooled)))

    def keys(pooled):
        return momentum.projector(momentum.head(pooled))

    loss = 0
    for view, index in enumerate(model.config.box_sets, start=1):
        shared = slice(index * count, (index + 1) * count)
        q_first, q = embed_each(maps[0], boxes[0][:, shared], queries), embed_each(maps[view], boxes[view], queries)
        with torch.no_grad():
            k_first = embed_each(momentum_maps[0], boxes[0][:, shared], keys)
            k = embed_each(momentum_maps[view], boxes[view], keys)
        first = slots(ids[0][:, shared], levels[0][:, shared], len(maps[0]), -1)
        second = slots(ids[view], levels[view], len(maps[0]), -view - 1)
        pairs = (first[:, :, None] == second[:, None]).float()
        loss = loss + box_similarity_loss(q_first, k, pairs) + box_similarity_loss(q, k_first, pairs.mT)
    return loss


def our_loss(model: SoCoForPreTraining, batch: dict, maps: list[list[Tensor]], momentum_maps: list) -> Tensor:
    """The same, all boxes of a view at once: what the model itself does."""
    boxes, levels = batch["boxes"], batch["levels"]
    online = [model.predict(model.encoder.embed(*view)) for view in zip(maps, boxes, levels, strict=True)]
    with torch.no_grad():
        momentum = [model.momentum_encoder.embed(*view) for view in zip(momentum_maps, boxes, levels, strict=True)]
    return model.compare(online, momentum, levels, batch["ids"]).loss


def official_step(model: SoCoForPreTraining, batch: dict) -> Tensor:
    maps = [model.encoder.feature_maps(view) for view in batch["pixel_values"]]
    with torch.no_grad():
        momentum_maps = [model.momentum_encoder.feature_maps(view) for view in batch["pixel_values"]]
    return official_loss(model, batch, maps, momentum_maps)


def our_step(model: SoCoForPreTraining, batch: dict) -> Tensor:
    return model(**batch).loss


# ---- what is measured ----


def make_batch(sizes: list[int], config: SoCoConfig, batch_size: int, device: str) -> dict[str, list[Tensor]]:
    """Views of rendered scenes with the proposals of selective search."""
    scenes = make_synthetic_dataset(batch_size, seed=0, image_size=(240, 320))
    found = [selective_search(decode_image(row["image"]), "tiny", max_boxes=50) for row in scenes]
    column = [{"bbox": boxes.tolist(), "score": scores.tolist()} for boxes, scores in found]
    dataset = datasets.Dataset.from_list([{"proposals": proposals} for proposals in column])
    dataset = datasets.concatenate_datasets([scenes.remove_columns("objects"), dataset], axis=1)
    views = SoCoViews(dataset, sizes, config.box_sets, config.level_sizes, seed=0)
    batch = collate_soco([views[SampleKey(row, 0, 0)] for row in range(batch_size)])
    batch["pixel_values"] = [(view / 255 - 0.45) / 0.225 for view in batch["pixel_values"]]
    return {name: [view.to(device) for view in values] for name, values in batch.items()}


def gradients(model: SoCoForPreTraining, step: Callable, batch: dict) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = step(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: SoCoForPreTraining, batch: dict) -> dict[str, float]:
    """The losses of both, and how far their gradients are apart, with fixed statistics in the norms."""
    model.eval()
    ours, our_gradients = gradients(model, our_step, batch)
    official, official_gradients = gradients(model, official_step, batch)
    model.train()
    assert abs(ours - official) <= 1e-5, f"the losses differ: {ours} and {official}"
    assert our_gradients.keys() == official_gradients.keys()
    distance = max(
        ((our_gradients[name] - value).norm() / value.norm().clamp(min=1e-6)).item()
        for name, value in official_gradients.items()
    )
    assert distance <= 1e-3, f"the gradients differ by {distance} of their length"
    return {"loss": ours, "official_loss": official, "gradient_distance": distance}


def in_turn(functions: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each function."""
    rows = common.summary(common.interleaved(functions, repeats, device))
    return {name: row["milliseconds"] for name, row in rows.items()}


def measure(variant: str, backbone: str, sizes: list[int], fields: dict, arguments: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    backbone_config, _, _ = build_backbone_config(backbone, (4, 8, 16, 32), freeze_batch_norm=False)
    config = SoCoConfig(backbone_config=backbone_config, variant=variant, **fields)
    model = SoCoForPreTraining(config).to(arguments.device).train()
    batch = make_batch(sizes, config, arguments.batch_size, arguments.device)
    our_step(model, batch)  # the norms get statistics, so that the activations stay within bounds
    model.update_momentum_encoder(0.5)
    equal = assert_equal(model, batch)
    reference = copy.deepcopy(model)
    model.to(memory_format=torch.channels_last)  # as in training

    def whole_step(model: SoCoForPreTraining, step: Callable) -> Callable:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            step(model, batch).backward()
            optimizer.step()
            model.update_momentum_encoder(0.99)

        return run

    with torch.no_grad():
        maps = [model.encoder.feature_maps(view) for view in batch["pixel_values"]]

    def regions(loss: Callable) -> None:
        leaves = [[level.detach().requires_grad_() for level in view] for view in maps]
        loss(model, batch, leaves, leaves).backward()

    steps = {
        "official": whole_step(reference, official_step),
        "arranged": whole_step(copy.deepcopy(model), official_step),
        "ours": whole_step(model, our_step),
    }
    parts = {"official": lambda: regions(official_loss), "ours": lambda: regions(our_loss)}
    times, part_times = (in_turn(each, arguments.repeats, arguments.device) for each in (steps, parts))
    return {
        **equal,
        "step_official_ms": times["official"],
        "step_official_channels_last_ms": times["arranged"],
        "step_ms": times["ours"],
        "step_ratio": times["ours"] / times["official"],
        "step_ratio_of_same_layout": times["ours"] / times["arranged"],
        "regions_official_ms": part_times["official"],
        "regions_ms": part_times["ours"],
        "regions_ratio": part_times["ours"] / part_times["official"],
    }


def format_row(name: str, row: dict[str, float]) -> str:
    return (
        f"{name:<30} step {row['step_official_ms']:8.0f} ms -> {row['step_ms']:7.0f} ms: {row['step_ratio']:.2f} times"
        f" ({row['step_ratio_of_same_layout']:.2f} in the same layout)"
        f"   regions {row['regions_official_ms']:8.0f} ms -> {row['regions_ms']:6.0f} ms: {row['regions_ratio']:.2f} "
        f"times   loss {row['official_loss']:.5f}, {row['loss']:.5f}"
    )


def main(words: list[str] | None = None) -> dict:
    arguments = parse_arguments(words)
    torch.set_num_threads(1)
    environment = common.environment(arguments.device, "torchvision", "transformers", "timm")
    results = {"environment": environment, "batch_size": arguments.batch_size, "cases": {}}
    for name in arguments.cases:
        results["cases"][name] = measure(*CASES[name], arguments)
        print(format_row(name, results["cases"][name]), flush=True)
    return common.save(arguments.output, results)


if __name__ == "__main__":
    main()
