"""
A pre-training step against the work that nobody can avoid, and against what one would write with stock parts.

    python benchmarks/step.py
    python benchmarks/step.py --device cuda --images 16 --height 800 --width 1216 --workers 16

- `step`: forward, backward, clipping, optimizer and momentum update of `AlignDetForPreTraining`, from uint8 images.
- `unavoidable`: the same detectors with a loss that costs nothing. The frozen backbone sees both views, the
  transformer goes forward and backward on one and forward on the other. No matching, no losses, no optimizer.
- `stock`: two full detectors that share nothing and whose backbones are trained, transformers' losses and matchers,
  a Python loop for the momentum; the contrastive loss is ours. The momentum detector runs without gradients, or, in
  the second row, with a graph that nobody uses.

`MB` counts weights, the state of the optimizer, and the most that a step allocates. The switches are measured against
the step as it is: other precision, other layout of the images in memory, `torch.compile` (only if asked for:
compiling takes minutes on a CPU). On a GPU the last rows are what the GPU does besides matrix products and
convolutions, how often the CPU waits for it, and how long it waits for the loader.
"""

import copy
import itertools
import json
import time
from collections.abc import Callable
from functools import partial

import common
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.loss.loss_for_object_detection import HungarianMatcher

from aligndet_hf import AlignDetForPreTraining
from aligndet_hf.data.collate import normalize_images
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.losses import object_contrastive_loss
from aligndet_hf.training.compilation import compile_networks

MOMENTUM = 0.996
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Operators that are matrix work, as torch's profiler names them.
MATRIX_WORK = ("mm", "conv", "attention", "linear")


def make_batch(images: int, height: int, width: int, proposals: int, device: str) -> dict:
    """A batch of random images and boxes as the loader makes it, on the device."""
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for prefix in ("", "momentum_"):
        pixels = torch.randint(256, (images, height, width, 3), dtype=torch.uint8, generator=generator)
        batch[f"{prefix}pixel_values"] = pixels.to(device).permute(0, 3, 1, 2)
        batch[f"{prefix}pixel_mask"] = torch.ones(images, height, width, dtype=torch.int64, device=device)
        batch[f"{prefix}labels"] = [
            {
                "boxes": torch.rand(proposals, 4, generator=generator).mul(0.5).add(0.1).to(device),
                "class_labels": torch.zeros(proposals, dtype=torch.int64, device=device),
                "proposal_ids": torch.arange(proposals, device=device) + image * proposals,
            }
            for image in range(images)
        ]
    return batch


def normalized(batch: dict) -> dict:
    """The batch with its images normalised, as the training loop does after their copy to the device."""
    images = {
        f"{prefix}pixel_values": normalize_images(
            batch[f"{prefix}pixel_values"], batch[f"{prefix}pixel_mask"], MEAN, STD
        )
        for prefix in ("", "momentum_")
    }
    return batch | images


