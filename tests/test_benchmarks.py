"""The benchmarks run and write what they say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(name):
    if str(ROOT / "benchmarks") not in sys.path:  # as for a script there
        sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def proposals():
    return load("proposals")


def test_benchmark_of_proposals(proposals, tmp_path, capsys):
    from aligndet_hf.data.synthetic import write_synthetic_folder

    write_synthetic_folder(tmp_path / "scenes", {"train": 2, "validation": 1}, seed=0, image_size=(96, 128))
    output = tmp_path / "results" / "proposals.json"
    words = ["--images", str(tmp_path / "scenes"), "--full_images", "1", "--seconds", "0", "--output", str(output)]
    results = proposals.main(words)
    assert results == json.loads(output.read_text())
    measured = results["sets"]["scenes"]
    assert list(measured) == list(proposals.methods())
    assert {name: values["images"] for name, values in measured.items() if values["images"] != 3} == {
        proposals.FULL: 1
    }
    assert measured["selective_search default"]["AR@100"] > measured["random boxes"]["AR@100"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in measured) and {"numba", "cpu"} <= set(results["environment"])


def test_benchmark_of_soco(monkeypatch, tmp_path, capsys):
    """The official arrangement gives the same loss and gradients, or the benchmark itself fails."""
    soco = load("soco")
    fields = {"fpn_channels": 8, "head_dim": 16, "mlp_dim": 16, "projection_dim": 8, "level_sizes": [8, 16, 32, 64]}
    monkeypatch.setitem(soco.CASES, "tiny", ("star", "resnet10t", [64, 64, 48, 32], fields))
    output = tmp_path / "results" / "soco.json"
    words = ["--cases", "tiny", "--batch_size", "2", "--repeats", "1", "--output", str(output)]
    results = soco.main(words)
    assert results == json.loads(output.read_text()) and "timm" in results["environment"]
    row = results["cases"]["tiny"]
    assert row["loss"] == pytest.approx(row["official_loss"], abs=1e-5) and abs(row["loss"]) > 1e-3
    assert row["gradient_distance"] < 1e-3 and row["regions_ratio"] > 0
    assert "tiny" in capsys.readouterr().out


def test_benchmark_of_memory(tmp_path, capsys):
    memory, output = load("memory"), tmp_path / "memory.json"
    small = ["--backbone", "test_resnet", "--image_size", "160", "--batch_size", "1", "--output", str(output)]
    results = memory.main(["--families", "rt_detr", "--variants", "plain", *small])
    assert results == json.loads(output.read_text())
    found = results["bytes"]["rt_detr"]
    assert found["plain"]["size"] == 160
    assert found["plain"]["state"] > 100e6 and found["plain"]["step"] > 1e6
    assert "rt_detr" in capsys.readouterr().out
    lacking = memory.measure("rt_detr", "checkpointing", memory.parse_arguments(small))
    assert lacking["step"] is None and "-" in memory.format_table({"rt_detr": {"checkpointing": lacking}})


def test_benchmark_of_direct_pretraining(tmp_path, capsys):
    """Both arms train for as long as they say; the second goes on from its own first stage."""
    from aligndet_hf.data.synthetic import write_synthetic_folder

    direct, resolution, output = load("direct"), load("resolution"), tmp_path / "direct.json"
    write_synthetic_folder(tmp_path / "data", {"train": 8, "validation": 2}, seed=0, image_size=(96, 128))
    recipe = {**resolution.SMALL, "learning_rate": 1e-4, "per_device_train_batch_size": 2, "report_to": "none"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = f"--dataset {tmp_path}/data --recipe {tmp_path}/recipe.yaml --folder {tmp_path}/runs --output {output}"
    results = direct.main([*words.split(), *"--low 64 --full 128 --images 8 --repeats 1 --minutes 0.001".split()])
    assert results == json.loads(output.read_text())
    assert list(results["rows"]) == ["epoch at 64", "epoch at 128"]
    arms = results["arms"]
    assert [point["size"] for point in arms["full resolution"]["curve"]] == [128]
    assert [point["size"] for point in arms["low, then full"]["curve"]] == [64, 128]
    report = json.loads((tmp_path / "runs" / "then" / "transfer_report.json").read_text())
    assert not report["reset"] and not report["mismatched"]
    assert "low_times_faster" in capsys.readouterr().out


def test_benchmark_of_resolutions(tmp_path, capsys):
    resolution, output = load("resolution"), tmp_path / "resolution.json"
    short = "--steps 2 --finetuning_steps 1 --sizes 64 96 --full_size 96 --batch_size 2 --images 6".split()
    results = resolution.main([*short, "--folder", str(tmp_path / "runs"), "--output", str(output)])
    assert results == json.loads(output.read_text()) and list(results["arms"]) == ["no pre-training", "64", "96"]
    assert results["arms"]["64"]["seconds_per_step"] > 0 and results["arms"]["96"]["AP"] >= 0
    assert "2 steps each, then 1 at 96 pixels" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a benchmark with one round of small sizes, and returns its results as it wrote them."""

    def run(name: str, *words: str) -> dict:
        output = tmp_path / "results" / f"{name}.json"
        results = load(name).main([*words, "--repeats", "1", "--output", str(output)])
        assert json.loads(output.read_text()) == results
        assert {"torch", "cpu", "load"} <= set(results["environment"])
        printed = capsys.readouterr().out
        assert all(row in printed for row in results["rows"])
        assert all(row["milliseconds"] > 0 for row in results["rows"].values())
        return results

    return run


