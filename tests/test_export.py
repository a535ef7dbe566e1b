"""`aligndet export`: the graph and the script beside it find what the detector finds, without PyTorch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_detectors import CONVNETS, timm_backbone, tiny_config
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    ConditionalDetrImageProcessor,
    DetrImageProcessor,
    RfDetrImageProcessor,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
)

from aligndet_hf.cli import main
from aligndet_hf.commands.export import ExportArguments
from aligndet_hf.commands.predict import predict
from aligndet_hf.data.image_list import list_images
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.synthetic import render_scene
from aligndet_hf.detectors.build import build_image_processor, detector_from_config
from aligndet_hf.detectors.families import family_of
from aligndet_hf.exporting import run_onnx
from aligndet_hf.exporting.onnx_graph import _postprocessing, describe, export_onnx
from aligndet_hf.exporting.parity import compare
from aligndet_hf.proposals.trained import with_both_sides

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TINY = {
    "detr": {"encoder_layers": 1, "decoder_layers": 1, "backbone_config": RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"],
    )},
    "rt_detr": {"decoder_layers": 1, "num_queries": 10},
}  # fmt: skip


def decided_detector(family, **fields):
    """A tiny detector whose class heads prefer some queries to others, as a trained one's do."""
    torch.manual_seed(0)
    detector = detector_from_config(tiny_config(family, **fields)).eval()
    for name, parameter in detector.named_parameters():
        if re.match(family_of(detector.config).class_heads, name):
            torch.nn.init.normal_(parameter, 0, 0.3)
    return detector


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Scenes, one of them upright."""
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(128, 128), (64, 64), (128, 64)]):
        PIL.Image.fromarray(render_scene(np.random.default_rng(number), *size)[0]).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=TINY)
def exported(request, tmp_path_factory, photos):
    """The folders of a detector and of its export, which the command wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    detector = decided_detector(request.param, **TINY[request.param])
    detector.save_pretrained(folder / "detector")
    build_image_processor(detector, 64).save_pretrained(folder / "detector")
    flags = ["--detector", str(folder / "detector"), "--images", str(photos), "--output_dir", str(folder / "onnx")]
    assert main(["export", *flags]) == 0
    return folder / "detector", folder / "onnx"


def test_parity_on_images_of_the_user(exported, photos):
    parity = json.loads((exported[1] / "model.json").read_text())["parity"]
    assert parity["images"] == 3 and parity["detections"] >= 15
    assert parity["differing"] == [] and parity["box_difference"] < 0.5 and parity["score_difference"] < 1e-3


def test_the_graph_of_deformable_detr_takes_images_of_other_sizes(tmp_path, capfd):
    backbone = timm_backbone(out_indices=(4,))
    detector = decided_detector("deformable_detr", backbone_config=backbone, num_feature_levels=2, num_queries=10)
    export_onnx(detector, tmp_path / "model.onnx", (64, 64))  # whose coarsest feature map has one place
    assert capfd.readouterr() == ("", "")  # exporters tell their developers much
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for images, height, width in [(2, 64, 64), (1, 85, 64), (1, 128, 96), (3, 130, 171)]:
        pixels, mask = torch.rand(images, 3, height, width), torch.ones(images, height, width, dtype=torch.long)
        with torch.no_grad():
            expected = detector(pixel_values=pixels, pixel_mask=mask)
        found = session.run(["logits", "pred_boxes"], {"pixel_values": pixels.numpy(), "pixel_mask": mask.numpy()})
        np.testing.assert_allclose(found[0], expected.logits, atol=1e-4)
        np.testing.assert_allclose(found[1], expected.pred_boxes, atol=1e-5)


def test_the_script_beside_it_finds_the_same_without_pytorch(exported, photos):
    detector, folder = exported
    code = (
        "import sys, runpy; sys.argv = ['run.py', *sys.argv[1:]]\n"
        f"runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'aligndet_hf'} & set(sys.modules)"
    )
    names = sorted(str(path) for path in photos.iterdir())
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    expected = predict(str(detector), names, score_threshold=0.3, per_device_eval_batch_size=1)
    lines = [line.split(" ") for line in run.stdout.splitlines()]
    assert len(lines) == sum(len(found["boxes"]) for found in expected) > 10
    for name, found in zip(names, expected, strict=True):
        own = [line for line in lines if line[0] == name]
        assert [float(line[2]) for line in own] == pytest.approx(found["scores"], abs=2e-3)
        corners = np.hstack([found["boxes"][:, :2], found["boxes"][:, :2] + found["boxes"][:, 2:]])
        printed = np.array([line[3:] for line in own], dtype=float)
        for corner, label, score in zip(corners, found["names"], found["scores"], strict=True):
            same = [one[1] == label and abs(float(one[2]) - score) < 2e-3 for one in own]
            inside = np.clip(printed[same], 0, [found["width"], found["height"]] * 2)
            assert np.abs(inside - corner).max(axis=1).min() < 0.6


