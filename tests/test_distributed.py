"""One process with a batch of images, and several processes with a part of them each, must train alike."""

import json
from pathlib import Path

import datasets
import forks
import pytest
import sharded_runs
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny_detectors import CONFIGS, CONVNETS, random_batch, timm_backbone, tiny_config, tiny_detector

from aligndet_hf.detectors.criterion import use_correct_loss
from aligndet_hf.detectors.families import family_of
from aligndet_hf.models import AlignDetForPreTraining
from aligndet_hf.processes import rows_of_other_processes
from aligndet_hf.training.sharding import require_supported

COUNTS = [7, 1, 2, 0]  # unequal halves, where a normaliser per process shows
NO_BOXES = [0, 0, 0, 0]
EIGHT_COUNTS = [7, 1, 2, 0, 0, 0, 4, 3]
# How four processes share eight images: two each, or as it comes. The third of the even ones has no proposal.
SHARES = {"even": [0, 2, 4, 6, 8], "uneven": [0, 3, 4, 6, 8]}

# Dropout and denoising noise are drawn per process.
WITHOUT_CHANCE = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "num_denoising": 0}
# The families whose stock loss is right in several processes.
STOCK_IS_RIGHT = ["lw_detr", "rf_detr", *CONVNETS]


# The ways in which families contrast: all layers, the last of two, and with groups of queries.
PRETRAINED = [
    ("detr", "even", True),
    ("detr", "uneven", True),
    ("detr", "uneven", False),
    ("rt_detr", "even", True),
    ("yolos", "uneven", True),
    ("lw_detr", "even", True),
    ("torchvision_retinanet", "uneven", True),
    ("torchvision_fcos", "uneven", True),
    ("torchvision_faster_rcnn", "even", True),
    ("torchvision_mask_rcnn", "uneven", True),
]


def without_chance(model_type: str, **fields):
    config = tiny_config(model_type)
    fields |= {name: value for name, value in WITHOUT_CHANCE.items() if hasattr(config, name)}
    return tiny_detector(model_type, **fields)