def resident_bytes(modules: list[nn.Module], optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of weights, buffers and the state of the optimizer, each counted once."""
    states = optimizer.state.values() if optimizer else []
    tensors = itertools.chain(
        *(itertools.chain(m.parameters(), m.buffers()) for m in modules), *map(dict.values, states)
    )
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


class Step:
    """Our step."""

    def __init__(self, detector: nn.Module, precision: torch.dtype | None = None, compiled: bool = False):
        self.model = AlignDetForPreTraining.from_detector(copy.deepcopy(detector)).train().to(detector.device)
        self.precision = precision
        if compiled:
            compile_networks(self.model.networks())
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-4, fused=True)

    def __call__(self, batch: dict) -> None:
        with torch.autocast(batch["pixel_values"].device.type, self.precision, enabled=self.precision is not None):
            loss = self.model(**normalized(batch)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_momentum_detector(MOMENTUM)

    def resident_bytes(self) -> int:
        return resident_bytes([self.model], self.optimizer)


class Unavoidable:
    """The forward and backward passes of our step, with a loss that costs nothing."""

    def __init__(self, detector: nn.Module):
        self.model = AlignDetForPreTraining.from_detector(copy.deepcopy(detector)).train().to(detector.device)
        for part in (self.model.online_detector, self.model.momentum_detector):
            part.loss_function = self.free_loss

    @staticmethod
    def free_loss(logits, labels, device, pred_boxes, config, outputs_class: Tensor, outputs_coord: Tensor, **unused):
        return outputs_class.sum() + outputs_coord.sum(), {}, None

    def __call__(self, batch: dict) -> None:
        views = [
            {name: batch[prefix + name] for name in ("pixel_values", "pixel_mask", "labels")}
            for prefix in ("", "momentum_")
        ]
        self.model.online_detector(**views[0]).loss.backward()
        with torch.no_grad():
            self.model.momentum_detector(**views[1])
        self.model.zero_grad()

    def resident_bytes(self) -> int:
        return resident_bytes([self.model])


class Stock:
    """AlignDet from the parts of transformers."""

    def __init__(self, detector: nn.Module, momentum_graph: bool):
        self.online, self.momentum = copy.deepcopy(detector).train(), copy.deepcopy(detector).train()
        for part in (self.online, self.momentum):
            part.requires_grad_(True)
        width = detector.config.d_model
        self.projectors = [
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(detector.device)
            for _ in range(2)
        ]
        self.trained = [*self.online.parameters(), *self.projectors[0].parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4)
        self.matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
        self.momentum_graph = momentum_graph

    def rows(self, detector: nn.Module, projector: nn.Module, batch: dict, prefix: str):
        """Projected features of all layers, the ids of their proposals, and the stock loss."""
        labels = batch[f"{prefix}labels"]
        outputs = detector(
            pixel_values=batch[f"{prefix}pixel_values"],
            pixel_mask=batch[f"{prefix}pixel_mask"],
            labels=labels,
            output_hidden_states=True,
        )
        last = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
        states = [*outputs.decoder_hidden_states[1:-1], outputs.last_hidden_state]
        ids = []
        for predictions in [*outputs.auxiliary_outputs, last]:
            for image, (query, target) in enumerate(self.matcher(predictions, labels)):
                own = torch.full((last["logits"].shape[1],), -1, device=query.device)
                own[query] = labels[image]["proposal_ids"].cpu()[target]
                ids.append(own)
        features = projector(torch.stack(states)).flatten(0, 2)
        return features, torch.cat(ids).to(features.device), outputs.loss

    def __call__(self, batch: dict) -> None:
        online, online_ids, loss = self.rows(self.online, self.projectors[0], batch, "")
        with torch.set_grad_enabled(self.momentum_graph):
            momentum, momentum_ids, _ = self.rows(self.momentum, self.projectors[1], batch, "momentum_")
        loss = loss + object_contrastive_loss(online, momentum.detach(), online_ids, momentum_ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            pairs = zip((self.momentum, self.projectors[1]), (self.online, self.projectors[0]), strict=True)
            for old_module, new_module in pairs:
                for old, new in zip(old_module.parameters(), new_module.parameters(), strict=True):
                    old.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)

    def resident_bytes(self) -> int:
        return resident_bytes([self.online, self.momentum, *self.projectors], self.optimizer)


def share_of_matrix_work(function: Callable, device: str) -> float:
    """The part of a call's time in which matrix products, convolutions and attention run."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    function()
    start = common.now(device)
    function()
    seconds = common.now(device) - start
    with torch.profiler.profile(activities=activities) as profile:
        function()
        common.now(device)
    events = profile.key_averages()
    matrix = [e for e in events if e.key.startswith("aten::") and any(word in e.key for word in MATRIX_WORK)]
    if device == "cuda":
        return sum(event.self_device_time_total for event in matrix) / (1e6 * seconds)
    return sum(event.self_cpu_time_total for event in matrix) / sum(event.self_cpu_time_total for event in events)


def loader_wait(step: Callable, images: int, height: int, width: int, workers: int, steps: int) -> dict[str, float]:
    """Images a second with a real loader of rendered scenes, and the share of the time that the step waits for it."""
    from torch.utils.data import DataLoader

    from aligndet_hf.data.collate import collate_views
    from aligndet_hf.data.dataset import ProposalViews
    from aligndet_hf.data.sampling import EpochBatchSampler
    from aligndet_hf.data.synthetic import make_synthetic_dataset
    from aligndet_hf.data.views import ViewConfig
    from aligndet_hf.processes import init_worker

    scenes = make_synthetic_dataset(32, seed=0, image_size=(480, round(480 * width / height)))
    scenes = scenes.rename_column("objects", "proposals")
    views = ProposalViews(scenes, ViewConfig([height], width), seed=0, max_proposals=50)
    sampler = EpochBatchSampler(len(views), images, seed=0, drop_last=True)
    loader = DataLoader(
        views,
        batch_sampler=sampler,
        collate_fn=collate_views,
        num_workers=workers,
        worker_init_fn=init_worker,
        pin_memory=True,
    )
    waited, start = 0.0, None
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for number in range(steps + 1):
        before = time.perf_counter()
        batch = next(epochs)
        waited += time.perf_counter() - before
        step(send_to_device(batch, "cuda", non_blocking=True))
        if number == 0:  # the workers have started
            torch.cuda.synchronize()
            waited, start = 0.0, time.perf_counter()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"images a second": steps * images / seconds, "waits for the loader": waited / seconds}


