"""`aligndet <command> [--config recipe.yaml] [--flag value ...]`.

One dataclass per command is its flags, its YAML keys and its Python arguments. The command's module is imported when
the command runs, so that `aligndet --help` answers at once.
"""

import argparse
import dataclasses
import difflib
import importlib
import json
import os
import shutil
import sys
import typing
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser


class Command(NamedTuple):
    """One row of the command table: where its arguments and its function live, and one line for `--help`."""

    module: str
    arguments: str
    function: str
    summary: str


COMMANDS = {
    "proposals": Command(
        "aligndet_hf.commands.proposals",
        "ProposalsArguments",
        "generate_proposals",
        "find object-like boxes in unlabelled images and store them as a `proposals` column",
    ),
    "clusters": Command(
        "aligndet_hf.commands.clusters",
        "ClustersArguments",
        "cluster_proposals",
        "sort the proposals into pseudo-classes: k-means over features of a frozen backbone",
    ),
    "recall": Command(
        "aligndet_hf.commands.recall",
        "RecallArguments",
        "measure_recall",
        "say how many objects the proposals find, beside random boxes and a grid; draw them",
    ),
    "pretrain": Command(
        "aligndet_hf.commands.pretrain",
        "PretrainArguments",
        "pretrain",
        "pre-train a whole detector (or, with SoCo, a backbone) on images with proposals, and export it",
    ),
    "knn": Command(
        "aligndet_hf.commands.knn",
        "KnnArguments",
        "measure_knn",
        "say what a backbone knows of labelled objects: nearest neighbours of their features",
    ),
    "finetune": Command(
        "aligndet_hf.commands.finetune",
        "FinetuneArguments",
        "finetune",
        "fine-tune a pre-trained (or any) detector on labelled images",
    ),
    "evaluate": Command(
        "aligndet_hf.commands.evaluate",
        "EvaluateArguments",
        "evaluate",
        "print the COCO table of a detector, with the AP of every class",
    ),
    "predict": Command(
        "aligndet_hf.commands.predict",
        "PredictArguments",
        "predict",
        "find objects in new images and videos: pictures, COCO and YOLO labels, a data set",
    ),
    "chain": Command(
        "aligndet_hf.commands.chain",
        "ChainArguments",
        "run_chain",
        "run several of these commands, each on the output of those before it, from one file",
    ),
    "compare": Command(
        "aligndet_hf.commands.compare",
        "CompareArguments",
        "compare",
        "say whether pre-training helps on your data: arms x label fractions x seeds, and a report",
    ),
    "embeddings": Command(
        "aligndet_hf.commands.embeddings",
        "EmbeddingsArguments",
        "compare_embeddings",
        "draw what detectors make of labelled objects (t-SNE), and say how well neighbours share a class (kNN)",
    ),
    "report": Command(
        "aligndet_hf.commands.report",
        "ReportArguments",
        "report",
        "write one HTML file on a run, with its curves, pictures, numbers and settings",
    ),
}

USAGE = "usage: aligndet <command> [--config recipe.yaml] [--flag value ...]"
EXAMPLES = """\
from unlabelled images to a fine-tuned detector:
  aligndet proposals --dataset images/ --output_dir outputs/proposals
  aligndet recall    --dataset outputs/proposals --output_dir outputs/recall --num_pictures 8  # a look
  aligndet clusters  --dataset outputs/proposals --backbone_weights timm --output_dir outputs/clusters  # optional
  aligndet pretrain  --dataset outputs/proposals --detector rt_detr --output_dir outputs/pretrained
  aligndet finetune  --dataset labelled/ --detector outputs/pretrained/detector --output_dir outputs/finetuned
  aligndet evaluate  --dataset labelled/ --split validation --detector outputs/finetuned
  aligndet predict   --images photos/ --detector outputs/finetuned --output_dir outputs/predictions
  aligndet embeddings --dataset labelled/ --detector outputs/pretrained --output_dir outputs/embeddings  # a look
  aligndet report    --run outputs/finetuned  # one HTML file; both trainings write theirs

a backbone of your own instead of ImageNet's, from random weights (docs/soco.md):
  aligndet pretrain  --method soco --dataset outputs/proposals --backbone resnet50 --output_dir outputs/soco
  aligndet knn       --dataset labelled/ --backbone outputs/soco/backbone --output_dir outputs/knn  # what it knows

all of that from one file, or several variants of it compared on your labels with several seeds (docs/compare.md):
  aligndet chain   --config chain.yaml   --output_dir outputs/chain
  aligndet compare --config compare.yaml --output_dir outputs/compare

Every flag is also a key of the YAML recipe given by --config; a flag on the command line wins over the recipe.
`aligndet <command> --help` lists a command's flags; `accelerate launch scripts/pretrain.py ...` uses several GPUs.
`--source` of `aligndet proposals` takes boxes from elsewhere, say from a detector of an earlier round."""


