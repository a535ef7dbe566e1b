"""What a new user does: the commands and the notebook of README, from the built wheel, in a folder without code."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import forks
import numpy as np
import pytest
from tiny_detectors import tiny_detector

from aligndet_hf import selective_search
from aligndet_hf.data.synthetic import write_synthetic_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# What a tiny detector on few small images takes, and what keeps all of it quick and offline.
SMALL = {
    "--detector deformable_detr": "--detector tiny",
    "--image_sizes 448 480 512": "--image_sizes 64",
    "--max_steps 4000": "--max_steps 1 --use_cpu true --write_report false",
    "--output_dir outputs/finetuned": "--output_dir outputs/finetuned --max_steps 1 --use_cpu true "
    "--write_report false --num_pictures 0 --dataloader_num_workers 0 --dataloader_persistent_workers false",
    "--output_dir outputs/proposals": "--output_dir outputs/proposals --dataloader_num_workers 0",
    'output_dir="outputs/boxes"': 'output_dir="outputs/boxes", dataloader_num_workers=0',
    'detector="deformable_detr"': 'detector="tiny", max_steps=1, use_cpu=True, write_report=False, image_sizes=[64]',
    'output_dir="outputs/tuned"': 'output_dir="outputs/tuned", max_steps=1, use_cpu=True, write_report=False, '
    "num_pictures=0, dataloader_num_workers=0, dataloader_persistent_workers=False, image_sizes=[64]",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The content of the wheel, with what numba has compiled of the same file here: that takes long."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "aligndet_hf", source / "aligndet_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(place)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        wheel.extractall(place)
    selective_search(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8))
    ours, theirs = (root / "aligndet_hf" / "proposals" for root in (ROOT, place))
    shutil.copystat(ours / "kernels.py", theirs / "kernels.py")
    shutil.copytree(ours / "__pycache__", theirs / "__pycache__", ignore=shutil.ignore_patterns("*.pyc"))
    return place


@pytest.fixture
def folder(tmp_path):
    """Images, labelled images, and a tiny detector in place of one whose backbone would have to be downloaded."""
    write_synthetic_folder(tmp_path / "labelled", {"train": 4, "validation": 2}, seed=0, image_size=(64, 80))
    shutil.copytree(tmp_path / "labelled" / "train", tmp_path / "images")
    (tmp_path / "images" / "metadata.jsonl").unlink()
    tiny_detector("deformable_detr", num_labels=1).save_pretrained(tmp_path / "tiny")
    return tmp_path


def made_small(text: str) -> str:
    for given, small in SMALL.items():
        text = text.replace(given, small)
    return text


def run(code: str, folder: Path, installed: Path) -> str:
    return forks.run_alone(code, folder=folder, package=installed)


def test_the_wheel_has_what_is_found_by_name(installed):
    package = installed / "aligndet_hf"
    assert (package / "recipes" / "aligndet_detr_r50_coco.yaml").is_file() and (package / "py.typed").is_file()
    assert (package / "__init__.pyi").is_file() and (package / "citations.bib").is_file()


def test_the_four_commands_run(folder, installed):
    block = re.search("## Four commands.*?```bash\n(.*?)```", README, flags=re.DOTALL)[1]
    commands = [line for line in made_small(block).replace("\\\n", " ").splitlines() if line.startswith("aligndet ")]
    assert len(commands) == 4
    code = "import shlex\nfrom aligndet_hf.cli import main\n"
    code += "".join(f"assert main(shlex.split({command!r})[1:]) == 0\n" for command in commands)
    assert "AP" in run(code, folder, installed)
    assert (folder / "outputs" / "finetuned" / "model.safetensors").is_file()


def test_the_notebook_runs(folder, installed):
    cell = re.search("<!-- the notebook -->\n```python\n(.*?)```", README, flags=re.DOTALL)[1]
    assert len([line for line in cell.splitlines() if line]) <= 10
    assert re.search(r"\n[01]\.\d+\s*$", run(made_small(cell), folder, installed))


def test_readme_is_short_and_has_a_picture():
    assert len(README.splitlines()) <= 150
    picture = ROOT / re.search(r"!\[[^\]]*\]\(([^)]+)\)", README)[1]
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 300_000
