"""Running stages: each in a process of its own, in the order of their needs, and none twice."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from types import FrameType

import torch

from .. import cli
from ..files import write_json
from ..flags import names_of
from ..runs import Interrupted, NotedSignals
from .stages import Stage, arguments_class, needed_for, setting

_INTERRUPTED = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM)}
_POLL_SECONDS = 0.1
_PART = ".part.json"  # beside a stage that has begun and not ended: the seconds it took so far
ANEW = "remove it too, to do both anew."


def run_stages(
    stages: Iterable[Stage],
    *,
    num_parallel: int = 1,
    launcher: str = "",
    logs: bool = False,
    keep_going: bool = False,
    on_start: Callable[[Stage], None] = lambda stage: None,
    on_wait: Callable[[Stage], None] = lambda stage: None,
    on_end: Callable[[Stage, str | None], None] = lambda stage, failure: None,
    lock: int | None = None,
) -> dict[Stage, str]:
    """
    Runs stages, each after those that it needs. What is finished is not run again; what was interrupted resumes.

    Args:
        stages (`Iterable[Stage]`): All of them, also those that others need, earlier ones first; with their recipes.
        num_parallel (`int`, *optional*, defaults to 1): Processes at the same time; 0 runs all in this process.
        launcher (`str`, *optional*): A command such as `accelerate launch --num_processes 8` to start training with.
        logs (`bool`, *optional*, defaults to `False`): Write what a stage prints to a file `.log` beside its output.
        keep_going (`bool`, *optional*, defaults to `False`): Go on with the others when a stage fails.
        on_start (`Callable`, *optional*): Called with each stage that is about to run.
        on_wait (`Callable`, *optional*): Called with each stage that runs, several times a second.
        on_end (`Callable`, *optional*): Called with each stage that is finished or failed, and with the reason or
            `None`.
        lock (`int`, *optional*): An open file that the processes hold on to, see
            [`~aligndet_hf.runs.RunFolder`]: a stage that outlives its starter keeps others out.

    Returns:
        `dict[Stage, str]`: what failed, or could not run for that, and why.

    Raises:
        ValueError: a stage builds on output that is gone, or that other settings would change. Nothing was run.
        Interrupted: SIGTERM or SIGINT, which the running stages got as well.
    """
    stages = list(stages)
    waiting, failures = [stage for stage in stages if not is_finished(stage)], {}
    for stage in stages:
        if gone := [need for need in stage.needs if need in waiting and not need.folder.exists()]:
            if stage.folder.exists():
                raise ValueError(f"{stage.folder} was made from {gone[0].folder}, which is gone: {ANEW}")
        _refuse_to_outdate(stage, stages)
    running: dict[Stage, tuple[Callable[[], int | None], float, int]] = {}
    read = {}
    signals = _Signals()
    with signals if num_parallel else contextlib.nullcontext():
        while waiting or running:
            for stage in list(waiting) if not signals.number else ():
                if reason := _hindrance(stage, failures):
                    failures[stage] = reason
                    waiting.remove(stage)
                    on_end(stage, reason)
                elif len(running) < max(num_parallel, 1) and not set(stage.needs) & {*waiting, *running}:
                    waiting.remove(stage)
                    on_start(stage)
                    started, read[stage] = time.perf_counter() - _seconds_before(stage), stage.inputs()
                    slot = min(set(range(len(running) + 1)) - {other for _, _, other in running.values()})
                    log = stage.beside(".log") if logs else None
                    if num_parallel == 0:
                        poll = _run_here(stage, log)
                    else:
                        poll = _start(stage, log, launcher, num_parallel, slot, lock, signals)
                    running[stage] = poll, started, slot
            if num_parallel:
                time.sleep(_POLL_SECONDS)
            for stage, (poll, started, _) in list(running.items()):
                code = poll()
                if code is None:
                    on_wait(stage)
                    continue
                del running[stage]
                failure = None
                seconds = round(time.perf_counter() - started, 1)
                if code == 0:
                    record = {"settings": _plain(stage.settings), "inputs": read[stage], "seconds": seconds}
                    write_json(stage.beside(".json"), record)
                    stage.beside(_PART).unlink(missing_ok=True)
                else:
                    write_json(stage.beside(_PART), {"seconds": seconds})
                if code in _INTERRUPTED and not signals.number:
                    signals.note(_INTERRUPTED[code])
                elif code and not signals.number:
                    failure = failures[stage] = _reason(stage, code, logs)
                if not signals.number:
                    on_end(stage, failure)
                    for other in stages if failure is None else ():
                        if stage in other.needs and other not in {*waiting, *failures} and not is_finished(other):
                            failures[other] = f"{other.folder} was made from {stage.folder} as it was before: {ANEW}"
                            on_end(other, failures[other])
            if signals.number and not running:
                raise Interrupted("Interrupted. Run the same command again to go on.", signals.number)
            if failures and not keep_going:
                waiting = []
    return failures


def is_finished(stage: Stage) -> bool:
    """Whether a stage was run to its end with these settings, and files of this content."""
    record = _sound_record(stage)
    if record is None or record["settings"] != _plain(stage.settings):
        return False
    return "inputs" not in record or record["inputs"] == stage.inputs()  # earlier versions wrote none


def _sound_record(stage: Stage) -> dict | None:
    """The record of a stage that was run to its end, with whatever settings; `None` if there is none."""
    try:
        record = json.loads(stage.beside(".json").read_text())
    except (OSError, ValueError):
        return None
    is_sound = isinstance(record, dict) and isinstance(record.get("settings"), dict) and "seconds" in record
    return _of_folders_now(record, stage) if is_sound and stage.folder.exists() else None


def _of_folders_now(record: dict, stage: Stage) -> dict:
    """A record that names the stage's folder, and those that it needs, as now: all may have been moved or copied."""
    before, now = record["settings"].get("output_dir"), stage.settings["output_dir"]
    if before == now or not isinstance(before, str):
        return record
    folders = [str(other.folder) for other in (stage, *stage.needs)]
    moved = {_in_json(os.path.normpath(os.path.join(before, os.path.relpath(path, now)))): path for path in folders}
    names = "|".join(map(re.escape, moved))
    paths = rf'(?<=[" ])({names})(?=["/\\])'  # texts that are one or begin with one, keys of `inputs` among them
    return json.loads(re.sub(paths, lambda found: _in_json(moved[found[0]]), json.dumps(record)))


