"""Fine-tuning: exact resumption, whole checkpoints, what moves and what is measured, and a result without us in it."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import forks
import PIL.Image
import pytest
import timm
import torch
from accelerate.utils import gather_object
from damages import DAMAGES, flip
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_detectors import CONFIGS, CONVNETS, NUM_QUERIES, tiny_detector
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrForObjectDetection,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from aligndet_hf.commands.finetune import (
    FinetuneArguments,
    _load_labelled,
    _start_detector,
    finetune,
    settings_of,
)
from aligndet_hf.data.collate import collate_labelled
from aligndet_hf.data.dataset import LabelledImages
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import category_names, load_dataset_source, load_labelled
from aligndet_hf.data.label_export import export_labels
from aligndet_hf.data.sampling import SampleKey
from aligndet_hf.data.synthetic import SYNTHETIC_CATEGORIES, make_synthetic_dataset, write_synthetic_folder
from aligndet_hf.data.views import ViewConfig
from aligndet_hf.detectors.backbones import get_backbone, set_backbone_trainable
from aligndet_hf.detectors.build import build_image_processor, ignored_note
from aligndet_hf.detectors.criterion import use_correct_loss
from aligndet_hf.detectors.families import family_of
from aligndet_hf.evaluation.coco_metrics import CocoMetrics
from aligndet_hf.evaluation.detections import EvaluationImages
from aligndet_hf.runs import Interrupted
from aligndet_hf.training.batch_size import largest_batch
from aligndet_hf.training.checkpointing import find_last_checkpoint, new_checkpoint
from aligndet_hf.training.detection_trainer import DetectionTrainer
from aligndet_hf.training.interrupts import StopSignals
from aligndet_hf.training.parameter_groups import layer_depths, parameter_groups
from aligndet_hf.training.weight_average import WEIGHTS

SIZES = [64, 96]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Labelled data (8 images to train on, 5 to measure on) and a DETR checkpoint with other classes."""
    folder = tmp_path_factory.mktemp("finetune")
    write_synthetic_folder(folder / "data", {"train": 8, "validation": 5}, seed=0, image_size=(64, 96))
    tiny_detector("detr").save_pretrained(folder / "detector")
    return folder


def arguments_for(folder: Path, output_dir: Path, **changes) -> FinetuneArguments:
    """Two epochs of two steps."""
    settings = {
        "dataset": str(folder / "data"),
        "detector": str(folder / "detector"),
        "output_dir": str(output_dir),
        "image_sizes": SIZES,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "write_report": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return FinetuneArguments(**settings | changes)


def make_trainer(model_type: str, output_dir: Path, seed: int = 0, freeze: bool = False, callbacks=None, **changes):
    """A trainer of a tiny detector on four synthetic images."""
    detector = use_correct_loss(tiny_detector(model_type, seed, num_labels=len(SYNTHETIC_CATEGORIES)))
    set_backbone_trainable(detector, not freeze)
    dataset = make_synthetic_dataset(4, seed=0, image_size=(64, 96))
    image_processor = build_image_processor(detector, 64)
    view = ViewConfig([64], resize=family_of(detector.config).resize)
    return DetectionTrainer(
        detector,
        arguments_for(output_dir, output_dir, **{"max_steps": 1, "do_eval": False, "save_strategy": "no"} | changes),
        train_dataset=LabelledImages(dataset, view, seed=0),
        eval_dataset=EvaluationImages(dataset, SYNTHETIC_CATEGORIES, image_processor),
        processing_class=image_processor,
        callbacks=callbacks,
    )


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def of_checkpoint(folder: Path, checkpoint: str) -> bool:
    """Whether the tensors of a detector that have the same names in a checkpoint of its run are equal."""
    kept, saved = weights_of(folder), weights_of(folder / checkpoint)
    names = kept.keys() & saved.keys()
    return len(names) > 20 and all(torch.equal(kept[name], saved[name]) for name in names)


class Interrupt(TrainerCallback):
    """Ends a run right after it saved the checkpoint of a step, as a killed process does."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next runs of `finetune` end after the checkpoint of a step; `None` lets them finish."""
    stop = {"step": None}
    init = DetectionTrainer.__init__

    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs, callbacks=[Interrupt(stop["step"])])

    monkeypatch.setattr(DetectionTrainer, "__init__", patched)
    return lambda step: stop.update(step=step)


# ---- runs ----


# What keeps a state of its own beside the weights.
OF_TODAY = {
    "ema_decay": 0.9,
    "augmentations": ["mosaic", "copy_paste", "photometric"],
    "layer_decay": 0.8,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "early_stopping_patience": 2,
    "metric_for_best_model": "AR1",
}


def test_average_augmentations_and_early_stopping_resume_exactly(folder, tmp_path, interrupt):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, **OF_TODAY}
    whole = finetune(arguments_for(folder, tmp_path / "whole", **changes))
    steps = json.loads((tmp_path / "whole" / "results.json").read_text())["steps"]
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        finetune(arguments_for(folder, tmp_path / "parts", **changes))
    interrupt(None)
    assert finetune(arguments_for(folder, tmp_path / "parts", **changes)).metrics == whole.metrics
    results = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert results["steps"] == steps and results["weights"]["kept"] in ("average", "last")
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    average = [load_file(tmp_path / run / f"checkpoint-{steps}" / WEIGHTS) for run in ("whole", "parts")]
    assert same(*average) and not same(average[0], weights_of(tmp_path / "whole" / f"checkpoint-{steps}"))


