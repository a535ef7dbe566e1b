"""
What an output folder is: new, resumable, finished, another run's, foreign, or in use. The one place that knows.

A folder is told by its record, `run.json`: the command, its settings and a fingerprint of its data. The record is
written before all else in the folder and removed after all else, so that it never lies about what is there.
"""

import contextlib
import json
import mimetypes
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from .files import UNFINISHED, remove, sync_folder, write_json

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process out
    fcntl = None

RECORD, LOCK = "run.json", ".lock"
_AGAIN_SECONDS = 0.1  # after which a signal comes again that met a finalizer


class Interrupted(KeyboardInterrupt):
    """A signal ended a run that can go on: the message says from where. `signal` is its number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal = signal_number


class NotedSignals:
    """
    Context in which SIGTERM and SIGINT (Ctrl-C) are noted in `number` instead of ending the process; not outside the
    main thread, where Python cannot handle signals.
    """

    number = 0

    def __enter__(self):
        is_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if is_main_thread else ()
        self._previous = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        self.number = self.number or number


@dataclass(eq=False)
class RunFolder:
    """
    The folder of a run, for as long as a command writes there: a context manager that keeps other processes out.

    Inside it, [`claim`] says whose run it is; before that nothing is written. A folder is
    - new without a record, without pictures and without anything that the command would write. Other files may lie
      there, and runs in folders of their own; they stay;
    - resumable with the record of the same run, and finished if `result` is there too;
    - another run's with another record: refused, or cleared with `overwrite`. A run that has left nothing to go on
      from is no run yet, and gives way;
    - foreign without a record, but with pictures, for they may be somebody's photographs, or with files of names that
      the command writes: refused, whatever is asked for.

    Args:
        output_dir (`str` or `Path`): The folder.
        command (`str`): The command, as `aligndet` has it.
        written (`Iterable[str]`, *optional*): Names, or glob patterns, of what the command writes there.
        kept (`Iterable[str]`, *optional*): The same, of what an interrupted run goes on from.
        result (`str`, *optional*): The file that is written last: the mark of a finished run.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to start anew, and clear another run of the same
            command. With `aside` the same run goes on nevertheless.
        aside (`bool`, *optional*, defaults to `False`): Work in `<output_dir>.partial`, which takes the place of
            `output_dir` at the end (see [`put_in_place`]), so that all or nothing is there.
        on_main (`Callable`, *optional*): Calls a function in the main process of several, with what comes of it in all
            of them, as [`~aligndet_hf.data.launch.Launch.on_main`] does.

    Attributes:
        path (`Path`): The folder.
        work (`Path`): Where to write: `path`, unless `aside`.
        is_finished (`bool`): Whether the run is finished; known after [`claim`].

    Raises:
        ValueError: when entered, another process works there. The message names it.
        Interrupted: SIGTERM or SIGINT, where nothing else handles them.
    """

    output_dir: InitVar[str | Path]
    command: str
    _: KW_ONLY
    written: Iterable[str] = ()
    kept: Iterable[str] = ()
    result: str | None = None
    overwrite: bool = False
    aside: bool = False
    on_main: Callable = lambda function, *args: function(*args)

    def __post_init__(self, output_dir: str | Path):
        try:
            self.path = Path(output_dir).expanduser().resolve()  # one folder is one run, under whatever name
        except RuntimeError as error:  # a link to itself, or the home of nobody
            raise ValueError(f"output_dir {str(output_dir)!r} leads nowhere ({error}): choose another") from error
        self.work = self.path.with_name(f"{self.path.name}.partial") if self.aside else self.path
        self.kept = [*self.kept, *([self.result] if self.result else [])]
        self.written = [*self.written, *self.kept]
        self.is_finished = False
        self._descriptor: int | None = None
        self._hindrance: OSError | None = None  # why nothing can be written, if nothing can
        self._is_main = False
        self._is_claimed = False
        self._parts: dict[str, Any] = {}
        self._may_change: set[str] = set()
        self._places: set[str] = set()

    def __enter__(self) -> "RunFolder":
        self.on_main(self._enter)
        is_main_thread = threading.current_thread() is threading.main_thread()
        self._handles = is_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._handles:
            signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, kind: type | None = None, *_) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._leave()
        if kind is KeyboardInterrupt:
            self._stop(signal.SIGINT)

    def _stop(self, number: int, frame=None) -> None:
        if _is_in_finalizer(frame):  # where an exception is lost
            threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()
            return
        raise Interrupted(
            f"{signal.Signals(number).name}: stopped. What is finished is kept: run the same command again to go on.",
            number,
        )

    def _leave(self) -> None:
        if self._descriptor in _held:  # not in another than the main process, nor in a fork of it
            try:
                if self._is_claimed or os.fstat(self._descriptor).st_size == 0:  # else it tells of a killed run
                    (self.work / LOCK).unlink(missing_ok=True)
            finally:
                _release(self._descriptor)
        if self.aside and self._is_main:
            with contextlib.suppress(OSError):  # not empty: something to go on from
                self.work.rmdir()

    @property
    def lock(self) -> int | None:
        """The open lock file. A process that inherits it keeps others out for as long as it lives."""
        return self._descriptor

    def claim(
        self, may_change: Iterable[str] = (), places: Iterable[str] = (), **parts: Mapping[str, Any]
    ) -> dict[str, tuple]:
        """
        Makes the folder this run's, or refuses.

        Args:
            may_change (`Iterable[str]`, *optional*): Keys that may differ from the run that is there. The
                record has the values now after [`extend`].
            places (`Iterable[str]`, *optional*): Keys of settings that are paths, whose content is among the parts.
                Where it lies decides nothing; a refusal tells it.
            parts (`Mapping`): What tells this run from others, as JSON has it: `settings`, and `data` with hashes of
                the content. What is known later can be given in a second call.

        Returns:
            `dict[str, tuple]`: what did change: key -> (value before, value now).

        Raises:
            ValueError: the folder is another run's, or foreign. Nothing was touched.
            OSError: the folder cannot be written to.
        """
        self._parts |= json.loads(json.dumps(parts))
        self._may_change |= set(may_change)
        self._places |= set(places)
        self.is_finished, changes = self.on_main(self._claim, self._parts, self._may_change)
        return changes

    def extend(self) -> None:
        """Makes what has changed part of the run, which goes on: it is not finished any more."""
        self.on_main(self._extend)
        self.is_finished = False

    def put_in_place(self, complete: Path) -> None:
        """
        Makes a folder in `work` the output, in the place of what was there, and removes `work`.

        Args:
            complete (`Path`): The folder, with all of the result.
        """
        write_json(complete / RECORD, self._read(self.work))
        sync_folder(complete)
        self._of_output(self._parts)  # something may have come there meanwhile
        if self.path.exists():
            os.replace(self.path, self.work / "replaced")
        os.replace(complete, self.path)
        self._clear_work()

    # ---- in the main process ----

    def _enter(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker, while it imports the script
            raise RuntimeError("processes that load data import this script: call under `if __name__ == '__main__':`")
        self._is_main = True
        try:
            if self.written and not (self.path / RECORD).exists():  # before any work
                self._refuse_foreign(self.path)
            self.work.mkdir(parents=True, exist_ok=True)
            self._descriptor = _acquire(self.work / LOCK)
        except OSError as error:
            self._hindrance = error
        self._refuse_other_lock()

    def _refuse_other_lock(self) -> None:
        """A run that works aside and one that works in place hold different locks: each holds its own, then looks."""
        beside = self.path if self.aside else self.path.with_name(f"{self.path.name}.partial")
        if fcntl is None or not os.path.isfile(beside / LOCK):
            return
        try:
            _release(_acquire(beside / LOCK))
        except ValueError:
            self._leave()
            raise
        except OSError:
            pass  # not ours to open, so not held by a run of ours

    def _claim(self, parts: dict, may_change: set[str]) -> tuple[bool, dict]:
        if self.aside and (record := self._of_output(parts)):
            if self._hindrance is None:
                self._clear_work()
                self._is_claimed = True  # the lock of a run that was killed just before its end goes too
            return True, {}
        if self._hindrance is not None:
            reason = self._hindrance.strerror or self._hindrance
            raise OSError(f"cannot write to the output folder {self.path}: {reason}") from self._hindrance
        record, changes = self._read(self.work), {}
        if record is None:
            self._refuse_foreign(self.work)
        else:
            changes = _differences(record, parts, self._places)
            refused = changes.keys() - may_change
            if self.overwrite and (refused if self.aside else not self._is_claimed):
                record = None
            elif refused and not any(self._found(self.kept)):
                record = None
            elif refused:
                raise ValueError(self._refusal(self.work, _differences(record, parts), may_change))
        self._hold()
        for path in self._found() if record is None else self.work.glob(f"{UNFINISHED}*"):
            remove(path)
        updated = {"command": self.command} | parts | (record or {})
        if updated != record:
            write_json(self.work / RECORD, updated)
        return not self.aside and self._has_result(), changes if record else {}

    def _has_result(self) -> bool:
        """Whether the mark of a finished run is there, and sound; else the run goes on, and writes it anew."""
        path = self.path / (self.result or "")
        try:
            return path.is_file() and (path.suffix != ".json" or isinstance(json.loads(path.read_bytes()), dict))
        except (OSError, ValueError, RecursionError):
            return False

    def _extend(self) -> None:
        (self.path / (self.result or RECORD)).unlink(missing_ok=True)
        write_json(self.work / RECORD, {"command": self.command} | self._parts)

    def _of_output(self, parts: dict) -> dict | None:
        """The record of the output, if that is the finished run; `None` if it may be made, or replaced."""
        record = self._read(self.path)
        if record is None:
            if self.path.is_file():
                raise ValueError(f"{self.path} is a file: choose another output_dir")
            if os.path.ismount(self.path):
                raise ValueError(f"nothing can take the place of {self.path}, a mount point: choose a folder in it")
            self._refuse_foreign(self.path)
        elif _differences(record, parts, self._places):
            if not self.overwrite:
                raise ValueError(self._refusal(self.path, _differences(record, parts)))
            return None
        return record

    def _hold(self) -> None:
        """Says in the lock file who holds it."""
        if self._descriptor is not None and not self._is_claimed:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = f"process {os.getpid()} on {socket.gethostname()} (aligndet {self.command}, since {now})"
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, holder.encode())
        self._is_claimed = True

    def _read(self, folder: Path) -> dict | None:
        """The record of a folder, `None` if it has none."""
        path = folder / RECORD
        try:
            if path.exists() and not path.is_file():
                raise ValueError("not a file")  # opening a pipe would wait for ever
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, which tells whose run this is, is damaged ({error}): remove {folder}"
            ) from error
        owner = record.get("command") if isinstance(record, dict) else None
        if owner != self.command:
            whose = f"a run of `aligndet {owner}`" if owner else f"a {RECORD} that is not of this package"
            raise ValueError(f"{folder} holds {whose}: choose another output_dir for `aligndet {self.command}`")
        return record

    def _found(self, patterns: Iterable[str] | None = None) -> list[Path]:
        """What is there of what the command writes; aside, all of it."""
        if self.aside and patterns is None:
            return self._content(self.work)
        patterns = self.written if patterns is None else patterns
        return [path for pattern in patterns for path in self.work.glob(pattern) if path.name not in (RECORD, LOCK)]

    def state_of(self, patterns: Iterable[str]) -> set[tuple[Path, int, int]]:
        """The files of these names that are there, each with what changes when it is written."""
        return {(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in self._found(patterns)}

    def _content(self, folder: Path) -> list[Path]:
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in found if path.name not in (RECORD, LOCK))

    def _clear_work(self) -> None:
        """Removes the folder of unfinished work, its record last."""
        for path in self._content(self.work):
            remove(path)
        (self.work / RECORD).unlink(missing_ok=True)

    def _refuse_foreign(self, folder: Path) -> None:
        found = self._content(folder)
        if not self.aside:  # what the command would write, and what is nobody's run
            own = set(self._found())
            found = [path for path in found if path in own or not _is_harmless(path)]
        found = [path for path in found if path.name != UNFINISHED + RECORD]  # of a run that ended as it began
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(
                f"{folder} holds {found[0].name}{more}, but no {RECORD}: it was not written by `aligndet "
                f"{self.command}`. Choose a new output_dir: another folder, or one in this folder."
            )

    def _refusal(self, folder: Path, changes: dict[str, tuple], may_change: set[str] = frozenset()) -> str:
        told = {key: values for key, values in changes.items() if key not in may_change}
        listed = ", ".join(
            f"{key}: not the same" if all(map(_is_hash, values)) else "{}: {!r} there, {!r} now".format(key, *values)
            for key, values in told.items()
        )
        return (
            f"{folder} holds a run of another configuration, or of other data ({listed}). Give the same to resume it, "
            f"another --output_dir to leave it alone, or --overwrite_output_dir to start anew."
        )


@contextlib.contextmanager
def measuring_folder(output_dir: str | Path | None, command: str, written: Iterable[str]) -> Iterator[Path | None]:
    """
    Context of a command that measures, and replaces what it wrote into a folder before: what it does not write anew is
    removed at the end. It gives the folder, which is there; without one nothing happens.

    Raises:
        ValueError: another process works in the folder, it is another command's run, or foreign.
        OSError: it cannot be written to.
    """
    if output_dir is None:
        yield None
        return
    written = list(written)
    with RunFolder(output_dir, command, written=written) as folder:
        folder.claim()
        before = folder.state_of(written)
        yield Path(output_dir)
        for path, *_ in before & folder.state_of(written):
            remove(path)


def _is_harmless(path: Path) -> bool:
    """
    Whether what lies where a run begins, and which no command needs to have written, holds no pictures.

    Hidden folders are nobody's photographs: environments, caches and repositories, which are full of icons.
    """
    if path.name.startswith("."):
        return True
    if path.is_dir() and not path.is_symlink():
        return (path / RECORD).is_file() or all(map(_is_harmless, path.iterdir()))
    return not (mimetypes.guess_type(path.name)[0] or "").startswith(("image/", "video/"))


def _is_in_finalizer(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _is_hash(value: Any) -> bool:
    """Whether a value is a hash, which tells a reader nothing."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def _differences(record: dict, parts: dict, places: set[str] = frozenset()) -> dict[str, tuple]:
    """What differs between the parts and those that the record has, but for places: key -> (there, now)."""
    changes = {}
    for name in (name for name in parts if name in record):  # in their order, which a set has not
        before, now = flattened(record[name]), flattened(parts[name])
        counted = [key for key in before | now if name != "settings" or key not in places]
        changes |= {key: (before.get(key), now.get(key)) for key in counted if before.get(key) != now.get(key)}
    return changes


def flattened(settings: dict) -> dict:
    """Settings without nesting: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat = {}
    for key, value in settings.items():
        nested = flattened(value) if isinstance(value, dict) and value else None
        flat |= {key: value} if nested is None else {f"{key}.{name}": entry for name, entry in nested.items()}
    return flat


# ---- the lock ----

# Lock files that this process holds open. Processes that it forks, such as those that load data, close theirs: they
# may outlive it for a while, and the run must be startable again at once.
_held: set[int] = set()


def _acquire(path: Path) -> int | None:
    """
    Locks a file until it is released or this process ends, in whatever way.

    Returns:
        `int`: the descriptor of the open file; `None` where the system has no such locks.

    Raises:
        ValueError: another process holds it. The message has what it wrote there.
    """
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 500).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ValueError(f"{path.parent} is in use by {holder}: wait until it ends, or end it.") from error
        except OSError:
            pass  # a file system without locks
        # The process that held it may have removed the file between opening and locking.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _held.add(descriptor)
                return descriptor
        os.close(descriptor)


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _forget() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
