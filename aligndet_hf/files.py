"""Files that are complete or absent: written under another name, synced, renamed into place."""

import json
import os
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