def test_what_is_read_may_lie_elsewhere(folder, tmp_path, interrupt, monkeypatch):
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        finetune(arguments_for(folder, tmp_path / "run"))
    interrupt(None)
    shutil.copytree(folder / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    changes = {"dataset": "data/", "detector": os.path.relpath(folder / "detector")}
    finetune(arguments_for(folder, "run", **changes))
    image = next(Path("data/train").glob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"0")
    with pytest.raises(ValueError, match="dataset: .*/data' there, 'data/' now.*content: "):
        finetune(arguments_for(folder, "run", **changes))


def test_early_stopping_ends_a_run_that_does_not_improve(folder, tmp_path):
    changes = {"max_steps": 8, "learning_rate": 1e-12, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    arguments = arguments_for(folder, tmp_path, **changes, early_stopping_patience=2, save_strategy="steps")
    finetune(arguments)
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 3
    weights = weights_of(tmp_path)
    assert of_checkpoint(tmp_path, "checkpoint-1")  # the best, as nothing after it is better
    (tmp_path / "results.json").unlink()  # as if it had been killed after its last checkpoint
    finetune(arguments)
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 3
    assert same(weights_of(tmp_path), weights)
    with pytest.raises(ValueError, match="early_stopping_patience needs measurements"):
        arguments_for(folder, tmp_path, early_stopping_patience=2, eval_strategy="no")


def test_early_stopping_ends_with_the_best_weights(folder, tmp_path, interrupt, monkeypatch, capsys):
    compute, measured, runs = CocoMetrics.compute, {}, (tmp_path / "whole", tmp_path / "parts")
    monkeypatch.setattr(CocoMetrics, "compute", lambda self: compute(self) | {"AP": next(measured["AP"])})
    changes = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    changes |= {"save_strategy": "steps", "save_steps": 4}
    measured["AP"] = iter([0.1, 0.4, 0.2, 0.3, 0.4])  # after each step, and at the end
    finetune(arguments_for(folder, runs[0], **changes))
    measured["AP"] = iter([0.1, 0.4])
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        finetune(arguments_for(folder, runs[1], **changes))
    measured["AP"] = iter([0.2, 0.3, 0.4])
    interrupt(None)
    finetune(arguments_for(folder, runs[1], **changes))
    assert capsys.readouterr().out.count("The best measured weights are kept: AP 40.0 after step 2 of 4.") == 2
    assert of_checkpoint(runs[0], "checkpoint-2") and same(*map(weights_of, runs))
    measured["AP"] = iter([0.1, 0.4, 0.2, 0.3, 0.3])
    finetune(arguments_for(folder, tmp_path / "last", **changes, load_best_model_at_end=False))
    assert "best measured" not in capsys.readouterr().out and not same(*map(weights_of, (runs[0], tmp_path / "last")))
    with pytest.raises(ValueError, match="the best weights must be saved when they are measured"):
        arguments_for(folder, tmp_path, **changes | {"save_strategy": "epoch"})


def test_the_average_is_the_formula(tmp_path):
    trainer = make_trainer("detr", tmp_path, max_steps=3, ema_decay=0.3, learning_rate=1e-2)
    name = next(name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad and tensor.ndim > 1)
    expected, seen = trainer.model.get_parameter(name).detach().clone(), []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.get_parameter(name).detach().clone())

    trainer.add_callback(Record())
    trainer.train()
    for weights, momentum in zip(seen, [2 / 11, 3 / 12, 0.3], strict=True):  # (1 + t) / (10 + t), at most 0.3
        expected = momentum * expected + (1 - momentum) * weights
    torch.testing.assert_close(trainer.average.detector.get_parameter(name), expected)
    assert not torch.equal(expected, seen[-1])
    frozen = make_trainer("detr", tmp_path, freeze=True, ema_decay=0.3)
    for own, averaged in zip(
        frozen.backbone.parameters(), get_backbone(frozen.average.detector).parameters(), strict=True
    ):
        assert own is averaged
    for decay in (0.0, 1.0, 2):
        with pytest.raises(ValueError, match="ema_decay must"):
            make_trainer("detr", tmp_path, ema_decay=decay)


def test_the_better_weights_are_kept(tmp_path):
    for kept, better in (("average", 0.2), ("last", 0.6)):
        trainer = make_trainer("detr", tmp_path, max_steps=2, ema_decay=0.9, learning_rate=1e-2)
        trainer.train()
        average = trainer.average.detector
        measured = {id(trainer.model): better, id(average): 0.4}

        def evaluate(self=trainer, measured=measured):
            of = self.model if self.average is None else self.average.detector
            self.results = {"AP": measured[id(of)]}
            return {"eval_AP": measured[id(of)]}

        trainer.evaluate = evaluate
        last = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        assert trainer.choose_weights() == {"kept": kept, "AP_last": better, "AP_average": 0.4}
        assert trainer.results == {"AP": max(better, 0.4)}
        assert same(trainer.model.state_dict(), average.state_dict() if kept == "average" else last)


def test_a_trainer_refuses_arguments_of_language_models(tmp_path):
    given = {"label_smoothing_factor": 0.1, "train_sampling_strategy": "group_by_length", "neftune_noise_alpha": 5.0}
    for name, value in given.items():
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **{name: value})
        with pytest.raises(ValueError, match=f"^{name} has no effect on the training of detectors"):
            DetectionTrainer(tiny_detector("detr"), arguments)


def test_rates_of_parts():
    detector = tiny_detector("detr")
    backbone = get_backbone(detector)
    kept = [name for name, _ in detector.named_parameters() if ".encoder." in name]
    options = {"learning_rate": 1.0, "weight_decay": 0.1, "backbone_learning_rate": 0.1}
    groups = parameter_groups(detector, backbone, **options, transferred=kept, transferred_learning_rate=0.5)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    in_backbone = {id(parameter) for parameter in backbone.parameters()}
    assert len(rates) == sum(parameter.requires_grad for parameter in detector.parameters())
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            expected = 0.1 if id(parameter) in in_backbone else 0.5 if name in kept else 1.0
            assert rates[id(parameter)] == expected, name
    depths = layer_depths([name for name, _ in detector.named_parameters()])
    options = {"learning_rate": 1.0, "weight_decay": 0.0, "layer_decay": 0.5}
    groups = parameter_groups(detector, backbone, **options, transferred=kept)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:  # what is new has the whole rate
            above = max(depths.values()) - depths[name] if id(parameter) in in_backbone or name in kept else 0
            assert rates[id(parameter)] == 0.5**above, name
    first = {part: min(depths[name] for name in depths if f".{part}." in name) for part in ("encoder", "decoder")}
    assert 1 == min(depths.values()) < first["encoder"] < first["decoder"]
    backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="layer_decay changes nothing: the backbone is frozen"):
        parameter_groups(detector, backbone, **options)


