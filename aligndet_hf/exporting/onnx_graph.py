"""A detector as an ONNX graph, by transformers' exporter, and what a program has to do before and after it."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.export import Dim
from transformers import BaseImageProcessor, PreTrainedModel

from ..detectors.families import family_of
from ..evaluation.detections import normalization_of

OUTPUTS = ("logits", "pred_boxes")

_SMALLEST_TRACED = 256  # pixels; the coarsest feature map of any family has a stride of 64


def export_onnx(
    detector: PreTrainedModel,
    path: Path,
    image_size: tuple[int, int],
    *,
    opset: int | None = None,
    half: bool = False,
) -> list[str]:
    """
    Writes the graph of a detector: images in, `logits` and `pred_boxes` out.

    Any number of images may be given at once. Families that resize to squares take images of one size, and no mask;
    the others take any size, and `pixel_mask`, which is 1 on the image and 0 in the padding.

    Args:
        detector (`PreTrainedModel`): The detector, on the CPU.
        path (`Path`): The file to write.
        image_size (`tuple[int, int]`): Height and width of the images; an example for families that take any size.
        opset (`int`, *optional*): Version of ONNX's operators; torch's default if not given.
        half (`bool`, *optional*, defaults to `False`): Whether the weights and the arithmetic are float16. Inputs and
            outputs stay float32.

    Returns:
        `list[str]`: names of the inputs.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: the detector cannot be exported: a convnet, or for what the exporter says.
    """
    if family_of(detector.config).own_loss:
        raise ValueError(
            f"a {detector.config.model_type} cannot be exported to ONNX: it suppresses boxes that overlap better "
            "ones, how many are left depends on the image, and transformers' exporter needs to know it before. "
            "`aligndet convert --to torchvision` writes its weights for the detector of torchvision"
        )
    try:
        import onnx
        import onnx_ir
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise ImportError('Exporting needs ONNX and ONNX Runtime: pip install "aligndet-hf[export]"') from error
    if opset is not None and opset > (newest := onnx.defs.onnx_opset_version()):
        raise ValueError(f"opset must be at most {newest}, the newest that the installed onnx knows, got {opset}")

    sample, dynamic = _sample(detector, image_size)
    try:
        with _open_shapes(detector), torch.no_grad(), _quiet():
            exported = OnnxExporter().export(
                detector.eval(), sample, OnnxConfig(dynamic_shapes=dynamic, opset_version=opset)
            )
    except Exception as error:  # torch and onnxscript raise all kinds
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"this {detector.config.model_type} cannot be exported to ONNX: {first}") from error
    graph = exported.program.graph
    graph.outputs[:] = [output for output in graph.outputs if output.name in OUTPUTS]
    onnx_ir.passes.common.RemoveUnusedNodesPass()(exported.program)
    onnx_ir.save(exported.program, str(path))
    if half:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(str(path)), keep_io_types=True), str(path))
    return [value.name for value in graph.inputs]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what exporters tell their developers on every export; whether it is right, the comparison says."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _sample(detector: PreTrainedModel, image_size: tuple[int, int]) -> tuple[dict, dict]:
    """Two images to trace the graph with, and which of their dimensions may differ."""
    if family_of(detector.config).resize == "square":
        return {"pixel_values": torch.rand(2, 3, *image_size)}, {"pixel_values": {0: Dim.DYNAMIC}}
    # A dimension of 1, as small images have it in the coarsest feature map, would be fixed in the graph.
    image_size = [max(side, _SMALLEST_TRACED) for side in image_size]
    sample = {"pixel_values": torch.rand(2, 3, *image_size)}
    sample["pixel_mask"] = torch.ones(2, *image_size, dtype=torch.long)
    return sample, {
        "pixel_values": dict.fromkeys((0, 2, 3), Dim.DYNAMIC),
        "pixel_mask": dict.fromkeys((0, 1, 2), Dim.DYNAMIC),
    }


@contextlib.contextmanager
def _open_shapes(detector: PreTrainedModel) -> Iterator[None]:
    """
    Keeps the number and the size of images open where the code of transformers would fix them in the graph.

    RT-DETR and its relatives ask for the `len` of a tensor, which must be a number. Deformable DETR makes tensors of
    the sizes of feature maps by `torch.as_tensor`, and of their places by `torch.linspace`: both become constants, and
    what is found in an image of another size is wrong without a word.
    """
    names = {type(module).__module__ for module in detector.modules()}
    modules = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
    as_tensor, linspace = torch.as_tensor, torch.linspace

    def length(value):
        return value.shape[0] if isinstance(value, torch.Tensor) else len(value)

    def sizes(data, dtype=None, device=None):
        sides = (
            [side for size in data for side in size] if isinstance(data, list) and isinstance(data[0], tuple) else []
        )
        if not any(isinstance(side, torch.SymInt) for side in sides):
            return as_tensor(data, dtype=dtype, device=device)
        return torch.stack([torch.scalar_tensor(side, dtype=dtype, device=device) for side in sides]).view(-1, 2)

    def places(start, end, steps, dtype=None, device=None):
        if not isinstance(steps, torch.SymInt):
            return linspace(start, end, steps, dtype=dtype, device=device)
        return torch.arange(steps, device=device).to(dtype) + start  # the places of a map are 1 apart

    for module in modules:
        module.len = length
    torch.as_tensor, torch.linspace = sizes, places
    try:
        yield
    finally:
        torch.as_tensor, torch.linspace = as_tensor, linspace
        for module in modules:
            del module.len


def describe(detector: PreTrainedModel, image_processor: BaseImageProcessor, inputs: list[str]) -> dict:
    """
    What a program has to know of an exported detector: its inputs, what happens to an image before the graph and to
    the outputs after it, and its classes. `run_onnx.py` does what this says.

    Args:
        detector (`PreTrainedModel`): The detector.
        image_processor (`BaseImageProcessor`): The detector's.
        inputs (`list[str]`): Names of the inputs of the graph.

    Returns:
        `dict`: as JSON has it.
    """
    size = {name: value for name, value in dict(image_processor.size).items() if value is not None}
    config = detector.config
    window = getattr(image_processor, "pixel_window", None)  # of images with more than 8 bits
    return {
        "family": config.model_type,
        "classes": [config.id2label[label] for label in sorted(config.id2label)],
        "inputs": inputs,
        "outputs": list(OUTPUTS),
        "preprocessing": {
            "color": "RGB",
            "layout": "float32 [images, 3, height, width]",
            "size": size,
            "resample": int(image_processor.resample),
            "antialias": _averages(image_processor),
            **normalization_of(image_processor),
            "pixel_window": None if window is None else list(window),
        },
        "postprocessing": {"boxes": "centre x, centre y, width, height; 1 is the width or height of the image"}
        | _postprocessing(image_processor, config),
    }


def _averages(image_processor: BaseImageProcessor) -> bool:
    """Whether an image that shrinks is averaged, found out by giving one: RF-DETR's image processor does not."""
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:, ::4] = 255  # columns that are between the samples of every fourth place
    steps = {"do_rescale": False, "do_normalize": False, "do_pad": False, "input_data_format": "channels_last"}
    prepared = image_processor(images=image, size={"height": 8, "width": 8}, return_tensors="np", **steps)
    return bool(prepared["pixel_values"].any())


def _postprocessing(image_processor: BaseImageProcessor, config) -> dict:
    """How the image processor reads outputs, found out by giving it some."""
    queries, classes = family_of(config).num_queries(config), len(config.id2label)

    def scores_of(logits: torch.Tensor) -> list[float]:
        outputs = SimpleNamespace(logits=logits, pred_boxes=torch.full((*logits.shape[:2], 4), 0.5))
        found = image_processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=[(1, 1)])
        return found[0]["scores"].tolist()

    # Of one query with the logits 0 and 2, a softmax whose last class is "nothing" gives the first one 0.12.
    is_softmax = max(scores_of(torch.tensor([[[0.0, 2.0]]]))) < 0.5
    return {
        "activation": "softmax" if is_softmax else "sigmoid",
        "one_label_per_query": len(scores_of(torch.zeros(1, 2, 3))) == 2 and is_softmax,
        "max_detections": len(scores_of(torch.zeros(1, queries, classes + is_softmax))),
    }
