"""The commands that `kills.py` attacks, and tiny data and detectors for them."""

import json
from pathlib import Path
from typing import NamedTuple

CONVNETS = ("torchvision_fcos", "torchvision_faster_rcnn")  # one of one stage, and one of two


class Attacked(NamedTuple):
    """
    A command with its flags, the flags that make it another run, and glob patterns of the files that count; the flag
    that names its folder, and a folder whose copy it finds there.
    """

    command: str
    flags: list[str]
    other: list[str]
    files: list[str]
    place: str = "--output_dir"
    given: str | None = None


def attacked(root: Path) -> dict[str, Attacked]:
    data, found, detector, labelled = (str(root / name) for name in ("data", "found", "detector", "labelled"))
    cpu = ["--use_cpu", "--dataloader_num_workers", "0", "--write_report", "false"]
    steps = ["--max_steps", "6", "--save_steps", "1", "--per_device_train_batch_size", "2", *cpu]
    soco = {"fpn_channels": 8, "head_dim": 16, "mlp_dim": 16, "projection_dim": 8, "level_sizes": [8, 16, 32, 64]}
    seed, score = ["--seed", "1"], ["--score_threshold", "0.02"]
    measured = ["--dataset", data, "--split", "train"]
    tasks = {
        "proposals": Attacked(
            "proposals",
            [
                "--dataset",
                data,
                "--source",
                "opencv",
                "--short_side",
                "64",
                "--shard_size",
                "1",
                "--dataloader_num_workers",
                "2",
            ],
            ["--max_boxes", "5"],
            ["**/*"],
        ),
        "clusters": Attacked(
            "clusters",
            ["--dataset", found, "--detector", labelled, "--num_clusters", "2", "--strides", "32"],
            seed,
            ["**/*"],
        ),
        "pretrain": Attacked(
            "pretrain",
            ["--dataset", found, "--detector", detector, "--image_sizes", "64", *steps],
            seed,
            ["model.safetensors", "detector/*", "backbone_report.json"],
        ),
        "soco": Attacked(
            "pretrain",
            ["--method", "soco", "--dataset", found, "--backbone", str(root / "backbone"), *steps]
            + ["--image_sizes", "64", "64", "32", "--soco_config", json.dumps(soco)],
            seed,
            ["*.safetensors", "backbone/*"],
        ),
        "finetune": Attacked(
            "finetune",
            ["--dataset", data, "--detector", detector, "--do_eval", "false", "--save_strategy", "steps"]
            + ["--image_sizes", "64", *steps],
            seed,
            ["model.safetensors", "transfer_report.json"],
        ),
        # Ends early: three measurements in a row are no better.
        "finetune_averaged": Attacked(
            "finetune",
            ["--dataset", data, "--detector", detector, "--image_sizes", "64", "--ema_decay", "0.9", *steps]
            + ["--early_stopping_patience", "3", "--eval_strategy", "steps", "--eval_steps", "1"]
            + ["--save_strategy", "steps", "--layer_decay", "0.9", "--augmentations", "mosaic", "mixup", "copy_paste"],
            ["--ema_decay", "0.8"],
            ["model.safetensors", "transfer_report.json"],
        ),
        "chain": Attacked(
            "chain",
            ["--config", str(root / "chain.yaml"), "--in_this_process"],
            ["--set", "pretrain.seed=1"],
            ["*/model.safetensors", "*/*.arrow", "*.yaml"],
        ),
        "compare": Attacked(
            "compare",
            ["--config", str(root / "compare.yaml"), "--num_pictures", "0"],
            ["--seeds", "1"],
            ["**/model.safetensors", "**/*.arrow", "*.csv", "label_subsets.json"],
        ),
        "predict": Attacked(
            "predict",
            ["--images", f"{data}/train", "--detector", labelled, "--score_threshold", "0.01"],
            score,
            ["**/*"],
        ),
        "pseudolabel": Attacked(
            "pseudolabel",
            ["--dataset", data, "--detector", labelled, "--class_check", "none", "--label_fraction", "0.25"]
            + ["--score_threshold", "0.02", "--ignore_threshold", "0.01"],
            ["--nms_threshold", "0.9"],
            ["**/*.arrow", "**/*.json"],
        ),
        "export": Attacked(
            "export", ["--detector", labelled, "--images", f"{data}/train", "--num_images", "1"], score, ["*.onnx"]
        ),
        "convert": Attacked("convert", ["--from", str(root / "published.pth")], ["--to", "mmdet"], ["**/*"]),
        "evaluate": Attacked(
            "evaluate", [*measured, "--detector", labelled, "--save_predictions"], score, ["predictions.json"]
        ),
        "recall": Attacked("recall", ["--dataset", str(root / "found-labels")], seed, ["recall.json"]),
        "knn": Attacked(
            "knn", [*measured, "--backbone", "resnet10t", "--short_side", "64", "--k", "2"], seed, ["knn.json"]
        ),
        "embeddings": Attacked("embeddings", [*measured, "--detector", labelled], seed, ["embeddings.json"]),
        "check": Attacked("check", ["--dataset", data], ["--num_queries", "1"], ["check.json"]),
        "report": Attacked("report", [], [], ["*"], "--run", given=found),
    }
    for kind in CONVNETS:
        for name in ("pretrain", "finetune"):
            flags = [str(root / kind) if flag == detector else flag for flag in tasks[name].flags]
            tasks[f"{name}-{kind}"] = tasks[name]._replace(flags=flags)
    return tasks


