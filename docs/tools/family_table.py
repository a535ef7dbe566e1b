"""What works with which detector family: tries it on a tiny random detector of each and prints docs/families.md.

    python docs/tools/family_table.py > docs/families.md

Takes two minutes on a CPU. The tiny detectors are those of the tests.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from aligndet_hf import AlignDetForPreTraining
from aligndet_hf.detectors.families import family_of, num_queries
from aligndet_hf.detectors.published import PUBLISHED
from aligndet_hf.training.pretrain_aligndet import enable_gradient_checkpointing

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from tiny_detectors import CONFIGS, random_batch, tiny_detector  # noqa: E402

COLUMNS = {
    "family": "",
    "class loss": "the loss of the family's class head, as transformers has it",
    "queries": "queries of a training step and of a prediction; convnets have none, but 20 detections",
    "layers contrasted": "decoder layers whose queries are contrasted, out of 2",
    "image processor": "saved with the detector, so that `pipeline` and `AutoImageProcessor` work",
    "pre-trains": "one AlignDet step: a finite loss, and gradients in all of the detector but its backbone",
    "checkpointing": "the same with gradient checkpointing switched on, with the same loss",
    "bf16": "the same under bfloat16 autocast",
    "compile": "`torch.compile(fullgraph=True)` of the prediction, backend `aot_eager`, with equal boxes",
}


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print(
        f"""# Detector families

Written by `python docs/tools/family_table.py`, with torch {torch.__version__.split("+")[0]} and transformers \
{transformers.__version__} on a CPU. A cross means that it was tried and failed; why stands below the table.
"""
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    failures = []
    for name in CONFIGS:
        row, reasons = row_of(name)
        print("| " + " | ".join(row) + " |", flush=True)
        failures += [f"- {name}, {column}: {reason}" for column, reason in reasons.items()]
    print("\n" + "\n".join(f"- **{column}**: {meaning}" for column, meaning in COLUMNS.items() if meaning))
    print("\n## What failed, and why\n\n" + ("\n".join(failures) or "Nothing."))
    print("\n" + short_names() + "\nHow a family is added: [adding_a_family.md](adding_a_family.md).")


def short_names() -> str:
    """The section about short names."""
    rows = [f"| `{name}` | `{hub_id}` |" for name, hub_id in PUBLISHED.items()]
    text = "`--detector` and all that takes a detector know published ones by short names, such as `rt_detr_r18`:"
    return "\n".join(["## Short names", "", text, "", "| name | Hub id |", "|---|---|", *rows, ""])


def row_of(name: str) -> tuple[list[str], dict[str, str]]:
    """A family's row, and why something in it failed, by column."""
    detector = tiny_detector(name).train()
    family, config = family_of(detector.config), detector.config
    with torch.no_grad():
        outputs = detector(**random_batch(), output_hidden_states=True)
        rows = family.object_rows(detector, outputs, None)
    layers = len(rows.features) // len(rows.features[rows.last])
    row = [
        name,
        family.losses(config).class_loss,
        f"{'none' if family.own_loss else outputs.logits.shape[1]} / {num_queries(config)}",
        "no layers" if family.own_loss else "2 of 2" if layers == 2 else "last of 2",
        family.image_processor,
    ]
    reasons = {}
    for column, attempt in {
        "pre-trains": pretraining_loss,
        "checkpointing": checkpointing,
        "bf16": bfloat16,
        "compile": compiled,
    }.items():
        reason = failure(attempt, name)
        row.append("yes" if reason is None else "✗")
        if reason is not None:
            reasons[column] = reason
    return row, reasons


def failure(attempt: Callable[[str], object], name: str) -> str | None:
    """The first line of the error of an attempt, if it fails."""
    try:
        attempt(name)
    except Exception as error:  # whatever it is, it is what the table reports
        sentence, _, _ = str(error).strip().splitlines()[0].partition(". ")
        return f"{type(error).__name__}: {sentence}"
    finally:
        torch.compiler.reset()
    return None


def pretraining_loss(name: str, prepare: Callable[[AlignDetForPreTraining], object] = lambda model: None) -> float:
    """The loss of a step, after its backward pass."""
    torch.manual_seed(0)
    model = AlignDetForPreTraining.from_detector(tiny_detector(name)).train()
    prepare(model)
    views = random_batch() | {f"momentum_{key}": value for key, value in random_batch().items()}
    torch.manual_seed(1)
    loss = model(**views).loss
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing or not loss.isfinite():
        raise RuntimeError(f"loss {loss:.3f}, no gradient in {missing[:3]}")
    return loss.item()


def checkpointing(name: str) -> None:
    """A step with gradient checkpointing."""
    loss = pretraining_loss(name, enable_gradient_checkpointing)
    if abs(loss - (expected := pretraining_loss(name))) > 1e-4 * expected:
        raise RuntimeError(f"the loss is {loss:.4f} instead of {expected:.4f}")


def bfloat16(name: str) -> None:
    """A step under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        pretraining_loss(name)


def compiled(name: str) -> None:
    """A prediction in one graph."""
    detector, pixels = tiny_detector(name).eval(), random_batch()["pixel_values"]
    with torch.no_grad():
        expected = detector(pixel_values=pixels).pred_boxes
        found = torch.compile(detector, backend="aot_eager", fullgraph=True)(pixel_values=pixels).pred_boxes
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