def test_parts_side_by_side_are_one_layer():
    detector = tiny_detector("rt_detr")
    depths = layer_depths([name for name, _ in detector.named_parameters()])
    for part in ("encoder_input_proj", "lateral_convs", "bbox_embed"):
        assert len({depth for name, depth in depths.items() if f".{part}." in name}) == 1, part
    layers = {depth for name, depth in depths.items() if ".decoder.layers." in name}
    assert len(layers) == detector.config.decoder_layers > 1


def test_an_interrupted_run_ends_bit_identical_in_a_fresh_process(folder, tmp_path, interrupt):
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    whole = finetune(arguments_for(folder, tmp_path / "whole", **changes))
    interrupt(3)  # in the middle of the second epoch; dropout, flips and evaluations drew random numbers before
    with pytest.raises(KeyboardInterrupt):
        finetune(arguments_for(folder, tmp_path / "parts", **changes))
    assert find_last_checkpoint(tmp_path / "parts").path.name == "checkpoint-3"
    assert not (tmp_path / "parts" / "results.json").exists()

    # Loading in another process changes nothing either.
    flags = changes | {"dataloader_num_workers": 1}
    settings = {**_given(arguments_for(folder, tmp_path / "parts")), **flags}
    forks.run(finetune_with, settings, console=tmp_path / "console.txt")

    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["metrics"] == whole.metrics
    start = weights_of(folder / "detector")
    moved = [name for name, tensor in weights_of(tmp_path / "whole").items() if not torch.equal(tensor, start[name])]
    assert len(moved) > 50


def finetune_with(settings: dict) -> None:
    finetune(FinetuneArguments(**settings))


def _given(arguments: FinetuneArguments) -> dict:
    """What [`arguments_for`] gave, to hand it to another process."""
    names = ("dataset", "detector", "output_dir", "image_sizes", "num_train_epochs", "per_device_train_batch_size")
    names += ("per_device_eval_batch_size", "logging_steps", "use_cpu", "disable_tqdm")
    return {name: getattr(arguments, name) for name in names}


def test_a_signal_in_the_last_step_of_an_epoch_loses_no_measurement(folder, tmp_path, monkeypatch):
    received, steps = StopSignals.received, []
    monkeypatch.setattr(StopSignals, "received", lambda self: steps.append(0) or (len(steps) == 2) * signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped after step 2"):
        finetune(arguments_for(folder, tmp_path, logging_strategy="epoch"))
    monkeypatch.setattr(StopSignals, "received", received)
    finetune(arguments_for(folder, tmp_path, logging_strategy="epoch"))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for name in ("eval_AP", "loss"):
        assert [entry["epoch"] for entry in history if name in entry] == [1, 2], name


def test_a_run_killed_after_its_last_checkpoint_trains_no_further(folder, tmp_path, interrupt):
    changes = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}  # ends within an epoch
    finetune(arguments_for(folder, tmp_path / "whole", **changes))
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        finetune(arguments_for(folder, tmp_path / "parts", **changes))
    interrupt(None)
    finetune(arguments_for(folder, tmp_path / "parts", **changes))
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    assert json.loads((tmp_path / "parts" / "trainer_state.json").read_text())["global_step"] == 3


def test_a_full_disk_while_saving_costs_one_checkpoint(folder, tmp_path, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2, "do_eval": False}
    finetune(arguments_for(folder, tmp_path / "whole", **changes))
    save = torch.save
    with monkeypatch.context() as patch:

        def fail(state, path, *args, **kwargs):
            if "checkpoint-2" in str(path):
                raise RuntimeError("PytorchStreamWriter failed writing file")
            save(state, path, *args, **kwargs)

        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="could not write .*parts: PytorchStreamWriter"):
            finetune(arguments_for(folder, tmp_path / "parts", **changes))
    assert [path.name for path in (tmp_path / "parts").glob("*checkpoint-*")] == ["checkpoint-1"]
    finetune(arguments_for(folder, tmp_path / "parts", **changes))
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