def main(argv: list[str] | None = None) -> int:
    """Run the console command and return the exit code: 0, 2 for bad input, 128 + the signal that interrupted it."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in COMMANDS:
        return run(command, rest)
    if command in ("-h", "--help", "help"):
        summaries = [f"  {name:<10} {row.summary}" for name, row in COMMANDS.items()]
        print("\n".join([USAGE, "", "commands:", *summaries, "", EXAMPLES]))
        return 0
    if command == "--version":
        from aligndet_hf import __version__

        print(__version__)
        return 0
    print(f"error: there is no command {command!r}{nearest(command, COMMANDS)}\n{USAGE}", file=sys.stderr)
    return 2


def run(command: str, argv: list[str] | None = None) -> int:
    """
    Parse the arguments of one command and run it.

    Errors that the user can mend (`ValueError`, which `DataError` is, `OSError`, `FloatingPointError`, `ImportError`)
    are printed as one line; the traceback is shown with `--traceback` or `ALIGNDET_DEBUG=1`.

    Args:
        command (`str`): A key of `COMMANDS`.
        argv (`list[str]`, *optional*): The flags; those of the process by default.

    Returns:
        `int`: the exit code, as [`main`] does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv or os.environ.get("ALIGNDET_DEBUG", "0") not in ("", "0")
    argv = [arg for arg in argv if arg != "--traceback"]
    row = COMMANDS[command]
    try:
        module = importlib.import_module(row.module)
        arguments = parse_arguments(getattr(module, row.arguments), argv, f"aligndet {command}", row.summary)
        getattr(module, row.function)(arguments)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if show_traceback:
            raise
        text = str(error)
        if text.startswith("Caught ") and "Original Traceback" in text:  # what torch makes of an error in a worker
            text = text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        # `pretrain` raises a subclass after its clean save: which signal it was, and how to resume.
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", 2)
    return 0


def parse_arguments(cls: type, argv: list[str], prog: str = "aligndet", description: str | None = None):
    """
    Build the dataclass `cls` from flags and an optional `--config` YAML file.

    The recipe's values become the defaults of the flags, so a flag on the command line wins. Values of the recipe go
    through the same conversion as flags (`1e-4`, which YAML reads as text, is a float where a float is due). Fields of
    type `dict` take JSON on the command line and a mapping in YAML.

    Args:
        cls (`type`): A dataclass; the metadata of a field holds its `help`.
        argv (`list[str]`): The flags.
        prog (`str`): What `--help` calls the command.
        description (`str`, *optional*): The first line of `--help`.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: an unknown flag or key (the nearest valid one is named), a value of the wrong type, or a required
            one that is missing.
    """
    parser = ArgumentParser(cls, show_all="--help-all" in argv, prog=prog, description=description)
    argv = ["--help" if arg == "--help-all" else arg for arg in argv]
    config, argv = _split_config(argv)
    if config is not None:
        parser.set_defaults_from(config)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}")
    return cls(**vars(namespace))