def test_the_ten_lines_of_the_page_find_the_same_without_pytorch(exported, photos):
    detector, folder = exported
    if json.loads((folder / "model.json").read_text())["postprocessing"]["activation"] != "sigmoid":
        pytest.skip("the ten lines are for squares and sigmoid")
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", page, flags=re.DOTALL)
    code = code.replace("outputs/exported", str(folder)).replace("photo.jpg", str(photos / "0.png"))
    code += "import sys; assert not {'torch', 'transformers', 'aligndet_hf'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = sorted((line.split(" ") for line in run.stdout.splitlines()), key=lambda line: -float(line[1]))
    (found,) = predict(str(detector), str(photos / "0.png"), score_threshold=0.3)
    assert [line[0] for line in lines][:5] == found["names"][:5] and len(lines) >= len(found["boxes"]) > 0
    for line in lines[:5]:
        x, y, w, h = map(float, line[2:])
        left, top, right, bottom = np.clip([x, y, x + w, y + h], 0, [128, 128] * 2)
        same = np.abs(found["scores"] - float(line[1])) < 1e-3
        differences = np.abs(found["boxes"][same] - [left, top, right - left, bottom - top]).max(axis=1)
        assert differences.min() < 0.5


def test_images_with_more_than_8_bits_are_scaled_as_in_training(tmp_path):
    levels = np.arange(6000, 10_000, 10, dtype=np.uint16).reshape(20, 20)
    PIL.Image.fromarray(levels).save(tmp_path / "deep.png")
    PIL.Image.fromarray((levels // 40).astype(np.uint8)).save(tmp_path / "plain.png")
    processor = RTDetrImageProcessor(size={"height": 64, "width": 64}, pixel_window=[7000, 9000])
    model = describe(detector_from_config(tiny_config("rt_detr")), processor, ["pixel_values"])
    found = np.asarray(run_onnx.read(model, tmp_path / "deep.png"))
    assert found.shape == (20, 20, 3) and found[0, 0, 0] == 0 and found[-1, -1, 0] == 255
    assert found[10, 0, 0] == 128  # the level 8000, in the middle
    assert np.array_equal(found, decode_image(tmp_path / "deep.png", (7000, 9000)))
    assert np.array_equal(np.asarray(run_onnx.read(model, tmp_path / "plain.png"))[..., 0], levels // 40)


def test_any_number_of_images_at_once(exported):
    session, model = run_onnx.load(exported[1])
    one, other = (
        run_onnx.prepare(model, PIL.Image.fromarray(render_scene(np.random.default_rng(seed), 64, 64)[0]))
        for seed in (5, 6)
    )
    three = {name: np.concatenate([one[name], other[name], one[name]]) for name in one}
    together = session.run(["logits", "pred_boxes"], three)
    for place, alone in ((0, one), (1, other), (2, one)):
        for both, single in zip(together, session.run(["logits", "pred_boxes"], alone), strict=True):
            np.testing.assert_allclose(both[place], single[0], atol=1e-3)


def test_a_graph_that_computes_something_else_is_seen(exported, photos):
    detector, folder = exported
    session, model = run_onnx.load(folder)

    def run(inputs):
        logits, boxes = session.run(["logits", "pred_boxes"], inputs)
        return logits, boxes + 0.01

    parts = (AutoModelForObjectDetection.from_pretrained(detector), AutoImageProcessor.from_pretrained(detector))
    images = list_images(photos)
    report = compare(*parts, run, model, images, range(len(images)))
    assert len(report["differing"]) == report["detections"] > 0
    mistake = "the graph computes something else than the detector"
    reasons = {entry["reason"] for entry in report["differing"]}
    assert mistake in reasons and all("undecided" in reason for reason in reasons - {mistake})


def test_ties_are_told_from_mistakes():
    """Queries chosen from tokens that all have the same score: which ones they are, the graph may see otherwise."""
    detector = decided_detector("rt_detr", num_queries=10)
    processor = build_image_processor(detector, 64)
    torch.nn.init.zeros_(detector.model.enc_score_head.weight)
    model = {"precision": "float32"} | describe(detector, processor, ["pixel_values"])

    @torch.no_grad()
    def run(inputs):
        torch.nn.init.normal_(detector.model.enc_score_head.weight, 0, 1e-6)
        outputs = detector(pixel_values=torch.tensor(inputs["pixel_values"]))
        torch.nn.init.zeros_(detector.model.enc_score_head.weight)
        return outputs.logits.numpy(), outputs.pred_boxes.numpy()

    report = compare(
        detector, processor, run, model, list_images(render_scene(np.random.default_rng(0), 64, 64)[0]), [0]
    )
    reasons = {entry["reason"] for entry in report["differing"]}
    assert len(reasons) == 1 and "undecided: it takes 10 of 84 candidates" in reasons.pop()


@pytest.mark.parametrize(
    "processor, family, expected",
    [
        (DetrImageProcessor(), "detr", ("softmax", True, 20)),
        (ConditionalDetrImageProcessor(), "conditional_detr", ("sigmoid", False, 60)),
        (RTDetrImageProcessor(), "rt_detr", ("sigmoid", False, 20)),
    ],
)
def test_the_postprocessing_is_that_of_the_image_processor(processor, family, expected):
    config = tiny_config(family)
    assert tuple(_postprocessing(processor, config).values()) == expected
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 20, 3 + (expected[0] == "softmax"), generator=generator)
    boxes = torch.rand(1, 20, 4, generator=generator)
    outputs = type("Outputs", (), {"logits": logits, "pred_boxes": boxes})
    (reference,) = processor.post_process_object_detection(outputs, threshold=0.4, target_sizes=[(50, 70)])
    model = {"postprocessing": _postprocessing(processor, config)}
    scores, labels, found = run_onnx.finish(model, logits[0].numpy(), boxes[0].numpy(), 70, 50, 0.4)
    order = reference["scores"].argsort(descending=True)
    np.testing.assert_allclose(scores, reference["scores"][order], rtol=1e-5)
    assert labels.tolist() == reference["labels"][order].tolist()
    np.testing.assert_allclose(found, reference["boxes"][order], atol=1e-3)


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (100, 1000), (800, 800), (333, 500), (1333, 800)])
def test_the_size_is_that_of_the_image_processor(shape):
    processor = DetrImageProcessor(size={"shortest_edge": 200, "longest_edge": 333})
    image = np.zeros((*shape, 3), dtype=np.uint8)
    height, width = processor(images=image, do_pad=False, return_tensors="pt")["pixel_values"].shape[2:]
    assert run_onnx.resized(shape[1], shape[0], {"shortest_edge": 200, "longest_edge": 333}) == (width, height)


