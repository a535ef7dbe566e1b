"""The benchmarks run and write what they say."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def proposals():
    spec = importlib.util.spec_from_file_location("benchmark_proposals", ROOT / "benchmarks" / "proposals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_recall_by_hand(proposals):
    truth = np.array([[0, 0, 10, 10], [50, 50, 10, 10]], float)
    boxes = np.array([[0, 0, 10, 8]] + [[200, 200, 5, 5]] * 60 + [[50, 50, 10, 10]], float)
    found = proposals.recall([boxes, np.zeros((0, 4))], [truth, truth[:0]])
    # The first box has an IoU of 0.8: found at 7 of 10 thresholds; the other object is found beyond the first 50.
    assert found["recall@50"] == 0.5 and found["AR@50"] == pytest.approx(0.35)
    assert found["recall@100"] == 1 and found["AR@300"] == pytest.approx(0.85)
