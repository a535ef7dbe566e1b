"""`aligndet export`: a detector as a file that needs neither PyTorch nor this package."""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..arguments import DatasetArguments, ReadyDetectorArguments, RunArguments, again
from ..data.bit_depth import window_of
from ..data.image_list import list_images
from ..data.sources import model_hash
from ..data.splits import spread_rows
from ..data.synthetic import render_scene
from ..detectors.build import find_detector, open_detector, open_image_processor
from ..detectors.families import family_of
from ..exporting import run_onnx
from ..exporting.onnx_graph import describe, export_onnx
from ..exporting.parity import BOX_TOLERANCE, SCORE_TOLERANCE, compare
from ..files import write_json
from ..flags import flag, takes_arguments
from ..objects import folder_of
from ..ranges import COUNT, SHARE, Range, check_values
from ..runs import RunFolder

OPSETS = Range(18)  # torch writes no older operators
_COMPLETE = "complete"


@dataclass(kw_only=True)
class ExportArguments(RunArguments, ReadyDetectorArguments):
    """Arguments of [`export`]: the flags of `aligndet export` and the keys of its recipes."""

    help_groups = {"opset": "The graph", "images": "Comparison"}

    opset: int | None = flag(
        None,
        "result",
        "write operators of this version of ONNX, 18 or newer; torch's default if not given",
        range=OPSETS,
    )
    fp16: bool = flag(False, "result", "store weights and calculate in float16")

    images: list[str] | None = flag(
        None,
        "data",
        "compare the export with the detector on these images: files, folders, patterns, data sets; rendered scenes "
        "if not given",
    )
    split: str | None = again(DatasetArguments, "split", help="split of the data sets; all of them if not given")
    num_images: int = flag(8, "output", "compare on at most this many images, evenly spaced", range=COUNT)
    score_threshold: float = flag(0.1, "output", "compare boxes with at least this score", range=SHARE)

    output_dir: str = again(
        RunArguments, "output_dir", help="folder for model.onnx, model.json and run.py; must be new"
    )

    def __post_init__(self):
        self.detector = folder_of(self.detector)
        check_values(self)


@takes_arguments
def export(arguments: ExportArguments) -> dict:
    """
    Exports a detector to ONNX, and compares the export with the detector.

    The folder has `model.onnx`; `model.json`, which says what happens to an image before the graph and to its outputs
    after it, and how the comparison ended; and `run.py`, which does all of that with ONNX Runtime and NumPy.

    Args:
        arguments ([`ExportArguments`]): The configuration.

    Returns:
        `dict`: the content of `model.json`, with the comparison (see [`~aligndet_hf.exporting.parity.compare`]) as
        `parity`.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: the detector cannot be exported, or `output_dir` is in use.
        OSError: there is no such detector, or it has no image processor.
    """
    detector = open_detector(arguments.detector).float().eval()
    image_processor = open_image_processor(arguments.detector)
    family_of(detector.config)
    names = ("opset", "fp16", "num_images", "score_threshold")
    settings = {"detector": model_hash(find_detector(arguments.detector))} | {
        name: getattr(arguments, name) for name in names
    }
    images = _images(arguments)
    images.window = window_of(image_processor)
    folder = RunFolder(arguments.output_dir, "export", aside=True, overwrite=arguments.overwrite_output_dir)
    with folder:
        folder.claim(settings=settings, data={"images": images.identity()})
        if folder.is_finished:
            print(f"{folder.path} is complete: nothing to do.")
            return run_onnx.load(folder.path)[1]
        complete = folder.work / _COMPLETE
        complete.mkdir(exist_ok=True)
        inputs = export_onnx(
            detector,
            complete / "model.onnx",
            _example_size(image_processor),
            opset=arguments.opset,
            half=arguments.fp16,
        )
        model = describe(detector, image_processor, inputs)
        model["precision"] = "float16" if arguments.fp16 else "float32"
        model["versions"] = {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")}
        write_json(complete / "model.json", model)
        graph = f"the graph of this {detector.config.model_type}"
        try:
            session, _ = run_onnx.load(complete)
        except Exception as error:  # ONNX Runtime has exceptions of its own
            raise ValueError(f"{graph} cannot be loaded by ONNX Runtime, so nothing was written: {error}") from error

        def run(given):
            try:
                return session.run(["logits", "pred_boxes"], given)
            except Exception as error:
                height, width = given["pixel_values"].shape[2:]
                raise ValueError(
                    f"{graph} does not run in ONNX Runtime on an image of {width} x {height} pixels, so nothing was "
                    f"written: {str(error).split(': ')[-1]}"
                ) from error

        model["opset"] = _opset(complete / "model.onnx")
        chosen = spread_rows(len(images), arguments.num_images)
        model["parity"] = compare(detector, image_processor, run, model, images, chosen, arguments.score_threshold)
        write_json(complete / "model.json", model)
        shutil.copyfile(run_onnx.__file__, complete / "run.py")
        folder.put_in_place(complete)
    _print_report(model, folder.path)
    return model


def _images(arguments: ExportArguments):
    """The images to compare on."""
    if arguments.images is None:
        scenes = [render_scene(np.random.default_rng((0, n)), 240, 320)[0] for n in range(arguments.num_images)]
        return list_images(scenes)
    return list_images(arguments.images, arguments.split)


def _example_size(image_processor) -> tuple[int, int]:
    size = dict(image_processor.size)
    return (size["height"], size["width"]) if size.get("height") else (size["shortest_edge"],) * 2


def _opset(path: Path) -> int:
    import onnx

    opsets = onnx.load(str(path), load_external_data=False).opset_import
    return next(entry.version for entry in opsets if entry.domain in ("", "ai.onnx"))


def _print_report(model: dict, output: Path) -> None:
    parity = model["parity"]
    same = parity["detections"] - len(parity["differing"])
    print(
        f"{same} of {parity['detections']} detections on {parity['images']} images are the same in ONNX Runtime "
        f"(boxes within {BOX_TOLERANCE:g} pixels, scores within {SCORE_TOLERANCE:g}): boxes differ by at most "
        f"{parity['box_difference']:.2g} pixels, scores by {parity['score_difference']:.1g}"
    )
    for entry in parity["differing"][:10]:
        print(f"  {entry['file']}: {entry['class']} {entry['score']:.2f}: {entry['reason']}")
    print(f"Saved to {output}: python {output / 'run.py'} photo.jpg")
