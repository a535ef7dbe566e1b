"""The examples in the documentation run, and it names commands and files that exist."""

import doctest
import importlib
import json
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import aligndet_hf
from aligndet_hf.cli import COMMANDS
from aligndet_hf.commands.chain import plan_chain
from aligndet_hf.commands.compare import CompareArguments, plan_jobs
from aligndet_hf.parser import parse_arguments
from aligndet_hf.reporting.comparison import summary

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aligndet_hf"
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
MODULES = [module.name for module in pkgutil.walk_packages(aligndet_hf.__path__, "aligndet_hf.") if not module.ispkg]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_nouns_are_named_again():
    unclear = re.compile(r"\b(that of|those of|of which|so many)\b", re.IGNORECASE)
    found = [f"{path.name}: {words}" for path in PACKAGE.rglob("*.py") for words in unclear.findall(path.read_text())]
    assert len(found) <= 5, found  # to fall, not to rise: name the noun


def test_readme_examples():
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 8 and results.failed == 0


@pytest.mark.parametrize("name", PAGES)
def test_examples_of_pages(name):
    assert doctest.testfile(str(ROOT / "docs" / name), module_relative=False).failed == 0


def test_links_lead_somewhere():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (folder / target).exists(), target
    for recipe in re.findall(r"[a-z_0-9]+\.yaml", README):
        assert recipe == "recipe.yaml" or (ROOT / "aligndet_hf" / "recipes" / recipe).exists(), recipe


def documented_commands() -> list[str]:
    """Every `aligndet ...` and `accelerate launch scripts/...` line of the README, pages, and headers of recipes."""
    texts = [README, *PAGES.values()] + [
        re.sub(r"^# ?", "", path.read_text(), flags=re.MULTILINE)
        for path in (ROOT / "aligndet_hf/recipes").glob("*.yaml")
    ]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(aligndet|accelerate launch) .*--(dataset|detector|set)", line)]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line, monkeypatch, tmp_path):
    for block in re.findall("```yaml\n# (\\S+)\n(.*?)```", PAGES["compare.md"], flags=re.DOTALL):
        (tmp_path / block[0]).write_text(block[1])
    line = re.sub(r"(?<=--config )(chain|compare)\.yaml", rf"{tmp_path}/\1.yaml", line)
    monkeypatch.chdir(ROOT)  # recipes are named relative to the clone
    words = shlex.split(line, comments=True)
    if words[0] == "accelerate":
        words = words[words.index(next(word for word in words if word.endswith(".py"))) :]
        words[:1] = ["aligndet", Path(words[0]).stem]
    command = COMMANDS[words[1]]
    cls = getattr(importlib.import_module(command.module), command.arguments)
    arguments = parse_arguments(cls, words[2:])
    if words[1] in ("chain", "compare"):
        arguments.output_dir = str(tmp_path)
        for stage in planned_stages(arguments):
            stage.write_recipe()
    else:
        assert vars(arguments).get("dataset", vars(arguments).get("detector")) in line


def planned_stages(arguments) -> list:
    if isinstance(arguments, CompareArguments):
        return [stage for job in plan_jobs(arguments) for stage in job.stages]
    return list(plan_chain(arguments).values())


def test_published_results_are_those_of_the_cards_and_the_pages():
    """`python docs/tools/model_cards.py` makes them so."""
    script = runpy.run_path(str(ROOT / "docs" / "tools" / "model_cards.py"))
    for path in script["pages"](ROOT):
        page = path.read_text(encoding="utf-8")
        assert script["fill"](page, ROOT) == page, path
    for path in ROOT.glob("model_cards/*/results.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        measured = {round(100 * run["metrics"]["AP"], 2) for run in results["runs"]}
        cards = set(path.parent.glob("*.md")) - {path.parent / "report.md"}
        assert cards
        for card in map(ModelCard.load, cards):
            assert summary(results) in card.text
            own = {one.metric_value for one in card.data.eval_results or () if one.metric_name.startswith("AP (IoU")}
            assert own <= measured, card.text[:200]


def test_the_picture_of_results_shows_the_tables():
    """`python docs/tools/curves.py` draws it."""
    script = runpy.run_path(str(ROOT / "docs" / "tools" / "curves.py"))
    page = """
| draw | start | AP after 200 / 1,000 steps, 181 images | AP |
|---|---|---|---|
| 0 | plain | 10.0 / 40.0 | 1 |
| 0 | four boxes | 99.0 / 99.0 | 1 |
| 0 | one box | 20.0 / 50.0 | 1 |
| 1 | plain | 30.0 / 50.0 | 1 |
| 1 | one box | 20.0 / 60.0 | 1 |

| draw | AP after 200 / 1,000 steps |
|---|---|
"""
    (found,) = script["tables"](page)
    assert found["plain"] == {"x": [200, 1000], "mean": [0.2, 0.45], "min": [0.1, 0.4], "max": [0.3, 0.5]}
    assert found["pre-trained"]["max"] == [0.2, 0.6]
    panels = script["panels"]()
    assert list(panels) == [*script["TABLES"], *script["COMPARISONS"]]
    assert all(list(lines) == ["plain", "pre-trained"] for lines in panels.values())


def test_there_are_documented_commands():
    assert len(documented_commands()) >= 9
