"""The benchmarks run and write what they say."""

import importlib.util
import json
from pathlib import Path

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