def make_inputs(root: Path) -> None:
    """What the commands work on."""
    import torch
    import yaml
    from original_detectors import MmdetDetr, randomise
    from tiny_detectors import tiny_detector
    from tiny_soco import tiny_backbone
    from transformers.models.resnet.modeling_resnet import ResNetBackbone

    from aligndet_hf.data.synthetic import SYNTHETIC_CATEGORIES, write_synthetic_folder
    from aligndet_hf.detectors.build import build_image_processor

    write_synthetic_folder(root / "data", {"train": 8, "validation": 2}, seed=0, image_size=(64, 64))
    for kind, name in [("rt_detr", "detector"), *zip(CONVNETS, CONVNETS, strict=True)]:
        tiny_detector(kind, num_labels=1).save_pretrained(root / name)
    labelled = tiny_detector("detr", num_labels=len(SYNTHETIC_CATEGORIES))
    labelled.config.id2label = dict(enumerate(SYNTHETIC_CATEGORIES))
    labelled.save_pretrained(root / "labelled")
    build_image_processor(labelled, 64).save_pretrained(root / "labelled")
    ResNetBackbone(tiny_backbone()).save_pretrained(root / "backbone")
    meta = {"mmdet_version": "3.3.0", "dataset_meta": {"classes": tuple(SYNTHETIC_CATEGORIES)}}
    state = randomise(MmdetDetr(3, len(SYNTHETIC_CATEGORIES))).state_dict()
    torch.save({"meta": meta, "state_dict": state}, root / "published.pth")

    common = {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 1, "image_sizes": [64], "max_steps": 2}
    finetune = {"dataset": str(root / "data"), "detector": "${pretrain}/detector", "per_device_train_batch_size": 2}
    finetune |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    proposals = {"dataset": str(root / "data"), "split": "train", "source": "random", "max_boxes": 3}
    stages = {
        "proposals": proposals | {"dataloader_num_workers": 0},
        "pretrain": {"dataset": "${proposals}", "detector": str(root / "detector")},
        "finetune": finetune | {"write_report": False},
    }
    chain = {"common": common, "stages": stages}
    arms = {"arms": {"plain": {"pretrain": None}, "aligndet": {}}, "fractions": [1.0], "seeds": [0], "num_parallel": 0}
    (root / "chain.yaml").write_text(yaml.safe_dump(chain, sort_keys=False))
    (root / "compare.yaml").write_text(yaml.safe_dump(chain | arms, sort_keys=False))
    from aligndet_hf import cli

    found = ["--source", "random", "--max_boxes", "3", "--dataloader_num_workers", "0"]
    for name, split in {"found": "train", "found-labels": "validation"}.items():
        argv = ["--dataset", str(root / "data"), "--split", split, "--output_dir", str(root / name)]
        assert cli.main(["proposals", *argv, *found]) == 0
