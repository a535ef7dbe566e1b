"""
Kills commands at random moments (SIGKILL) and starts them again until they end: the bytes of what they make must be
those of a run that nothing happened to. Then two processes at a time in one folder: one runs, one is refused.

    python benchmarks/kills.py --kills 30 proposals finetune pretrain
"""

import argparse
import contextlib
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

STEPS = ["--max_steps", "6", "--save_steps", "1", "--image_sizes", "64", "--use_cpu", "--disable_tqdm", "true"]


def commands(root: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Of each command its flags, and glob patterns of the files whose bytes count."""
    data, found, detector = str(root / "data"), str(root / "found"), str(root / "detector")
    trained = ["--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--write_report", "false"]
    return {
        "proposals": (
            ["--dataset", data] + "--source opencv --short_side 64 --shard_size 1 --dataloader_num_workers 2".split(),
            ["**/*.arrow", "**/proposals.json"],
        ),
        "pretrain": (
            ["--dataset", found, "--detector", detector, *trained, *STEPS],
            ["model.safetensors", "detector/*"],
        ),
        "finetune": (
            ["--dataset", data, "--detector", detector, "--do_eval", "false", "--save_strategy", "steps", *trained]
            + STEPS,
            ["model.safetensors"],
        ),
    }


def start(command: str, flags: list[str], output: Path) -> int:
    """Starts a command in a fork, and returns the id of the process."""
    pid = os.fork()
    if pid:
        return pid
    from aligndet_hf import cli

    log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 99
    try:
        code = cli.main([command, *flags, "--output_dir", str(output)])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder: Path, patterns: list[str]) -> dict[str, str]:
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def attack(command: str, flags: list[str], patterns: list[str], root: Path, kills: int, chance: random.Random) -> str:
    began = time.monotonic()
    assert end(start(command, flags, root / f"{command}-whole")) == 0, (root / f"{command}-whole.log").read_text()
    seconds, whole = time.monotonic() - began, content(root / f"{command}-whole", patterns)
    killed, runs, wrong = 0, 0, 0
    while killed < kills:
        runs += 1
        output = root / f"{command}-{runs}"
        for _ in range(3):  # three kills a run, then to its end
            pid = start(command, flags, output)
            time.sleep(chance.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed += end(pid) == -signal.SIGKILL
        code = end(start(command, flags, output))
        wrong += code != 0 or content(output, patterns) != whole
    both = {}
    for number in range(max(1, kills // 3)):
        output = root / f"{command}-both-{number}"
        first = start(command, flags, output)
        time.sleep(chance.uniform(0, seconds))
        codes = sorted([end(start(command, flags, output)), end(first)])
        both[str(codes)] = both.get(str(codes), 0) + 1
        wrong += codes not in ([0, 0], [0, 2]) or content(output, patterns) != whole
    return f"{command}: {killed} kills in {runs} runs, {wrong} wrong; exit codes of two at a time: {both}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=["proposals", "finetune", "pretrain"])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import torch
    from tiny_detectors import tiny_detector

    from aligndet_hf.data.synthetic import write_synthetic_folder

    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_synthetic_folder(root / "data", {"train": 8}, seed=0, image_size=(64, 64))
        tiny_detector("rt_detr", num_labels=1).save_pretrained(root / "detector")
        # In a fork, as all else: threads of Arrow in this process would not survive later ones.
        found = ["--dataset", str(root / "data"), "--source", "random", "--max_boxes", "3"]
        found += ["--dataloader_num_workers", "0"]
        assert end(start("proposals", [*found, "--disable_tqdm"], root / "found")) == 0
        for command in arguments.commands:
            flags, patterns = commands(root)[command]
            print(attack(command, flags, patterns, root, arguments.kills, chance), flush=True)


if __name__ == "__main__":
    main()