def _in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _refuse_to_outdate(stage: Stage, stages: list[Stage]) -> None:
    """Refuses other settings for what later stages were made from: now, not after the hours that the stage takes."""
    record, plain = _sound_record(stage), _plain(stage.settings)
    if record is None or record["settings"] == plain:
        return
    later = [str(one.folder) for one in stages if stage in needed_for([stage, one])[:-1] and one.folder.exists()]
    if not later:
        return
    before, now = Stage(stage.name, stage.command, record["settings"]), replace(stage, settings=plain)
    cls = arguments_class(stage.command)
    places = {item.name for item in fields(cls) if item.metadata.get("is_path")}  # what lies there decides
    names = sorted(names_of(cls, "result", "data", "start") - places)
    values = {name: (setting(before, name), setting(now, name)) for name in names}
    if changed := [f"{name} {was!r} ({value!r} now)" for name, (was, value) in values.items() if was != value]:
        raise ValueError(
            f"{stage.folder} was made with {', '.join(changed)}, and {', '.join(later)} from it. Give the same again, "
            f"or remove what was made from it, to do that anew, and {stage.folder} too unless it only gets longer."
        )


def record_of(stage: Stage) -> dict:
    """What is known of a finished stage: its `settings`, and the `seconds` that its processes took."""
    return json.loads(stage.beside(".json").read_text())


def _seconds_before(stage: Stage) -> float:
    """Seconds of the processes that this one goes on from: interrupted ones, or of a shorter run."""
    for suffix in (_PART, ".json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if stage.folder.exists():
                return float(json.loads(stage.beside(suffix).read_text())["seconds"])
    return 0.0


class _Signals(NotedSignals):
    """Context in which SIGINT and SIGTERM are passed on to the running processes, and noted in `number`."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []

    def __exit__(self, *error):
        super().__exit__()
        for process in self.processes:  # only after an error of ours is any of them still there
            if process.poll() is None:
                process.terminate()
                process.wait()

    def note(self, number: int, frame: FrameType | None = None) -> None:
        super().note(number)
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    # Ctrl-C reaches a whole group, data loading processes included; they know how to deal with it.
                    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)


def _command(stage: Stage, launcher: str) -> list[str]:
    prefix = shlex.split(launcher) if cli.COMMANDS[stage.command].is_launched else []
    prefix = prefix or [sys.executable]
    return [*prefix, "-m", "aligndet_hf", stage.command, "--config", str(stage.beside(".yaml"))]


def _secret_environment(stage: Stage) -> dict[str, str]:
    """Tokens as the Hub's client reads them: files and command lines can be read by others."""
    tokens = [str(token) for token in stage.secrets.values() if token is not None]
    return {"HF_TOKEN": tokens[0]} if tokens else {}


@contextlib.contextmanager
def _with_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _devices() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _start(stage, log, launcher, num_parallel, slot, lock, signals) -> Callable[[], int | None]:
    environment = os.environ | _secret_environment(stage)
    if num_parallel > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_parallel)))
    if num_parallel > 1 and not launcher and (devices := _devices()):
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    with open(log, "a") if log else contextlib.nullcontext() as output:
        # In a group of its own, so that signals reach it once: through us.
        process = subprocess.Popen(
            _command(stage, launcher),
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            env=environment,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    signals.processes.append(process)

    def poll() -> int | None:
        code = process.poll()
        return code if code is None or code >= 0 else 128 - code  # as a shell counts signals

    return poll


def _run_here(stage, log) -> Callable[[], int]:
    with open(log, "a") if log else contextlib.nullcontext() as output:
        with (
            _with_environment(_secret_environment(stage)),
            contextlib.redirect_stdout(output) if log else contextlib.nullcontext(),
            contextlib.redirect_stderr(output) if log else contextlib.nullcontext(),
        ):
            try:
                code = cli.run(stage.command, ["--config", str(stage.beside(".yaml"))])
            except Exception:  # a bug, or no memory: of this stage only, as if it had its own process
                traceback.print_exc()
                code = 1
    return lambda: code


def _hindrance(stage: Stage, failures: dict[Stage, str]) -> str | None:
    return next((f"needs {need.folder}, which failed" for need in stage.needs if need in failures), None)


def _plain(settings: dict) -> dict:
    return json.loads(json.dumps(settings))


def _reason(stage: Stage, code: int, logs: bool) -> str:
    """Why a stage failed: its error, or what it said last, if that was written to a file."""
    if not logs:
        return f"exit code {code}"
    log = stage.beside(".log")
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(said) if line.startswith("error: ")]
    if errors:
        reason = " ".join(said[errors[-1] :]).removeprefix("error: ")
    else:
        reason = ": ".join([f"exit code {code}", *said[-1:]])
    return f"{reason.rstrip('.')}; its log is {log}"
