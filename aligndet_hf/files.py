"""Files that are complete or absent: written under another name, synced, renamed into place."""

import contextlib
import json
import os
import shutil
from pathlib import Path

UNFINISHED = "unfinished-"  # What a folder or file is called until it is complete, or while it is being removed.


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 that is complete or absent."""
    unfinished = path.with_name(UNFINISHED + path.name)
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file that is complete or absent."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk."""
    if path.is_dir():
        with contextlib.suppress(PermissionError):  # Windows opens no folders
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)  # Windows syncs only what may be written


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Has the system write a folder with all that is in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def remove(path: Path) -> None:
    """Removes a file or a folder, so that a folder left half removed is not taken for a whole one."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f"{UNFINISHED}removal-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
