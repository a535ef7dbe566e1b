"""The sources of proposals: trained models, columns, files; each through `aligndet proposals`."""

import json
import os
import shutil
from pathlib import Path

import datasets
import forks
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_detectors import tiny_detector
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from aligndet_hf.commands.proposals import ProposalsArguments, generate_proposals
from aligndet_hf.data.columns import proposals_feature, validate_proposals
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.proposal_files import import_proposals
from aligndet_hf.detectors import build
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.proposals import trained
from aligndet_hf.proposals.filters import select_proposals

EVERYTHING = {"nms_threshold": 1.0, "max_aspect_ratio": float("inf"), "min_relative_size": 0.0}


def arguments(dataset, output, **changes) -> ProposalsArguments:
    run = {"dataloader_num_workers": 0, "shard_size": 3, "disable_tqdm": True}
    return ProposalsArguments(**{"dataset": str(dataset), "output_dir": str(output), **run, **changes})


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.cast_column("image", datasets.Image(decode=False))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five pictures of different sizes, one of them not a picture."""
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40 + 8 * number, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "2.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    tiny_detector("detr", num_labels=3).save_pretrained(folder)
    DetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A SAM with random weights, whose masks are made stable: their logits are large."""
    folder, sizes = tmp_path_factory.mktemp("segmenter"), {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16}
    vision = SamVisionConfig(
        **sizes, output_channels=16, num_hidden_layers=1, image_size=64, num_pos_feats=8, window_size=2
    )
    torch.manual_seed(0)
    model = SamModel(
        SamConfig(
            vision_config=vision,
            prompt_encoder_config=SamPromptEncoderConfig(hidden_size=16, image_size=64, mask_input_channels=4),
            mask_decoder_config=SamMaskDecoderConfig(
                **sizes, num_hidden_layers=1, iou_head_depth=1, iou_head_hidden_dim=16
            ),
        )
    )
    with torch.no_grad():
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight *= 1e9
        model.mask_decoder.iou_prediction_head.proj_out.bias += 1
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    processor = SamImageProcessor(size={"longest_edge": 64}, pad_size=size, mask_size={"longest_edge": 16})
    processor.save_pretrained(folder)
    return folder


# ---- trained models ----


@pytest.mark.parametrize("batch_size", [1, 4])
def test_boxes_of_a_detector_are_those_of_its_processor(images, detector, tmp_path, batch_size):
    result = generate_proposals(
        arguments(
            images,
            tmp_path / "out",
            source="detector",
            detector=str(detector),
            per_device_eval_batch_size=batch_size,
            **EVERYTHING,
        )
    )
    assert len(result) == 4  # the broken one is left out, also in the middle of a batch
    validate_proposals(undecoded(result))
    model = AutoModelForObjectDetection.from_pretrained(detector).eval()
    processor = AutoImageProcessor.from_pretrained(detector)
    for row in result:
        with torch.no_grad():
            outputs = model(**processor(images=row["image"], return_tensors="pt"))
        size = row["image"].size[::-1]
        expected = processor.post_process_object_detection(outputs, threshold=0.05, target_sizes=[size])[0]
        order = torch.argsort(-expected["scores"], stable=True)
        boxes = expected["boxes"][order].clamp(min=0)
        boxes = torch.minimum(boxes, torch.tensor([*size[::-1], *size[::-1]]))
        boxes[:, 2:] -= boxes[:, :2]
        assert len(boxes) > 3
        np.testing.assert_allclose(row["proposals"]["score"], expected["scores"][order], atol=1e-4)
        np.testing.assert_allclose(row["proposals"]["bbox"], boxes, atol=0.02)


def test_a_checkpoint_in_half_precision_runs_in_float32(images, detector, tmp_path):
    AutoModelForObjectDetection.from_pretrained(detector).half().save_pretrained(tmp_path / "half")
    AutoImageProcessor.from_pretrained(detector).save_pretrained(tmp_path / "half")
    (boxes, scores) = trained.load_box_finder(str(tmp_path / "half"))([np.zeros((40, 60, 3), dtype=np.uint8)])[0]
    assert len(boxes) and boxes.dtype == scores.dtype == np.float32 and np.isfinite(boxes).all()
    assert (boxes != boxes.astype(np.float16)).any()