def test_a_batch_that_fits_is_found_and_changes_nothing_else(folder, tmp_path, monkeypatch, capsys):
    """Where memory is for two images, batches of four become two of two: the run that says so itself."""
    fields = {"max_steps": 2, "do_eval": False, "save_strategy": "no", "write_report": False}
    explicit = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    finetune(arguments_for(folder, tmp_path / "explicit", **fields | explicit))
    forward, seen, room = DetrForObjectDetection.forward, [], 2

    def limited(self, pixel_values, *args, **kwargs):
        seen.append(len(pixel_values))
        if len(pixel_values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(DetrForObjectDetection, "forward", limited)
    monkeypatch.setattr("aligndet_hf.commands.finetune.measure_speed", lambda *args: {})
    changes = fields | {"auto_find_batch_size": True}
    finetune(arguments_for(folder, tmp_path / "found", **changes))
    assert seen == [4, 2] + [2] * 4
    assert json.loads((tmp_path / "found" / "batch_size.json").read_text()) == {"per_device_train_batch_size": 2}
    assert "Batches of 2 of 4 images fit into memory" in capsys.readouterr().out
    assert same(weights_of(tmp_path / "explicit"), weights_of(tmp_path / "found"))
    # A run that goes on keeps what it has found, however much room there is now.
    (tmp_path / "found" / "results.json").unlink()
    room, seen[:] = 4, []
    finetune(arguments_for(folder, tmp_path / "found", **changes))
    assert set(seen) == {2} and same(weights_of(tmp_path / "explicit"), weights_of(tmp_path / "found"))
    room = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(arguments_for(folder, tmp_path / "none", **changes))


def test_processes_look_for_the_largest_batch_together(monkeypatch):
    """One that has no room must not go on alone: the losses of a step wait for each other."""
    others, tried = iter([False, True]), []
    monkeypatch.setattr("aligndet_hf.training.batch_size.gather_object", lambda own: [*own, next(others)])
    assert largest_batch(tried.append, 6) == 3 and tried == [6, 3]


def test_the_result_is_a_plain_detector_with_a_card(folder, tmp_path, capsys):
    changes = {"label_fraction": 0.5, "card_license": "apache-2.0", "write_report": True, "num_pictures": 2}
    result = finetune(arguments_for(folder, tmp_path / "run", **changes))
    output_dir = result.output_dir
    assert {"report.html", "predictions.jpg", "worst.jpg", "diagnosis.json"} <= {
        path.name for path in output_dir.iterdir()
    }

    detector = AutoModelForObjectDetection.from_pretrained(output_dir)
    assert type(detector).__module__.startswith("transformers.")
    assert list(detector.config.id2label.values()) == SYNTHETIC_CATEGORIES
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert processor.size["shortest_edge"] == max(SIZES)
    image = str(next((folder / "data" / "validation").glob("*.jpg")))
    found = pipeline("object-detection", model=str(output_dir))(image, threshold=0.0)
    assert found and found[0]["label"] in SYNTHETIC_CATEGORIES

    worst = json.loads((output_dir / "diagnosis.json").read_text())["worst_images"]
    names = {path.name for path in (folder / "data" / "validation").glob("*.jpg")}
    assert worst and {image["file_name"] for image in worst} <= names
    assert f"<td>{worst[0]['file_name']}</td>" in (output_dir / "report.html").read_text()

    record = json.loads((output_dir / "results.json").read_text())
    assert record["metrics"] == result.metrics and record["images"] == 4 and record["steps"] == 2
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    assert [entry["eval_AP"] for entry in history if "eval_AP" in entry][-1] == result.metrics["AP"]
    terms = {"loss_ce", "loss_bbox", "loss_giou"}  # of the last layer, for a plot
    assert history[0].keys() == terms | {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    for entry in history:
        if "loss" in entry:  # the logged terms are those of the last layer; DETR adds up the two layers' terms
            assert entry["loss"] > entry["loss_ce"] + 5 * entry["loss_bbox"] + 2 * entry["loss_giou"] > 0
    report = json.loads((output_dir / "transfer_report.json").read_text())
    assert report["reset"] == ["class_labels_classifier.weight", "class_labels_classifier.bias"]
    card = ModelCard.load(output_dir / "README.md")
    assert card.data.license == "apache-2.0"
    assert "| kept | " in card.text and "| reset | 2 | `class_labels_classifier.weight`" in card.text
    told = capsys.readouterr().out.splitlines()
    assert "  reset: class_labels_classifier.weight" in told
    assert told[-1].startswith(f"Finished. The detector is in {result.output_dir}.")
    assert card.data.eval_results[0].metric_value == round(100 * result.metrics["AP"], 2)

    capsys.readouterr()
    modified = (output_dir / "model.safetensors").stat().st_mtime_ns
    again = finetune(arguments_for(folder, output_dir, label_fraction=0.5))
    assert again == result and "is finished" in capsys.readouterr().out
    assert (output_dir / "model.safetensors").stat().st_mtime_ns == modified


def test_measuring_changes_nothing_and_a_frozen_backbone_stays(folder, tmp_path):
    changes = {"freeze_backbone": True, "learning_rate": 1e-3}
    finetune(arguments_for(folder, tmp_path / "measured", **changes))
    finetune(arguments_for(folder, tmp_path / "unmeasured", do_eval=False, **changes))
    after = weights_of(tmp_path / "measured")
    assert same(after, weights_of(tmp_path / "unmeasured"))  # dropout draws the same in both

    before = weights_of(folder / "detector")
    backbone = {name for name in before if "backbone" in name}
    assert backbone and all(torch.equal(after[name], before[name]) for name in backbone)
    report = json.loads((tmp_path / "measured" / "transfer_report.json").read_text())
    assert report["frozen"] and all("backbone" in name for name in report["frozen"])
    head = "bbox_predictor.layers.0.weight"
    assert not torch.equal(after[head], before[head])


def test_another_configuration_is_refused_unless_told_to_overwrite(folder, tmp_path):
    changes = {"do_eval": False, "max_steps": 1}
    finetune(arguments_for(folder, tmp_path / "run", **changes))
    with pytest.raises(ValueError, match="learning_rate: 0.0001 there, 0.001 now"):
        finetune(arguments_for(folder, tmp_path / "run", learning_rate=1e-3, **changes))
    before = weights_of(tmp_path / "run")
    # Another spread of the same batch is the same run.
    same_run = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    finetune(arguments_for(folder, tmp_path / "run", **changes | same_run))
    finetune(arguments_for(folder, tmp_path / "run", learning_rate=1e-3, overwrite_output_dir=True, **changes))
    assert not same(before, weights_of(tmp_path / "run"))

    (tmp_path / "other" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds checkpoint-7, but no run.json: .* `aligndet finetune`"):
        finetune(arguments_for(folder, tmp_path / "other"))
    assert (tmp_path / "other" / "checkpoint-7").exists()


def test_settings_are_what_has_an_influence(folder, tmp_path):
    checkpoint = settings_of(arguments_for(folder, tmp_path))
    assert checkpoint["transfer"] == "keep-boxes" and "backbone" not in checkpoint
    assert checkpoint["images_per_step"] == 4 and checkpoint["backbone_learning_rate"] == 1e-5
    assert not {"output_dir", "hub_token", "logging_steps", "dataloader_num_workers"} & checkpoint.keys()
    assert "eval_split" not in checkpoint  # measuring has none, unless it chooses the weights
    assert settings_of(arguments_for(folder, tmp_path, load_best_model_at_end=True))["eval_split"] == "validation"
    new = settings_of(arguments_for(folder, tmp_path, detector="rt_detr", backbone="resnet50"))
    assert new["backbone"] == "resnet50" and "transfer" not in new


@pytest.mark.parametrize(
    "backbone, weights, is_random",
    [
        ("resnet10t", None, True), ("timm/resnet10t", "none", True), ("resnet10t", "timm", False),
        (None, None, False), ("facebook/dinov2-small", None, False),
    ],
)  # fmt: skip
def test_the_backbone_learns_slowly_only_if_it_brings_weights(folder, tmp_path, backbone, weights, is_random):
    changes = {"detector": "rt_detr", "backbone": backbone, "backbone_weights": weights, "learning_rate": 1e-3}
    arguments = arguments_for(folder, tmp_path, **changes)
    assert arguments.backbone_learning_rate == (1e-3 if is_random else 1e-4)
    given = arguments_for(folder, tmp_path, **changes, backbone_learning_rate=3e-5)
    assert given.backbone_learning_rate == 3e-5


def test_training_only_needs_no_validation_data_and_any_start_will_do(folder, tmp_path):
    shutil.copytree(folder / "data" / "train", tmp_path / "data" / "train")
    shutil.copy(folder / "data" / "labels.json", tmp_path / "data")
    tiny = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2, "num_queries": 9}
    changes = {
        "detector": "rt_detr",
        "backbone": "resnet10t",
        "detector_config": tiny | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_denoising": 4},
        "do_eval": False,
        "max_steps": 1,
    }
    result = finetune(arguments_for(tmp_path, tmp_path / "run", **changes))
    assert result.metrics == {}
    assert not {"transfer_report.json", "backbone_report.json"} & {path.name for path in result.output_dir.iterdir()}
    assert AutoModelForObjectDetection.from_pretrained(result.output_dir).config.num_queries == 9
    assert "Nothing was measured" in (result.output_dir / "README.md").read_text()
    with pytest.raises(DataError, match="no split 'validation'.*--eval_dataset and --eval_split say what to measure"):
        finetune(arguments_for(tmp_path, tmp_path / "measured", **changes | {"do_eval": True}))


def test_one_coco_file_is_trained_on_or_measured_on(folder, tmp_path):
    """It is the split that a command asks for: without another one to measure on, that would be the same images."""
    splits = {"train": load_dataset_source(folder / "data", "train", labels=True)}
    export_labels(splits, SYNTHETIC_CATEGORIES, tmp_path / "coco", "coco")
    file = str(tmp_path / "coco" / "annotations" / "instances_train.json")
    with pytest.raises(DataError, match="instances_train.json is one split, which is trained on.*--do_eval false"):
        finetune(arguments_for(folder, tmp_path / "run", dataset=file))


def test_the_last_stages_of_a_backbone_with_weights_are_trained_alone(folder, tmp_path):
    network = timm.create_model("resnet10t", num_classes=3)
    torch.save({"state_dict": {f"module.{name}": t for name, t in network.state_dict().items()}}, tmp_path / "w.pth")
    changes = {
        "detector": "detr",
        "backbone": "resnet10t",
        "backbone_weights": str(tmp_path / "w.pth"),
        "detector_config": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 9},
        "trainable_backbone_stages": 2,
        "learning_rate": 1e-2,
        "do_eval": False,
        "max_steps": 2,
    }
    result = finetune(arguments_for(folder, tmp_path / "run", **changes))
    report = json.loads((result.output_dir / "backbone_report.json").read_text())
    assert report["prefix"] == "state_dict.module." and len(report["unused"]) == 2 and not report["missing"]
    before = network.state_dict()
    after = get_backbone(AutoModelForObjectDetection.from_pretrained(result.output_dir)).named_parameters()
    moved = {name for name, parameter in after if not torch.equal(parameter, before[name])}
    assert moved and all(name.startswith(("layer3.", "layer4.")) for name in moved)
    with pytest.raises(ValueError, match="give it or trainable_backbone_stages"):
        arguments_for(folder, tmp_path, freeze_backbone=True, trainable_backbone_stages=1)
    with pytest.raises(ValueError, match="lr_milestones are a schedule, and lr_scheduler_type linear is another"):
        arguments_for(folder, tmp_path, lr_milestones=[0.5], lr_scheduler_type="linear")


def test_sizes_that_suit_the_images_are_chosen_once(folder, tmp_path, capsys):
    arguments = arguments_for(folder, tmp_path / "run", image_sizes=None, label_fraction=0.5, max_steps=1)
    output_dir = finetune(arguments).output_dir
    told = capsys.readouterr().out
    assert "image_sizes 64 96, since the shorter side of half of the images is at most 64 pixels" in told
    assert AutoImageProcessor.from_pretrained(output_dir).size["shortest_edge"] == 96
    assert json.loads((output_dir / "run.json").read_text())["data"]["image_sizes"] == [64, 96]
    settings = json.loads((output_dir / "finetune_settings.json").read_text())
    assert settings["image_sizes"] == [64, 96] and settings["eval_size"] == 96
    assert arguments.image_sizes is None  # the same again is the same run
    finetune(arguments)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"image_sizes: None there, \[64\] now"):
        finetune(arguments_for(folder, tmp_path / "run", image_sizes=[64], label_fraction=0.5, max_steps=1))


