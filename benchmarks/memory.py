"""
Memory of a pre-training step, family by family, plain, with gradient checkpointing and with bfloat16.

    python benchmarks/memory.py --image_size 480 --batch_size 2

Every number is of a process of its own, of the second step of a new detector with its family's default sizes, around a
frozen ResNet-50 where the family takes one: `state` is what lies there between steps (weights of both detectors,
gradients, AdamW), `step` what a step takes beside it at its peak, mostly activations. On a CPU these are bytes that
the process holds in memory (Linux only), on a GPU bytes that torch has allocated. What the file of results already
has, of the same settings, is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

# glibc would keep freed memory for later, and each of its arenas some.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import common
import torch

from aligndet_hf.detectors.build import build_detector
from aligndet_hf.detectors.families import FAMILIES
from aligndet_hf.models import AlignDetForPreTraining
from aligndet_hf.training.pretrain_aligndet import enable_gradient_checkpointing

VARIANTS = ("plain", "checkpointing", "bf16")
NUM_PROPOSALS = 20


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=sorted(FAMILIES), help="all by default")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS, help="all by default")
    parser.add_argument("--backbone", default="resnet50", help="of the families that take one")
    parser.add_argument("--image_size", type=int, default=480, help="height and width of the images")
    parser.add_argument("--batch_size", type=int, default=2, help="images of a step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", default="benchmarks/results/memory.json", help="where to write the numbers")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # family and variant, in a process of its own
    return parser.parse_args(words)


def measure(family: str, variant: str, arguments: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    backbone = {"backbone": arguments.backbone} if FAMILIES[family].strides else {}
    model = AlignDetForPreTraining.from_detector(build_detector(family, **backbone)).train().to(arguments.device)
    if variant == "checkpointing":
        try:
            enable_gradient_checkpointing(model)
        except ValueError:  # the family has none
            return {"state": None, "step": None}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    multiple = FAMILIES[family].size_multiple(model.online_detector.config)
    size = max(multiple, round(arguments.image_size / multiple) * multiple)
    batch = make_batch(arguments.batch_size, size, arguments.device)
    autocast = torch.autocast(arguments.device, torch.bfloat16) if variant == "bf16" else nullcontext()

    def step():
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        model.update_momentum_detector(0.996)

    step()  # makes gradients and moments, which stay
    before = held(arguments.device)
    reset_peak(arguments.device)
    step()
    weights = {id(p): p.nbytes for p in (*model.parameters(), *model.buffers())}
    gradients = sum(p.nbytes for p in model.parameters() if p.grad is not None)
    return {"size": size, "state": sum(weights.values()) + 3 * gradients, "step": peak(arguments.device) - before}


def make_batch(images: int, size: int, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for prefix in ("", "momentum_"):
        batch[f"{prefix}pixel_values"] = torch.randn(images, 3, size, size, generator=generator).to(device)
        batch[f"{prefix}pixel_mask"] = torch.ones(images, size, size, dtype=torch.long, device=device)
        batch[f"{prefix}labels"] = [
            {
                "boxes": (torch.rand(NUM_PROPOSALS, 4, generator=generator) * 0.3 + 0.2).to(device),
                "class_labels": torch.zeros(NUM_PROPOSALS, dtype=torch.long, device=device),
                "proposal_ids": torch.arange(NUM_PROPOSALS, device=device) + number * NUM_PROPOSALS,
            }
            for number in range(images)
        ]
    return batch


def reset_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def held(device: str) -> int:
    return _status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def peak(device: str) -> int:
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def format_table(rows: dict) -> str:
    lines = [f"{'family':<20}{'state':>10}" + "".join(f"{variant:>16}" for variant in VARIANTS) + "    (MB)"]
    for family, found in rows.items():
        values = [found.get(variant, {}).get("step") for variant in VARIANTS]
        state = next((values["state"] for values in found.values() if values["state"]), 0)
        cells = "".join(f"{'-' if value is None else f'{value / 1e6:.0f}':>16}" for value in values)
        lines.append(f"{family:<20}{state / 1e6:>10.0f}{cells}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> dict:
    arguments = parse_arguments(words)
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments)))
        return {}
    settings = {name: getattr(arguments, name) for name in ("backbone", "image_size", "batch_size", "device")}
    environment = common.environment(arguments.device, "transformers")
    results = {"environment": environment, "settings": settings, "bytes": {}}
    output = Path(arguments.output)
    if output.exists() and (known := json.loads(output.read_text()))["settings"] == settings:
        results["bytes"] = known["bytes"]
    flags = [f"--{name}={value}" for name, value in settings.items()]
    for family in arguments.families:
        found = results["bytes"].setdefault(family, {})
        for variant in arguments.variants:
            if variant not in found:
                command = [sys.executable, __file__, *flags, "--measure", family, variant]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[variant] = json.loads(done.stdout.splitlines()[-1])
                common.save(output, results)
    print(format_table(results["bytes"]))
    return results


if __name__ == "__main__":
    main()
