"""
Memory of `aligndet predict` on many images: the peak of the process, and how much of it is its own.

    python benchmarks/predict.py --num_images 10000

Images are rendered, small, and linked to as many names; the detector is tiny, so that what is measured is the command:
`peak` is the largest resident size (VmHWM). The pages of libraries and files in it are given back when others
need memory; `own` is what cannot be given back (anonymous). `--kill_after` kills the command once it has that many
images, and runs it again to its end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import PIL.Image
import torch

from aligndet_hf.data.synthetic import render_scene
from aligndet_hf.detectors.build import build_detector, build_image_processor

SHARD = 64  # images between two saves


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=10_000, help="images to look at")
    parser.add_argument("--kill_after", type=int, help="kill the command after this many images, and run it again")
    parser.add_argument("--detector", help="folder of a detector; a tiny RT-DETR of random weights if not given")
    parser.add_argument("--output", default=common.RESULTS / "predict.json", help="where to write the numbers")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "photos", arguments.num_images)
        detector = arguments.detector or write_detector(folder / "detector")
        command = [sys.executable, "-m", "aligndet_hf", "predict", "--detector", detector]
        command += ["--images", f"{folder}/photos", "--output_dir", f"{folder}/found"]
        runs = []
        if arguments.kill_after:
            runs.append(run(command, folder / "found.partial", arguments.kill_after))
        runs.append(run(command, folder / "found.partial"))
    results = {"environment": common.environment("cpu", "transformers"), "images": arguments.num_images, "runs": runs}
    print(common.table({f"run {number}": row for number, row in enumerate(runs, 1)}))
    return common.save(arguments.output, results)


def write_images(folder: Path, number: int) -> None:
    folder.mkdir()
    for n in range(number):
        if n < 50:
            PIL.Image.fromarray(render_scene(np.random.default_rng(n), 120, 160)[0]).save(folder / f"{n:06d}.jpg")
        else:
            os.link(folder / f"{n % 50:06d}.jpg", folder / f"{n:06d}.jpg")


def write_detector(folder: Path) -> str:
    torch.manual_seed(0)
    detector = build_detector("rt_detr", backbone="resnet10t", d_model=32, num_queries=20, num_denoising=0)
    detector.save_pretrained(folder)
    build_image_processor(detector, 64).save_pretrained(folder)
    return str(folder)


def run(command: list[str], work: Path, kill_after: int | None = None) -> dict:
    """Peaks in MB of a run of the command, which is killed after some images if asked for."""
    process, seen = subprocess.Popen(command), {"peak MB": 0.0, "own MB": 0.0, "images": 0}
    place = Path("/proc", str(process.pid))
    while process.poll() is None:
        try:
            peak = megabytes(place / "status", "VmHWM")
            own = megabytes(place / "smaps_rollup", "Anonymous")
        except (OSError, StopIteration):  # it has just ended
            break
        seen["peak MB"], seen["own MB"] = max(seen["peak MB"], peak), max(seen["own MB"], own)
        seen["images"] = max(seen["images"], SHARD * len(list(work.glob("shard-*.arrow"))))
        if kill_after and seen["images"] >= kill_after:
            process.kill()
            break
        time.sleep(0.5)
    return seen | {"exit code": process.wait()}


def megabytes(path: Path, key: str) -> float:
    """A number of a file of the kernel, in MB."""
    lines = path.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


if __name__ == "__main__":
    main()