@pytest.mark.parametrize("shape", [(2, 3000), (1500, 7), (40, 60)])
def test_very_long_images_have_both_sides(shape):
    """As they are prepared everywhere else."""
    size = {"shortest_edge": 64, "longest_edge": 107}
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    repeated = run_onnx.with_both_sides(image, size)
    np.testing.assert_array_equal(repeated, with_both_sides(image, size))
    assert min(run_onnx.resized(*repeated.shape[1::-1], size)) > 0
    steps = {"size": size, "resample": 2, "rescale_factor": 1 / 255, "mean": [0.0] * 3, "std": [1.0] * 3}
    inputs = run_onnx.prepare({"preprocessing": steps, "inputs": []}, PIL.Image.fromarray(image))
    assert max(inputs["pixel_values"].shape) > 64


@pytest.mark.parametrize("family", CONVNETS)
def test_convnets_are_refused_with_the_reason(family, tmp_path):
    detector = detector_from_config(tiny_config(family))
    with pytest.raises(ValueError, match=f"a {family} cannot be exported to ONNX: it suppresses boxes"):
        export_onnx(detector, tmp_path / "model.onnx", (64, 64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "resample"), [("rt_detr", 2), ("rt_detr", 3), ("rf_detr", 2)])
@pytest.mark.parametrize("side", [(64, 64), (37, 301), (200, 90)])
def test_images_are_resized_to_the_grey_level_as_the_image_processor_does(family, resample, side):
    """Larger, smaller, by little and by much; a real image, whose sums end between two grey levels everywhere."""
    processor = {"rt_detr": RTDetrImageProcessor, "rf_detr": RfDetrImageProcessor}[family](
        size={"height": side[0], "width": side[1]}, do_normalize=False, do_rescale=False, resample=resample
    )
    model = describe(detector_from_config(tiny_config(family)), processor, ["pixel_values"])
    assert model["preprocessing"]["antialias"] == (family == "rt_detr")  # as RF-DETR's authors resize
    for shape in ((97, 130), (64, 64), (480, 640), (33, 900)):
        image = render_scene(np.random.default_rng(0), *shape)[0]
        image = (image + np.random.default_rng(1).integers(-9, 9, image.shape)).clip(0, 255).astype(np.uint8)
        expected = processor(images=image, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        np.testing.assert_array_equal(run_onnx.prepare(model, PIL.Image.fromarray(image))["pixel_values"], expected)


@pytest.mark.parametrize(("opset", "message"), [(17, "opset must be 18 or more"), (99, r"opset must be at most \d+")])
def test_operators_of_a_version_that_does_not_exist(opset, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ExportArguments(detector=str(tmp_path), output_dir=str(tmp_path / "out"), opset=opset)
        export_onnx(detector_from_config(tiny_config("rt_detr")), tmp_path / "model.onnx", (64, 64), opset=opset)


def test_onnx_runtime_is_missed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"ONNX Runtime: pip install .*aligndet-hf\[export\]"):
        export_onnx(detector_from_config(tiny_config("rt_detr")), tmp_path / "model.onnx", (64, 64))
    assert not list(tmp_path.iterdir())


def test_what_is_lacking_is_named(tmp_path, capsys):
    assert main(["export", "--detector", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "is not a detector" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert Path(run_onnx.__file__).read_text().count("import torch") == 0
