"""`aligndet convert`, published checkpoints as `--detector`, and detectors for other libraries."""

import json
import re
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from original_detectors import Detr, MmdetDetr, randomise
from tiny_detectors import timm_backbone, tiny_detector
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from aligndet_hf import AlignDetForPreTraining
from aligndet_hf.cli import main
from aligndet_hf.commands.compare import CompareArguments, compare
from aligndet_hf.commands.convert import ConvertArguments, convert
from aligndet_hf.data.synthetic import SYNTHETIC_CATEGORIES, write_synthetic_folder
from aligndet_hf.detectors.build import find_detector
from aligndet_hf.detectors.converters import read_detector
from aligndet_hf.detectors.converters.layout import ConversionReport


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def original() -> MmdetDetr:
    return randomise(MmdetDetr(3, len(SYNTHETIC_CATEGORIES)))


@pytest.fixture(scope="module")
def published(original, tmp_path_factory):
    """A file as mmdet writes it, of the classes of the synthetic images."""
    path = tmp_path_factory.mktemp("published") / "detr_r18.pth"
    meta = {"mmdet_version": "3.3.0", "dataset_meta": {"classes": tuple(SYNTHETIC_CATEGORIES)}}
    torch.save({"meta": meta, "state_dict": original.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "out"
    assert main(["convert", "--from", str(published), "--output_dir", str(folder), "--card_license", "mit"]) == 0
    return folder


def outputs(detector) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        found = detector(images())
    return (found.logits, found.pred_boxes) if hasattr(found, "logits") else found


def test_the_folder_is_a_detector_with_its_processor_report_and_card(original, published, converted):
    detector = AutoModelForObjectDetection.from_pretrained(converted)
    for found, expected in zip(outputs(detector), outputs(original), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    processor = AutoImageProcessor.from_pretrained(converted)
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    report = json.loads((converted / "conversion_report.json").read_text())
    assert report["layout"] == "DETR of mmdet 3" and len(report["kept"]) + len(report["reshaped"]) == 197
    card = ModelCard.load(converted / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "object-detection"
    assert (
        "`detr_r18.pth`, a checkpoint in the layout of DETR of mmdet 3" in card.text and "| kept | 161 |" in card.text
    )
    assert "@inproceedings{detr," in card.text and "https://github.com/open-mmlab/mmdetection" in card.text
    assert str(published.parent) not in card.content


def test_a_finished_conversion_is_not_overwritten_by_another(converted, published, tmp_path, capsys):
    torch.save({"model": Detr().state_dict()}, tmp_path / "other.pth")
    assert main(["convert", "--from", str(tmp_path / "other.pth"), "--output_dir", str(converted)]) == 2
    assert "source: 'detr_r18.pth' there, 'other.pth' now" in capsys.readouterr().err


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "page.pth").write_text("<html>")
    assert main(["convert", "--from", str(tmp_path / "page.pth"), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "page.pth cannot be read as weights: it is neither a safetensors file" in error
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(
        ValueError, match="no published layout becomes a detector of family 'rt_detr'; known are condit"
    ):
        convert(ConvertArguments(detector="page.pth", family="rt_detr", output_dir=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="are for reading a file, not for --to mmdet"):
        ConvertArguments(detector="x", to="mmdet", partial=True, output_dir="y")


def test_a_file_is_taken_wherever_a_detector_is(original, published):
    folder = find_detector(published)
    assert find_detector(str(published)) == folder  # read once
    detector = AutoModelForObjectDetection.from_pretrained(folder)
    assert torch.equal(detector.class_labels_classifier.weight, original.bbox_head.fc_cls.weight)
    assert AutoImageProcessor.from_pretrained(folder).size["shortest_edge"] == 800
    model = AlignDetForPreTraining.from_detector(published)
    assert torch.equal(model.online_detector.class_labels_classifier.weight, original.bbox_head.fc_cls.weight)


def test_a_file_is_an_arm_of_a_comparison(published, tmp_path):
    data = tmp_path / "data"
    write_synthetic_folder(data, {"train": 2, "validation": 2}, seed=0, image_size=(64, 64))
    finetune = {"dataset": str(data), "detector": "detr", "max_steps": 1, "image_sizes": [64], "use_cpu": True}
    finetune |= {"disable_tqdm": True, "dataloader_num_workers": 0, "save_strategy": "no", "report_to": "none"}
    finetune |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 2}
    compare(
        CompareArguments(
            stages={"finetune": finetune}, arms={}, checkpoints=[f"authors={published}"], seeds=[0], fractions=[1.0],
            output_dir=str(tmp_path / "out"), num_parallel=0,
        )
    )  # fmt: skip
    (report,) = (tmp_path / "out").rglob("transfer_report.json")
    report = json.loads(report.read_text())
    assert len(report["reset"]) == 2 and len(report["kept"]) == 195 and not report["mismatched"]


# ---- and back ----


def test_mmdet_gets_its_own_names(original, published, converted, tmp_path):
    path = convert(ConvertArguments(detector=str(converted), to="mmdet", output_dir=str(tmp_path)))
    content = torch.load(path, weights_only=True)
    assert content["meta"]["dataset_meta"]["classes"] == list(SYNTHETIC_CATEGORIES)
    again = MmdetDetr(3, len(SYNTHETIC_CATEGORIES))
    missing, unexpected = again.load_state_dict(content["state_dict"], strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    for found, expected in zip(outputs(again.eval()), outputs(original), strict=True):
        assert torch.equal(found, expected)
    assert not read_detector(path)[1].missing


def test_torchvision_gets_its_own_file(tmp_path, capsys):
    detector = tiny_detector("torchvision_fcos", backbone_config=timm_backbone("resnet18", (2, 3, 4)))
    detector.save_pretrained(tmp_path / "detector")
    arguments = {"detector": str(tmp_path / "detector"), "to": "torchvision", "output_dir": str(tmp_path / "file")}
    path = convert(ConvertArguments(**arguments))
    assert path == tmp_path / "file" / "torchvision.safetensors"
    assert f"sizes of your images: {detector.torchvision_arguments()}\n" in capsys.readouterr().out
    again, report = read_detector(path)
    assert not [name for name in report.missing if not name.endswith("num_batches_tracked")]
    for name, tensor in detector.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_detector_that_would_compute_otherwise_is_not_written(tmp_path):
    for model_type, fields, message in (
        ("detr", {"auxiliary_loss": True}, "norms the output of every decoder layer before the next one"),
        (
            "dab-detr",
            {"auxiliary_loss": True},
            "a dab-detr cannot be written for mmdet; these can: detr, torchvision_fcos",
        ),
    ):
        tiny_detector(model_type, **fields).save_pretrained(tmp_path / model_type)
        with pytest.raises(ValueError, match=message):
            convert(
                ConvertArguments(detector=str(tmp_path / model_type), to="mmdet", output_dir=str(tmp_path / "out"))
            )


@pytest.mark.skipif(sys.platform == "win32", reason="limits files as Linux and macOS do")
@pytest.mark.parametrize("to", ["transformers", "mmdet"])
def test_what_cannot_be_written_is_one_line_and_the_same_command_goes_on(published, converted, tmp_path, capsys, to):
    """No file may grow beyond 20 kB: writes fail half way, as on a full disk."""
    import resource

    source = str(published if to == "transformers" else converted)
    argv = ["convert", "--from", source, "--to", to, "--card_license", "mit", "--output_dir", str(tmp_path / "out")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capsys.readouterr().err.strip().split("\n")
    assert re.match(
        r"error: could not write .*/out.*MB are free there\)\. If that is too little, make room", errors[-1]
    )
    assert main(argv) == 0


def test_a_card_that_is_written_again_stays_as_it_is(published, converted):
    card = (converted / "README.md").read_bytes()
    (converted / ConversionReport.file_name).unlink()  # ended just before its end
    flags = ["--output_dir", str(converted), "--card_license", "mit"]
    assert main(["convert", "--from", str(published), *flags]) == 0
    assert (converted / "README.md").read_bytes() == card