def main(words: list[str] | None = None) -> dict:
    parser = common.parser(__file__, __doc__, repeats=4)
    sizes = {"images": 2, "height": 480, "width": 640, "proposals": 50}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--backbone", default="resnet50", help="timm name of the detector's backbone")
    parser.add_argument(
        "--detector_config", type=json.loads, default={}, help="fields of the detector's config as JSON"
    )
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--workers", type=int, default=0, help="on a GPU: processes of a loader to measure with")
    arguments = parser.parse_args(words)
    device = arguments.device
    shape = [getattr(arguments, name) for name in sizes]
    torch.manual_seed(0)
    detector = build_detector("detr", backbone=arguments.backbone, **arguments.detector_config).to(device)
    batch = make_batch(*shape, device)
    views = normalized(batch)
    channels_first = batch | {name: batch[name].contiguous() for name in ("pixel_values", "momentum_pixel_values")}

    step, bf16 = Step(detector), Step(detector, torch.bfloat16)
    objects = {
        "step": step,
        "unavoidable": Unavoidable(detector),
        "stock": Stock(detector, momentum_graph=False),
        "stock, graph of the momentum detector": Stock(detector, momentum_graph=True),
        "step, bf16": bf16,
    }
    functions = {name: partial(call, batch if isinstance(call, Step) else views) for name, call in objects.items()}
    functions["step, channels first"] = partial(step, channels_first)
    if arguments.compile:
        for name, precision in {"step, compiled": None, "step, bf16, compiled": torch.bfloat16}.items():
            objects[name] = Step(detector, precision, compiled=True)
            functions[name] = partial(objects[name], batch)
    times = common.interleaved(functions, arguments.repeats, device)
    rows = common.summary(times)
    for name, function in functions.items():
        resident = objects.get(name, step).resident_bytes()
        rows[name]["MB"] = (resident + common.peak_memory(function, device)) / 1e6
        rows[name]["images/s"] = 1000 * arguments.images / rows[name]["milliseconds"]
        if device == "cuda" or name == "step":
            rows[name]["waits"] = common.waits(function, device)
            rows[name]["matrix work"] = share_of_matrix_work(function, device)
    results = {
        "sizes": dict(zip(sizes, shape, strict=True)),
        "rows": rows,
        "step / unavoidable": 1 / common.times_faster(times, "step", "unavoidable"),
        "stock / step": {
            name: {
                "time": common.times_faster(times, "step", name),
                "memory": rows["step"]["MB"] / rows[name]["MB"],
            }
            for name in ("stock", "stock, graph of the momentum detector")
        },
    }
    if arguments.workers:
        results["with a loader"] = {
            name: loader_wait(objects[name], *shape[:3], arguments.workers, steps=30)
            for name in ("step", "step, bf16")
        }
    return common.report(__file__, arguments, results, "transformers", "timm")


if __name__ == "__main__":
    main()