class ArgumentParser(HfArgumentParser):
    """
    `HfArgumentParser` that raises instead of exiting, reads `dict` fields as JSON, and prints a help one can read.

    A dataclass names the sections of its help in the class attribute `help_groups`, a dictionary from the first field
    of a section to its title. Fields inherited from another package (`transformers.TrainingArguments`) are accepted as
    well, but listed only with `--help-all`.
    """

    usage_line = "%(prog)s [--config recipe.yaml] [--flag value ...]"

    def __init__(self, cls: type, show_all: bool = False, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, usage=self.usage_line, **kwargs)
        self.fields = {field.name for field in dataclasses.fields(cls) if field.init}
        self.titles = _help_titles(cls)
        titles = sorted(dict.fromkeys(self.titles.values()), key="Hub".__eq__)  # which comes last
        self.sections = {title: self.add_argument_group(title) for title in titles}
        self.inherited = self.add_argument_group("Inherited")
        self.show_all = show_all
        common = self.add_argument_group("Common")
        common.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML recipe of these flags")
        common.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="for a bug report")
        self._add_dataclass_arguments(cls)
        if self.inherited._group_actions and not show_all:
            self.epilog = "The flags of transformers.TrainingArguments are accepted as well; --help-all lists them."

    def _parse_dataclass_field(self, parser, field: dataclasses.Field):
        section = self.sections[self.titles[field.name]] if field.name in self.titles else self.inherited
        known = len(self._actions)
        is_dict = dict in {typing.get_origin(hint) or hint for hint in (field.type, *typing.get_args(field.type))}
        HfArgumentParser._parse_dataclass_field(section, field)
        for action in self._actions[known:]:
            if is_dict and section is not self.inherited:
                action.type, action.metavar = _json_mapping, "JSON"
            is_complement = action.option_strings[0] == f"--no_{field.name}"
            if is_complement or (section is self.inherited and not self.show_all):
                action.help = argparse.SUPPRESS

    def set_defaults_from(self, config: str):
        """Make the values of a YAML file the defaults, as if they had been given as flags."""
        with open(config, encoding="utf-8") as file:
            try:
                values = yaml.safe_load(file) or {}
            except yaml.YAMLError as error:
                raise ValueError(f"{config} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{config} must be a mapping of `flag: value` lines, not a {type(values).__name__}")
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False  # While only the recipe is parsed.
        for key, value in values.items():
            if key not in self.fields:
                raise ValueError(f"{config}: unknown key {key!r}{nearest(str(key), self.fields)}")
            if value is not None and value != []:
                try:
                    value = getattr(self.parse_args(_as_flags(key, value)), key)
                except ValueError as error:
                    raise ValueError(f"{config}: {error}") from error
            self.set_defaults(**{key: value})
        for action in required:
            action.required = action.dest not in values

    def error(self, message: str):
        raise ValueError(message)


class HelpFormatter(argparse.HelpFormatter):
    """One spelling of each flag, the type of its value, and its default where it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {"string_to_bool": "true|false", "str": "TEXT"}
        name = getattr(action.type, "__name__", "value")
        return names.get(name, name.upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        if action.default is argparse.SUPPRESS or action.default in (None, [], {}, "") or action.nargs == 0:
            return action.help
        return f"{action.help} (default: %(default)s)"


def _help_titles(cls: type) -> dict[str, str]:
    """The section title of every field that one of our classes declares, in the order in which help lists them."""
    titles = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("transformers"):
            title = base.__name__.removesuffix("Arguments")
            for name in vars(base).get("__annotations__", ()):
                title = vars(base).get("help_groups", {}).get(name, title)
                titles[name] = title
    return titles


def _as_flags(key: str, value) -> list[str]:
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    return found.config, rest


def _json_mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON mapping is due, such as '{{\"num_queries\": 100}}', not: {text}")
    return value


def nearest(name: str, valid) -> str:
    """What to add to a message about a name that does not exist: the valid one that it is closest to, if any."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


if __name__ == "__main__":
    sys.exit(main())
