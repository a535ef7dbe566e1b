"""
Runs `aligndet` commands against a Hub, each in a process of its own: a fork of this one, which has imported all.

Reads lines of JSON, `{"argv": [...], "environment": {...}, "output": "file"}`, and answers each with the exit code.
"""

import json
import os
import sys
import traceback

import aligndet_hf.commands.clusters
import aligndet_hf.commands.finetune
import aligndet_hf.commands.pretrain  # noqa: F401
from aligndet_hf import cli
from aligndet_hf.evaluation import speed

speed.RUNS = 2  # as in conftest.py


def run(argv: list[str], environment: dict[str, str], output: str) -> int:
    """The exit code of a command; what it prints is written to a file."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.environ.update(environment)
        code = cli.main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
