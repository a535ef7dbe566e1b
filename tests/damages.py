"""What can happen to a checkpoint on a disk: functions of its folder, beside which is the checkpoint before it."""

import json
import os
import shutil
from pathlib import Path

WEIGHTS, OPTIMIZER, STATE, CHECKSUMS = "model.safetensors", "optimizer.pt", "trainer_state.json", "checksums.json"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def before(folder: Path) -> Path:
    return min(path for path in folder.parent.glob("checkpoint-*") if path != folder)


def exchange(path: Path) -> None:
    shutil.copyfile(before(path.parent) / path.name, path)


def replace(path: Path, make) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def only_the_state(folder: Path) -> None:
    checksums = json.loads((folder / CHECKSUMS).read_text())
    (folder / CHECKSUMS).write_text(json.dumps({STATE: checksums[STATE]}))
    flip(folder / WEIGHTS)


def on(name: str, damage):
    return lambda folder: damage(folder / name)


DAMAGES = {
    **{f"one bit of {name}": on(name, flip) for name in (WEIGHTS, OPTIMIZER, STATE, CHECKSUMS)},
    **{f"{name} cut short": on(name, cut) for name in (WEIGHTS, OPTIMIZER, STATE, CHECKSUMS)},
    **{f"{name} empty": on(name, empty) for name in (WEIGHTS, OPTIMIZER, STATE, CHECKSUMS)},
    **{f"no {name}": on(name, os.remove) for name in (WEIGHTS, OPTIMIZER, STATE, CHECKSUMS)},
    **{f"{name} of the checkpoint before": on(name, exchange) for name in (WEIGHTS, OPTIMIZER, CHECKSUMS)},
    **{f"{name} is a folder": on(name, lambda path: replace(path, Path.mkdir)) for name in (WEIGHTS, CHECKSUMS)},
    **{f"{name} is a pipe": on(name, lambda path: replace(path, os.mkfifo)) for name in (WEIGHTS, CHECKSUMS)},
    "longer weights": on(WEIGHTS, longer),
    "weights are a link to nothing": on(WEIGHTS, lambda path: replace(path, lambda p: p.symlink_to("nothing"))),
    "weights are a link to those before": on(
        WEIGHTS, lambda path: replace(path, lambda p: p.symlink_to(before(p.parent) / WEIGHTS))
    ),
    "the state is a list": on(STATE, lambda path: path.write_text("[]")),
    "the checksums are a list": on(CHECKSUMS, lambda path: path.write_text("[]")),
    "the checksums are nested": on(CHECKSUMS, lambda path: path.write_text("[" * 100_000)),
    "checksums of nothing but the state": only_the_state,
    "a file more": lambda folder: shutil.copyfile(folder / WEIGHTS, folder / "adapter_model.safetensors"),
    "the checkpoint before under this name": lambda folder: replace(
        folder, lambda path: shutil.copytree(before(path), path)
    ),
    "an empty folder": lambda folder: replace(folder, Path.mkdir),
    "a file instead of the folder": lambda folder: replace(folder, Path.touch),
    "a link to nothing instead of the folder": lambda folder: replace(folder, lambda p: p.symlink_to("nothing")),
    "a link to the checkpoint before": lambda folder: replace(folder, lambda p: p.symlink_to(before(p))),
}