def test_a_random_backbone_is_trained_as_a_whole_and_told(folder, tmp_path, capsys):
    tiny = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 9}
    changes = {"detector": "detr", "backbone": "resnet10t", "detector_config": tiny, "do_eval": False, "max_steps": 1}
    for frozen in ({"freeze_backbone": True}, {"trainable_backbone_stages": 2}):
        with pytest.raises(ValueError, match="frozen of it teaches the detector nothing. Give --backbone_weights"):
            finetune(arguments_for(folder, tmp_path / "run", **changes, **frozen))
    capsys.readouterr()
    finetune(arguments_for(folder, tmp_path / "run", **changes))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("note: the backbone starts from random numbers, so all of it") for line in lines) == 1
    (told,) = [line for line in lines if line.startswith("step 1 of 1: loss ")]
    assert ", learning rate 0.0001" in told and not any("{'" in line for line in lines)


def test_flags_of_a_new_detector_are_told_beside_a_checkpoint(folder, tmp_path, capsys):
    changes = {"backbone": "resnet18", "detector_config": {"num_queries": 50}}
    arguments = arguments_for(folder, tmp_path, **changes)
    detector, _ = _start_detector(arguments, ["a"])
    assert detector.config.num_queries == NUM_QUERIES
    assert (
        f"note: backbone, detector_config: for a new detector, without effect on {folder}" in capsys.readouterr().out
    )
    assert ignored_note(arguments_for(folder, tmp_path, detector="rt_detr", **changes)) is None


def test_a_pretraining_run_gives_its_detector(folder, tmp_path):
    shutil.copytree(folder / "detector", tmp_path / "pretrained" / "detector")
    changes = {"max_steps": 1, "do_eval": False, "seed": 3}
    finetune(arguments_for(folder, tmp_path / "run", detector=str(tmp_path / "pretrained"), **changes))
    finetune(arguments_for(folder, tmp_path / "same", **changes))
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "same"))
    with pytest.raises(ValueError, match="data is not a detector: it has no config.json"):
        finetune(arguments_for(folder, tmp_path / "wrong", detector=str(folder / "data")))