def backward(model, batch: dict, wrap) -> tuple[torch.Tensor, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # batch statistics are those of a process
    wrapped = wrap(model)
    loss = wrapped(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def loss_and_gradients(model_type: str, images: slice, correct: bool, wrap=lambda model: model, counts=COUNTS):
    detector = without_chance(model_type).train()
    if correct:
        use_correct_loss(detector)
    whole = random_batch(counts)
    if family_of(detector.config).masks:  # which only the first process has
        whole["labels"][0]["masks"] = torch.ones(counts[0], 64, 64).tril()
    batch = {name: value[images] for name, value in whole.items()}
    return backward(detector, batch, wrap)


def pretraining_step(model_type: str, images: slice, gather: bool, wrap=lambda model: model):
    """
    Loss and gradients of AlignDet: all of it with gathered negatives, otherwise without the contrastive loss.

    In float64: small networks with random weights blow the rounding of a convolution up.
    """
    # With test_resnet, of 50,000 gradients one differs by 5e-6 of its size.
    larger = {"backbone_config": timm_backbone("resnet10t")} if model_type == "detr" else {}
    model = AlignDetForPreTraining.from_detector(
        without_chance(model_type, **larger), gather_negatives=gather, contrastive_loss_coefficient=20.0 * gather
    )
    model = model.train().double()
    batch = {name: value[images] for name, value in random_batch(EIGHT_COUNTS).items()}
    first = min((int(label["proposal_ids"].min()) for label in batch["labels"] if len(label["boxes"])), default=0)
    # Ids start from 0 in every process. The other view lacks the first proposal of every image.
    batch["labels"] = [label | {"proposal_ids": label["proposal_ids"] - first} for label in batch["labels"]]
    batch["momentum_labels"] = [{name: value[1:] for name, value in label.items()} for label in batch["labels"]]
    batch["pixel_values"] = batch["pixel_values"].double()
    batch |= {f"momentum_{name}": batch[name].flip(-1) for name in ("pixel_values", "pixel_mask")}
    return backward(model, batch, wrap)


def one_of_several(folder: Path) -> None:
    state = PartialState(cpu=True, backend="gloo")  # the stock loss asks accelerate for the number of processes
    rank = state.process_index

    def wrap(model):
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    if state.num_processes == 2:
        images = slice(2 * rank, 2 * rank + 2)
        results = {(m, c): loss_and_gradients(m, images, c, wrap) for m in CONFIGS for c in (True, False)}
        results |= {(m, "background"): loss_and_gradients(m, images, True, wrap, NO_BOXES) for m in CONFIGS}
    else:
        images = {share: slice(*bounds[rank : rank + 2]) for share, bounds in SHARES.items()}
        results = {
            (model_type, share, gather): pretraining_step(model_type, images[share], gather, wrap)
            for model_type, share, gather in PRETRAINED
        }
        results["rows"] = rows_of_other_processes(torch.full((rank, 2), float(rank)))
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def launch(size: int, folder: Path) -> list[dict]:
    forks.run_ranks(size, one_of_several, folder, folder=folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    return launch(4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("case", "counts"), [(True, COUNTS), ("background", NO_BOXES)])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_two_processes_have_the_loss_and_gradients_of_one(two_processes, model_type, case, counts):
    loss, gradients = loss_and_gradients(model_type, slice(None), correct=True, counts=counts)
    ranks = [results[model_type, case] for results in two_processes]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, rtol=1e-5, atol=1e-5)
    for _, averaged in ranks:
        torch.testing.assert_close(averaged, gradients, rtol=1e-5, atol=1e-5 * gradients.abs().max().item())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_stock_loss_does_not(two_processes, model_type):
    loss, _ = loss_and_gradients(model_type, slice(None), correct=False)
    stock = sum(results[model_type, False][0] for results in two_processes) / 2
    error = abs(stock - loss) / loss
    assert error < 1e-5 if model_type in STOCK_IS_RIGHT else error > 0.02


@pytest.mark.parametrize("model_type, share, gather", PRETRAINED)
def test_four_processes_pretrain_like_one(four_processes, model_type, share, gather):
    loss, gradients = pretraining_step(model_type, slice(None), gather)
    ranks = [results[model_type, share, gather] for results in four_processes]
    torch.testing.assert_close(sum(rank[0] for rank in ranks) / 4, loss, rtol=1e-6, atol=0)
    for _, averaged in ranks:
        torch.testing.assert_close(averaged, gradients, rtol=1e-6, atol=1e-6 * gradients.abs().mean().item())


def test_rows_of_other_processes(four_processes):
    # Process `rank` has `rank` rows of its number.
    for rank, results in enumerate(four_processes):
        others = [number for number in range(4) for _ in range(number) if number != rank]
        assert results["rows"].tolist() == [[number, number] for number in others]


def test_sharded_runs_are_those_of_ddp(proposal_folder, detector_folders, tmp_path):
    dataset = datasets.load_from_disk(proposal_folder)
    proposals = dataset["proposals"][:]
    for row in range(0, 8, 2):  # half of the batches use no denoising embedding
        proposals[row] = {name: [] for name in proposals[row]}
    column = datasets.Dataset.from_dict(
        {"proposals": proposals}, features=dataset.select_columns("proposals").features
    )
    dataset = datasets.concatenate_datasets([dataset.remove_columns("proposals"), column], axis=1)
    dataset.save_to_disk(tmp_path / "data")

    data, detector = str(tmp_path / "data"), str(detector_folders("rt_detr"))
    forks.run_ranks(2, sharded_runs.main, data, detector, str(tmp_path), folder=tmp_path)
    expected = tmp_path / "ddp"
    moments = torch.load(expected / "checkpoint-4" / "optimizer.pt", weights_only=True)["optimizer"]
    for name in ("fsdp", "taken over"):
        for file in ("model.safetensors", "detector/model.safetensors", "checkpoint-4/model.safetensors"):
            weights, reference = load_file(tmp_path / name / file), load_file(expected / file)
            assert weights.keys() == reference.keys()
            for key, value in weights.items():
                torch.testing.assert_close(value, reference[key], rtol=1e-5, atol=1e-5)
        saved = torch.load(tmp_path / name / "checkpoint-4" / "optimizer.pt", weights_only=True)["optimizer"]
        torch.testing.assert_close(saved, moments, rtol=1e-5, atol=1e-5)
        logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (tmp_path / name, expected)]
        losses = [[json.loads(line)["loss"] for line in log] for log in logs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    class Accelerator:
        distributed_type, is_fsdp2, mixed_precision = DistributedType.MULTI_CPU, False, "no"

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP needs several processes with a GPU each"):
        require_supported(Accelerator, "aligndet")
    Accelerator.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        require_supported(Accelerator, "aligndet")
    Accelerator.is_fsdp2, Accelerator.mixed_precision = True, "fp16"
    with pytest.raises(ValueError, match="float32 or with bf16, got fp16"):
        require_supported(Accelerator, "aligndet")
    Accelerator.mixed_precision = "no"
    with pytest.raises(ValueError, match="for --method aligndet, this is soco"):
        require_supported(Accelerator, "soco")
    with pytest.raises(ValueError, match="torch_compile and FSDP"):
        require_supported(Accelerator, "aligndet", compiled=True)
    Accelerator.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="does not run under DeepSpeed.*accelerate_fsdp2"):
        require_supported(Accelerator, "aligndet")
