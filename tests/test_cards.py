"""Cards: the generated part and a person's words, what may be told, commands and citations."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import IntervalStrategy

from aligndet_hf.cards import BEGIN, END, citations, command_line, inert, merge_card, told, told_settings, write_card
from aligndet_hf.detectors.families import FAMILIES
from aligndet_hf.flags import given_flags
from aligndet_hf.parser import parse_arguments
from aligndet_hf.training.finetune_arguments import FinetuneArguments
from aligndet_hf.training.pretrain_arguments import PretrainArguments


def card(text: str, **metadata) -> str:
    return f"---\n{yaml.safe_dump(metadata)}---\n\n{BEGIN}\n{text}\n{END}\n"


def test_what_a_person_wrote_stays():
    before = card("old", tags=["ours", "old"], license="mit", language="en").replace(
        f"\n{BEGIN}", f"\nAbove.\n{BEGIN}"
    )
    merged = merge_card(card("new", tags=["ours"], datasets=["a/b"]), before + "Below.\n")
    assert merged.endswith(f"---\n\nAbove.\n{BEGIN}\nnew\n{END}\nBelow.\n") and "old\n" + END not in merged
    assert ModelCard(merged).data.to_dict() == {
        "datasets": ["a/b"], "tags": ["ours", "old"], "license": "mit", "language": "en",
    }  # fmt: skip
    assert merge_card(card("new", tags=["ours"], datasets=["a/b"]), merged) == merged  # again changes nothing


def test_what_is_generated_wins_and_results_are_never_old():
    before = card("old", license="mit", **{"model-index": [{"name": "old", "results": []}]})
    merged = merge_card(card("new", license="apache-2.0"), before)
    assert ModelCard(merged).data.to_dict() == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    "before", ["A card of mine.\n", f"---\ntags: mine\n---\nA card\nof mine {BEGIN}\nwithout an end\n"]
)
def test_a_card_without_marks_is_kept_whole(before):
    merged = merge_card(card("new", tags=["ours"]), before)
    words = before.removeprefix("---\ntags: mine\n---\n")
    assert merged.index(END) < merged.index(words) and "\nnew\n" in merged
    assert ("mine" in ModelCard(merged).data.tags) == (words != before)


def test_the_first_card_with_a_persons_words_counts():
    new, hub = card("new"), card("old", language="en")
    local = card("old", language="de", widget=1) + "Local words.\n"
    assert merge_card(new, hub, local).endswith("Local words.\n")
    merged = merge_card(new, hub + "Words of the Hub.\n", local)
    assert merged.endswith("Words of the Hub.\n") and "Local" not in merged
    assert ModelCard(merged).data.to_dict() == {"language": "en", "widget": 1}


@pytest.mark.parametrize("metadata", ["a: [", "- a list", "a text"])
def test_metadata_that_cannot_be_read(metadata):
    with pytest.raises(ValueError, match="not a YAML mapping: mend it, or remove it"):
        merge_card(card("new"), f"---\n{metadata}\n---\ntext")


def test_a_card_is_written_at_once(tmp_path):
    path = write_card(tmp_path / "README.md", card("one"))
    path.write_text(path.read_text() + "Mine.\n")
    write_card(path, card("two"))
    assert "two" in path.read_text() and path.read_text().endswith("Mine.\n")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_settings_are_plain_and_private():
    assert told_settings(
        {
            "backbone_weights": Path("/data/mobilenet.safetensors"),
            "detector": "someone/detector",
            "image_sizes": (480, 512),
            "detector_config": {"num_queries": 60},
            "eval_strategy": IntervalStrategy.EPOCH,
            "hub_token": "secret",
            "some_other_token": "secret",
            "max_size": None,
        }
    ) == {
        "backbone_weights": "mobilenet.safetensors",
        "detector": "someone/detector",
        "image_sizes": [480, 512],
        "detector_config": {"num_queries": 60},
        "eval_strategy": "epoch",
    }
    assert told("/home/me/cells/detector") == "cells" and told("C:\\me\\cells") == "cells" and told("a/b") == "a/b"


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "someone" / "cells").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert told("someone/cells") == "cells"


@dataclass
class Arguments:
    dataset: str
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    flip: bool = True
    rate: float = 0.1
    options: dict = field(default_factory=dict)
    limit: int | None = None
    place: str | None = field(default=None, metadata={"role": "place"})
    key: str | None = field(default=None, metadata={"role": "secret"})
    hub_token: str | None = None
    output_dir: str | None = field(default=None, metadata={"role": "place"})


def test_the_command_line_of_arguments():
    arguments = Arguments(
        "/home/me/some cells",
        sizes=[3],
        flip=False,
        options={"a": 1},
        hub_token="secret",
        place="/home/me",
        key="secret",
    )
    assert shlex.split(command_line("run", Arguments, given_flags(arguments))) == [
        "aligndet", "run", "--dataset", "some cells", "--sizes", "3", "--flip", "false", "--options", '{"a": 1}',
    ]  # fmt: skip
    given = {"dataset": "a/b", "limit": 2}
    assert command_line("run", Arguments, given) == "aligndet run --dataset a/b --limit 2"


@pytest.mark.parametrize("cls, command", [(PretrainArguments, "pretrain"), (FinetuneArguments, "finetune")])
def test_the_command_line_gives_the_arguments_again(cls, command, tmp_path):
    given = {"image_sizes": [64, 96], "crop_scale": [0.5, 1.0], "learning_rate": 3e-4, "use_cpu": True}
    arguments = cls(dataset="a/b", detector="c/d", output_dir=str(tmp_path), **given)
    words = shlex.split(command_line(command, cls, arguments.given))
    # What was given, and nothing that follows from it or from the data.
    flags = ["--dataset", "--detector", *(f"--{name}" for name in given), "--output_dir"]
    assert sorted(word for word in words if word.startswith("--")) == sorted(flags)
    again = parse_arguments(cls, [*words[2:], "--output_dir", str(tmp_path)])
    assert {name: getattr(again, name) for name in given} == given
    assert command_line(command, cls, again.given) == command_line(command, cls, arguments.given)


def test_every_family_has_its_paper():
    papers = citations(*FAMILIES)
    assert len(papers) == len(FAMILIES) and all(paper.count("{") == paper.count("}") for paper in papers)
    assert len(citations("aligndet", "nobody", "aligndet", "mae")) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red_cell", "red_cell"),
        ("white|cell", r"white\|cell"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a\n# Heading\n```\n[x](javascript:y)", r"a # Heading \`\`\` \[x\](javascript:y)"),
        ("<!-- aligndet: end of the generated part -->", "&lt;!-- aligndet: end of the generated part --&gt;"),
    ],
)
def test_names_of_data_are_nothing_but_text_in_a_card(name, expected):
    assert inert(name) == expected


def test_settings_end_no_block_and_hold_no_token_at_any_depth():
    settings = {"dataset": "a\n```\n<!-- aligndet", "lr_scheduler_kwargs": {"hub_token": "x", "power": 2}}
    assert told_settings(settings) == {"dataset": "a ` ` ` <! -- aligndet", "lr_scheduler_kwargs": {"power": 2}}