def test_benchmark_of_the_contrastive_loss(run):
    sizes = {"layers": 2, "images": 2, "queries": 10, "proposals": 4, "width": 8}
    results = run("contrastive", *(word for name, size in sizes.items() for word in (f"--{name}", str(size))))
    assert results["largest difference of a loss"] < 1e-6
    assert results["largest difference of a gradient"] < 1e-6
    assert all(0 < row["extra MB"] < 1 for row in results["rows"].values())


def test_benchmark_of_the_criterion(run):
    sizes = {"layers": 2, "images": 2, "queries": 10, "boxes": 3, "classes": 4}
    results = run("criterion", *(word for name, size in sizes.items() for word in (f"--{name}", str(size))))
    assert set(results["times faster"]) == {"detr", "rt_detr"}
    assert max(results["largest relative difference"].values()) < 1e-5


def test_benchmark_of_the_clusters(tmp_path, capsys):
    output = tmp_path / "clusters.json"
    words = ["--backbone", "resnet10t", "--boxes", "5", "--sizes", "224 x 224", "--repeats", "1"]
    results = load("clusters").main([*words, "--output", str(output)])
    assert json.loads(output.read_text()) == results
    row = results["rows"]["224 x 224"]
    assert row["difference"] < 1e-5 and row["ratio"] > 2 and "224 x 224" in capsys.readouterr().out


SMALL_DETR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 10, "encoder_ffn_dim": 16}
SMALL_DETR |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


def test_benchmark_of_the_step(run):
    sizes = {"images": 1, "height": 64, "width": 64, "proposals": 3}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    results = run("step", *words, "--backbone", "resnet10t", "--detector_config", json.dumps(SMALL_DETR))
    assert results["step / unavoidable"] > 0
    megabytes = {name: row["MB"] for name, row in results["rows"].items()}
    assert megabytes["step"] < megabytes["stock"] < megabytes["stock, graph of the momentum detector"]
    assert 0 < results["rows"]["step"]["matrix work"] < 1


def test_benchmark_of_the_views(run):
    results = run("views", "--num_images", "2", "--image_size", "48", "64", "--sizes", "32")
    assert "image processor" in results["times faster"]


def test_benchmark_of_the_momentum_update(run):
    results = run("ema", "--backbone", "resnet10t")
    assert len(results["times faster"]) == 3


def test_benchmark_of_convnets(tmp_path):
    words = ["--families", "torchvision_fcos", "--backbone", "resnet10t", "--height", "64", "--width", "96"]
    words += ["--rows", "200", "--proposals", "10", "--repeats", "1", "--output", str(tmp_path / "convnets.json")]
    results = load("convnets").main([*words, "--anchors", "2000"])
    one, eight = results["IoU, MB"].values()
    assert 0 < eight < 1.5 * one  # the images are matched one after the other
    assert results["contrast, times faster"] > 1
    row = results["rows"]["torchvision_fcos, step"]
    assert row["times the unavoidable"] > 0.5 and row["loss in bf16 / in float32"] == pytest.approx(1, abs=0.05)
