"""Parts of pages: pictures of sensible size, what is wrong with a detector, and what a comparison shows."""

import base64
import json
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
from test_report import EVIL, Page

from aligndet_hf.evaluation.diagnosis import Diagnosis
from aligndet_hf.reporting.comparison import _markdown
from aligndet_hf.reporting.diagnosis_page import diagnosis_section
from aligndet_hf.reporting.drawing import contact_sheet, draw_boxes
from aligndet_hf.reporting.html_report import write_report
from aligndet_hf.reporting.page import MAX_SIDE, Section, picture_uri, write_page
from aligndet_hf.reporting.paired import Run, compare_runs
from aligndet_hf.reporting.pictures import color_of
from aligndet_hf.reporting.verdict import verdict


def opened(address: str) -> PIL.Image.Image:
    return PIL.Image.open(BytesIO(base64.b64decode(address.partition(",")[2])))


def test_photographs_become_small_and_drawings_stay_as_they_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 2000, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "photograph.png")
    address = picture_uri(tmp_path / "photograph.png")
    assert address.startswith("data:image/jpeg") and opened(address).size == (MAX_SIDE, 720)
    assert len(address) < (tmp_path / "photograph.png").stat().st_size / 2
    drawing = np.full((400, 400, 3), 255, np.uint8)
    drawing[200, :] = 0
    PIL.Image.fromarray(drawing).save(tmp_path / "drawing.png")
    assert (np.asarray(opened(picture_uri(tmp_path / "drawing.png"))) == drawing).all()


def test_tags_do_not_hide_each_other_and_dashes_have_gaps():
    image, box = np.full((200, 200, 3), 255, np.uint8), [20, 40, 100, 100]
    drawn = np.asarray(draw_boxes(image, [box, box], [0, 1], ["cat", "cat"]))
    tags = [(drawn == [int(color_of(label)[i : i + 2], 16) for i in (1, 3, 5)]).all(-1) for label in (0, 1)]
    rows = [set(np.flatnonzero(tag[:, 22:40].sum(1) > 5)) for tag in tags]
    assert all(rows) and not rows[0] & rows[1] - {40, 140}  # but for the borders of the boxes
    whole, dashed = (
        np.asarray(draw_boxes(image, [box], [0], [""], dashed=[in_dashes]))[40, 20:120] for in_dashes in (False, True)
    )
    share = (dashed != 255).any(-1).mean() / (whole != 255).any(-1).mean()
    assert (whole != 255).any(-1).all() and 0.5 < share < 0.8


def test_a_sheet_has_its_note_and_its_legend():
    picture = PIL.Image.new("RGB", (50, 40), "white")
    plain = contact_sheet([picture] * 3, ["a"] * 3, columns=3, side=50)
    full = contact_sheet([picture] * 3, ["a"] * 3, 3, 50, "a note which is too long for one line", {"a": "#ff0000"})
    assert full.width == plain.width and full.height == plain.height + 18 * 3  # two lines, and the legend
    assert (np.asarray(full) == [255, 0, 0]).all(-1).sum() > 50


def test_names_with_a_line_break_are_drawn_in_one_line():
    picture = PIL.Image.new("RGB", (90, 40), "white")
    broken, whole = (
        contact_sheet([picture], [name], 1, 90, legend={name: "#ff0000"}) for name in ("a\nname\n", "a name")
    )
    np.testing.assert_array_equal(np.asarray(broken), np.asarray(whole))


