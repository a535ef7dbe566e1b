"""The pictures: what is read, what is smoothed, which boxes count as found, and that files come out."""

import builtins
import json

import matplotlib.image as matplotlib_image
import numpy as np
import pytest

from aligndet_hf.evaluation.diagnosis import agreeing
from aligndet_hf.reporting import plots, predictions
from aligndet_hf.reporting.pictures import color_of


def has_color(path, color: str) -> bool:
    """Whether a saved picture has a pixel of about this colour."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(matplotlib_image.imread(path)[..., :3] - wanted).max(-1) < 0.02).any())


def test_reads_trainer_state_jsonl_and_folders(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 3, "lo')
    assert plots.read_history(tmp_path / "log.jsonl") == records  # the half-written line of a killed run is left out
    assert plots.read_history(tmp_path) == records
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": records[:1]}))
    assert plots.read_history(tmp_path) == records[:1]
    with pytest.raises(FileNotFoundError, match="neither"):
        plots.read_history(tmp_path / "..")


def test_smoothing_is_a_centred_mean():
    assert plots.smooth([0, 3, 6, 0], 0).tolist() == [0, 3, 6, 0]
    assert plots.smooth([0, 3, 6, 0], 1).tolist() == [1.5, 3, 3, 3]
    line = np.arange(50.0)
    np.testing.assert_allclose(plots.smooth(line, 5)[5:-5], line[5:-5])  # no lag on a slope


def test_curves_draw_every_run(tmp_path):
    runs = {
        "long": [{"step": step, "loss": 1 / (step + 1)} for step in range(40)],
        "short": [{"step": 0, "loss": 0.2}, {"step": 30, "loss": 0.9}],
    }
    path = plots.plot_curves(runs, tmp_path / "new" / "loss.png", keys=("loss", "not_logged"))
    assert has_color(path, plots.PALETTE[0]) and has_color(path, plots.PALETTE[1])
    with pytest.raises(ValueError, match="there is.*loss"):
        plots.plot_curves(runs, path, keys=("accuracy",))


def test_curves_end_with_what_training_gave(tmp_path):
    history = [{"step": 20, "AP": 0.1}, {"step": 40, "AP": 0.3}]
    kept = {"step": 40, "AP": 0.2}  # measured again, with the weights that are kept
    logs = {"once": history, "again": [*history, kept], "other": [*history[:1], kept]}
    once, again, other = (
        plots.plot_curves({"run": log}, tmp_path / f"{name}.png", ["AP"]).read_bytes() for name, log in logs.items()
    )
    assert once == again != other


def test_arms_with_a_class_that_has_no_objects(tmp_path):
    def results(ap):
        numbers = dict.fromkeys(("AP", "AP50", "AP75", "APm", "APl"), ap) | {"APs": -1}
        return numbers | {"per_class": {"cell": ap, "platelet": -1}}

    path = plots.plot_arms({"pre-trained": results(0.4), "plain": results(0.3)}, tmp_path / "ap.png", "10 % of labels")
    assert has_color(path, plots.PALETTE[0]) and has_color(path, plots.PALETTE[1])


def test_a_prediction_finds_each_object_once_and_of_its_own_class():
    truth = {"boxes": [[0, 0, 10, 10], [20, 20, 30, 30]], "labels": [0, 1]}
    found = {
        "boxes": np.array([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 26]]),
        "labels": np.array([0, 0, 0, 1]),
        "scores": np.array([0.9, 0.8, 0.7, 0.6]),
    }
    # The second is a duplicate although it fits better, the third has the wrong class.
    assert agreeing(found, truth).tolist() == [True, False, False, True]
    assert agreeing(found, {"boxes": [], "labels": []}).tolist() == [False] * 4


def test_predictions_beside_ground_truth(tmp_path):
    images = [np.full((60, 80, 3), 255, np.uint8), np.full((90, 50, 3), 255, np.uint8)]
    truth = [{"boxes": [[5, 5, 40, 40]], "labels": [0]}, {"boxes": np.zeros((0, 4)), "labels": []}]
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    found = {"boxes": np.array([[4, 4, 41, 99.0]]), "labels": np.array([1]), "scores": np.array([0.6])}
    arms = {"one": [found, nothing], "other": [nothing, nothing]}
    path = predictions.plot_predictions(images, truth, arms, ["a", "b"], tmp_path / "boxes.png", threshold=0.5)
    assert has_color(path, plots.PALETTE[0]) and has_color(path, plots.PALETTE[1])
    for threshold in (0.7, [0.5, 0.7]):
        path = predictions.plot_predictions(images, truth, arms, ["a", "b"], path, threshold)
        assert has_color(path, plots.PALETTE[0]) and not has_color(path, plots.PALETTE[1])
    predictions.plot_predictions(images, truth, arms, ["a", "b"], tmp_path / "boxes.jpg")
    assert (tmp_path / "boxes.jpg").read_bytes().startswith(b"\xff\xd8")  # a JPEG


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    def no_matplotlib(name, *args, original=builtins.__import__, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    for draw in (
        lambda: plots.plot_curves({"run": [{"step": 1, "loss": 1.0}]}, tmp_path / "a.png"),
        lambda: plots.plot_arms({"arm": dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 0.1)}, tmp_path),
        lambda: plots.plot_precision({"a": {"objects": 1, "curve": [0.5] * 101}}, tmp_path / "a.png"),
    ):
        with pytest.raises(ImportError, match=r"aligndet-hf\[plots\]"):
            draw()


def test_no_two_of_thirty_classes_have_the_same_colour():
    assert len({color_of(label) for label in range(30)}) == 30
    assert [color_of(label) for label in (0, 9)] == [plots.PALETTE[0], plots.PALETTE[9]]
