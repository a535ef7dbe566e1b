"""`aligndet <command> [--config recipe.yaml] [--flag value ...]`.

One dataclass per command is its flags, its YAML keys and its Python arguments. The command's module is imported when
the command runs, so that `aligndet --help` answers at once.
"""

import errno
import importlib
import os
import sys
from typing import NamedTuple

from .flags import nearest


class Command(NamedTuple):
    """
    One row of the command table: its name, one line for `--help`, and what its function is called, if not by its name.

    `is_launched` says whether `accelerate launch` can run it in several processes.
    """

    name: str
    summary: str
    called: str | None = None
    is_launched: bool = False

    @property
    def function(self) -> str:
        """The name of its function."""
        return self.called or self.name

    @property
    def module(self) -> str:
        """Where its arguments and its function live."""
        return f"aligndet_hf.commands.{self.name}"

    @property
    def arguments(self) -> str:
        """The dataclass of its arguments."""
        return f"{self.name.capitalize()}Arguments"


_ROWS = [
    Command("check", "look at a data set before a training: what is in it, and everything that is wrong with it"),
    Command(
        "proposals",
        "find object-like boxes in unlabelled images and store them as a `proposals` column",
        "generate_proposals",
        is_launched=True,
    ),
    Command(
        "clusters",
        "sort the proposals into pseudo-classes: k-means over features of a frozen backbone",
        "cluster_proposals",
    ),
    Command(
        "recall",
        "say how many objects the proposals find, beside random boxes and a grid; draw them",
        "measure_recall",
    ),
    Command(
        "pretrain",
        "pre-train a whole detector (or, with SoCo, a backbone) on images with proposals, and export it",
        is_launched=True,
    ),
    Command(
        "knn", "say what a backbone knows of labelled objects: nearest neighbours of their features", "measure_knn"
    ),
    Command("finetune", "fine-tune a pre-trained (or any) detector on labelled images", is_launched=True),
    Command("evaluate", "print the COCO table of a detector, with the AP of every class"),
    Command("predict", "find objects in new images and videos: pictures, COCO and YOLO labels, a data set"),
    Command("export", "write a detector as ONNX, with all that is needed to run it, and compare it with the detector"),
    Command("pseudolabel", "label unlabelled images with the boxes of a fine-tuned detector, and check their classes"),
    Command(
        "convert",
        "read a published checkpoint as a detector of transformers; write a detector for mmdet or torchvision",
    ),
    Command(
        "chain", "run several of these commands, each on the output of those before it, from one file", "run_chain"
    ),
    Command("compare", "say whether pre-training helps on your data: arms x label fractions x seeds, and a report"),
    Command(
        "embeddings",
        "draw what detectors make of labelled objects (t-SNE), and say how well neighbours share a class (kNN)",
        "compare_embeddings",
    ),
    Command("report", "write one HTML file on a run, with its curves, pictures, numbers and settings"),
]
COMMANDS = {row.name: row for row in _ROWS}

USAGE = "usage: aligndet <command> [--config recipe.yaml] [--flag value ...]"
EXAMPLES = """\
from unlabelled images to a fine-tuned detector:
  aligndet proposals --dataset images/ --output_dir outputs/proposals
  aligndet recall    --dataset outputs/proposals --output_dir outputs/recall --num_pictures 8  # a look
  aligndet clusters  --dataset outputs/proposals --backbone_weights timm --output_dir outputs/clusters  # optional
  aligndet pretrain  --dataset outputs/proposals --detector rt_detr --output_dir outputs/pretrained
  aligndet check     --dataset labelled/ --output_dir outputs/check  # is anything wrong with the labels?
  aligndet finetune  --dataset labelled/ --detector outputs/pretrained --output_dir outputs/finetuned
  aligndet evaluate  --dataset labelled/ --split validation --detector outputs/finetuned
  aligndet predict   --images photos/ --detector outputs/finetuned --output_dir outputs/predictions
  aligndet export    --detector outputs/finetuned --images photos/ --output_dir outputs/exported
  aligndet pseudolabel --dataset images/ --labelled_dataset labelled/ --detector outputs/finetuned \\
      --output_dir outputs/pseudo
  aligndet embeddings --dataset labelled/ --detector outputs/pretrained --output_dir outputs/embeddings  # a look
  aligndet report    --run outputs/finetuned  # one HTML file; both trainings write theirs

a backbone of your own instead of ImageNet's, from random weights (docs/soco.md):
  aligndet pretrain  --method soco --dataset outputs/proposals --backbone resnet50 --output_dir outputs/soco
  aligndet knn       --dataset labelled/ --split train --backbone outputs/soco/backbone --output_dir outputs/knn

what others published, and back (docs/checkpoints.md):
  aligndet convert   --from detr-r50.pth --output_dir outputs/detr  # or at once as --detector detr-r50.pth

all of that from one file, or several variants of it compared on your labels with several seeds (docs/compare.md):
  aligndet chain   --config chain.yaml   --output_dir outputs/chain
  aligndet compare --config compare.yaml --output_dir outputs/compare

Every flag is also a key of the YAML recipe given by --config; a flag on the command line wins over the recipe.
`--config` also takes the name of a recipe of the package; `aligndet recipes` lists them, `aligndet recipes NAME` says
where one is. `aligndet <command> --help` lists a command's flags; `accelerate launch -m aligndet_hf pretrain ...` uses
several GPUs.
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
    if command == "recipes":
        from .recipes import find_recipe, recipe_names

        if rest[:1] in (["-h"], ["--help"]):
            print("usage: aligndet recipes [NAME]\n\nlist the recipes of the package, or say where one is")
            return 0
        try:
            print(find_recipe(rest[0]) if rest else "\n".join(recipe_names()))
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
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
        argv (`list[str]`, *optional*): The flags; by default the flags of the process.

    Returns:
        `int`: the exit code, as [`main`] does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv or os.environ.get("ALIGNDET_DEBUG", "0") not in ("", "0")
    argv = [arg for arg in argv if arg != "--traceback"]
    row, arguments = COMMANDS[command], None
    try:
        from .parser import parse_arguments  # not above: transformers takes a second, and `aligndet --help` needs none

        module = importlib.import_module(row.module)
        arguments = parse_arguments(getattr(module, row.arguments), argv, f"aligndet {command}", row.summary)
        result = getattr(module, row.function)(arguments)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if show_traceback:
            raise
        text = str(error)
        if text.startswith("Caught ") and "Original Traceback" in text:  # what torch makes of an error in a worker
            text = text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            import datasets

            places = getattr(arguments, "output_dir", None), datasets.config.HF_DATASETS_CACHE
            full = " or ".join(str(place) for place in places if place)
            text += f" at {full}. Free some, and run the same command again"
        from .data.door import printable  # which loads datasets

        print("error: " + "\n".join(map(printable, text.split("\n"))), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        # `pretrain` raises a subclass after its clean save: which signal it was, and how to resume.
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", 2)
    return getattr(result, "exit_code", 0)


if __name__ == "__main__":
    sys.exit(main())
