"""The whole journey on generated images: proposals, pre-training, fine-tuning from both starts, and the comparison.

    python scripts/demo.py [output folder]

`make demo` runs it. It takes some minutes on two CPU cores, downloads nothing, and can be interrupted: the same
command goes on where it stopped. Every step is the Python function behind the `aligndet` command of the same name.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from aligndet_hf import (
    FinetuneArguments,
    PretrainArguments,
    ProposalsArguments,
    RecallArguments,
    category_names,
    finetune,
    generate_proposals,
    load_dataset_source,
    measure_recall,
    pretrain,
)
from aligndet_hf.data.synthetic import write_synthetic_folder
from aligndet_hf.evaluation.coco_metrics import format_table
from aligndet_hf.reporting.pictures import has_matplotlib
from aligndet_hf.reporting.plots import plot_arms, plot_curves
from aligndet_hf.reporting.predictions import plot_detectors

SIZE = 128  # pixels; everything here is small enough for a laptop's CPU
NUM_UNLABELLED, NUM_LABELLED, NUM_MEASURED = 400, 100, 100

# A small RT-DETR around a small random backbone. With weights of your own for the backbone you would freeze it in
# pre-training, as AlignDet does.
DETECTOR = {
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

TRAINING = {
    "image_sizes": [96, 128],
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "warmup_steps": 50,
    "logging_steps": 20,
    "dataloader_num_workers": 1,
    "use_cpu": True,
}


def main(output: Path) -> None:
    start = time.monotonic()
    data = output / "data"
    if not data.exists():
        unfinished = output / "unfinished-data"
        shutil.rmtree(unfinished, ignore_errors=True)
        scenes = {"unlabelled": NUM_UNLABELLED, "train": NUM_LABELLED, "validation": NUM_MEASURED}
        write_synthetic_folder(unfinished, scenes, seed=0, image_size=(SIZE, SIZE), max_objects=5)
        (unfinished / "unlabelled" / "metadata.jsonl").unlink()  # pre-training gets no labels
        unfinished.rename(data)

    banner(f"1. proposals for {NUM_UNLABELLED} images without labels")
    generate_proposals(
        ProposalsArguments(
            dataset=str(data / "unlabelled"),
            output_dir=str(output / "proposals"),
            # Few boxes that are apart: a scene has up to five objects, and the best five boxes find most of them.
            nms_threshold=0.3,
            max_relative_size=0.7,
        )
    )

    if has_matplotlib():
        arguments = {"output_dir": str(output / "recall"), "num_pictures": 8, "num_boxes": 8}
        measure_recall(RecallArguments(dataset=str(output / "proposals"), **arguments))

    banner("2. pre-training of the whole detector")
    pretrained = pretrain(
        PretrainArguments(
            **DETECTOR,
            **TRAINING,
            dataset=str(output / "proposals"),
            output_dir=str(output / "pretrained"),
            max_proposals=5,
            aligndet_config={"freeze_backbone": False, "base_momentum": 0.95, "contrastive_temperature": 0.2},
            max_steps=600,
            lr_scheduler_type="cosine",
        )
    )

    arms = {}
    starts = {"plain": DETECTOR, "pre-trained": {"detector": str(pretrained.detector_dir)}}
    for number, (name, detector) in enumerate(starts.items(), start=3):
        banner(f"{number}. fine-tuning on {NUM_LABELLED} labelled images, {name} start")
        arms[name] = finetune(
            FinetuneArguments(
                **detector,
                **TRAINING,
                dataset=str(data),
                output_dir=str(output / f"finetuned-{name}"),
                max_steps=1000,
                backbone_learning_rate=5e-4,
                eval_strategy="steps",
                eval_steps=250,
                save_strategy="steps",
                save_steps=250,
                report_to="none",
            )
        )

    banner("5. both starts side by side")
    results = {name: arm.metrics for name, arm in arms.items()}
    pictures(output, data, results)
    print(f"AP on {NUM_MEASURED} images, after the same {NUM_LABELLED} labelled images and the same steps:\n")
    for name, metrics in results.items():
        print(f"{name} start\n{format_table(metrics)}\n")
    (output / "results.json").write_text(json.dumps(results, indent=2))
    gain = 100 * (results["pre-trained"]["AP"] - results["plain"]["AP"])
    print(f"Pre-training changes AP by {gain:+.1f} points. One seed, generated images: a demonstration, no benchmark.")
    print(f"Pictures and results are in {output} ({(time.monotonic() - start) / 60:.1f} minutes).")


def pictures(output: Path, data: Path, results: dict) -> None:
    plot_arms(results, output / "ap.png", title="The same fine-tuning from both starts")
    runs = {name: output / f"finetuned-{name}" for name in results}
    plot_curves(runs, output / "finetuning_curves.png", keys=("loss", "eval_AP"), title="Fine-tuning")
    keys = ("loss", "loss_contrastive", "rank_accuracy", "embedding_spread")
    plot_curves({"pre-training": output / "pretrained"}, output / "pretraining_curves.png", keys, title="Pre-training")

    labelled = load_dataset_source(str(data), "validation", labels=True)
    plot_detectors(runs, labelled, category_names(labelled, str(data)), output / "predictions.jpg", num_images=4)


def banner(text: str) -> None:
    print(f"\n=== {text} ===", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
