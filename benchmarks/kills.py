"""
What happens to commands that are killed, stopped, doubled, or cannot write: attacks on every command that writes.

Each try is a fork of this process, which has imported all there is. Kills and signals come at random moments and at
random file operations in the output folder, so that the short ones, such as the removal of old work, are met too.

- kill: SIGKILL, three times a run; then the same command must end with the bytes of a run that nothing happened to;
- signal: the same with SIGTERM and SIGINT to all processes of the run, as batch systems and terminals send them, which
  must end it with one line and the code 143 or 130;
- damage: what can happen to the files of the last checkpoint of an interrupted training (tests/damages.py): the same
  command must end with the same bytes, or with one line;
- pair: two processes in one folder, of equal and of different settings: one runs, the other is refused, and what is
  there at the end is the output of one of them, never a mixture;
- disk: a full disk (a small tmpfs, which needs root) must end the run with one line; with more room it goes on;
- permission: a folder, and then data, that the user may not use must end the run with one line.

    python benchmarks/kills.py kill pair --tries 30 --commands proposals finetune
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from attacked import Attacked, attacked, make_inputs

# Worker processes import this file too: they have the same.
SCRATCH = Path(os.environ.get("KILLS_SCRATCH") or tempfile.mkdtemp(prefix="kills-"))
SCRATCH.chmod(0o755)
os.environ |= {"KILLS_SCRATCH": str(SCRATCH)}
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ |= {name: str(SCRATCH / "home") for name in ("HOME", "HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME")}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


# ---- processes ----


def start(
    task: Attacked, output: Path, other: bool = False, log: Path | None = None, before: Callable = lambda: None
) -> int:
    """Starts a command in a fork, which first calls `before`; returns the id of the process."""
    log = log or SCRATCH / "log"
    log.unlink(missing_ok=True)
    argv = [task.command, *task.flags, *(task.other if other else []), task.place, str(output)]
    return fork(lambda: run(argv, before), log)


def run(argv: list[str], before: Callable) -> int:
    from aligndet_hf import cli

    before()
    code = cli.main(argv)
    (SCRATCH / "imported").write_text(" ".join(sys.modules))
    return code


def import_what_was_needed() -> None:
    """Imports what a command imported as it ran: later forks have it."""
    for name in (SCRATCH / "imported").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def fork(function: Callable, log: Path) -> int:
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # it has done so, and more
            os.setpgid(pid, pid)
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        code = function() or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for_end(pid: int, seconds: float) -> None:
    """Waits until a process ends, at most so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)


