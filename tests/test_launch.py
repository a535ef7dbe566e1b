"""Several processes of a launcher: who does what, and what the others learn of it."""

import os
from pathlib import Path

import datasets
import forks
import numpy as np
import PIL.Image
import pytest
import torch

from aligndet_hf import FinetuneArguments, PretrainArguments
from aligndet_hf.commands import proposals as generate
from aligndet_hf.commands.proposals import ProposalsArguments, generate_proposals
from aligndet_hf.data.launch import Launch
from aligndet_hf.training.pretrain_setup import build_accelerator


def fail():
    raise ValueError(f"only rank {os.environ['RANK']} does it")


def one_of_two(images: Path, output: Path) -> None:
    with Launch() as launch:
        print("main:", launch.on_main(lambda: int(os.environ["RANK"])), launch.rank, launch.is_main)
        try:
            launch.on_main(fail)
        except ValueError as error:
            print("raised:", error)
        launch.wait()
        fields = {"preset": "tiny", "shard_size": 2, "dataloader_num_workers": 0}
        for _ in range(2):
            found = generate_proposals(ProposalsArguments(dataset=str(images), output_dir=str(output), **fields))
            print("rows:", len(found))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), dtype=np.uint8))).save(folder / f"{number}.png")
    (folder / "4.png").write_text("no picture")
    return folder


def test_alone_the_main_process_is_this_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with Launch() as launch:
        assert (launch.rank, launch.size, launch.local_size, launch.is_main) == (0, 1, 1, True)
        assert launch.on_main(max, 2, 3) == 3
        with pytest.raises(ZeroDivisionError):
            launch.on_main(divmod, 1, 0)
        launch.wait()


def test_two_processes_share_the_work(images, tmp_path):
    outputs = forks.run_ranks(2, one_of_two, images, tmp_path / "out", folder=tmp_path)
    for rank, output in enumerate(outputs):
        assert f"main: 0 {rank} {rank == 0}" in output and "raised: only rank 0 does it" in output
        assert output.count("rows: 8") == 2
        assert ("Saved to" in output, "Nothing to do" in output) == (rank == 0, rank == 0)  # only the main one talks
    alone = generate_proposals(
        ProposalsArguments(dataset=str(images), output_dir=str(tmp_path / "alone"), preset="tiny", disable_tqdm=True)
    )
    assert datasets.load_from_disk(str(tmp_path / "out"))["proposals"][:] == alone["proposals"][:]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_searches_its_shards_only(images, tmp_path, monkeypatch, rank):
    class Stop(Exception):
        pass

    class OneOfThree(Launch):
        def __init__(self):
            self.rank, self.size, self.local_size, self._started = rank, 3, 3, True

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def on_main(self, function, *args):
            return function(*args)

        def wait(self):
            raise Stop

    monkeypatch.setattr(generate, "Launch", OneOfThree)
    fields = {"preset": "tiny", "shard_size": 2, "dataloader_num_workers": 0, "disable_tqdm": True}
    run = ProposalsArguments(dataset=str(images), output_dir=str(tmp_path / "out"), **fields)
    with pytest.raises(Stop):
        generate_proposals(run)
    written = sorted(path.name[:15] for path in (tmp_path / "out.partial").glob("train-0*.arrow"))
    assert written == [f"train-{start:09d}" for start in range(0, 9, 2) if start // 2 % 3 == rank]

    # The main process does not join what another machine has written to another disk.
    monkeypatch.setattr(OneOfThree, "wait", lambda self: None)
    with pytest.raises(generate.DataError, match="of 5 shards are not there.*same output_dir"):
        generate_proposals(run)


def train_without_a_word_on_the_cpu(folder: Path) -> None:
    fields = {"dataset": "d", "output_dir": str(folder)}
    print("pretrain:", build_accelerator(PretrainArguments(**fields)).num_processes)
    print("finetune:", FinetuneArguments(**fields).world_size)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on a machine without a GPU")
def test_processes_train_together_where_there_is_no_gpu(tmp_path):
    for printed in forks.run_ranks(2, train_without_a_word_on_the_cpu, tmp_path, folder=tmp_path):
        assert "pretrain: 2" in printed and "finetune: 2" in printed