def test_what_is_measured_on_has_the_categories_of_training(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "labels.json").write_text(json.dumps(["moon", *SYNTHETIC_CATEGORIES[1:]]))
    with pytest.raises(DataError, match=f"other categories.*: moon, which are not among {SYNTHETIC_CATEGORIES[0]}, "):
        finetune(arguments_for(folder, tmp_path / "run", eval_dataset=str(tmp_path / "data"), eval_split="validation"))


def test_categories_of_other_numbers_are_matched_by_name(tmp_path):
    """A label file of its own may have them in another order, and fewer of them."""
    image, categories = tmp_path / "a.png", ["ant", "bee", "cat"]
    PIL.Image.new("RGB", (40, 40)).save(image)
    boxes = [[1.0, 1.0, 9.0, 9.0], [20.0, 20.0, 9.0, 9.0]]
    for number, names in enumerate((categories, ["cat", "bee"])):
        content = {
            "images": [{"id": 1, "file_name": "a.png"}],
            "categories": [{"id": place, "name": name} for place, name in enumerate(names, start=1)],
            "annotations": [
                {"id": own, "image_id": 1, "category_id": names.index(name) + 1, "bbox": box}
                for own, (name, box) in enumerate(zip(("bee", "cat"), boxes, strict=True), start=1)
            ],
        }
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    expected, names, _ = load_labelled(tmp_path / "0.json")
    found, same_names, _ = _load_labelled(str(tmp_path / "1.json"), None, None, names)
    assert names == same_names == category_names(found) == categories
    assert found[0]["objects"]["category"] == expected[0]["objects"]["category"] == [1, 2]
    assert found[0]["objects"]["bbox"] == boxes


# ---- checkpoints ----