def test_a_diagnosis_on_a_page(tmp_path):
    diagnosis = Diagnosis([EVIL, "dog"])
    box, other = [0, 0, 10, 10], [50, 50, 60, 60]
    for score, label in ((0.9, 0), (0.8, 1)):
        found = {"boxes": [box, other], "scores": [score, score], "labels": [label, 0]}
        diagnosis.update(EVIL, found, {"boxes": [box, other], "labels": [0, 0]})
    told = json.loads(json.dumps(diagnosis.compute()))
    page = Page(write_page(tmp_path / "page.html", "A page", [diagnosis_section(told), Section("Empty")]).read_text())
    assert "script" not in page.tags and "Empty" not in page.words and page.tags.count("img") == 1
    start = page.words.index("object, taken for →")
    matrix = [word for word in page.words[start + 1 :] if word][:15]
    assert matrix == [
        EVIL,
        "dog",
        "background",
        EVIL,
        "3",
        "0",
        "1",
        "dog",
        "0",
        "0",
        "0",
        "background",
        "0",
        "0",
        "0",
    ]
    assert "The best single threshold for all classes is 0.80." in " ".join(page.words)
    many = Diagnosis([f"class {number}" for number in range(30)])
    many.update(
        0, {"boxes": [box] * 31, "scores": [0.9] * 31, "labels": [0] + [*range(30)]}, {"boxes": [box], "labels": [0]}
    )
    titles = {part.title: part for part in diagnosis_section(many.compute()).more}
    (rows,) = titles["What was taken for what"].tables
    assert len(rows) == 2 and rows[1] == (1, "background", "class 0")


def results_of(aps: dict[str, dict[float, list[float]]], **protocol) -> dict:
    """What `compare` would write for these AP values by arm, share of the labels and seed."""
    runs = []
    for arm, by_fraction in aps.items():
        for fraction, values in by_fraction.items():
            for seed, value in enumerate(values):
                metrics = dict.fromkeys("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split(), value) | {
                    "per_class": {"cell": value}
                }
                runs.append(Run(arm, fraction, seed, metrics, [{"step": 1, "AP": value}]))
    statistics = {f"{fraction:g}": arms for fraction, arms in compare_runs(runs, "plain").items()}
    arms = {arm: {"start": {"detector": arm}, "protocol": protocol if arm != "plain" else {}} for arm in aps}
    return {"statistics": statistics, "baseline": "plain", "arms": arms, "protocol": {"max_steps": 4}}


