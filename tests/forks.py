"""
Processes of their own without a cold start: forks of a server that has imported torch and transformers once.

The server knows nothing of this package, so that a fork may also do without it.
"""

import multiprocessing
import os
import re
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

PRELOADED = [
    "accelerate", "datasets.arrow_dataset", "faster_coco_eval", "pytest", "scipy.optimize", "timm", "torch",
    "torchvision.transforms.v2", "transformers", "transformers.pipelines", "transformers.trainer",
]  # fmt: skip

# Not the one server that Python keeps for all: `aligndet proposals` tells that what to load.
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(PRELOADED)


def be_quick() -> None:
    """What every process of the tests does first."""
    torch.set_num_threads(1)  # tests and processes run beside each other
    re._MAXCACHE = 10_000  # transformers compiles some hundred patterns whenever it loads or saves a model


def start(function: Callable, *args, console: Path, environment: dict[str, str] | None = None):
    """
    Starts a function, by its name in its module, in a process.

    Args:
        function (`Callable`): What to run.
        args: Its arguments.
        console (`Path`): The file that gets what the process prints, after what is in it.
        environment (`dict`, *optional*): Variables that are set in the process.

    Returns:
        `multiprocessing.Process`: the process, which runs.
    """
    console.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_in_fork, args=(function, args, str(console), environment or {}))
    with mock.patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
        process.start()
    return process


def run(function: Callable, *args, console: Path, environment: dict[str, str] | None = None) -> str:
    """What a function prints in a process of its own, which has to end well; arguments as for [`start`]."""
    process = start(function, *args, console=console, environment=environment)
    process.join()
    printed = console.read_text()
    assert process.exitcode == 0, printed
    return printed


def run_ranks(size: int, function: Callable, *args, folder: Path) -> list[str]:
    """What each of `size` processes prints that run a function together, with the variables of `torchrun`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    common["LOCAL_WORLD_SIZE"] = str(size)
    consoles = [folder / f"rank-{rank}.txt" for rank in range(size)]
    processes = [
        start(function, *args, console=console, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, console in enumerate(consoles)
    ]
    for process in processes:
        process.join()
    printed = [console.read_text() for console in consoles]
    assert [process.exitcode for process in processes] == [0] * size, "\n".join(printed)
    return printed


def run_alone(code: str, *argv, folder: Path, package: Path | None = None) -> str:
    """
    What a script prints that is run in a folder and without this package: any import of it fails, or finds the one
    in the folder `package`.
    """
    console = folder / f"console-{len(list(folder.iterdir()))}.txt"
    return run(_without_this_package, code, argv, folder, package, console=console)


def _in_fork(function, args, console, environment):
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    be_quick()
    function(*args)


def _without_this_package(code, argv, folder, package):
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")  # where code that checkpoints bring is copied to
    assert not [name for name in sys.modules if name.startswith("aligndet_hf")]
    if package is None:
        sys.modules["aligndet_hf"] = None
    else:
        sys.path.insert(0, str(package))
    os.chdir(folder)
    script = folder / "script.py"
    script.write_text(code)
    sys.argv = [str(script), *map(str, argv)]
    runpy.run_path(str(script), run_name="__main__")
    places = [module.__file__ for name, module in sys.modules.items() if name.startswith("aligndet_hf") and module]
    assert all(package and Path(place).is_relative_to(package) for place in places), places
