"""
Direct Pre-training (arXiv 2106.03112): time of an epoch at low and at full resolution, and AP at the same total time.

    python benchmarks/direct.py --dataset bccd --backbone_weights mobilenetv2_100.safetensors

First, epochs at both resolutions take turns, with their loaders; the median of the CPU time of one thread is taken.
From it follow the steps of two arms that train for `--minutes` each: all of it at full resolution, or `--low_share` of
it at low resolution, in batches with as many pixels and at a constant rate, and the rest at full resolution. Both have
the detector and the learning rate of `--recipe`, and train all of it on all of `train`. AP is measured on `validation`
at full resolution.
"""

import json
import statistics
import time
from pathlib import Path

import common
import torch
import yaml

from aligndet_hf.cards import told_settings
from aligndet_hf.commands.finetune import FinetuneArguments, finetune
from aligndet_hf.data.dataset import LabelledImages
from aligndet_hf.data.formats import category_names, load_dataset_source
from aligndet_hf.data.views import ViewConfig
from aligndet_hf.detectors.backbones import set_backbone_trainable
from aligndet_hf.detectors.build import build_image_processor, load_detector
from aligndet_hf.detectors.criterion import use_correct_loss
from aligndet_hf.detectors.families import family_of
from aligndet_hf.recipes import find_recipe
from aligndet_hf.training.detection_trainer import DetectionTrainer

# Norms learn in the large batches of low resolution, and are kept in the small ones, as in the paper.
LOW = {"lr_milestones": [], "lr_scheduler_type": "constant_with_warmup", "freeze_backbone_norms": False}
FULL = {"lr_milestones": [0.8], "freeze_backbone_norms": True}


def parse_arguments(words: list[str] | None):
    parser = common.parser(__file__, __doc__, repeats=3)
    parser.add_argument("--dataset", required=True, help="labelled images with the splits train and validation")
    parser.add_argument("--backbone_weights", help="of the recipe's backbone; random ones if not given")
    parser.add_argument("--recipe", default="finetune_rt_detr_bccd_plain", help="of `finetune`")
    parser.add_argument("--low", type=int, default=128, help="size of the images of the first stage")
    parser.add_argument("--full", type=int, default=256, help="size of the others, and to measure with")
    parser.add_argument("--low_share", type=float, default=0.5, help="of the time, for the first stage")
    parser.add_argument("--minutes", type=float, default=5, help="of each arm, without its measurements")
    parser.add_argument("--images", type=int, default=64, help="of the epochs that are timed")
    parser.add_argument("--folder", default="benchmarks/output/direct", help="of the runs")
    return parser.parse_args(words)


def settings(arguments, size: int, name: str, **changes) -> FinetuneArguments:
    """The recipe at one resolution; smaller images in batches with as many pixels."""
    recipe = yaml.safe_load(find_recipe(arguments.recipe).read_text())
    batch = round(recipe["per_device_train_batch_size"] * (arguments.full / size) ** 2)
    changes = {"per_device_train_batch_size": batch, "image_sizes": [size], "eval_size": arguments.full} | changes
    changes |= {"dataset": arguments.dataset, "output_dir": str(Path(arguments.folder) / name)}
    changes |= {"backbone_weights": arguments.backbone_weights, "use_cpu": arguments.device == "cpu"}
    changes |= {"label_fraction": 1.0, "freeze_backbone": False, "save_strategy": "no", "write_report": False}
    changes |= {"dataloader_num_workers": 0, "overwrite_output_dir": True, "disable_tqdm": True}
    return FinetuneArguments(**recipe | changes)


def epoch(arguments, size: int):
    """A function that trains for one epoch of `--images` images, and the number of its steps."""
    run = settings(arguments, size, "timed", eval_strategy="no")
    dataset = load_dataset_source(arguments.dataset, "train", labels=True)
    categories = category_names(dataset, arguments.dataset)
    torch.manual_seed(0)
    detector = use_correct_loss(load_detector(run, len(categories), dict(enumerate(categories)))[0])
    set_backbone_trainable(detector, not run.freeze_backbone)
    view = ViewConfig([size], resize=family_of(detector.config).resize)
    trainer = DetectionTrainer(
        detector,
        run,
        train_dataset=LabelledImages(dataset.select(range(arguments.images)), view, seed=0),
        processing_class=build_image_processor(detector, size, None),
    )
    loader, optimizer = trainer.get_train_dataloader(), trainer.create_optimizer()

    def train() -> None:
        detector.train()
        for batch in loader:
            trainer.compute_loss(detector, trainer._prepare_inputs(batch)).backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), run.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return train, len(loader)


def stage(arguments, size: int, name: str, steps: int, **changes) -> tuple[list[tuple[int, float]], float, dict]:
    """Fine-tunes; AP after each quarter of the steps, seconds with the measurements, and the last metrics."""
    changes |= {"max_steps": steps, "eval_strategy": "steps", "eval_steps": max(1, -(-steps // 4))}
    started = time.process_time()
    result = finetune(settings(arguments, size, name, **changes))
    log = json.loads((Path(result.output_dir) / "trainer_state.json").read_text())["log_history"]
    return [(e["step"], e["eval_AP"]) for e in log if "eval_AP" in e], time.process_time() - started, result.metrics


def arms(arguments, seconds: dict[int, float]) -> dict:
    """Both arms: AP over the seconds of training, which are steps times the median of a step."""
    low, full = arguments.low, arguments.full
    plan = {
        "full resolution": [("full", full, 1.0, FULL)],
        "low, then full": [
            ("low", low, arguments.low_share, LOW),
            ("then", full, 1 - arguments.low_share, FULL | {"transfer": "everything", "warmup_steps": 0}),
        ],
    }
    found = {}
    for arm, stages in plan.items():
        curve, total, before, start = [], 0.0, 0.0, {}
        for name, size, share, changes in stages:
            steps = max(1, round(60 * arguments.minutes * share / seconds[size]))
            points, spent, metrics = stage(arguments, size, name, steps, **changes | start)
            curve += [{"seconds": before + step * seconds[size], "size": size, "AP": ap} for step, ap in points]
            before, total = before + steps * seconds[size], total + spent
            start = {"detector": str(Path(arguments.folder) / name)}
        found[arm] = {"AP": metrics["AP"], "AP50": metrics["AP50"], "seconds": before, "seconds_measured": total}
        found[arm]["curve"] = curve
    return found


def main(words: list[str] | None = None) -> dict:
    arguments = parse_arguments(words)
    torch.set_num_threads(1)
    epochs = {size: epoch(arguments, size) for size in (arguments.low, arguments.full)}
    functions = {size: train for size, (train, _) in epochs.items()}
    times = common.interleaved(functions, arguments.repeats, arguments.device)
    images = len(load_dataset_source(arguments.dataset, "train", labels=True))
    rows = {
        f"epoch at {size}": {"seconds": statistics.median(values) * images / arguments.images}
        for size, values in times.items()
    }
    faster = common.times_faster(times, arguments.low, arguments.full)
    results = {"rows": rows, "low_times_faster": faster, "settings": told_settings(vars(arguments))}
    if arguments.minutes > 0:
        seconds = {size: statistics.median(times[size]) / steps for size, (_, steps) in epochs.items()}
        results["seconds_a_step"] = {str(size): value for size, value in seconds.items()}
        results["arms"] = arms(arguments, seconds)
    return common.report(__file__, arguments, results, "transformers")


if __name__ == "__main__":
    main()