@pytest.mark.parametrize(
    "plain, ours, told",
    [
        ([0.2, 0.2, 0.2], [0.25, 0.22, 0.21],
         "is above plain in every seed, by 2.7 points of AP, with 10 % of the labels "
         "(a hint: 3 seeds of equal arms agree by chance in 25 % of all comparisons)"),
        ([0.2] * 6, [0.1] * 6, "is below plain in every seed, by 10.0 points of AP, with 10 % of the labels"),
        ([0.2, 0.2], [0.3, 0.1], "cannot be told from plain with 10 % of the labels, where the seeds disagree"),
        ([0.2] * 2, [0.20001, 0.19999],
         "is equal to plain to a tenth of a point in every seed, with 10 % of the labels"),
        ([0.2] * 2, [0.3, 0.20001], "cannot be told from plain with 10 % of the labels, where the seeds disagree"),
        ([0.2], [0.3], "differs from plain by +10.0 in one seed, with 10 % of the labels. One seed decides nothing"),
        ([0.01] * 3, [0.04] * 3,
         "cannot be compared with plain with 10 % of the labels: the AP of both is below 5, so that nothing can be "
         "concluded"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_was_shown_and_no_more(plain, ours, told):
    assert " ".join(verdict(results_of({"plain": {0.1: plain}, "ours": {0.1: ours}}))) == f"ours {told}."


def test_one_seed_is_said_once_for_all_arms():
    told = verdict(results_of({"plain": {0.1: [0.2]}, "ours": {0.1: [0.3]}, "other": {0.1: [0.1]}}))
    assert told == [
        "ours differs from plain by +10.0 in one seed, with 10 % of the labels.",
        "other differs from plain by -10.0 in one seed, with 10 % of the labels.",
        "One seed decides nothing.",
    ]


def test_a_verdict_on_several_shares_and_arms():
    plain = {0.01: [0.01, 0.02], 0.1: [0.2, 0.2], 0.5: [0.3, 0.3], 1.0: [0.4, 0.4]}
    ours = {0.01: [0.02, 0.03], 0.1: [0.21, 0.22], 0.5: [0.34, 0.34], 1.0: [0.4, 0.41]}
    first, second, _ = verdict(results_of({"plain": plain, "ours": ours, "other": {1.0: [0.5]}}, max_steps=9))
    assert first == (
        "ours, not under the same protocol, is above plain in every seed, by 1.5 to 4.0 points of AP, with 10 % and "
        "50 % of the labels; it cannot be told from plain with 100 % of the labels, where the seeds disagree; it "
        "cannot be compared with plain with 1 % of the labels: the AP of both is below 5, so that nothing can be "
        "concluded (a hint: 2 seeds of equal arms agree by chance in 50 % of all comparisons)."
    )
    assert second.startswith("other, not under the same protocol, differs from plain by +10.0 in one seed, with 100 %")
    results = results_of({"plain": {0.1: [0.2, 0.2]}, "ours": {0.1: [0.3, 0.3]}})
    results["statistics"]["0.1"]["ours"]["gain"]["image_interval"] = [-0.01, 0.2]
    assert "; with 10 % of the labels, other evaluation images could say the opposite (a hint" in verdict(results)[0]
    results["arms"] = {"plain": {"start": {}, "protocol": {}}, "ours": {"start": {}, "protocol": {"max_steps": 8}}}
    assert verdict(results)[0].startswith("ours, not under the same protocol, is above plain in every seed")
    results["statistics"]["0.1"]["ours"]["curve"]["step"] = [2]  # after more steps than the 1 of plain
    assert verdict(results)[0].startswith("ours, which is plain with longer fine-tuning, is above plain in every seed")
    assert verdict(results_of({"plain": plain})) == ["There is nothing yet to compare plain with."]
    assert verdict({"statistics": {}, "baseline": "plain"}) == ["Nothing is finished yet."]


def test_the_sections_of_a_comparison_in_markdown():
    section = Section(
        "Part", text=["First.", "Some - words.", "More."], code="a: 1", tables=[[("arm", "why"), ("a|b", "c\nd")]],
        pictures=[("x", "curve.png")], more=[Section(text=["Last."])],
    )  # fmt: skip
    assert list(_markdown(section)) == [
        "## Part", "First.", "- Some - words.\n- More.", "```yaml\na: 1\n```",
        "| arm | why |\n| --- | --- |\n| a\\|b | c d |", "![x](curve.png)", "Last.",
    ]  # fmt: skip


def test_the_page_of_a_comparison(tmp_path):
    results = results_of({"plain": {0.1: [0.2, 0.2]}, "ours": {0.1: [0.3, 0.1]}}) | {
        "config": {"seeds": [0, 1]}, "evaluation": {"dataset": "cells", "split": "test", "images": 3},
        "images": {"0.1": 2}, "runs": [], "planned": 4, "failures": {"ours/finetune": EVIL}, "environment": "here",
        "stages": [{"folder": "plain/finetune", "command": "finetune", "seconds": 60}],
        "seconds": dict.fromkeys(("plain", "ours"), {"before": None, "measured": 60}),
        "leakage": {"sources": {"training": []}, "training_images": [], "images": 3, "unreadable": 0, "leaks": []},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    for name in ("learning_curves.png", "arms-0.1.jpg"):
        PIL.Image.new("RGB", (50, 40)).save(tmp_path / name)
    page = Page(write_report(tmp_path).read_text())
    assert "script" not in page.tags and EVIL in page.words and page.tags.count("img") == 2
    assert page.words.count("ours cannot be told from plain with 10 % of the labels, where the seeds disagree.") == 1
    words = [word for word in page.words if word]
    parts = ["What was compared", "Results", "Pictures", "Protocol", "Leakage", "What failed", "How it was run"]
    assert sorted(parts, key=lambda part: len(words) - words[::-1].index(part)) == parts
    assert "aligndet finetune --config FOLDER/plain/finetune.yaml" in words and "By class" in words
    assert words.index(next(word for word in words if word.startswith("Fine-tuning from 2"))) < words.index(EVIL)
    assert "Pictures" not in Page(write_report(tmp_path, with_pictures=False).read_text()).words
