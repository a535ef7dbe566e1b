"""Images with more than 8 bits: one decision for a data set, the same picture everywhere."""

import base64
import json
import re
import shutil

import datasets
import forks
import numpy as np
import PIL.Image
import pytest
from tiny_detectors import ONE_STEP, SMALL_DETR, tiny_detector
from transformers import AutoImageProcessor, pipeline

from aligndet_hf.commands.evaluate import EvaluateArguments, evaluate
from aligndet_hf.commands.finetune import finetune
from aligndet_hf.commands.proposals import ProposalsArguments, generate_proposals
from aligndet_hf.data.bit_depth import (
    parse_rule,
    pixel_window,
    record_pixel_window,
    saved_window,
    settle_pixel_window,
    window_line,
)
from aligndet_hf.data.dataset import LabelledImages
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.sampling import SampleKey
from aligndet_hf.data.views import ViewConfig
from aligndet_hf.detectors.build import save_image_processor
from aligndet_hf.detectors.deep_images import open_image, to_8_bits
from aligndet_hf.training.finetune_arguments import FinetuneArguments
from aligndet_hf.training.publish import _model_files

LOW, HIGH = 7000, 9040  # 12 of the 16 bits, as thermal cameras have them: 8 levels for each of the 256


def levels(seed, height=48, width=64):
    """A picture of blocks, uint16 `[height, width]`."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8)).astype(np.uint16)
    blocks[0, :2] = 0, 255
    return LOW + 8 * np.kron(blocks, np.ones((8, 8), dtype=np.uint16))


def write_folder(folder, count, seed=0, suffix="png", convert=lambda pixels: pixels):
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        name = f"{number}.{suffix}"
        PIL.Image.fromarray(convert(levels(seed + number))).save(folder / name)
        lines.append(json.dumps({"file_name": name, "objects": {"bbox": [[8, 8, 24, 16]], "category": [0]}}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


# ---- the decision ----


def test_the_range_of_the_data(tmp_path):
    write_folder(tmp_path / "x", 3)
    dataset = load_dataset_source(tmp_path / "x")
    assert pixel_window(dataset) is None
    assert settle_pixel_window([dataset]) == (LOW, HIGH)
    for part in (dataset, dataset.select([1]), dataset.select_columns(["image"]), dataset.shuffle(seed=0)):
        assert pixel_window(part) == (LOW, HIGH)
    dataset.save_to_disk(tmp_path / "saved")
    assert pixel_window(datasets.load_from_disk(tmp_path / "saved")) == (LOW, HIGH)
    assert "the levels 7000 to 9040 of the files become 0 to 255" in window_line((LOW, HIGH))


def test_all_parts_get_the_same(tmp_path):
    parts = [load_dataset_source(write_folder(tmp_path / "a", 1))]
    parts.append(load_dataset_source(write_folder(tmp_path / "b", 1, convert=lambda pixels: pixels + 1000)))
    assert settle_pixel_window(parts) == (LOW, HIGH + 1000)
    assert [pixel_window(part) for part in parts] == [(LOW, HIGH + 1000)] * 2


def test_percentiles_ignore_dead_pixels(tmp_path):
    def with_dead_pixels(pixels):
        pixels = np.tile(pixels, (4, 4))
        pixels[0, 0], pixels[0, 1] = 0, 65535
        return pixels

    dataset = load_dataset_source(write_folder(tmp_path / "x", 2, convert=with_dead_pixels))
    assert settle_pixel_window([dataset], "percentile") == (LOW, HIGH)
    dataset = load_dataset_source(tmp_path / "x")
    assert settle_pixel_window([dataset], "range") == (0, 65535)


def test_given_beats_known_beats_recorded_beats_measured(tmp_path):
    dataset = load_dataset_source(write_folder(tmp_path / "x", 1))
    assert settle_pixel_window([dataset], known=(1.0, 2.0)) == (1, 2)
    assert settle_pixel_window([dataset]) == (1, 2)  # as recorded
    assert settle_pixel_window([dataset], known=(3.0, 4.0)) == (3, 4)
    assert settle_pixel_window([dataset], "5,6.5", known=(3.0, 4.0)) == (5, 6.5)
    assert pixel_window(dataset) == (5, 6.5)


def test_of_8_bits_there_is_nothing_to_decide(tmp_path):
    dataset = load_dataset_source(write_folder(tmp_path / "x", 2, convert=lambda pixels: pixels.astype(np.uint8)))
    assert settle_pixel_window([dataset], "5,6", known=(3.0, 4.0)) is None and pixel_window(dataset) is None


def test_a_record_stands_beside_other_words(tmp_path):
    dataset = load_dataset_source(write_folder(tmp_path / "x", 1))
    dataset.info.description = "Of my own.\n\nProposals: {}"
    for window in ((1.0, 2.0), (-3.5, 1e5)):
        record_pixel_window(dataset, window)
        assert pixel_window(dataset) == window and dataset.info.description.endswith("Of my own.\n\nProposals: {}")


@pytest.mark.parametrize("rule", ["", "min", "5", "5,5", "6,5", "nan,1", "1,inf", "1,2,3"])
def test_wrong_rules(rule):
    with pytest.raises(ValueError, match="pixel_window must be range, percentile, or two numbers such as 7000,9000"):
        parse_rule(rule)


@pytest.mark.parametrize("suffix, convert", [("png", lambda p: p), ("tif", lambda p: p.astype(np.float32) / 7)])
def test_training_sees_the_contrast(tmp_path, suffix, convert):
    dataset = load_dataset_source(write_folder(tmp_path / "x", 1, suffix=suffix, convert=convert))
    settle_pixel_window([dataset])
    images = LabelledImages(dataset, ViewConfig([48], flip_probability=0, color=False))
    image = images[SampleKey(0, 0, 0)]["image"][0].numpy()
    np.testing.assert_array_equal(image, (levels(0) - LOW) // 8)


# ---- the same picture everywhere ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Proposals of 16-bit images, and a detector that is fine-tuned on them."""
    folder = tmp_path_factory.mktemp("deep")
    write_folder(folder / "data" / "train", 4)
    write_folder(folder / "data" / "validation", 2, seed=50)
    arguments = {"source": "random", "max_boxes": 3, "dataloader_num_workers": 0, "disable_tqdm": True}
    generate_proposals(
        ProposalsArguments(dataset=str(folder / "data"), output_dir=str(folder / "proposals"), **arguments)
    )
    finetune(
        FinetuneArguments(
            dataset=str(folder / "data"),
            output_dir=str(folder / "finetuned"),
            detector_config=SMALL_DETR | {"num_queries": 5},
            **ONE_STEP,
        )
    )
    return folder


