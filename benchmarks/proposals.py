"""
Time and recall of the proposal methods, side by side on one thread.

    python benchmarks/proposals.py --images path/to/labelled path/to/other

Every image is searched by every method in turn, so that a change of the machine's speed meets all of them; times are
medians of the CPU time per image, without decoding. The presets of selective search are compared with OpenCV's fast
mode in our order and in its own, and with random boxes, which have not seen the image.
"""

import argparse
import concurrent.futures
import multiprocessing
import statistics
import time
from pathlib import Path

import common
import cv2
import datasets
import numpy as np

from aligndet_hf.commands.recall import RecallMeter
from aligndet_hf.data.formats import load_dataset_source, split_names
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.synthetic import make_synthetic_dataset
from aligndet_hf.proposals.controls import random_boxes
from aligndet_hf.proposals.opencv import opencv_selective_search
from aligndet_hf.proposals.selective_search import PRESETS, selective_search

LIMITS = (50, 100, 300)
FULL = "OpenCV fast, full resolution"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="*", default=[], help="labelled folders or files; rendered scenes if none")
    parser.add_argument("--num_images", type=int, help="at most so many images of each, evenly spaced; all by default")
    parser.add_argument(
        "--full_images", type=int, default=5, help="images for OpenCV at full resolution, which is slow"
    )
    parser.add_argument("--seconds", type=float, default=5, help="duration of a measurement of throughput; 0 for none")
    parser.add_argument("--output", default="benchmarks/results/proposals.json", help="where to write the numbers")
    return parser.parse_args(words)


def load(source: str | None, num_images: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and their boxes `[N, 4]` (absolute xywh) of all splits of a source; rendered scenes for `None`."""
    if source is None:
        dataset = make_synthetic_dataset(50, seed=0, image_size=(480, 640))
    else:
        splits = [load_dataset_source(source, split, labels=True) for split in split_names(source)]
        dataset = datasets.concatenate_datasets(splits)
    rows = np.unique(np.linspace(0, len(dataset) - 1, num_images or len(dataset)).round().astype(int))
    return [
        (decode_image(row["image"]), np.array(row["objects"]["bbox"], dtype=np.float32).reshape(-1, 4))
        for row in dataset.select(rows)
    ]


def opencv_as_it_is(image: np.ndarray, short_side: int = 200) -> np.ndarray:
    """The boxes of OpenCV's fast mode in its own, random order, all of them."""
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    small = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    search.switchToSelectiveSearchFast()
    return (search.process() / scale).astype(np.float32)


def methods() -> dict:
    """Name to a function from an image and its number to boxes `[N, 4]`, best first."""
    presets = {
        f"selective_search {preset}": lambda image, _, preset=preset: selective_search(image, preset)[0]
        for preset in PRESETS
    }
    return presets | {
        "OpenCV fast, 200 px": lambda image, _: opencv_selective_search(image)[0],
        "OpenCV fast, 200 px, own order": lambda image, _: opencv_as_it_is(image),
        FULL: lambda image, _: opencv_selective_search(image, short_side=min(image.shape[:2]))[0],
        "random boxes": lambda image, number: random_boxes(image.shape[:2], LIMITS[-1], number),
    }


def measure(samples: list[tuple[np.ndarray, np.ndarray]], full_images: int) -> dict:
    """Per method: median CPU milliseconds, mean number of boxes, number of images, and recall."""
    times, found = {name: [] for name in methods()}, {name: [] for name in methods()}
    for name, search in methods().items():
        if name != FULL:
            search(samples[0][0], 0)  # compiled
    for number, (image, _) in enumerate(samples):
        for name, search in methods().items():
            if name == FULL and number >= full_images:
                continue
            start = time.process_time()
            boxes = search(image, number)
            times[name].append(1000 * (time.process_time() - start))
            found[name].append(boxes)
    return {
        name: {
            "milliseconds": statistics.median(times[name]),
            "boxes": statistics.mean(map(len, boxes)),
            "images": len(boxes),
            **recall(boxes, [truth for _, truth in samples[: len(boxes)]]),
        }
        for name, boxes in found.items()
        if boxes
    }


def recall(proposals: list, objects: list) -> dict:
    """Of all objects of some images, see `RecallMeter`."""
    meter = RecallMeter(LIMITS)
    for boxes, truth in zip(proposals, objects, strict=True):
        meter.update(boxes, truth)
    return meter.compute()["all"]


def images_per_second(seconds: float) -> float:
    """How many scenes of 480 x 640 pixels the default preset searches in a second of this process."""
    images = [row[0] for row in load(None, 8)]
    selective_search(images[0])
    time.sleep(max(0, 2 - time.perf_counter() % 2))  # all processes start together
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        selective_search(images[number % len(images)])
        number += 1
    return number / (time.perf_counter() - start)


def measure_throughput(seconds: float) -> dict:
    """Images per second of one and of two processes, in turn: the medians of three measurements."""
    rates = {1: [], 2: []}
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(images_per_second, [0.1, 0.1]))
        for _ in range(3):
            for processes, values in rates.items():
                values.append(sum(pool.map(images_per_second, [seconds] * processes)))
    one, two = (statistics.median(values) for values in rates.values())
    return {"one_process": one, "two_processes": two, "ratio": two / one}


def format_table(name: str, results: dict) -> str:
    lines = [f"{name}: recall at IoU 0.5 / average recall in %, of the first {', '.join(map(str, LIMITS))} boxes"]
    for method, values in results.items():
        cells = [f"{100 * values[f'recall@{limit}']:5.1f} /{100 * values[f'AR@{limit}']:5.1f}" for limit in LIMITS]
        lines.append(
            f"  {method:<32}{values['milliseconds']:8.1f} ms   {'   '.join(cells)}   "
            f"{values['boxes']:5.0f} boxes, {values['images']} images"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> dict:
    arguments = parse_arguments(words)
    cv2.setNumThreads(1)
    environment = common.environment("cpu", "numba", "opencv-contrib-python-headless")
    results = {"environment": environment, "sets": {}}
    for source in arguments.images or [None]:
        name = Path(source).name if source else "rendered scenes"
        results["sets"][name] = measure(load(source, arguments.num_images), arguments.full_images)
        print(format_table(name, results["sets"][name]), flush=True)
    if arguments.seconds:
        results["images_per_second"] = measure_throughput(arguments.seconds)
        print(
            "images a second: {one_process:.1f}, in two processes {two_processes:.1f}: {ratio:.2f} times".format(
                **results["images_per_second"]
            )
        )
    return common.save(arguments.output, results)


if __name__ == "__main__":
    main()
