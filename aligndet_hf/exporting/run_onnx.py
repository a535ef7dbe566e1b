"""
Runs an exported detector with ONNX Runtime and NumPy (and Pillow, which opens images):

    python run.py photo.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np


def load(folder):
    """The session and the description of an exported detector: `model.onnx` and `model.json` in a folder."""
    import onnxruntime

    folder = Path(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=onnxruntime.get_available_providers())
    return session, json.loads((folder / "model.json").read_text(encoding="utf-8"))


def resized(width, height, size):
    """Width and height that the detector sees an image with."""
    if "height" in size:
        return size["width"], size["height"]
    small, large = min(width, height), max(width, height)
    edge = min(size["shortest_edge"], size["longest_edge"] * small / large)
    small_side, large_side = round(edge), int(edge * large / small)
    return (small_side, large_side) if width < height else (large_side, small_side)


def with_both_sides(pixels, size):
    """Pixels that can be resized: of a very long image, whose short side would have 0 pixels, each line repeated."""
    longest, short, long = size.get("longest_edge"), min(pixels.shape[:2]), max(pixels.shape[:2])
    if not longest or short * longest >= long:
        return pixels
    enough = -(-long // longest)
    return np.repeat(pixels, -(-enough // short), axis=int(pixels.shape[1] < pixels.shape[0]))


def read(model, name):
    """An image file as an RGB image of Pillow. Images with more than 8 bits are scaled as in training."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(name))
    window = model["preprocessing"].get("pixel_window")
    if window is not None and image.mode[0] in "IF":  # 16 bits or more, or floating-point
        low, high = window  # the grey levels that become 0 and 255; what lies beyond is cut
        levels = np.clip((np.asarray(image, dtype=np.float64) - low) * (255 / (high - low)) + 0.5, 0, 255)
        image = Image.fromarray(np.nan_to_num(levels, nan=0.0).astype(np.uint8))
    return image.convert("RGB")


def resize(pixels, length, axis, resample, antialias=True):
    """
    Resizes an axis of uint8 pixels to a length, to the grey level as torchvision does it: weights of 16 bits, bilinear
    or bicubic (`resample` 2 or 3, as Pillow numbers them), and with `antialias` averaging where the image shrinks.
    """
    given = pixels.shape[axis]
    if given == length:
        return pixels
    scale = given / length
    stretch, reach = max(scale, 1.0) if antialias else 1.0, {2: 1, 3: 2}[resample]
    centre = (np.arange(length) + 0.5) * scale
    first = np.maximum((centre - reach * stretch + 0.5).astype(int), 0)
    behind = np.minimum((centre + reach * stretch + 0.5).astype(int), given)
    taps = first[:, None] + np.arange((behind - first).max())
    far = np.abs(taps - centre[:, None] + 0.5) / stretch
    weights = np.maximum(1 - far, 0)
    if resample == 3:
        near = (1.5 * far - 2.5) * far * far + 1
        weights = np.where(far < 1, near, np.where(far < 2, ((-0.5 * far + 2.5) * far - 4) * far + 2, 0))
    weights[taps >= behind[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next((bits for bits in range(22) if int(0.5 + weights.max() * 2 ** (bits + 1)) >= 2**15), 22)
    weights = np.trunc(weights * 2**bits + np.copysign(0.5, weights)).astype(np.int64)
    shape = [length if place == axis else 1 for place in range(pixels.ndim)]
    total = 2 ** (bits - 1)
    for tap, weight in zip(np.minimum(taps, given - 1).T, weights.T, strict=True):
        total = total + pixels.take(tap, axis).astype(np.int64) * weight.reshape(shape)
    return (total >> bits).clip(0, 255).astype(np.uint8)


def prepare(model, image):
    """An RGB image of Pillow as the inputs of the graph: float32 [1, 3, height, width]."""
    steps = model["preprocessing"]
    pixels = with_both_sides(np.asarray(image), steps["size"])
    width, height = resized(*pixels.shape[1::-1], steps["size"])
    how = steps["resample"], steps.get("antialias", True)
    pixels = resize(resize(pixels, width, 1, *how), height, 0, *how)
    pixels = (pixels.astype(np.float32) * steps["rescale_factor"] - steps["mean"]) / steps["std"]
    inputs = {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)}
    if "pixel_mask" in model["inputs"]:
        inputs["pixel_mask"] = np.ones((1, *pixels.shape[:2]), dtype=np.int64)
    return inputs


def finish(model, logits, boxes, width, height, threshold):
    """Outputs for one image as scores [n], labels [n] and boxes [n, 4]: xyxy in pixels, best score first."""
    steps = model["postprocessing"]
    if steps["activation"] == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:  # softmax, whose last class is "nothing"
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = (scores / scores.sum(axis=-1, keepdims=True))[:, :-1]
    if steps["one_label_per_query"]:
        scores = np.where(scores == scores.max(axis=-1, keepdims=True), scores, -1)
    best = np.argsort(-scores, axis=None, kind="stable")[: steps["max_detections"]]
    query, labels = np.unravel_index(best[scores.ravel()[best] >= threshold], scores.shape)
    centre, half = boxes[query, :2], boxes[query, 2:] / 2
    return scores[query, labels], labels, np.hstack([centre - half, centre + half]) * ([width, height] * 2)


def detect(session, model, image, threshold=0.3):
    """What the detector finds in an RGB image of Pillow; see `finish`."""
    logits, boxes = session.run(["logits", "pred_boxes"], prepare(model, image))
    return finish(model, logits[0], boxes[0], *image.size, threshold)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python run.py IMAGE ...")
    session, model = load(Path(__file__).parent)
    for name in sys.argv[1:]:
        for score, label, box in zip(*detect(session, model, read(model, name)), strict=True):
            print(name, model["classes"][label], f"{score:.3f}", *box.round(1))