@pytest.mark.parametrize(
    "name, message",
    [
        ("bbox_predictor", "1 tensors hold NaN or infinite numbers, such as bbox_predictor.layers.0.bias"),
        ("class_labels_classifier", "2 tensors have other shapes than its config.json makes, such as class_labels_"),
        ("query_position", "lacks 1 tensors of its detector, such as model.query_position_embeddings.weight"),
        ("", "its weights are damaged or no weights"),
    ],
)
def test_weights_of_a_detector_that_are_not_sound_are_refused(images, detector, tmp_path, name, message):
    folder = shutil.copytree(detector, tmp_path / "detector")
    weights = load_file(folder / "model.safetensors")
    found = sorted(key for key in weights if name in key)
    if name == "bbox_predictor":
        weights[found[0]] *= float("nan")
    elif name == "class_labels_classifier":
        weights |= {key: weights[key][:2] for key in found}
    elif name == "query_position":
        weights.pop(found[0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if not name:
        os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(ValueError, match=message):
        generate_proposals(arguments(images, tmp_path / "out", source="detector", detector=str(folder)))


def test_a_detector_of_this_package_is_known_from_the_start(tmp_path):
    detector = tiny_detector("torchvision_fcos")
    detector.save_pretrained(tmp_path / "fcos")
    build_image_processor(detector, 64).save_pretrained(tmp_path / "fcos")
    code = f"""
import numpy as np
from aligndet_hf.proposals.trained import load_box_finder

find = load_box_finder({str(tmp_path / "fcos")!r}, 0.0)
print(len(find([np.zeros((40, 60, 3), dtype=np.uint8)])[0][0]), "boxes")
"""
    printed = forks.run_alone(code, folder=tmp_path, package=Path(trained.__file__).parents[2])
    assert printed.endswith(" boxes\n") and not printed.endswith(" 0 boxes\n")


def test_a_short_name_is_a_detector_on_the_hub(images, tmp_path, monkeypatch):
    def cached_file(name, file):
        raise OSError(f"{name} is asked for")

    monkeypatch.setattr(build, "cached_file", cached_file)
    build._on_hub.cache_clear()
    with pytest.raises(OSError, match="detector 'rt_detr_r18': no such folder.*: PekingU/rtdetr_r18vd is asked for"):
        generate_proposals(arguments(images, tmp_path / "out", source="detector", detector="rt_detr_r18"))


def test_low_scores_are_left_out(images, detector, tmp_path):
    common = {"source": "detector", "detector": str(detector), **EVERYTHING}
    everything = generate_proposals(arguments(images, tmp_path / "all", score_threshold=0.0, **common))
    scores = np.concatenate([row["score"] for row in everything["proposals"]])
    threshold = float(np.median(scores))
    few = generate_proposals(arguments(images, tmp_path / "few", score_threshold=threshold, **common))
    kept = np.concatenate([row["score"] for row in few["proposals"]])
    assert len(kept) == (scores > threshold).sum() > 0


def test_another_detector_in_the_same_folder_is_not_the_same_run(images, detector, tmp_path):
    folder = tmp_path / "detector"
    tiny_detector("detr", num_labels=3).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(detector).save_pretrained(folder)
    run = arguments(images, tmp_path / "out", source="detector", detector=str(folder))
    generate_proposals(run)
    generate_proposals(run)
    tiny_detector("detr", num_labels=2).save_pretrained(folder)
    with pytest.raises(ValueError, match="detector_content.*--overwrite"):
        generate_proposals(run)


def test_boxes_of_masks(images, segmenter, tmp_path):
    (tmp_path / "two").mkdir()  # a mask is made for each of 1024 points
    for name in ("0.png", "4.png"):
        shutil.copy(images / name, tmp_path / "two")
    result = generate_proposals(
        arguments(tmp_path / "two", tmp_path / "out", source="detector", detector=str(segmenter), score_threshold=0.1)
    )
    validate_proposals(undecoded(result))
    assert [row["image"].size for row in result] == [(64, 40), (64, 72)]
    for row in result:  # its masks are a pattern all over the image
        assert row["proposals"]["bbox"] == [[0, 0, *row["image"].size]]
        assert row["proposals"]["score"][0] > 0.9


def test_other_models_are_refused(images, tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    run = arguments(images, tmp_path / "out", source="detector", detector=str(tmp_path / "vit"))
    with pytest.raises(ValueError, match="type 'vit', which neither detects objects nor generates masks"):
        generate_proposals(run)
    tiny_detector("detr").save_pretrained(tmp_path / "alone")
    with pytest.raises(OSError, match="(?i)image ?processor.*alone"):
        generate_proposals(arguments(images, tmp_path / "out", source="detector", detector=str(tmp_path / "alone")))
    with pytest.raises(OSError, match="nowhere"):
        trained.load_box_finder(str(tmp_path / "nowhere"))


def test_code_of_a_repository_is_not_run(tmp_path):
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.StrangeConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_strange.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code|strange"):
        trained.load_box_finder(str(tmp_path))
    assert not (tmp_path / "proof").exists()


# ---- a column ----


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two images with proposals in clusters and with labels."""
    folder = tmp_path_factory.mktemp("labelled") / "saved"
    proposals = [
        {
            "bbox": [[70, 0, 9, 9], [0, 0, 20, 20], [0, 0, 20, 19], [30, 5, 20, 10], [0, 0, 40, 4]],  # one is outside
            "score": [0.95, 0.9, 0.8, 0.7, 0.6],
            "cluster": [5, 3, 2, 1, 0],
        },
        {"bbox": [[50, 30, 40, 30]], "score": [0.5], "cluster": [7]},  # reaches out of the image
    ]
    objects = [{"bbox": [[1, 2, 30, 20], [40, 10, 8, 8]], "category": [0, 1]}, {"bbox": [], "category": []}]
    features = {
        "image": datasets.Image(),
        "proposals": proposals_feature(with_clusters=True),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
            "category": datasets.List(datasets.Value("int64")),
        },
    }
    pictures = [PIL.Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    columns = {"image": pictures, "proposals": proposals, "objects": objects}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)
    return folder


def test_a_column_is_filtered_again_with_its_clusters(labelled, tmp_path):
    result = generate_proposals(arguments(labelled, tmp_path / "out", source="column"))
    assert result.column_names == ["image", "objects", "proposals"]
    assert result[0]["proposals"]["bbox"] == [[0, 0, 20, 20], [30, 5, 20, 10]]  # a duplicate and a long one are gone
    assert result[0]["proposals"]["cluster"] == [3, 1]
    np.testing.assert_allclose(result[0]["proposals"]["score"], [0.9, 0.7])
    assert result[1]["proposals"]["bbox"] == [[50, 30, 14, 18]] and result[1]["proposals"]["cluster"] == [7]
    again = generate_proposals(arguments(tmp_path / "out", tmp_path / "again", source="column"))
    assert again["proposals"][:] == result["proposals"][:]


def test_labels_as_proposals(labelled, tmp_path):
    result = generate_proposals(
        arguments(labelled, tmp_path / "out", source="column", column="objects", min_relative_size=0)
    )
    assert result[0]["proposals"] == {"bbox": [[1, 2, 30, 20], [40, 10, 8, 8]], "score": [1.0, 0.5]}
    assert result[1]["proposals"] == {"bbox": [], "score": []}
    with pytest.raises(DataError, match="no column 'boxes'"):
        generate_proposals(arguments(labelled, tmp_path / "no", source="column", column="boxes"))


def test_the_content_of_the_column_counts(labelled, tmp_path):
    run = arguments(labelled, tmp_path / "out", source="column")
    generate_proposals(run)
    other = datasets.load_from_disk(str(labelled)).select([1, 1])
    other.save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="input_train.*--overwrite"):
        generate_proposals(arguments(tmp_path / "other", tmp_path / "out", source="column"))


# ---- files ----


def proposal_file(path: Path, **changes) -> Path:
    content = {
        "images": [
            {"id": 7, "file_name": "0.png"},
            {"id": 3, "file_name": "images/1.png"},
            {"id": 5, "file_name": "x"},
        ],
        "categories": [{"id": 1, "name": "selective_search"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 1, "bbox": [0, 0, 30, 30]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [10, 10, 20, 20]},
            {"id": 3, "image_id": 3, "category_id": 1, "bbox": [20, 5, 40, 30]},
        ],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_a_proposal_file_is_read_by_file_names(images, tmp_path, capsys):
    path = proposal_file(tmp_path / "file.json")
    result = generate_proposals(arguments(images, tmp_path / "out", source="json", proposals_file=str(path)))
    assert "3 of 5 images of the split 'train' are not in this file" in capsys.readouterr().out
    assert result["proposals"][:] == [
        {"bbox": [[10, 10, 20, 20]], "score": [1.0]},
        {"bbox": [[0, 0, 30, 30], [20, 5, 40, 30]], "score": [1.0, 0.5]},
        {"bbox": [], "score": []},
        {"bbox": [], "score": []},
    ]
    proposal_file(path, categories=[])
    with pytest.raises(ValueError, match="proposals_file_content"):
        generate_proposals(arguments(images, tmp_path / "out", source="json", proposals_file=str(path)))


def test_scores_and_clusters_of_a_proposal_file(images, tmp_path):
    annotations = [
        {"image_id": 7, "category_id": 9, "bbox": [0, 0, 10, 10], "score": 0.2},
        {"image_id": 7, "category_id": 4, "bbox": [10, 10, 20, 20], "score": 0.6},
    ]
    categories = [{"id": 9, "name": "b"}, {"id": 4, "name": "a"}]
    path = proposal_file(tmp_path / "file.json", annotations=annotations, categories=categories)
    result = generate_proposals(arguments(images, tmp_path / "out", source="json", proposals_file=str(path)))
    first = result[0]["proposals"]
    assert first["bbox"] == [[10, 10, 20, 20], [0, 0, 10, 10]] and first["cluster"] == [0, 1]
    np.testing.assert_allclose(first["score"], [0.6, 0.2])
    column = import_proposals(path, {"train": load_dataset_source(images)})["train"]
    assert column.column_names == ["proposals"] and column[0]["proposals"] == first


def test_what_is_exported_is_read_again(labelled, tmp_path):
    path = tmp_path / "deep" / "proposals.json"
    with_ids = datasets.load_from_disk(str(labelled)).add_column("image_id", [12, 5])
    with_ids.save_to_disk(str(tmp_path / "data"))
    first = generate_proposals(
        arguments(tmp_path / "data", tmp_path / "first", source="column", export_json=str(path), **EVERYTHING)
    )
    content = json.loads(path.read_text())
    assert [(image["id"], image["height"], image["width"]) for image in content["images"]] == [
        (12, 48, 64),
        (5, 48, 64),
    ]
    assert [annotation["id"] for annotation in content["annotations"]] == [1, 2, 3, 4, 5]
    assert content["annotations"][4]["bbox"] == [50, 30, 14, 18] and content["annotations"][4]["area"] == 252
    assert [category["id"] for category in content["categories"]] == list(range(8))
    run = {"source": "json", "proposals_file": str(path), **EVERYTHING}
    second = generate_proposals(arguments(tmp_path / "data", tmp_path / "second", **run))
    assert second["proposals"][:] == first["proposals"][:]


def test_ids_and_names_of_the_images_are_those_of_the_label_file(labelled, tmp_path):
    """Also ids that are texts, and names in folders, of which two end alike."""
    path = tmp_path / "proposals.json"
    own = datasets.load_from_disk(str(labelled)).add_column("image_id", ["scan b", "scan a"])
    own.add_column("file_name", ["left/x.png", "right/x.png"]).save_to_disk(str(tmp_path / "data"))
    run = {"source": "column", "export_json": str(path)} | EVERYTHING
    first = generate_proposals(arguments(tmp_path / "data", tmp_path / "first", **run))
    content = json.loads(path.read_text())
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        ("scan b", "left/x.png"),
        ("scan a", "right/x.png"),
    ]
    assert {annotation["image_id"] for annotation in content["annotations"]} == {"scan a", "scan b"}
    for image in content["images"]:  # found by their ids where the names are others
        image["file_name"] = f"{image['id']}.tif"
    path.write_text(json.dumps(content))
    run = {"source": "json", "proposals_file": str(path), **EVERYTHING}
    second = generate_proposals(arguments(tmp_path / "data", tmp_path / "second", **run))
    assert second["proposals"][:] == first["proposals"][:]


def test_export_of_several_splits_without_clusters(images, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "images" / split / "a.png").write_bytes((images / "0.png").read_bytes())
    run = {"preset": "tiny", "export_json": str(tmp_path / "p.json")}
    generate_proposals(arguments(tmp_path / "images", tmp_path / "out", **run))
    for split in ("train", "validation"):
        content = json.loads((tmp_path / f"p-{split}.json").read_text())
        assert content["categories"] == [{"id": 1, "name": "selective_search"}]
        assert content["images"][0]["file_name"] == "a.png" and content["annotations"]
    generate_proposals(arguments(tmp_path / "images", tmp_path / "out", **run))  # also where nothing is left to do
    assert capsys.readouterr().out.count("Exported to") == 4


def of_annotations(change: dict) -> str:
    annotation = {"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    return json.dumps({"images": [], "annotations": [annotation, annotation | change]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a COCO file of proposals"),
        ("[" * 100_000, "not valid JSON"),
        (
            '{"images": [{"id": 1}], "annotations": []}',
            "entry 0 of 'images': not a COCO file of proposals: KeyError 'file_name'",
        ),
        ('{"images": [], "annotations": [{"bbox": [1, 2, 3, 4]}]}', "entry 0 of 'annotations': .*KeyError 'image_id'"),
        (
            '{"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2]}]}',
            "entry 0 of 'annotations': .*four numbers",
        ),
        (of_annotations({"bbox": [1, 2, 10**400, 4]}), "entry 1 of 'annotations': .*OverflowError"),
        (of_annotations({"bbox": [1, 2, float("nan"), 4]}), "entry 1 of 'annotations': .*finite numbers"),
        (of_annotations({"bbox": [1, 2, 1e300, 4]}), "entry 1 of 'annotations': .*finite numbers"),
        (of_annotations({"score": {}}), "entry 1 of 'annotations': .*TypeError"),
        (of_annotations({"score": None}), "entry 1 of 'annotations': .*finite numbers"),
        ('{"images": [{"id": 1, "file_name": "y"}], "annotations": []}', "lists none of the images .*0.png"),
    ],
)
def test_other_files_are_refused(images, tmp_path, text, message):
    (tmp_path / "file.json").write_text(text)
    run = arguments(images, tmp_path / "out", source="json", proposals_file=str(tmp_path / "file.json"))
    with pytest.raises(DataError, match=f"file.json.*{message}"):
        generate_proposals(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "magic"}, "source must be one of selective_search, .*got 'magic'"),
        ({"source": "detector"}, "--source detector needs --detector"),
        ({"source": "json"}, "--source json needs --proposals_file"),
        ({"source": "column", "detector": "x"}, "detector is for --source detector, not for column"),
        ({"mode": "fast", "detector": "x"}, "detector is for --source detector, not for opencv"),
        ({"source": "opencv", "preset": "tiny"}, "preset is for --source selective_search, not for opencv"),
        ({"preset": "huge"}, "preset must be one of tiny, default, quality, got 'huge'"),
        (
            {"source": "detector", "detector": "x", "per_device_eval_batch_size": 0},
            "per_device_eval_batch_size must be positive",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments("images", "out", **changes)


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({}, "selective_search"),
        ({"preset": "tiny"}, "selective_search"),
        ({"short_side": 100}, "opencv"),
        ({"detector": "x"}, "detector"),
        ({"column": "objects"}, "column"),
        ({"proposals_file": "x"}, "json"),
    ],
)
def test_the_source_is_that_of_the_settings_given(changes, source):
    assert arguments("images", "out", **changes).source == source


def test_selection_keeps_the_same_boxes_when_repeated():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 60, (200, 2)), rng.uniform(1, 40, (200, 2))], axis=1)
    first = select_proposals(boxes, rng.random(200), (100, 100))
    second = select_proposals(*first, (100, 100))
    np.testing.assert_array_equal(first[0], second[0])
