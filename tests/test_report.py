"""The HTML report: one file, everything in it, everything escaped."""

import base64
import json
from html.parser import HTMLParser

import pytest
from tiny_detectors import tiny_detector
from transformers import DetrConfig

from aligndet_hf import AlignDetConfig, cli
from aligndet_hf.evaluation.coco_metrics import SUMMARY
from aligndet_hf.reporting import html_report, pictures
from aligndet_hf.reporting.html_report import write_report
from aligndet_hf.reporting.pictures import new_figure, save_figure
from aligndet_hf.reporting.run_record import read_run

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: nesting, words, and whatever it would load or run."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.tags, self.addresses = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data.strip())


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    tiny_detector("detr", num_labels=2).save_pretrained(folder)
    return folder


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def finetuned(detector, tmp_path):
    """The files of a run of fine-tuning whose data wants to do harm."""
    run = tmp_path / "run"
    run.mkdir()
    write(run / "config.json", (detector / "config.json").read_text())
    write(run / "finetune_settings.json", {"dataset": f"/home/me/{EVIL}", "detector": "me/start", "seed": 1})
    metrics = {key: 0.25 for key in SUMMARY} | {"APs": -1.0, "per_class": {EVIL: 0.5, "dog": -1.0}}
    evaluation = {"dataset": EVIL, "split": "validation", "images": 12}
    results = {
        "metrics": metrics,
        "steps": 40,
        "images": 20,
        "evaluation": evaluation,
        "command": f"aligndet '{EVIL}'",
    }
    write(run / "results.json", results)
    write(run / "transfer_report.json", {"preset": "paper", "kept": [f"layer.{EVIL}"], "reset": ["b", "c"]})
    history = [{"step": step, "loss": 10 / step, "loss_ce": 1 / step} for step in range(1, 41)]
    write(run / "trainer_state.json", {"log_history": [*history, {"step": 40, "eval_AP": 0.25}]})
    save_figure(new_figure(1, 1), run / f"{EVIL.replace('/', '')}.png")
    return run


def test_a_report_of_fine_tuning(finetuned, capsys):
    assert cli.main(["report", "--run", str(finetuned)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (finetuned / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and EVIL in " ".join(page.words)  # it is there, as words
    assert "/home/me" not in text
    # Nothing to fetch: places in the page, and pictures that are in it.
    pictures_of = [address for address in page.addresses if not address.startswith("#part-")]
    assert len(pictures_of) == 3  # losses, accuracy, and the one in the folder
    for address in pictures_of:
        head, _, data = address.partition(",")
        start = {"data:image/png;base64": b"\x89PNG", "data:image/jpeg;base64": b"\xff\xd8"}[head]
        assert base64.b64decode(data, validate=True).startswith(start)
    assert "url(" not in text and "@import" not in text and "http" not in "".join(page.addresses)
    for words in (
        "25.0 %",
        "no such object",
        "50.0",
        "kept",
        "Transfer paper from me/start",
        "seed",
        "AP of each class",
    ):
        assert words in page.words, words


def test_a_report_without_matplotlib_has_no_curves(finetuned, monkeypatch):
    monkeypatch.setattr(html_report, "has_matplotlib", lambda: False)
    page = Page(write_report(finetuned, finetuned / "other.html").read_text())
    assert page.tags.count("img") == 1 and "Curves" not in page.words and "25.0 %" in page.words
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    assert not pictures.has_matplotlib()


def test_a_report_of_pretraining(detector, tmp_path):
    run = tmp_path / "run"
    (run / "detector").mkdir(parents=True)
    write(run / "detector" / "config.json", (detector / "config.json").read_text())
    AlignDetConfig(detector_config=DetrConfig.from_pretrained(detector), base_momentum=0.9).save_pretrained(run)
    proposals = {"settings": {"source": "selective_search", "preset": "tiny"}}
    summary = {
        "arguments": {"dataset": "me/boxes", "detector": "rt_detr", "hub_revision": None},
        "data": {"images": 1000, "proposals": 5000}, "proposals": proposals, "steps": 7,
        "versions": {"torch": "2"}, "metrics": {"loss": 1.5, "rank_accuracy": 0.125}, "command": "aligndet pretrain",
    }  # fmt: skip
    write(run / "pretrain_summary.json", summary)
    write(run / "backbone_report.json", {"source": "/home/me/w.pth", "matched": ["a"], "missing": []})
    write(run / "log.jsonl", "".join(json.dumps({"step": s, "loss": 1, "momentum": 0.9}) + "\n" for s in (1, 2)))
    record = read_run(run)
    assert (record.kind, record.images, record.base_model) == ("pretrain", 1000, None)
    numbers = record.settings["aligndet_config"]  # by default or not
    assert (numbers["base_momentum"], numbers["contrastive_temperature"]) == (0.9, 0.5)
    assert "detector_config" not in numbers and record.config.num_labels == 2
    page = Page(write_report(run).read_text())
    assert {"12.5 %", "1.5", "1,000", "aligndet pretrain", "settings.preset", "tiny"} <= set(page.words)
    assert page.tags.count("img") == 2 and any("w.pth (1 tensors loaded" in words for words in page.words)
    write(run / "pretrain_summary.json", summary | {"arguments": summary["arguments"] | {"detector": "me/detr"}})
    assert read_run(run).base_model == "me/detr"


def test_a_report_of_any_other_command(tmp_path):
    write(tmp_path / "recall.json", {"lists": {"ours": {"AR@10": 0.123456789}}, "hub_token": "secret", "note": "<b>"})
    page = Page(write_report(tmp_path).read_text())
    assert {"lists.ours.AR@10", "0.123457", "<b>"} <= set(page.words) and "secret" not in "".join(page.words)


def test_nothing_to_report(tmp_path, capsys):
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_told_with_one_that_is(tmp_path, capsys):
    (tmp_path / "finetuned").mkdir()
    assert cli.main(["report", "--run", str(tmp_path / "fintuned")]) == 2
    told = f"fintuned: there is no such folder (did you mean '{tmp_path / 'finetuned'}'?)"
    assert told in capsys.readouterr().err
