"""Objects where a path is expected: each function takes what the one before it returned."""

import copy
import pickle

import datasets
import pytest
import torch
from tiny_detectors import tiny_detector
from transformers import AutoImageProcessor, AutoModelForObjectDetection, TrainingArguments

import aligndet_hf
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.synthetic import make_synthetic_dataset
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.detectors.transfer import transfer_detector
from aligndet_hf.objects import Given, as_source

QUICK = {"use_cpu": True, "disable_tqdm": True, "write_report": False, "image_sizes": [64], "max_steps": 1}
QUICK_TUNING = {"dataloader_num_workers": 0, "dataloader_persistent_workers": False, "save_strategy": "no"}
QUICK_TUNING |= {"report_to": "none", "num_pictures": 0, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def labelled():
    return make_synthetic_dataset(4, seed=0, image_size=(64, 80))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return tiny_detector("rt_detr", num_labels=5)  # the shapes of synthetic images


def test_a_name_stands_for_an_object(labelled, detector):
    name = as_source(labelled)
    assert isinstance(name, Given) and name.value is labelled and as_source(name) is name
    assert copy.deepcopy(name) is name and pickle.loads(pickle.dumps(name)) == str(name)
    assert as_source(detector) == as_source(copy.deepcopy(detector))
    other = copy.deepcopy(detector)
    next(other.parameters()).data.add_(1)
    assert as_source(other) != as_source(detector)
    assert as_source("a/b") == "a/b" and as_source(None) is None
    with pytest.raises(ValueError, match="a data set or a model is expected, got a object"):
        as_source(object())


def test_each_function_takes_what_the_one_before_returned(labelled, detector, tmp_path):
    """Data sets and a model in memory, from images to a measured detector."""
    images = labelled.remove_columns("objects")
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    boxes = aligndet_hf.generate_proposals(
        aligndet_hf.ProposalsArguments(
            dataset=images,
            source="random",
            max_boxes=4,
            dataloader_num_workers=0,
            disable_tqdm=True,
            output_dir=f"{tmp_path}/p",
        )
    )
    assert len(boxes) == 4 and "proposals" in boxes.column_names
    start = aligndet_hf.pretrain(
        aligndet_hf.PretrainArguments(dataset=boxes, detector=detector, output_dir=f"{tmp_path}/start", **QUICK)
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    tuned = aligndet_hf.finetune(
        aligndet_hf.FinetuneArguments(
            dataset=labelled,
            eval_dataset=labelled,
            detector=start,
            output_dir=f"{tmp_path}/tuned",
            **QUICK | QUICK_TUNING,
        )
    )
    measured = {"dataset": labelled, "device": "cpu", "disable_tqdm": True}
    metrics = aligndet_hf.evaluate(aligndet_hf.EvaluateArguments(detector=tuned, **measured))
    assert metrics["AP"] == pytest.approx(tuned.metrics["AP"])
    splits = datasets.DatasetDict(a=images.select([0]), b=images.select([1, 2]))
    for detector_given in (tuned, str(tuned.output_dir)):
        found = aligndet_hf.predict(detector_given, splits, score_threshold=0.0, use_cpu=True, disable_tqdm=True)
        assert len(found) == 3 and found[0]["width"] == 80
    assert len(aligndet_hf.predict(tuned, splits, split="b", use_cpu=True, disable_tqdm=True)) == 2
    assert aligndet_hf.ExportArguments(detector=tuned, output_dir="x").detector == str(tuned.output_dir)


def test_a_look_leaves_a_model_in_the_mode_that_it_had(labelled, detector):
    model = copy.deepcopy(detector).train()
    model.model.backbone.eval()
    modes = [part.training for part in model.modules()]
    aligndet_hf.predict(model, labelled, image_processor=build_image_processor(model, 64), use_cpu=True)
    assert [part.training for part in model.modules()] == modes and {True, False} == set(modes)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate", "check", "compare", "generate_proposals"])
def test_functions_say_what_they_take(command):
    function = getattr(aligndet_hf, command)
    with pytest.raises(TypeError, match=rf"{command} takes (\w+)Arguments, got a dict: {command}\(\1Arguments\("):
        function({"dataset": "photos"})
    with pytest.raises(TypeError, match="got the arguments dataset"):
        function(dataset="photos")


def test_fine_tuning_starts_from_a_model_in_memory(labelled, detector, tmp_path, capsys):
    """With a seed of its own, so that only what was given can have the weights that are kept."""
    arguments = {"dataset": labelled, "do_eval": False, "output_dir": str(tmp_path), "learning_rate": 0.0}
    arguments |= {"detector": detector, "seed": 7, "warmup_steps": 1, **QUICK, **QUICK_TUNING}
    tuned = aligndet_hf.finetune(aligndet_hf.FinetuneArguments(**arguments))
    assert "note: the run has 1 steps and the warm-up 1, so" in capsys.readouterr().out
    kept = AutoModelForObjectDetection.from_pretrained(tuned.output_dir)
    name = "model.decoder.bbox_embed.0.layers.0.weight"
    assert torch.equal(kept.state_dict()[name], detector.state_dict()[name])
    assert aligndet_hf.finetune(aligndet_hf.FinetuneArguments(**arguments)) == tuned  # the same model: the same run
    other = copy.deepcopy(detector)
    next(other.parameters()).data.add_(1)
    with pytest.raises(ValueError, match="holds a run of another configuration.*detector"):
        aligndet_hf.finetune(aligndet_hf.FinetuneArguments(**arguments | {"detector": other}))


def test_a_stream_is_pre_trained_on(proposal_folder, detector, tmp_path, capsys):
    stream = datasets.load_from_disk(str(proposal_folder)).to_iterable_dataset()
    given = {"dataset": stream, "detector": detector, "output_dir": str(tmp_path), "warmup_steps": 1}
    arguments = aligndet_hf.PretrainArguments(**given, **QUICK)
    assert arguments.streaming and aligndet_hf.pretrain(arguments).metrics["step"] == 1
    assert "note: the run has 1 steps and the warm-up 1, so" in capsys.readouterr().out


def test_proposals_are_searched_in_a_stream(labelled, tmp_path):
    stream = labelled.select_columns(["image"]).to_iterable_dataset()
    for number, given in enumerate((stream, datasets.IterableDatasetDict({"train": stream}))):
        arguments = aligndet_hf.ProposalsArguments(
            dataset=given, output_dir=str(tmp_path / str(number)), num_workers=1
        )
        found = aligndet_hf.generate_proposals(arguments)
        assert arguments.streaming and len(found) == 4 and any(found[:]["proposals"][0]["bbox"])


def test_a_model_is_measured_with_an_image_processor(labelled, detector):
    arguments = {"detector": detector, "dataset": labelled, "device": "cpu", "disable_tqdm": True}
    with pytest.raises(ValueError, match="give `image_processor`"):
        aligndet_hf.evaluate(aligndet_hf.EvaluateArguments(**arguments))
    processor = build_image_processor(detector, 64)
    metrics = aligndet_hf.evaluate(aligndet_hf.EvaluateArguments(**arguments, image_processor=processor))
    assert 0 <= metrics["AP"] <= 1


def test_a_data_set_in_memory_is_called_so(labelled, capsys):
    aligndet_hf.check(aligndet_hf.CheckArguments(dataset=labelled, disable_tqdm=True, find_copies=False))
    assert "Dataset-" in (line := capsys.readouterr().out.splitlines()[0]) and line.endswith(": a data set in memory")


def test_a_command_that_needs_a_folder_says_so(detector, labelled, tmp_path):
    arguments = {"detector": detector, "dataset": labelled, "labelled_dataset": labelled.select([0])}
    with pytest.raises(ValueError, match="a folder of a detector and its image processor is needed"):
        aligndet_hf.pseudolabel(aligndet_hf.PseudolabelArguments(**arguments, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="or the folder that both are saved in"):
        aligndet_hf.export(aligndet_hf.ExportArguments(detector=detector, output_dir=str(tmp_path)))


def test_one_split_in_memory_leaves_nothing_to_measure_on(labelled, tmp_path):
    with pytest.raises(ValueError, match="give eval_dataset"):
        aligndet_hf.FinetuneArguments(dataset=labelled, output_dir=str(tmp_path))
    arguments = aligndet_hf.FinetuneArguments(dataset=datasets.DatasetDict(train=labelled), output_dir=str(tmp_path))
    with pytest.raises(DataError, match="no split 'validation'; found train.*--do_eval false leaves it out"):
        aligndet_hf.finetune(arguments)


def test_a_dict_of_data_sets_has_splits(labelled, detector, tmp_path):
    arguments = {"detector": detector, "output_dir": str(tmp_path), **QUICK, **QUICK_TUNING}
    splits = {"train": labelled, "validation": labelled.select([1])}
    tuned = aligndet_hf.finetune(aligndet_hf.FinetuneArguments(dataset=splits, **arguments))
    assert tuned.metrics["AP"] >= 0


def test_a_stream_is_no_labelled_data_set(labelled, tmp_path):
    arguments = aligndet_hf.FinetuneArguments(dataset=labelled.to_iterable_dataset(), output_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"IterableDataset-\w+: a stream .* datasets.Dataset.from_list"):
        aligndet_hf.finetune(arguments)


def test_the_trainer_takes_categories_that_are_numbers(labelled, detector):
    """Without names, as most data sets in memory have them."""
    features = labelled.features.copy()
    features["objects"]["category"] = datasets.List(datasets.Value("int64"))
    trainer = aligndet_hf.DetectionTrainer(detector, train_dataset=labelled.cast(features))
    assert len(trainer.train_dataset) == 4


def test_the_trainer_takes_plain_data_sets(labelled, detector, tmp_path):
    model = copy.deepcopy(detector)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = aligndet_hf.DetectionTrainer(
        model=model,
        args=arguments,
        train_dataset=labelled,
        eval_dataset=labelled,
        processing_class=build_image_processor(model, 64),
    )
    trainer.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert 0 <= trainer.evaluate()["eval_AP"] <= 1
    numbers, found = trainer.evaluate(labelled), trainer.predict(labelled)
    assert found.metrics["test_AP"] == numbers["eval_AP"] and found.predictions[3]["boxes"].shape[1] == 4
    assert len(found.predictions) == 4 and found.predictions[0]["scores"].size == found.predictions[0]["labels"].size
    assert set(aligndet_hf.DetectionTrainer(model, arguments, eval_dataset={"a": labelled}).eval_dataset) == {"a"}
    names = labelled.features["objects"]["category"].feature.names
    assert list(model.config.id2label.values()) == names and model.config.label2id[names[4]] == 4
    model.config.id2label = dict(enumerate(reversed(names)))
    turned = aligndet_hf.DetectionTrainer(model, args=arguments, train_dataset=labelled, eval_dataset=labelled)
    number = labelled[0]["objects"]["category"]
    for rows in (turned.train_dataset.rows.with_format(None), turned.eval_dataset.dataset):
        assert rows[0]["objects"]["category"] == [4 - one for one in number]  # by name
    assert list(turned.eval_dataset.categories) == names[::-1]
    model.config.id2label[1] = "moon"
    with pytest.raises(
        ValueError, match=f"the detector has no class {names[3]}, it has the classes {names[4]}, moon,"
    ):
        aligndet_hf.DetectionTrainer(model, args=arguments, train_dataset=labelled)
    with pytest.raises(ValueError, match="compute_metrics would have no effect: .* `trainer.measured` holds"):
        aligndet_hf.DetectionTrainer(detector, args=arguments, train_dataset=labelled, compute_metrics=len)
    with pytest.raises(ValueError, match="got a IterableDataset; .* makes one of a stream"):
        aligndet_hf.DetectionTrainer(detector, args=arguments, train_dataset=labelled.to_iterable_dataset())
    few = tiny_detector("detr", num_labels=1)
    with pytest.raises(ValueError, match="5 categories, the detector 1 classes"):
        aligndet_hf.DetectionTrainer(few, args=arguments, train_dataset=labelled)


def test_a_detector_in_half_precision_is_measured_and_trained(labelled, tmp_path):
    """As transformers loads what was saved so. Training would lose the steps that bfloat16 has no bits for."""
    half = tiny_detector("rt_detr", num_labels=5).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    build_image_processor(half, 64).save_pretrained(tmp_path)
    assert AutoModelForObjectDetection.from_pretrained(tmp_path).dtype == torch.bfloat16
    measured = {"dataset": labelled, "use_cpu": True, "disable_tqdm": True}
    numbers = [
        aligndet_hf.evaluate(aligndet_hf.EvaluateArguments(detector=given, image_processor=str(tmp_path), **measured))
        for given in (str(tmp_path), half)
    ]
    assert numbers[0] == numbers[1] and half.dtype == torch.bfloat16
    images = [labelled.cast_column("image", datasets.Image())[0]["image"]]
    for given in (str(tmp_path), half):
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        (found,) = aligndet_hf.predict(given, images, score_threshold=0.0, image_processor=processor, use_cpu=True)
        assert len(found["scores"]) == 20
    assert half.dtype == torch.bfloat16
    for start in (transfer_detector(tmp_path, 3)[0], aligndet_hf.AlignDetForPreTraining.from_detector(tmp_path)):
        assert {parameter.dtype for parameter in start.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"the weights are bfloat16, .* give model.float\(\)"):
        aligndet_hf.DetectionTrainer(half, train_dataset=labelled)


def test_the_trainer_refuses_at_once_to_keep_the_best_by_what_is_not_measured(labelled, detector, tmp_path):
    """`load_best_model_at_end` alone goes by the loss: transformers says after an epoch that there is none."""
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "use_cpu": True}
    with pytest.raises(ValueError, match="metric_for_best_model: there is no 'loss'. There are AP, AP50"):
        aligndet_hf.DetectionTrainer(detector, TrainingArguments(str(tmp_path), **best), eval_dataset=labelled)
    for name in ("AP75", "eval_AP_disk"):
        arguments = TrainingArguments(str(tmp_path), metric_for_best_model=name, **best)
        aligndet_hf.DetectionTrainer(detector, arguments, eval_dataset=labelled)

    class Own(aligndet_hf.DetectionTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": 1.0}

    Own(detector, TrainingArguments(str(tmp_path), **best), eval_dataset=labelled)


class Rows(torch.utils.data.Dataset):
    """Somebody's data set: an item, or a function of the row that makes one."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 2

    def __getitem__(self, key):
        return self.item(key) if callable(self.item) else self.item


IMAGE, LABELS = torch.zeros(3, 8, 8, dtype=torch.uint8), {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0)}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ((IMAGE, LABELS), "TypeError"),
        ({"pixel_values": IMAGE}, "KeyError: 'image'"),
        ({"image": IMAGE.float(), "labels": LABELS}, "image is tensor"),
        ({"image": IMAGE, "labels": {"boxes": 0, "labels": 0}}, "labels have boxes, labels"),
        (lambda row: [IMAGE][row + 1], "TypeError"),
    ],
)
def test_items_of_another_kind_are_refused_at_once(item, reason, detector, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=f"train_dataset.* must give image .*{reason}"):
        aligndet_hf.DetectionTrainer(detector, arguments, train_dataset=Rows(item))
    sound = Rows({"image": IMAGE, "labels": LABELS})
    assert aligndet_hf.DetectionTrainer(detector, arguments, train_dataset=sound).train_dataset is sound
    with pytest.raises(ValueError, match="eval_dataset must be .*EvaluationImages, got a Rows"):
        aligndet_hf.DetectionTrainer(detector, arguments, eval_dataset=sound)


def test_collators_of_ones_own(labelled, detector, tmp_path):
    """They take items of any kind, but neither a transform that is not applied nor items that cannot be had."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    rows = Rows({"pixel_values": IMAGE})
    trainer = aligndet_hf.DetectionTrainer(detector, arguments, train_dataset=rows, data_collator=list)
    assert next(iter(trainer.get_train_dataloader())) == [rows.item] * 2
    trainer = aligndet_hf.DetectionTrainer(detector, arguments, train_dataset=labelled, data_collator=None)
    assert {"pixel_values", "labels"} <= set(next(iter(trainer.get_train_dataloader())))
    with pytest.raises(ValueError, match="train_dataset has a transform, .* LabelledImages.*use_correct_loss"):
        mine = labelled.with_transform(lambda batch: {"pixel_values": batch["image"]})
        aligndet_hf.DetectionTrainer(detector, arguments, train_dataset=mine, data_collator=list)
    by_number = Rows(lambda row: [IMAGE][row + 1])
    with pytest.raises(ValueError, match=r"train_dataset\[SampleKey.*TypeError.*its index is the row"):
        aligndet_hf.DetectionTrainer(detector, arguments, train_dataset=by_number, data_collator=list)


def test_the_trainer_takes_no_name_of_a_model():
    with pytest.raises(ValueError, match="model must be a detector, got 'facebook/detr': .*from_pretrained"):
        aligndet_hf.DetectionTrainer(model="facebook/detr")
