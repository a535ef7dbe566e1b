"""`aligndet chain`: several commands, each on the output of those before it, as one pipeline from one file."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..arguments import OutputArguments, again
from ..flags import flag, nearest, takes_arguments
from ..pipelines.inputs import require_weights
from ..pipelines.runner import is_finished, run_stages
from ..pipelines.stages import Stage, command_of, fields_of, merged, resolve_stages
from ..runs import RECORD, RunFolder


@dataclass(kw_only=True)
class PipelineArguments(OutputArguments):
    """What a chain and a comparison of chains are made of."""

    help_groups = {"stages": "Stages", "launcher": "Run"}

    stages: dict[str, Any] = flag(
        {},
        "result",
        "the stages in order: a name and the flags of the command of that name, or of `command`; ${name} is the "
        "output folder of an earlier stage, or a variable",
    )
    common: dict[str, Any] = flag({}, "result", "flags of all stages whose command knows them")
    variables: dict[str, Any] = flag({}, "result", "names and their values; null for one that --set must give")
    set: list[str] = flag(
        [], "result", "NAME=VALUE of variables, STAGE.FLAG=VALUE of stages; values are read as in the file"
    )

    output_dir: str = again(
        OutputArguments,
        "output_dir",
        help="folder for the folders of the stages; the same command again goes on where it stopped",
    )
    launcher: str = flag(
        "", "run", "what to start proposals, pretrain and finetune with: accelerate launch --num_processes 8"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.stages:
            raise ValueError("there are no stages: give a file with `stages:` by --config")
        if self.launcher and not shutil.which(program := shlex.split(self.launcher)[0]):
            raise ValueError(f"--launcher {self.launcher!r}: there is no program {program!r} on the PATH")
        for assignment in self.set:
            self._assign(assignment)

    def _assign(self, assignment: str) -> None:
        name, equals, text = assignment.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {name}: {error}") from error
        stage, *path = name.split(".")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {name!r} without a value")
        if not path:
            if name not in self.variables:
                stages = [stage for stage, given in self.stages.items() if _has_flag(name, stage, given)]
                example = f", here {stages[-1]}.{name}={text}" if stages else ""
                raise ValueError(
                    f"--set: there is no variable {name!r}{nearest(name, self.variables)}. The variables are "
                    f"{', '.join(self.variables) or 'none'}; a flag of a stage is set by STAGE.FLAG=VALUE{example}"
                )
            self.variables = self.variables | {name: value}
            return
        if stage not in self.stages:
            stages = ", ".join(self.stages)
            raise ValueError(
                f"--set: there is no stage {stage!r}{nearest(stage, self.stages)}. The stages are {stages}"
            )
        for key in reversed(path):
            value = {key: value}
        self.stages = merged(self.stages, {stage: value})


def _has_flag(name: str, stage: str, given: Mapping | None) -> bool:
    """Whether a stage has a flag of this name; not where the file does not say which command it is."""
    try:
        return name in fields_of(command_of(stage, given or {}))
    except ValueError:
        return False


@dataclass(kw_only=True)
class ChainArguments(PipelineArguments):
    """Arguments of [`run_chain`]: the flags of `aligndet chain` and the keys of its files."""

    help_groups = {"skip": "Stages", "in_this_process": "Run"}

    skip: list[str] = flag(
        [], "result", "stages to leave out; a flag that refers to one takes the value that it has there"
    )
    in_this_process: bool = flag(False, "run", "run the stages in this process, to debug them")


def plan_chain(arguments: ChainArguments) -> dict[str, Stage]:
    """The stages of a chain that are not left out, by name, each in a folder of its own."""
    return resolve_stages(
        arguments.stages,
        arguments.variables,
        lambda name, *_: f"{arguments.output_dir}/{name}",
        arguments.common,
        skip=set(arguments.skip),
    )


@takes_arguments
def run_chain(arguments: ChainArguments) -> dict[str, Stage]:
    """
    Runs the stages of a chain one after the other, each as a process `aligndet <command>`.

    Every stage writes to `output_dir/<stage>`, with its recipe (`.yaml`) beside it, from which the command can be run
    alone. All settings are checked before the first stage starts. The same call again skips what is finished and
    resumes what was interrupted.

    Args:
        arguments ([`ChainArguments`]): The configuration.

    Returns:
        `dict[str, Stage]`: what was run, by name.

    Raises:
        ValueError: a stage has settings that its command does not accept, or others than when later stages were made
            from it. Nothing was run.
        ChildProcessError: a stage failed; the message names it.
        Interrupted: SIGTERM or SIGINT; the stage that was running got it too.
    """
    with RunFolder(arguments.output_dir, "chain") as folder:
        folder.claim()
        stages = plan_chain(arguments)
        if any(stage.beside(".json") == Path(arguments.output_dir) / RECORD for stage in stages.values()):
            raise ValueError(f"a stage cannot be called 'run': {RECORD} is the record of the chain's folder")
        parsed = {stage: stage.write_recipe() for stage in stages.values()}
        for stage in [stage for stage in parsed if is_finished(stage)]:
            del parsed[stage]
            print(f"stage {stage.name}: finished before, in {stage.folder}", flush=True)
        require_weights(parsed, arguments.variables)

        def tell(stage: Stage, failure: str | None) -> None:
            print(f"stage {stage.name}: {failure or f'finished, in {stage.folder}'}", flush=True)

        failures = run_stages(
            stages.values(),
            num_parallel=0 if arguments.in_this_process else 1,
            launcher=arguments.launcher,
            on_end=tell,
            lock=folder.lock,
        )
    for stage, reason in failures.items():
        raise ChildProcessError(
            f"stage {stage.name!r} (aligndet {stage.command} --config {stage.beside('.yaml')}) failed, "
            f"{reason.rstrip('.')}. When it is mended, the same command goes on from there."
        )
    return stages
