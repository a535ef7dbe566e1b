"""
Which families transformers can export to ONNX, and whether the export finds what the detector finds.

    python benchmarks/export.py

Every family is built with the tiny config of the tests, random weights and class heads that prefer some queries
to others, exported with `aligndet export`, and compared with PyTorch in ONNX Runtime on scenes that each side
prepares by itself. The table goes to docs/export.md.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import torch

from aligndet_hf.commands.export import ExportArguments, export
from aligndet_hf.detectors.build import build_image_processor, detector_from_config
from aligndet_hf.detectors.families import family_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from tiny_detectors import CONFIGS, tiny_config  # noqa: E402

MARKS = ("<!-- families that can be exported -->\n", "<!-- end of families -->")
SIDE = 64


def measure(family: str, num_images: int) -> dict:
    torch.manual_seed(0)
    detector = detector_from_config(tiny_config(family)).eval()
    for module in detector.modules():  # as PyTorch starts layers: transformers' start shows nothing of an image
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight.any():
            module.reset_parameters()
    for name, parameter in detector.named_parameters():
        if re.match(family_of(detector.config).class_heads, name):
            torch.nn.init.normal_(parameter, 0, 0.3)
    with tempfile.TemporaryDirectory() as folder:
        detector.save_pretrained(Path(folder, "detector"))
        build_image_processor(detector, SIDE).save_pretrained(Path(folder, "detector"))
        arguments = ExportArguments(
            detector=str(Path(folder, "detector")), output_dir=str(Path(folder, "onnx")), num_images=num_images
        )
        try:
            model = export(arguments)
        except ValueError as error:
            return {"error": str(error)}
    parity = model["parity"]
    reasons = sorted({entry["reason"].split(":")[0] for entry in parity["differing"]})
    return {"opset": model["opset"], "inputs": model["inputs"]} | parity | {
        "differing": len(parity["differing"]), "reasons": reasons, "versions": model["versions"],
    }  # fmt: skip


def table(results: dict[str, dict]) -> str:
    lines = ["| family | detections the same | boxes, pixels | scores | images |", "|---|---|---|---|---|"]
    for family, found in results.items():
        if "error" in found:
            lines.append(
                f"| `{family}` | cannot be exported | | | {found['error'].split(': ', 1)[-1].split('. ')[0]} |"
            )
            continue
        same = found["detections"] - found["differing"]
        sizes = "any size" if "pixel_mask" in found["inputs"] else "one size"
        reasons = f"; {'; '.join(found['reasons'])}" if found["reasons"] else ""
        lines.append(
            f"| `{family}` | {same} of {found['detections']} | {found['box_difference']:.1g} | "
            f"{found['score_difference']:.1g} | {sizes}{reasons} |"
        )
    versions = next((found["versions"] for found in results.values() if "versions" in found), {})
    return "\n".join(lines) + "\n\n" + ", ".join(f"{name} {number}" for name, number in versions.items()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(CONFIGS), help="all by default")
    parser.add_argument("--num_images", type=int, default=8, help="scenes to compare on")
    parser.add_argument("--output", default=ROOT / "benchmarks/results/export.json", type=Path, help="the numbers")
    parser.add_argument("--page", default=ROOT / "docs/export.md", type=Path, help="the page with the table")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for family in arguments.families:
        results[family] = measure(family, arguments.num_images)
        print(family, results[family], flush=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        write_table(results, arguments.page)


def write_table(results: dict[str, dict], path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    ordered = {family: results[family] for family in CONFIGS if family in results}
    page = before + MARKS[0] + "\n" + table(ordered) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
