"""The house: imports go one way, and `import aligndet_hf` stays quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aligndet_hf
from aligndet_hf.cli import COMMANDS

PACKAGE = Path(__file__).parents[1] / "aligndet_hf"

# Low to high. A room may import the rooms below it and its own modules.
HOUSE = [
    {"boxes", "convnets", "files", "flags", "ranges"},
    {"recipes"},
    {"cards", "objects", "parser", "runs"},
    {"arguments"},
    {"checkpoint", "hub", "box_losses", "losses", "matching", "momentum", "processes"},
    {"proposals"},
    {"data"},
    {"detectors"},
    {"models"},
    {"evaluation"},
    {"exporting"},
    {"reporting"},
    {"training"},
    {"cli"},
    {"pipelines"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}
STRANGERS = [("data", "detectors"), ("data", "models"), ("detectors", "data"), ("models", "data")]


def rooms_imported(source: str, package: list[str]) -> set[str]:
    """The rooms of `aligndet_hf` that a module of `package` imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            start = start + (node.module.split(".") if node.module else [])
            names += [[*start, alias.name] for alias in node.names]
    return {name[1] for name in names if name[0] == "aligndet_hf" and len(name) > 1 and name[1] in FLOOR}


def breaches(room: str, source: str, package: list[str]) -> list[str]:
    others = rooms_imported(source, package) - {room}
    return sorted(
        f"{room} imports {other}" for other in others if FLOOR[other] >= FLOOR[room] or (room, other) in STRANGERS
    )


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    *folders, name = path.relative_to(PACKAGE).parts
    room = folders[0] if folders else name.removesuffix(".py")
    assert room in FLOOR, f"{room} has no place in the house: add it to HOUSE, here and in CONTRIBUTING.md"
    assert breaches(room, path.read_text(encoding="utf-8"), ["aligndet_hf", *folders]) == []


@pytest.mark.parametrize(
    "room, source, expected",
    [
        ("data", "from aligndet_hf.models import AlignDetConfig", ["data imports models"]),
        ("data", "from ..models.modeling_aligndet import AlignDetConfig", ["data imports models"]),
        ("data", "from . import views\nfrom .columns import DataError\nfrom ..boxes import x", []),
        ("detectors", "def f():\n    import aligndet_hf.data.columns", ["detectors imports data"]),
        ("models", "from aligndet_hf import losses, data", ["models imports data"]),
        ("models", "from .. import losses, training", ["models imports training"]),
        ("training", "from aligndet_hf.data import columns\nfrom aligndet_hf.models import x\nimport torch", []),
    ],
)
def test_the_check_sees_a_breach(room, source, expected):
    assert breaches(room, source, ["aligndet_hf", room]) == expected


def test_no_file_is_long_but_tables_and_kernels():
    long = {path.stem for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > 500}
    assert long == {"families", "kernels", "modeling_torchvision"}


def test_the_lowest_rooms_stand_beside_each_other():
    assert breaches("losses", "from .matching import match_queries", ["aligndet_hf"]) == ["losses imports matching"]
    assert breaches("losses", "from .boxes import cxcywh_to_xyxy", ["aligndet_hf"]) == []


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after running some code."""
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


HEAVY = {"datasets", "cv2", "numba", "faster_coco_eval", "pycocotools", "matplotlib", "timm"}


def test_import_and_the_overview_of_the_commands_leave_heavy_packages_alone():
    loaded = loaded_by("import aligndet_hf; from aligndet_hf.cli import main; main(['--help'])")
    assert "aligndet_hf" in loaded and not (HEAVY | {"transformers", "torch", "numpy"}) & loaded


def test_predictions_and_clusters_load_what_they_need_when_they_need_it():
    loaded = loaded_by("import aligndet_hf.commands.predict, aligndet_hf.proposals.clusters")
    assert "aligndet_hf" in loaded and not {"cv2", "faster_coco_eval", "matplotlib", "sklearn"} & loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_a_function_of_the_python_face(command):
    row = COMMANDS[command]
    for name in (row.arguments, row.function):
        assert f"aligndet_hf{aligndet_hf._MODULE_OF.get(name)}" == row.module, f"add {name} to __init__.pyi"
