"""The Python face: names that are a contract, each imported when it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aligndet_hf


@pytest.mark.parametrize("name", aligndet_hf.__all__)
def test_every_name_of_the_face_is_there(name):
    assert name in dir(aligndet_hf)
    assert getattr(aligndet_hf, name).__name__ == name


def test_type_checkers_are_told_the_same():
    stub = ast.parse(Path(aligndet_hf.__file__).with_suffix(".pyi").read_text())
    told = {
        (node.module, alias.name) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert told == {(module.removeprefix("."), name) for name, module in aligndet_hf._MODULE_OF.items()}
    assert Path(aligndet_hf.__file__).with_name("py.typed").exists()


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        aligndet_hf.pretrian  # noqa: B018
    assert not hasattr(aligndet_hf, "__path_of_nothing__")


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "aligndet_hf", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, aligndet_hf.__version__, "")