def at_file_operation(number: int, output: Path, act: Callable, count: Path | None = None) -> None:
    """Calls `act` at a file operation of this process in the output folder, or beside it; or counts them all."""
    pid, seen = os.getpid(), 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or os.getpid() != pid:
            return
        if event in ("os.remove", "os.rmdir") or str(output) in f"{args[0]} {args[1]}":
            seen += 1
            if count is not None:
                os.pwrite(descriptor, b"%09d" % seen, 0)
            if seen == number:
                act()

    if count is not None:
        descriptor = os.open(count, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(hook)


def share_server_of_workers() -> None:
    """One server for the worker processes of all tries: its start takes longer than they do."""
    from multiprocessing import forkserver

    from aligndet_hf.commands.proposals import _PRELOADED
    from aligndet_hf.data.shard_search import _process_context

    _process_context(_PRELOADED)
    forkserver.ensure_running()
    forkserver._forkserver.ensure_running = lambda: None


# ---- what counts ----


class Whole(NamedTuple):
    """A run that nothing happened to."""

    content: dict[str, str]
    seconds: float
    operations: int
    bytes: int


def clear(task: Attacked, output: Path) -> None:
    """Leaves of a folder what the command finds there: nothing, or a copy of what is given."""
    for path in output.parent.glob(f"*{output.name}*"):
        shutil.rmtree(path)
    if task.given:
        shutil.copytree(task.given, output)


def content(task: Attacked, output: Path) -> dict[str, str]:
    found = {path for pattern in task.files for path in output.glob(pattern) if path.is_file()}
    found = {path for path in found if path.name not in ("run.json", ".lock")}
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def whole_run(task: Attacked, output: Path, other: bool = False) -> Whole:
    clear(task, output)
    count, began = SCRATCH / "count", time.monotonic()
    count.unlink(missing_ok=True)
    code = end(start(task, output, other, before=lambda: at_file_operation(0, output, None, count)))
    assert code == 0, (SCRATCH / "log").read_text()
    files = [path for path in output.rglob("*") if path.is_file()]
    found = content(task, output)
    assert found, f"{task.command}: no files count"
    size = sum(path.stat().st_size for path in files)
    return Whole(found, time.monotonic() - began, int(count.read_text()), size)


class Tally:
    """Counts what happened, and keeps the first of what is wrong."""

    def __init__(self):
        self.codes, self.wrong = Counter(), []

    def expect(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.wrong.append(f"{what}: {(SCRATCH / 'log').read_text()[-1500:]}")

    def line(self, task: str, attack: str) -> str:
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(self.codes.items(), key=str))
        return f"{task} {attack}: {len(self.wrong)} wrong; codes {codes}" + "".join(f"\n  {w}" for w in self.wrong[:3])


def goes_on(task: Attacked, output: Path, whole: Whole, tally: Tally, what: str) -> None:
    """The same command again, to its end."""
    code = end(start(task, output))
    found = content(task, output)
    differing = sorted(name for name in whole.content | found if whole.content.get(name) != found.get(name))
    tally.expect(code == 0 and not differing, f"after {what} code {code}, other bytes in {differing}")
    rest = [path.name for path in output.parent.glob(f"*{output.name}*") if path != output]
    tally.expect(not rest and not (output / ".lock").exists(), f"after {what} there is left {rest}")


def one_line(log: Path | None = None) -> bool:
    """
    Whether a failed command told why in one line, and no traceback.

    Below this line a comparison lists its stages; a chain says below the line of a stage which one it was.
    """
    text = (log or SCRATCH / "log").read_text()
    lines = [line for line in text.strip().split("\n") if not line.startswith("  ")]
    told = lines[-2:] if lines[-1].startswith("error: stage ") else lines[-1:]
    return "Traceback" not in text and [line for line in lines if line.startswith("error: ")] == told


# ---- attacks ----


def disturbed(task: Attacked, output: Path, whole: Whole, number: int, chance: random.Random) -> int:
    """A run that gets a signal at a random moment or file operation; returns its code."""
    send = os.kill if number == signal.SIGKILL else os.killpg
    if chance.random() < 0.5:
        place = chance.randint(1, whole.operations)
        act = lambda: send(os.getpid(), number)  # noqa: E731
        return end(start(task, output, before=lambda: at_file_operation(place, output, act)))
    pid = start(task, output)
    wait_for_end(pid, chance.uniform(0, whole.seconds))
    with contextlib.suppress(ProcessLookupError):
        send(pid, number)
    return end(pid)


def kill(task: Attacked, output: Path, whole: Whole, tries: int, chance: random.Random, tally: Tally) -> None:
    while tally.codes[-signal.SIGKILL] < tries:
        clear(task, output)
        for _ in range(3):  # three kills a run, then to its end
            code = disturbed(task, output, whole, signal.SIGKILL, chance)
            tally.codes[code] += 1
            tally.expect(code in (-signal.SIGKILL, 0), f"a run after a kill has code {code}")
        goes_on(task, output, whole, tally, "three kills")


def stop(task: Attacked, output: Path, whole: Whole, tries: int, chance: random.Random, tally: Tally) -> None:
    for count in range(tries):
        number = (signal.SIGTERM, signal.SIGINT)[count % 2]
        if count % 2 == 0:
            clear(task, output)
        code = disturbed(task, output, whole, number, chance)
        tally.codes[code] += 1
        text = (SCRATCH / "log").read_text()
        # Before the command has its folder SIGTERM ends it as it ends any process.
        allowed = code in (0, 128 + number) or (code == -signal.SIGTERM and number == signal.SIGTERM)
        tally.expect(allowed and "Traceback" not in text, f"{number.name} gives code {code}")
        if count % 2:
            goes_on(task, output, whole, tally, "two signals")


def pair(task: Attacked, output: Path, whole: Whole, tries: int, chance: random.Random, tally: Tally) -> None:
    changed = whole_run(task, output, other=True)
    logs = [SCRATCH / "first", SCRATCH / "second"]
    for count in range(tries):
        clear(task, output)
        other = bool(count % 2)
        first = start(task, output, log=logs[0])
        time.sleep(chance.uniform(0, whole.seconds * 0.8))
        second = start(task, output, other, log=logs[1])
        codes = [end(first), end(second)]
        tally.codes[str(codes)] += 1
        (SCRATCH / "log").write_text("".join(log.read_text() for log in logs))
        right = [content(task, output) == result.content for result in (whole, changed)]
        tally.expect(0 in codes and set(codes) <= {0, 2}, f"codes {codes}")
        tally.expect(any(right), "a mixture")
        for code, log in zip(codes, logs, strict=True):
            text = log.read_text()
            told = "is in use by" in text or "another configuration" in text or "another process" in text
            tally.expect(code == 0 or (told and one_line(log)), "refused, without saying why")


def disk(task: Attacked, output: Path, whole: Whole, tries: int, chance: random.Random, tally: Tally) -> None:
    output.parent.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "full", output.parent], check=True)
    try:
        for _ in range(tries):
            clear(task, output)
            kilobytes = max(4 * chance.randint(1, max(4, int(whole.bytes * 1.3) // 4096)), size_of(output))
            resize(output.parent, f"{kilobytes}k")
            code = end(start(task, output))
            tally.codes[code] += 1
            tally.expect(code == 0 or (code == 2 and one_line()), f"a disk of {kilobytes} kB gives code {code}")
            resize(output.parent, "256m")
            goes_on(task, output, whole, tally, f"a disk of {kilobytes} kB")
    finally:
        subprocess.run(["umount", "-l", output.parent], check=True)


def size_of(folder: Path) -> int:
    """The kilobytes that a folder takes on a tmpfs."""
    return 4 * sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def obey_modes() -> None:
    """Has this process, which may be root's, bound by the modes of files as any other user is."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for index in (0, 1):  # the effective and the permitted set: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        sets[index] &= ~0b1110
    libc.capset(header, sets)


def permission(task: Attacked, output: Path, whole: Whole, tries: int, chance: random.Random, tally: Tally) -> None:
    clear(task, output)
    place = output if task.given else output.parent
    place.chmod(0o555)
    code = end(start(task, output, before=obey_modes))
    tally.codes[code] += 1
    tally.expect(code == 2 and one_line(), f"a read-only place gives code {code}")
    place.chmod(0o777)
    code = end(start(task, output, before=obey_modes))
    tally.expect(code == 0 and content(task, output) == whole.content, f"with permission it gives code {code}")
    files = [path for path in output.rglob("*") if path.is_dir()] + [output]
    for path in files:  # finished, and read-only since
        path.chmod(0o555)
    output.parent.chmod(0o555)
    code = end(start(task, output, before=obey_modes))
    tally.codes[code] += 1
    tally.expect(code == 0 or one_line(), f"a finished run in a read-only place gives code {code}")
    tally.expect(content(task, output) == whole.content, "a finished run in a read-only place was changed")
    output.parent.chmod(0o777)
    clear(task, output)
    hidden = [Path(flag) for flag in task.flags if flag.startswith(str(SCRATCH))]
    for path in hidden:
        mode = path.stat().st_mode & 0o777
        path.chmod(0)
        code = end(start(task, output, before=obey_modes))
        path.chmod(mode)
        tally.codes[code] += 1
        tally.expect(code == 2 and one_line(), f"{path.name} of no permission gives code {code}")
        clear(task, output)


def damage(task: Attacked, output: Path, whole: Whole, tries: int, chance: random.Random, tally: Tally) -> None:
    from damages import DAMAGES

    if task.command not in ("pretrain", "finetune"):
        return
    clear(task, output)
    pid = start(task, output)
    while not (output / "checkpoint-4").exists():
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    end(pid)
    copy = output.parent.parent / "interrupted"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(output, copy)
    for name in chance.sample(list(DAMAGES), min(tries, len(DAMAGES))):
        clear(task, output)
        shutil.copytree(copy, output)
        DAMAGES[name](max(output.glob("checkpoint-*")))
        code = end(start(task, output))
        tally.codes[code] += 1
        same = code == 0 and content(task, output) == whole.content
        tally.expect(same or (code == 2 and one_line()), f"{name} gives code {code}")


ATTACKS = {"kill": kill, "signal": stop, "damage": damage, "pair": pair, "disk": disk, "permission": permission}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", default=list(ATTACKS))
    parser.add_argument("--commands", nargs="+", help="which to attack; all by default")
    parser.add_argument("--tries", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import torch

    from aligndet_hf import cli

    for row in cli.COMMANDS.values():
        importlib.import_module(row.module)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (SCRATCH / "home").mkdir()
    (SCRATCH / "home").chmod(0o777)
    inputs = SCRATCH / "inputs"
    inputs.mkdir()
    # In a fork, as all else: threads of Arrow in this process would not survive later ones.
    assert end(fork(lambda: make_inputs(inputs), SCRATCH / "log")) == 0, (SCRATCH / "log").read_text()
    tasks = attacked(inputs)
    share_server_of_workers()
    try:
        for name in arguments.commands or tasks:
            output = SCRATCH / "work" / "out"
            output.parent.mkdir(exist_ok=True)
            output.parent.chmod(0o777)
            whole_run(tasks[name], output)
            import_what_was_needed()
            whole = whole_run(tasks[name], output)
            print(f"{name}: {whole.seconds:.1f} s, {whole.operations} file operations", flush=True)
            for attack in arguments.attacks:
                tally, began = Tally(), time.monotonic()
                ATTACKS[attack](tasks[name], output, whole, arguments.tries, random.Random(arguments.seed), tally)
                print(f"{tally.line(name, attack)} ({time.monotonic() - began:.0f} s)", flush=True)
    finally:
        shutil.rmtree(SCRATCH)


if __name__ == "__main__":
    main()
