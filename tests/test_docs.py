"""The examples in the documentation run, and it names commands and files that exist."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import aligndet_hf
from aligndet_hf.cli import COMMANDS, parse_arguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODULES = [module.name for module in pkgutil.walk_packages(aligndet_hf.__path__, "aligndet_hf.") if not module.ispkg]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme_examples():
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 8 and results.failed == 0


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for recipe in re.findall(r"[a-z_0-9]+\.yaml", README):
        assert recipe == "recipe.yaml" or (ROOT / "scripts" / "recipes" / recipe).exists(), recipe


def documented_commands() -> list[str]:
    """Every `aligndet ...` and `accelerate launch scripts/...` line of the README and of the recipes' headers."""
    texts = [README] + [
        re.sub(r"^# ?", "", path.read_text(), flags=re.MULTILINE) for path in (ROOT / "scripts/recipes").glob("*.yaml")
    ]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(aligndet|accelerate launch) .*--(dataset|detector)", line)]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named relative to the clone
    words = shlex.split(line)
    if words[0] == "accelerate":
        words = words[words.index(next(word for word in words if word.startswith("scripts/"))) :]
        words[:1] = ["aligndet", Path(words[0]).stem]
    command = COMMANDS[words[1]]
    cls = getattr(importlib.import_module(command.module), command.arguments)
    arguments = parse_arguments(cls, words[2:])
    assert arguments.dataset in line


def test_there_are_documented_commands():
    assert len(documented_commands()) >= 9
