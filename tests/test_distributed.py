"""One process with a batch of four and two processes with two images each must train alike."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from tiny_detectors import CONFIGS, random_batch, tiny_config, tiny_detector

from aligndet_hf.detectors.criterion import use_correct_loss

COUNTS = [7, 1, 2, 0]  # unequal halves, where a normaliser per process shows

# Dropout and denoising noise are drawn per process.
WITHOUT_CHANCE = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "num_denoising": 0}
# The families whose stock loss is right in several processes.
STOCK_IS_RIGHT = ["lw_detr", "rf_detr"]


def loss_and_gradients(model_type: str, images: slice, correct: bool, wrap=lambda detector: detector):
    config = tiny_config(model_type)
    fields = {name: value for name, value in WITHOUT_CHANCE.items() if hasattr(config, name)}
    detector = tiny_detector(model_type, **fields).train()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # batch statistics are those of a process
    if correct:
        use_correct_loss(detector)
    batch = {name: value[images] for name, value in random_batch(COUNTS).items()}
    model = wrap(detector)
    loss = model(**batch).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in detector.parameters() if p.grad is not None])
    return loss.detach(), gradients


def worker(port: str, rank: str, folder: str) -> None:
    from accelerate import PartialState

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "RANK": rank,
        "LOCAL_RANK": rank,
    }
    torch.set_num_threads(1)
    PartialState(cpu=True, backend="gloo")  # the stock loss asks accelerate for the number of processes
    rank = int(rank)
    images = slice(2 * rank, 2 * rank + 2)

    def wrap(detector):
        return torch.nn.parallel.DistributedDataParallel(detector, find_unused_parameters=True)

    results = {(m, c): loss_and_gradients(m, images, c, wrap) for m in CONFIGS for c in (True, False)}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, port]
    processes = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=180) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_two_processes_have_the_loss_and_gradients_of_one(two_processes, model_type):
    loss, gradients = loss_and_gradients(model_type, slice(None), correct=True)
    ranks = [results[model_type, True] for results in two_processes]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, rtol=1e-5, atol=1e-5)
    for _, averaged in ranks:
        torch.testing.assert_close(averaged, gradients, rtol=1e-5, atol=1e-5 * gradients.abs().max().item())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_stock_loss_does_not(two_processes, model_type):
    loss, _ = loss_and_gradients(model_type, slice(None), correct=False)
    stock = sum(results[model_type, False][0] for results in two_processes) / 2
    error = abs(stock - loss) / loss
    assert error < 1e-5 if model_type in STOCK_IS_RIGHT else error > 0.02


if __name__ == "__main__":
    worker(*sys.argv[1:])
