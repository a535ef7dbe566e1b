"""Files that are complete or absent: written under another name, synced, renamed into place."""

import difflib
import hashlib
import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED = "unfinished-"  # What a folder or file is called until it is complete, or while it is being removed.
_SEAL_BYTES = 32  # of the hash at the end of a file


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


def read_json(path: Path) -> dict | None:
    """The content of a JSON file of ours, `None` if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@contextmanager
def clear_write_errors(path: Path, advice: str = "The checkpoints saved before are untouched."):
    """
    One clear `OSError` for all ways in which writing to `path` fails.

    safetensors and `torch.save` each raise a class of their own when the disk is full, and `torch.save` does not say
    that it is: the message has what is free.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(path if path.exists() else path.parent).free
        raise OSError(f"could not write {path}: {error} ({free / 1e6:.1f} MB are free there). {advice}") from error


def first_line(error: Exception) -> str:
    """What a reader of damaged weights says first; the name of its error if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def seal_file(unfinished: Path, path: Path) -> None:
    """
    Gives a complete file its name, synced and with a hash of its content at its end, where readers of Arrow streams
    and of zip files do not look.
    """
    seal = file_hash(unfinished)
    with open(unfinished, "ab") as file:
        file.write(seal.encode())
    sync(unfinished)
    os.replace(unfinished, path)


def is_sound(path: str | Path) -> bool:
    """Whether there is a file as [`seal_file`] has left it; one that was damaged since is told and removed."""
    path = Path(path)
    if not path.is_file():  # opening a pipe would wait for ever
        return False
    size = path.stat().st_size - _SEAL_BYTES
    with open(path, "rb") as file:
        file.seek(max(size, 0))
        written = file.read()
    if size >= 0 and written == file_hash(path, size).encode():
        return True
    print(f"{path} is damaged, and done anew.")
    path.unlink()
    return False


def file_hash(path: str | Path, size: float = math.inf, digest=None) -> str:
    """A hash of the content of a file, or of its first `size` bytes: 32 hexadecimal digits, or what `digest` gives."""
    digest = digest or hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(min(size, 1 << 22)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def similar_path(path: str | Path) -> str:
    """What to add to a message about a path that is not there: one beside it that is called nearly the same."""
    path = Path(path)
    names = [one.name for one in path.expanduser().parent.glob("*")]
    close = difflib.get_close_matches(path.name, names, 1, 0.75)
    return f" (did you mean {str(path.parent / close[0])!r}?)" if close else ""


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs only what may be written
    except PermissionError:
        if is_folder:  # Windows opens none
            return
        raise
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