def test_proposals_record_it(run, capsys):
    saved = datasets.load_from_disk(run / "proposals")
    assert {name: pixel_window(split) for name, split in saved.items()} == {
        "train": (LOW, HIGH), "validation": (LOW, HIGH),
    }  # fmt: skip
    assert json.loads((run / "proposals" / "proposals.json").read_text())["settings"]["pixel_window"] == [LOW, HIGH]
    stored = saved["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    assert stored == (run / "data" / "train" / "0.png").read_bytes()
    assert pixel_window(load_dataset_source(run / "proposals", "train")) == (LOW, HIGH)


def test_the_detector_has_it(run, tmp_path):
    assert saved_window(str(run / "finetuned")) == (LOW, HIGH)
    assert saved_window(str(tmp_path)) is None
    # Darker images to measure on are not made brighter.
    write_folder(tmp_path / "dark" / "validation", 1, convert=lambda pixels: (pixels - LOW) // 4 + LOW)
    seen = []
    original = decode_image
    import aligndet_hf.evaluation.detections as detections

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detections, "decode_image", lambda *args: seen.append(original(*args)) or seen[-1])
        evaluate(
            EvaluateArguments(
                detector=str(run / "finetuned"), dataset=str(tmp_path / "dark"), use_cpu=True, disable_tqdm=True
            )
        )
    np.testing.assert_allclose(seen[0][:, :, 0], (levels(0) - LOW) / 32, atol=0.51)


SEEN = """
pixels = detect.preprocess("{path}")["pixel_values"][0].permute(1, 2, 0).numpy()
processor = detect.image_processor
print(repr(float(((pixels * processor.image_std + processor.image_mean) / processor.rescale_factor).mean())))
"""


def lines_of_card(folder, path) -> str:
    """The lines of a card, for a file, which then print the mean pixel that the detector sees."""
    (code,) = re.findall(
        r"```python\n(from transformers import pipeline.*?)```", (folder / "README.md").read_text(), re.S
    )
    assert "7000 to 9040 become 0 to 255" in code
    return re.sub(r'model="[^"]*"', f'model="{folder}"', code).replace("image.png", str(path)) + SEEN.format(path=path)


def test_the_pipeline_sees_what_training_saw_without_this_package(run, tmp_path):
    path = run / "data" / "validation" / "0.png"
    printed = forks.run_alone(lines_of_card(run / "finetuned", path), folder=tmp_path)
    dataset = load_dataset_source(run / "data", "validation")
    record_pixel_window(dataset, (LOW, HIGH))
    images = LabelledImages(dataset, ViewConfig([48], flip_probability=0, color=False))
    seen = images[SampleKey(0, 0, 0)]["image"].float().mean().item()
    assert abs(float(printed.splitlines()[-1]) - seen) < 1 and 100 < seen < 160


def test_the_pipeline_that_would_cut_the_levels_is_refused(run, tmp_path):
    path = run / "data" / "validation" / "0.png"
    code = lines_of_card(run / "finetuned", path).replace(", trust_remote_code=True", "")
    with pytest.raises(AssertionError) as error:
        forks.run_alone(code, folder=tmp_path)
    assert "trust_remote_code=True" in str(error.value).splitlines()[-1]


@pytest.mark.parametrize("kind", ["file", "image", "base64", "array of 32 bits", "floating point"])
def test_the_pipeline_scales_as_training_does(run, kind):
    path = run / "data" / "validation" / "0.png"
    image = path if kind == "file" else PIL.Image.open(path)
    if kind == "array of 32 bits":
        image = PIL.Image.fromarray(np.asarray(image).astype(np.int32))
    if kind == "floating point":
        image = PIL.Image.fromarray(np.asarray(image).astype(np.float32))
    if kind == "base64":
        image = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    scaled = to_8_bits(open_image(str(path) if kind == "file" else image), (LOW, HIGH))
    np.testing.assert_array_equal(np.asarray(scaled.convert("RGB")), decode_image(path, (LOW, HIGH)))


def test_the_code_that_the_config_names_goes_to_the_hub(run, tmp_path):
    """The pipeline of deep images and the model of torchvision's detectors, and no script that lies beside them."""
    (run / "finetuned" / "mine.py").write_text("token = 'secret'\n")
    assert {"config.json", "model.safetensors", "deep_images.py"} <= set(files := _model_files(run / "finetuned"))
    assert "mine.py" not in files
    tiny_detector("torchvision_fcos").save_pretrained(tmp_path)
    assert sorted(_model_files(tmp_path)) == ["config.json", "model.safetensors", "modeling_torchvision.py"]


def test_eight_bits_stay_as_they_are():
    image = PIL.Image.new("RGB", (4, 4), (1, 2, 3))
    assert to_8_bits(image, (LOW, HIGH)) is image


def test_a_detector_of_ordinary_images_has_the_stock_pipeline(run, tmp_path):
    """Also one that comes from a detector of deep images."""
    shutil.copytree(run / "finetuned", tmp_path / "detector")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "detector")
    assert "custom_pipelines" in json.loads((tmp_path / "detector" / "config.json").read_text())
    del processor.pixel_window
    save_image_processor(processor, tmp_path / "detector")
    assert "custom_pipelines" not in json.loads((tmp_path / "detector" / "config.json").read_text())
    assert pipeline("object-detection", str(tmp_path / "detector")).image_processor.size == processor.size