# All kinds are in test_checkpointing.py; these are for what `Trainer` alone does with its files.
OWN = {
    "a short scheduler": lambda folder: os.truncate(folder / "scheduler.pt", 100),
    "empty random states": lambda folder: (folder / "rng_state.pth").write_bytes(b""),
}
KINDS = ("one bit of model.safetensors", "no optimizer.pt", "a file more", "the checkpoint before under this name")


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory) -> Path:
    """Runs of four steps: one that is `whole`, and one that a signal ended after three: `parts`."""
    parent = tmp_path_factory.mktemp("interrupted")
    changes = {"do_eval": False, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    finetune(arguments_for(folder, parent / "whole", **changes))
    step = DetectionTrainer.training_step

    def signalled(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as error:
        patch.setattr(DetectionTrainer, "training_step", signalled)
        finetune(arguments_for(folder, parent / "parts", **changes))
    assert error.value.signal == signal.SIGTERM and "SIGTERM: stopped after step 3 of 4, saved in" in str(error.value)
    assert "parts/checkpoint-3. Run the same command again to resume." in str(error.value)
    return parent


def goes_on(folder, interrupted, output_dir, **changes):
    """Copies the interrupted run, and returns the same call for the copy, not made yet."""
    shutil.copytree(interrupted / "parts", output_dir, dirs_exist_ok=True)
    settings = {"do_eval": False, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    return arguments_for(folder, output_dir, **settings | changes)


def test_damaged_checkpoints_are_set_aside_and_the_end_is_the_same(folder, interrupted, tmp_path):
    for name, damage in (OWN | {kind: DAMAGES[kind] for kind in KINDS}).items():
        arguments = goes_on(folder, interrupted, tmp_path / name)
        damage(tmp_path / name / "checkpoint-3")
        finetune(arguments)
        assert same(weights_of(tmp_path / name), weights_of(interrupted / "whole")), name
        left = sorted(path.name for path in (tmp_path / name).glob("*checkpoint-*"))
        assert left == ["checkpoint-3", "checkpoint-4", "damaged-checkpoint-3"], name


def test_a_run_without_a_sound_checkpoint_starts_anew(folder, interrupted, tmp_path):
    arguments = goes_on(folder, interrupted, tmp_path)
    for step in (2, 3):
        flip(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    finetune(arguments)
    assert same(weights_of(tmp_path), weights_of(interrupted / "whole"))


def test_images_that_come_later_are_not_mixed_in(folder, interrupted, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    run = {"dataset": str(tmp_path / "data"), "do_eval": False, "save_strategy": "steps", "save_steps": 1}
    finetune(arguments_for(folder, tmp_path / "run", **run))
    image = next((tmp_path / "data" / "train").glob("*.[jp]*g"))
    before = image.read_bytes()
    image.write_bytes(before + b"0")
    for _ in range(2):  # finished, and not
        with pytest.raises(ValueError, match="of other data .content: "):
            finetune(arguments_for(folder, tmp_path / "run", **run))
        (tmp_path / "run" / "results.json").write_text("")  # cut short
    image.write_bytes(before)
    finetune(arguments_for(folder, tmp_path / "run", **run))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4


def test_a_run_is_lengthened_or_ends_early(folder, interrupted, tmp_path, capsys):
    with pytest.raises(ValueError, match="checkpoint-3 is beyond the 2 steps.*at least --max_steps 3"):
        finetune(goes_on(folder, interrupted, tmp_path / "early", max_steps=2))
    finetune(goes_on(folder, interrupted, tmp_path / "early", max_steps=3))
    ended, saved = (
        AutoModelForObjectDetection.from_pretrained(tmp_path / "early" / name).state_dict()
        for name in ("", "checkpoint-3")
    )
    assert same(ended, saved)
    assert "The run is 3 steps long now (max_steps: -1 before, 3 now)" in capsys.readouterr().out
    finetune(goes_on(folder, interrupted, tmp_path / "early", max_steps=6))
    log = json.loads((tmp_path / "early" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    cosine = [0.5e-4 * (1 + math.cos(math.pi * step / 6)) for step in (3, 4, 5)]
    assert len(rates) == 6 and rates[3:] == pytest.approx(cosine)


def test_a_checkpoint_is_a_detector(folder, interrupted, tmp_path):
    checkpoint = interrupted / "parts" / "checkpoint-3"
    changes = {"do_eval": False, "max_steps": 1, "learning_rate": 1e-12, "backbone_learning_rate": 1e-12}
    finetune(arguments_for(folder, tmp_path, detector=str(checkpoint), **changes))
    before, after = weights_of(checkpoint), weights_of(tmp_path)
    assert torch.allclose(before["bbox_predictor.layers.0.weight"], after["bbox_predictor.layers.0.weight"])


# ---- the trainer ----


@pytest.mark.parametrize("model_type", CONFIGS)
def test_checkpoints_restore_every_tensor(model_type, tmp_path):
    saved = make_trainer(model_type, tmp_path)
    with new_checkpoint(tmp_path / "checkpoint-0") as unfinished:
        saved._save(str(unfinished))
        saved.state.save_to_json(str(unfinished / "trainer_state.json"))
    expected = {name: tensor.clone() for name, tensor in saved.model.state_dict().items()}

    resumed = make_trainer(model_type, tmp_path, seed=1)
    differing = sum(not torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    assert differing > 15
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-0"))
    restored = resumed.model.state_dict()
    assert len(restored) == len(expected) and same(restored, expected)

    best = make_trainer(model_type, tmp_path, seed=2)
    best.state.best_model_checkpoint = str(tmp_path / "checkpoint-0")
    best._load_best_model()
    assert same(best.model.state_dict(), expected)
    # And the folder is an ordinary checkpoint.
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-0")
    assert same(loaded.state_dict(), expected)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_checkpoint_that_would_lose_tensors_is_refused(model_type, tmp_path):
    trainer = make_trainer(model_type, tmp_path)
    trainer.model.save_pretrained(tmp_path)  # by the names of the original checkpoints, as the stock Trainer saves
    if model_type in ("table-transformer", "dab-detr", "deimv2", *CONVNETS):  # whose names are the original ones
        trainer._load_from_checkpoint(str(tmp_path))
    else:
        with pytest.raises(ValueError, match="tensors are missing"):
            trainer._load_from_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("freeze", [True, False])
def test_a_step_moves_what_is_trained_and_nothing_else(model_type, freeze, tmp_path):
    # Some steps, since heads that start at zero pass no gradient on; not clipped, lest float32 loses tiny steps.
    changes = {"learning_rate": 1e-3, "backbone_learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 4}
    trainer = make_trainer(model_type, tmp_path, freeze=freeze, **changes)
    detector = trainer.model
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    frozen = {id(tensor) for tensor in get_backbone(detector).state_dict(keep_vars=True).values()} if freeze else set()
    trainer.train()
    for name, tensor in detector.state_dict(keep_vars=True).items():
        if id(tensor) in frozen or name in family_of(detector.config).constants:
            assert torch.equal(tensor, before[name]), name
        elif model_type == "table-transformer" and name == "model.decoder.layers.0.self_attn_layer_norm.weight":
            pass  # the scale of the first layer's input, which is zero
        elif "roi_heads.mask" in name:
            pass  # the labels have no masks
        elif isinstance(tensor, torch.nn.Parameter) and not name.endswith("k_proj.bias"):  # softmax cancels it
            assert tensor.requires_grad and not torch.equal(tensor, before[name]), name
    if model_type != "yolos":  # which is one network
        assert get_backbone(detector).training != freeze


@pytest.mark.parametrize("model_type", CONFIGS)
def test_training_lowers_the_loss_and_an_interrupted_run_ends_with_the_same_weights(model_type, tmp_path):
    """Ten epochs of one step, cut off after the fourth and resumed in a new trainer."""
    changes = {"learning_rate": 3e-3, "max_steps": 10, "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(model_type, tmp_path / "whole", **changes)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.99 * sum(losses[:3])

    with pytest.raises(KeyboardInterrupt):
        make_trainer(model_type, tmp_path / "cut", callbacks=[Interrupt(4)], **changes).train()
    resumed = make_trainer(model_type, tmp_path / "cut", seed=1, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert resumed.state.global_step == 10
    assert same(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_end_a_run_before_they_harm(tmp_path, monkeypatch, factor):
    trainer = make_trainer("detr", tmp_path, max_steps=3)
    compute_loss = trainer.compute_loss

    def broken(*args, **kwargs):
        return compute_loss(*args, **kwargs) * (factor if trainer.state.global_step == 1 else 1)

    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(FloatingPointError, match="step 2: infinite or NaN gradients"):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_parameter_groups(tmp_path):
    trainer = make_trainer("detr", tmp_path, learning_rate=1e-3, backbone_learning_rate=1e-4, weight_decay=0.1)
    trainer.model.bbox_predictor.requires_grad_(False)
    groups = trainer.create_optimizer().param_groups
    # The backbone's norms are frozen, and it has no biases.
    expected = [(1e-3, 0.0), (1e-3, 0.1), (1e-4, 0.1)]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == expected
    backbone = {id(parameter) for parameter in get_backbone(trainer.model).parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert (id(parameter) in backbone) == (group["lr"] == 1e-4)
            assert (parameter.ndim > 1) == (group["weight_decay"] > 0)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}


def test_the_learning_rate_falls_at_milestones(folder, tmp_path):
    changes = {"lr_milestones": [1, 0.75], "warmup_steps": 1, "do_eval": False, "learning_rate": 0.01}
    result = finetune(arguments_for(folder, tmp_path / "run", **changes))
    history = json.loads((result.output_dir / "trainer_state.json").read_text())["log_history"]
    # Two steps an epoch: a warm-up step at half the rate, a whole one, then a tenth and a hundredth.
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates == pytest.approx([0.005, 0.01, 0.001, 0.0001])


def test_several_gpus_without_a_launcher_are_refused(tmp_path):
    trainer = make_trainer("rt_detr", tmp_path)
    arguments = dataclasses.replace(trainer.args)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch --num_processes 2"):
        DetectionTrainer(trainer.model, arguments, processing_class=trainer.processing_class)


def test_the_best_checkpoint_is_loaded_at_the_end(folder, tmp_path, monkeypatch):
    scores = iter([0.3, 0.2])
    compute = "aligndet_hf.evaluation.coco_metrics.CocoMetrics.compute"
    results = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 0.1)
    results |= dict.fromkeys(("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"), 0.1)
    monkeypatch.setattr(compute, lambda self: results | {"per_class": {"disk": next(scores, 0.3)}})
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "AP_disk", "save_total_limit": 1}
    result = finetune(arguments_for(folder, tmp_path / "run", **changes))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.3 and state["best_global_step"] == 2
    best = AutoModelForObjectDetection.from_pretrained(tmp_path / "run" / "checkpoint-2").state_dict()
    assert same(AutoModelForObjectDetection.from_pretrained(result.output_dir).state_dict(), best)
    # Elsewhere, and as long as before and longer, the best checkpoint is still known; one that is lost is told.
    os.replace(tmp_path / "run", tmp_path / "moved")
    changes |= {"save_total_limit": 2}
    result = finetune(arguments_for(folder, tmp_path / "moved", **changes, num_train_epochs=3))
    assert json.loads((tmp_path / "moved" / "results.json").read_text())["steps"] == 6
    assert same(AutoModelForObjectDetection.from_pretrained(result.output_dir).state_dict(), best)
    shutil.rmtree(tmp_path / "moved" / "checkpoint-2")
    with pytest.raises(ValueError, match="moved/checkpoint-2, the best checkpoint of this run, is damaged"):
        finetune(arguments_for(folder, tmp_path / "moved", **changes, num_train_epochs=4))


def measure_and_train(output_dir: Path, batch_size: int) -> dict:
    """Measures on three images and takes two steps: what each process saw, the numbers, and what moved how far."""
    # Plain gradient descent: AdamW makes whole steps of the rounding errors in gradients that are zero.
    changes = {"optim": "sgd", "learning_rate": 0.1, "backbone_learning_rate": 0.1, "max_steps": 2}
    changes |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": 1}
    # Denoising queries are drawn anew by every process, so not the RT-DETR.
    trainer = make_trainer("conditional_detr", output_dir, **changes)
    for module in trainer.model.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    dataset = trainer.eval_dataset.dataset.select(range(3))  # an odd number for two processes
    seen = []

    class Images(EvaluationImages):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    images = Images(dataset, SYNTHETIC_CATEGORIES, trainer.processing_class)
    metrics = images.metrics()
    images.metrics = lambda: metrics
    numbers = trainer.evaluate(images)
    trainer.train()
    after = trainer.model.state_dict()
    return {
        "rows": gather_object([seen]),
        "counted": gather_object([sorted(metrics.predictions)]),
        "numbers": {key: value for key, value in numbers.items() if key.startswith("eval_A")},
        "terms": {key: value for key, value in trainer.state.log_history[0].items() if key.startswith("loss")},
        "moved": {name: after[name] - before[name] for name in before},
    }


def one_of_two(folder: Path) -> None:
    result = measure_and_train(folder, 2)
    if torch.distributed.get_rank() == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path):
    forks.run_ranks(2, one_of_two, tmp_path, folder=tmp_path)
    two = torch.load(tmp_path / "result.pt", weights_only=True)
    one = measure_and_train(tmp_path, 4)

    assert one["rows"] == [[0, 1, 2]] and two["rows"] == [[0, 2], [1]]  # every image once
    assert one["counted"] == [[0, 1, 2]] and two["counted"] == [[0, 1, 2]] * 2
    assert len(one["numbers"]) == 12 + len(SYNTHETIC_CATEGORIES)
    assert one["numbers"] == pytest.approx(two["numbers"], abs=1e-6)
    assert one["terms"].keys() >= {"loss", "loss_bbox", "loss_giou"}
    assert one["terms"] == pytest.approx(two["terms"], rel=1e-4)
    differences = {name: (moved - two["moved"][name]).abs().max() for name, moved in one["moved"].items()}
    assert max(differences.values()) < 1e-6 < 1e-3 < max(moved.abs().max() for moved in one["moved"].values())


# ---- without this package ----


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_stock_trainer_fine_tunes_a_saved_detector(model_type, tmp_path):
    """`AutoModel`, `AutoImageProcessor`, the stock `Trainer` and a collator of three lines: no class of ours."""
    saved = tiny_detector(model_type)
    saved.save_pretrained(tmp_path / "detector")
    build_image_processor(saved, 64).save_pretrained(tmp_path / "detector")
    del saved

    detector = AutoModelForObjectDetection.from_pretrained(
        tmp_path / "detector", num_labels=len(SYNTHETIC_CATEGORIES), ignore_mismatched_sizes=True
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path / "detector")
    rows = []
    for row in make_synthetic_dataset(2, seed=0, image_size=(64, 64)).cast_column("image", _decoded()):
        objects = row["objects"]
        annotations = [
            {"bbox": box, "category_id": category, "area": area, "iscrowd": 0}
            for box, category, area in zip(objects["bbox"], objects["category"], objects["area"], strict=True)
        ]
        target = {"image_id": row["image_id"], "annotations": annotations}
        prepared = processor(images=row["image"].convert("RGB"), annotations=target, return_tensors="pt")
        rows.append({"pixel_values": prepared["pixel_values"][0], "labels": prepared["labels"][0]})

    def collate(items):
        pixel_values = torch.stack([item["pixel_values"] for item in items])
        return {"pixel_values": pixel_values, "labels": [dict(item["labels"]) for item in items]}

    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=1e-4 if model_type == "torchvision_retinanet" else 3e-3,  # which has neither norms nor warm-up
        lr_scheduler_type="constant",
        logging_steps=1,
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(detector, arguments, data_collator=collate, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and torch.tensor(losses).isfinite().all()
    assert sum(losses[-3:]) < sum(losses[:3])


def _decoded():
    from datasets import Image

    return Image(decode=True)


def test_batches_of_an_epoch_do_not_depend_on_where_it_was_entered(folder):
    """What a resumed run relies on: an item is a function of its key alone."""
    dataset = load_dataset_source(folder / "data", "train", labels=True)
    images = LabelledImages(dataset, ViewConfig(SIZES), seed=3)
    first, again = (collate_labelled([images[SampleKey(row, 1, 2)] for row in (4, 1)]) for _ in range(2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert torch.equal(first["labels"][0]["boxes"], again["labels"][0]["boxes"])
