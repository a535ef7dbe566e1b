"""
Pre-training at lower resolutions than fine-tuning: time of a step, and AP after the same fine-tuning at full size.

    python benchmarks/resolution.py
    python benchmarks/resolution.py --dataset labelled/ --proposals outputs/proposals --recipe my.yaml \\
        --sizes 320 448 640 --full_size 640 --steps 5000 --finetuning_steps 5000

Every arm has the same number of steps, images and proposals; only the size of the views differs. Without --dataset it
runs on generated images with the small detector below, on a CPU in some minutes, where differences of AP are within
the noise of a seed. A start without pre-training stands beside them. Interrupted, the same command goes on.
The times are those of the clock, size after size: they need a machine without other work.
"""

import argparse
import json
import time
from pathlib import Path

import common
import yaml

from aligndet_hf.cards import told_settings
from aligndet_hf.commands.finetune import FinetuneArguments, finetune
from aligndet_hf.commands.pretrain import PretrainArguments, pretrain
from aligndet_hf.commands.proposals import ProposalsArguments, generate_proposals
from aligndet_hf.data.synthetic import write_synthetic_folder

# The detector of `make demo`.
SMALL = {
    "detector": "rt_detr",
    "backbone": "test_resnet",
    "freeze_batch_norm": False,
    "detector_config": {
        "d_model": 64,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_layers": 3,
        "num_queries": 30,
        "num_denoising": 20,
        "hidden_expansion": 0.5,
    },
}
PRETRAINING = {
    **SMALL,
    "max_proposals": 20,
    "aligndet_config": {"freeze_backbone": False, "base_momentum": 0.95, "contrastive_temperature": 0.2},
    "learning_rate": 5e-4,
    "warmup_steps": 20,
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="labelled images with the splits train and validation")
    parser.add_argument("--proposals", help="what `aligndet proposals` wrote; with --dataset")
    parser.add_argument("--recipe", help="YAML file of `aligndet pretrain` with the detector and the method")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="of the views in pre-training")
    parser.add_argument("--full_size", type=int, default=128, help="in fine-tuning and measuring")
    parser.add_argument("--steps", type=int, default=150, help="of pre-training")
    parser.add_argument("--finetuning_steps", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--images", type=int, default=200, help="generated for pre-training; a third of it is labelled"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--folder", default="benchmarks/output/resolution", help="of the runs; a new one starts anew")
    parser.add_argument("--output", default="benchmarks/results/resolution.json", help="where to write the numbers")
    arguments = parser.parse_args(words)
    if (arguments.dataset is None) != (arguments.proposals is None):
        parser.error("--dataset and --proposals go together")
    return arguments


def generated(folder: Path, size: int, images: int) -> tuple[str, str]:
    """A labelled data set of generated scenes, and proposals for others."""
    data, proposals = folder / "data", folder / "proposals"
    if not data.exists():
        scenes = {"unlabelled": images, "train": -(-images // 3), "validation": -(-images // 3)}
        write_synthetic_folder(data, scenes, seed=0, image_size=(size, size), max_objects=5)
    settings = {"dataset": str(data / "unlabelled"), "output_dir": str(proposals), "dataloader_num_workers": 0}
    generate_proposals(ProposalsArguments(**settings))
    return str(data), str(proposals)


def measure(arguments: argparse.Namespace) -> dict:
    folder = Path(arguments.folder)
    dataset, proposals = arguments.dataset, arguments.proposals
    if dataset is None:
        dataset, proposals = generated(folder, arguments.full_size, arguments.images)
    method = yaml.safe_load(Path(arguments.recipe).read_text()) if arguments.recipe else PRETRAINING
    detector = {key: method[key] for key in SMALL | {"backbone_weights": None} if key in method}
    common = {"use_cpu": arguments.device == "cpu", "seed": arguments.seed, "disable_tqdm": True}
    common |= {"per_device_train_batch_size": arguments.batch_size, "write_report": False}

    arms = {"no pre-training": {"detector": detector}}
    for size in arguments.sizes:
        run = {"dataset": proposals, "output_dir": str(folder / f"pretrained-{size}"), "max_steps": arguments.steps}
        run |= {"image_sizes": [size], "logging_steps": max(1, arguments.steps // 10)}
        result = pretrain(PretrainArguments(**method | common | run))
        log = [json.loads(line) for line in (result.output_dir / "log.jsonl").read_text().splitlines()]
        seconds = sorted(arguments.batch_size / entry["images_per_second"] for entry in log)[len(log) // 2]
        arms[str(size)] = {"seconds_per_step": seconds, "detector": {"detector": str(result.detector_dir)}}
    for name, arm in arms.items():
        run = {"dataset": dataset, "output_dir": str(folder / f"finetuned-{name.replace(' ', '-')}")}
        run |= {"image_sizes": [arguments.full_size], "max_steps": arguments.finetuning_steps, "report_to": "none"}
        run |= {"eval_strategy": "no", "save_strategy": "no", "dataloader_num_workers": 0, "learning_rate": 5e-4}
        run |= {"num_pictures": 0}
        run |= {"backbone_learning_rate": 5e-4} if not arguments.recipe else {}
        metrics = finetune(FinetuneArguments(**arm.pop("detector") | common | run)).metrics
        arm |= {key: metrics[key] for key in ("AP", "AP50")}
    return arms


def format_table(arms: dict, arguments: argparse.Namespace) -> str:
    full = arms.get(str(arguments.full_size), {}).get("seconds_per_step")
    lines = [f"{'pre-trained at':<18}{'s a step':>10}{'of full':>10}{'AP':>8}{'AP50':>8}"]
    for name, arm in arms.items():
        seconds = arm.get("seconds_per_step")
        cells = [f"{seconds:.3f}" if seconds else "-", f"{seconds / full:.2f}" if seconds and full else "-"]
        lines.append(f"{name:<18}{cells[0]:>10}{cells[1]:>10}{100 * arm['AP']:>8.1f}{100 * arm['AP50']:>8.1f}")
    lines.append(f"{arguments.steps} steps each, then {arguments.finetuning_steps} at {arguments.full_size} pixels")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> dict:
    arguments = parse_arguments(words)
    started = time.perf_counter()
    arms = measure(arguments)
    environment = common.environment(arguments.device, "transformers")
    results = {"environment": environment, "settings": told_settings(vars(arguments)), "arms": arms}
    print(format_table(arms, arguments))
    print(f"({(time.perf_counter() - started) / 60:.1f} minutes)")
    return common.save(arguments.output, results)


if __name__ == "__main__":
    main()
