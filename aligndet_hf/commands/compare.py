"""`aligndet compare`: does pre-training help on one's own data? Arms x label fractions x seeds, under one protocol."""

import csv
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.formats import load_dataset_source
from ..data.leakage import Fingerprints, find_leaks, fingerprints
from ..data.splits import nested_subsets
from ..files import write_json
from ..flags import names_of, nearest
from ..pipelines.inputs import path_hash
from ..pipelines.runner import is_finished, record_of, run_stages
from ..pipelines.stages import (
    Stage,
    command_of,
    fields_of,
    merged,
    require_plain_name,
    resolve_stages,
    without_secrets,
)
from ..ranges import PART, SEED, SHARE
from ..recipes import find_recipe
from ..reporting.comparison import environment, write_report
from ..reporting.paired import Run, compare_runs
from ..reporting.pictures import new_figure
from ..runs import RunFolder
from ..training.finetune_arguments import FinetuneArguments
from .chain import PipelineArguments

# What an arm may set in the common fine-tuning and still be compared under the same protocol.
START = names_of(FinetuneArguments, "start")
# What the comparison sets in every stage that has it.
PER_RUN = {"seed": "${seed}", "label_fraction": "${fraction}", "label_seed": "${seed}"}
TRAINED = ("pretrain", "finetune")  # the commands that see the images in training
RESULTS, TABLE, LEAKAGE, SUBSETS = "results.json", "results.csv", "leakage.json", "label_subsets.json"

# Without a file: selective search, AlignDet and fine-tuning with the defaults of the commands.
STAGES = {
    "proposals": {"dataset": "${dataset}", "split": "train"},
    "pretrain": {"dataset": "${proposals}", "detector": "${detector}"},
    "finetune": {"dataset": "${dataset}", "detector": "${pretrain}/detector"},
}
COMMON = {"backbone": "${backbone}", "backbone_weights": "${weights}"}
VARIABLES = {"dataset": None, "detector": "rt_detr", "backbone": "resnet50", "weights": "timm"}


@dataclass(kw_only=True)
class CompareArguments(PipelineArguments):
    """Arguments of [`compare`]: the flags of `aligndet compare` and the keys of its files."""

    help_groups = {"arms": "Comparison", "num_parallel": "Run"}

    arms: dict[str, Any] = field(
        default_factory=lambda: {"plain": {"pretrain": None}, "aligndet": {}},
        metadata={
            "role": "result",
            "help": "names of starting points, and what each changes: stages and their flags, null to leave one out, "
            "or `chain: FILE` for the stages of another chain before the last one",
        },
    )
    checkpoints: list[str] = field(
        default_factory=list,
        metadata={
            "role": "result",
            "help": "NAME=DETECTOR: an arm for each, that starts from this checkpoint (folder or Hub id)",
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={"role": "result", "help": "the arm to compare with: `plain`, or else the first, if not given"},
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.01, 0.05, 0.1, 0.2, 1.0],
        metadata={"role": "result", "help": "shares of the labels to fine-tune with", "range": PART},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={
            "role": "result",
            "help": "each draws its labels and trains all arms; a stage with `seed` of its own is run once",
            "range": SEED,
        },
    )
    target_ap: list[float] = field(
        default_factory=list,
        metadata={
            "role": "output",
            "help": "AP values (0 to 1) to count the steps to, beside the baseline's last",
            "range": SHARE,
        },
    )
    allow_leakage: bool = field(
        default=False, metadata={"role": "run", "help": "run although evaluation images are among the training images"}
    )

    num_parallel: int = field(
        default=1,
        metadata={
            "role": "run",
            "help": "runs at the same time, each a process; 0: one after the other in this process",
        },
    )

    def __post_init__(self):
        if not self.stages:
            self.stages, self.common = STAGES, COMMON | self.common
            self.variables = VARIABLES | self.variables
        super().__post_init__()
        self.measured = list(self.stages)[-1]
        for text in self.checkpoints:
            name, equals, detector = text.partition("=")
            if not equals or not name:
                raise ValueError(f"--checkpoints takes NAME=DETECTOR, got {text!r}")
            self.arms = self.arms | {name: {self.measured: {"detector": detector}}}
        if (self.stages[self.measured] or {}).get("command", self.measured) != "finetune":
            raise ValueError(f"the last stage, {self.measured!r}, must be a `finetune`: it is what the arms share")
        if set_here := sorted(set(PER_RUN) & set(self.stages[self.measured])):
            raise ValueError(f"stage {self.measured!r}: {set_here[0]} is set by the comparison (--fractions, --seeds)")
        if set_here := sorted(set(PER_RUN) & set(self.common)):
            raise ValueError(f"common: {set_here[0]} is set by the comparison (--fractions, --seeds)")
        if not self.arms or "shared" in self.arms:
            raise ValueError("there must be arms, and none of them called `shared`, the folder of common stages")
        for name, changes in self.arms.items():
            require_plain_name("arm", name)
            if not isinstance(changes, Mapping | None):
                raise ValueError(f"arm {name!r} must be a mapping of stages to what changes in them, not {changes!r}")
        self.baseline = self.baseline or ("plain" if "plain" in self.arms else next(iter(self.arms)))
        if self.baseline not in self.arms:
            raise ValueError(f"there is no arm {self.baseline!r}{nearest(self.baseline, self.arms)}")
        for name in ("fractions", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different values, at least one, got {values}")


@dataclass(eq=False)
class Job:
    """One fine-tuning run of an arm, with the stages that lead to it."""

    arm: str
    fraction: float
    seed: int
    stages: list[Stage]  # the last is the measured one

    @property
    def measured(self) -> Stage:
        return self.stages[-1]

    def __str__(self) -> str:
        return f"{self.arm}, {100 * self.fraction:g} % of the labels, seed {self.seed}"


def compare(arguments: CompareArguments) -> dict:
    """
    Fine-tunes from several starting points with the same labels, steps and evaluation, and says which is better.

    Writes to `output_dir`: `report.md` with its plots, `results.csv` (a line per run), `results.json` (these with
    their learning curves, and the statistics), `label_subsets.json`, `leakage.json`, and the folders of all stages;
    what several runs share is done once, in `shared/`. The same call again goes on with what is not finished, and
    does nothing where all is.

    Args:
        arguments ([`CompareArguments`]): The configuration.

    Returns:
        `dict`: The content of `results.json`.

    Raises:
        ValueError: a stage has settings that its command does not accept, or (unless it is allowed) evaluation images
            are among the training images. Nothing was run.
        ChildProcessError: some runs failed, the others are done and reported. The message lists them.
        Interrupted: SIGTERM or SIGINT, which the running stages got too.
    """
    output_dir = Path(arguments.output_dir)
    new_figure(1, 1)  # says now, not after days, that matplotlib is missing
    with RunFolder(output_dir, "compare", written=[RESULTS, TABLE, LEAKAGE, SUBSETS, "report.md"]) as folder:
        folder.claim()
        jobs = plan_jobs(arguments)
        stages = list(dict.fromkeys(stage for job in jobs for stage in job.stages))
        parsed = {stage: stage.write_recipe() for stage in stages}
        check = _check_data(arguments, jobs, parsed[jobs[0].measured], output_dir)
        ended = sum(map(is_finished, stages))
        print(
            f"{len(jobs)} runs of {len(arguments.arms)} arms, {len(stages)} stages; {ended} are finished.", flush=True
        )

        measured = {job.measured: job for job in jobs}

        def tell(stage: Stage, failure: str | None) -> None:
            nonlocal ended
            ended += 1
            line = f"[{ended}/{len(stages)}] {measured.get(stage, stage.folder.relative_to(output_dir))}: "
            if failure is not None:
                print(f"{line}failed, {failure}", flush=True)
                return
            line += f"{record_of(stage)['seconds']:.0f} s"
            if stage in measured:
                line += f", AP {100 * _results_of(stage)['metrics']['AP']:.1f}"
                _report(arguments, jobs, {}, check, output_dir, with_plots=False)
            print(line, flush=True)

        failures = run_stages(
            stages,
            num_parallel=arguments.num_parallel,
            launcher=arguments.launcher,
            logs=True,
            keep_going=True,
            on_end=tell,
            lock=folder.lock,
        )
        results = _report(arguments, jobs, failures, check, output_dir)
    print(f"Report: {output_dir / 'report.md'}")
    if failures:
        listed = "\n".join(f"  {stage.folder}: {reason}" for stage, reason in failures.items())
        raise ChildProcessError(
            f"{len(failures)} of {len(stages)} stages failed; the same command again tries them anew:\n{listed}"
        )
    return results


def plan_jobs(arguments: CompareArguments) -> list[Job]:
    """
    All runs with their stages, in the order in which they are done: seed by seed, so that pairs come early.

    Two stages with the same settings are one. Its folder is `shared/<stage>` if it is as in the file, else
    `<arm>/<stage>`, with the fraction and the seed if it depends on them.
    """
    folders: dict[str, Path] = {}
    canonical: dict[Path, Stage] = {}

    def resolve(owner: str, changes: Mapping, fraction: float, seed: int) -> list[Stage]:
        stages, skip, variables = _of_arm(arguments, changes)
        values = {"fraction": fraction, "seed": seed}

        def place(name, command, settings, uses):
            told = {"fraction": f"{fraction:g}", "seed": seed}
            varying = "".join(f"-{key}-{value}" for key, value in told.items() if key in uses)
            folder = Path(arguments.output_dir) / owner / f"{name}{varying}"
            if name == arguments.measured:
                return folder
            return folders.setdefault(json.dumps([command, settings], sort_keys=True), folder)

        found = resolve_stages(stages, variables | values, place, arguments.common, PER_RUN, skip)
        for stage in found.values():
            stage.needs = [canonical[need.folder] for need in stage.needs]
            canonical.setdefault(stage.folder, stage)
        return [canonical[stage.folder] for stage in found.values()]

    jobs = []
    for seed in arguments.seeds:
        for fraction in arguments.fractions:
            resolve("shared", {}, fraction, seed)  # first, so that what is as in the file gets its folder there
            for arm, changes in arguments.arms.items():
                try:
                    stages = resolve(arm, changes or {}, fraction, seed)
                except ValueError as error:
                    raise ValueError(f"arm {arm!r}: {error}") from error
                jobs.append(Job(arm, fraction, seed, _needed(stages)))
                _refuse_other_labels(jobs[-1])
    return jobs


def _of_arm(arguments: CompareArguments, changes: Mapping) -> tuple[dict, set[str], dict]:
    """The stages of an arm, the stages that it leaves out, and the variables."""
    changes = dict(changes)
    stages, variables, measured = dict(arguments.stages), arguments.variables, arguments.measured
    if file := changes.pop("chain", None):
        chain = _read_chain(file)
        variables = chain["variables"] | variables
        own, last = chain["stages"], list(chain["stages"])[-1]
        start = {}
        if own[last].get("command", last) == "finetune":
            start = {key: value for key, value in own[last].items() if key in ("detector", "transfer")}
            del own[last]
        stages = own | {measured: merged(stages[measured], start)}
    skip = {name for name, change in changes.items() if change is None}
    for name, change in changes.items():
        if name not in stages and change is not None:
            last = stages.pop(measured)
            stages |= {name: change, measured: last}
        elif change is not None:
            stages[name] = merged(stages[name] or {}, change)
    if measured in skip:
        raise ValueError(f"stage {measured!r} is what is measured: no arm can do without")
    if set_here := sorted(set(PER_RUN) & set(stages[measured])):
        raise ValueError(f"stage {measured!r}: {set_here[0]} is set by the comparison (--fractions, --seeds)")
    return stages, skip, variables


def _read_chain(file: str) -> dict:
    """The file of a chain, with what is `common` in it made part of its stages."""
    content = yaml.safe_load(find_recipe(file).read_text(encoding="utf-8"))
    if not isinstance(content, Mapping) or not isinstance(content.get("stages"), Mapping) or not content["stages"]:
        raise ValueError(f"{file} is no chain: there is no mapping `stages`")
    common = content.get("common") or {}
    stages = {}
    for name, given in content["stages"].items():
        given = given or {}
        known = fields_of(command_of(name, given))
        given = merged({key: value for key, value in common.items() if key in known}, given)
        # Which labels are used is up to the comparison.
        stages[name] = {key: value for key, value in given.items() if key not in ("label_fraction", "label_seed")}
    return {"stages": stages, "variables": content.get("variables") or {}}


def _needed(stages: list[Stage]) -> list[Stage]:
    """The last stage and all that it needs, in order."""
    needed, more = set(), [stages[-1]]
    while more:
        stage = more.pop()
        needed.add(stage)
        more += stage.needs
    return [stage for stage in stages if stage in needed]


def _refuse_other_labels(job: Job) -> None:
    """A stage before the measured one that is trained with labels must not know more of them."""
    for stage in job.stages[:-1]:
        same_data = all(stage.settings.get(key) == job.measured.settings.get(key) for key in ("dataset", "split"))
        labels = [stage.settings.get(key) for key in ("label_fraction", "label_seed")]
        if stage.command == "finetune" and same_data and labels != [job.fraction, job.seed]:
            raise ValueError(
                f"arm {job.arm!r}, stage {stage.name!r} would be trained with other labels of the same data than the "
                "measured stage: leave label_fraction and label_seed to the comparison"
            )


# ---- the data ----


def _check_data(arguments: CompareArguments, jobs: list[Job], settings: FinetuneArguments, output_dir: Path) -> dict:
    """
    Writes the label subsets, and looks for evaluation images among the training images of all arms.

    Args:
        arguments, jobs, output_dir: The comparison.
        settings (`FinetuneArguments`): Of a measured stage: which data it is trained with and measured on.

    Returns:
        `dict`: `evaluation` (what is measured on), `images` (training images by fraction), `leakage`.
    """
    labelled = load_dataset_source(settings.dataset, settings.split, labels=True, image_dir=settings.image_dir)
    subsets = {seed: nested_subsets(len(labelled), arguments.fractions, seed) for seed in arguments.seeds}
    write_json(
        output_dir / SUBSETS,
        {
            "dataset": settings.dataset,
            "split": settings.split,
            "rows": {seed: {f"{share:g}": rows for share, rows in by.items()} for seed, by in subsets.items()},
        },
    )
    held_out = (settings.eval_dataset, settings.eval_split, settings.eval_image_dir)
    seen = sorted({_origin(stage, job.stages) for job in jobs for stage in job.stages if stage.command in TRAINED})
    leakage = _leakage(held_out, seen, output_dir)
    copies = [leak for leak in leakage["leaks"] if leak["same_file"]]
    alike = len(leakage["leaks"]) - len(copies)
    if copies and not arguments.allow_leakage:
        raise ValueError(
            f"{len(copies)} of {leakage['images']} evaluation images are training images, such as "
            f"{copies[0]['image']} (all in {output_dir / LEAKAGE}): choose another eval_split, or --allow_leakage true"
        )
    if leakage["leaks"]:
        print(
            f"warning: of {leakage['images']} evaluation images {len(copies)} are training images and {alike} look "
            f"like one: see {output_dir / LEAKAGE}"
        )
    return {
        "evaluation": {"dataset": held_out[0], "split": held_out[1], "images": leakage["images"]},
        "images": {f"{share:g}": len(rows) for share, rows in subsets[arguments.seeds[0]].items()},
        "leakage": leakage,
    }


def _origin(stage: Stage, stages: list[Stage]) -> tuple[str, str, str]:
    """Where the training images of a stage come from: data set, split and image folder, empty if not given."""
    by_folder = {str(other.folder): other for other in stages}
    settings, split = stage.settings, stage.settings.get("split") or "train"
    while settings["dataset"] in by_folder:
        settings = by_folder[settings["dataset"]].settings
        split = settings.get("split") or split
    return str(settings["dataset"]), split, settings.get("image_dir") or ""


def _leakage(held_out: tuple, seen: list[tuple], output_dir: Path) -> dict:
    """The evaluation images that are among the training images; not computed again for the same sources."""
    sources = {"evaluation": list(held_out), "training": [list(source) for source in seen]}
    paths = {source: Path(source[0]).expanduser() for source in [held_out, *seen]}
    sources["content"] = [path_hash(path, source[2] or None) for source, path in paths.items() if path.exists()]
    path = output_dir / LEAKAGE
    if path.exists() and (known := json.loads(path.read_text()))["sources"] == sources:
        return known

    def of(dataset: str, split: str | None, image_dir: str | None) -> Fingerprints:
        return fingerprints(load_dataset_source(dataset, split or None, image_dir=image_dir or None))

    measured, trained = of(*held_out), [of(*source) for source in seen]
    found = {
        "sources": sources,
        "images": len(measured.names) + measured.num_unreadable,
        "training_images": [len(prints.names) for prints in trained],
        "unreadable": measured.num_unreadable + sum(prints.num_unreadable for prints in trained),
        "leaks": [],
    }
    worst: dict[str, dict] = {}
    for prints in trained:
        for leak in find_leaks(prints, measured):
            if leak["image"] not in worst or leak["distance"] < worst[leak["image"]]["distance"]:
                worst[leak["image"]] = leak
    found["leaks"] = list(worst.values())
    write_json(path, found)
    return found


# ---- the results ----


def _results_of(stage: Stage) -> dict:
    """What a finished fine-tuning run reached: its `metrics`, its learning `curve`, its `steps`."""
    record = json.loads((stage.folder / "results.json").read_text())
    classes = list(record["metrics"]["per_class"])
    curve = {}
    for entry in json.loads((stage.folder / "trainer_state.json").read_text())["log_history"]:
        if "eval_AP" in entry:
            per_class = {name: entry[f"eval_AP_{name}"] for name in classes}
            curve[entry["step"]] = {"step": entry["step"], "AP": entry["eval_AP"], "per_class": per_class}
    return {"metrics": record["metrics"], "curve": list(curve.values()), "steps": record["steps"]}


def _report(arguments, jobs, failures, check, output_dir, with_plots=True) -> dict:
    """Writes all results that there are by now, and returns them."""
    runs, rows = [], []
    for job in jobs:
        if is_finished(job.measured):
            found = _results_of(job.measured)
            runs.append(Run(job.arm, job.fraction, job.seed, found["metrics"], found["curve"]))
            row = {"arm": job.arm, "fraction": job.fraction, "seed": job.seed, "steps": found["steps"]}
            row |= {key: value for key, value in found["metrics"].items() if key != "per_class"}
            rows.append(row | {f"AP_{name}": value for name, value in found["metrics"]["per_class"].items()})
    stages = list(dict.fromkeys(stage for job in jobs for stage in job.stages))
    baseline = next(job for job in jobs if job.arm == arguments.baseline).measured.settings
    results = {
        "config": {
            name: without_secrets(getattr(arguments, name), stages)
            for name in ("stages", "common", "variables", "arms", "baseline", "fractions", "seeds", "target_ap")
        },
        "environment": environment(),
        "baseline": arguments.baseline,
        "arms": {
            arm: _differences(next(job for job in jobs if job.arm == arm).measured.settings, baseline, output_dir)
            for arm in arguments.arms
        },
        "protocol": {
            key: value for key, value in baseline.items() if key not in START | set(PER_RUN) | {"output_dir"}
        },
        **check,
        "stages": [
            {"folder": str(stage.folder.relative_to(output_dir)), "command": stage.command} | record_of(stage)
            for stage in stages
            if is_finished(stage)
        ],
        "seconds": {arm: _seconds([job for job in jobs if job.arm == arm]) for arm in arguments.arms},
        "failures": {str(stage.folder.relative_to(output_dir)): reason for stage, reason in failures.items()},
        "planned": len(jobs),
        "runs": [dataclasses.asdict(run) for run in runs],
        "statistics": {
            f"{fraction:g}": arms
            for fraction, arms in compare_runs(runs, arguments.baseline, arguments.target_ap).items()
        },
    }
    write_json(output_dir / RESULTS, results)
    with open(output_dir / TABLE, "w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    write_report(output_dir, json.loads(json.dumps(results)), with_plots)
    return results


def _seconds(jobs: list[Job]) -> dict[str, float | None]:
    """What a run of an arm takes, in the mean: the stages `before` the measured one, and that one."""
    done = [[record_of(stage)["seconds"] for stage in job.stages] for job in jobs if is_finished(job.measured)]
    if not done:
        return {"before": None, "measured": None}
    return {
        "before": sum(sum(seconds[:-1]) for seconds in done) / len(done),
        "measured": sum(seconds[-1] for seconds in done) / len(done),
    }


def _differences(settings: Mapping, baseline: Mapping, output_dir: Path) -> dict[str, dict]:
    """In what an arm's measured stage differs from the baseline's: `start`, and (it should not) `protocol`."""
    keys = [key for key in (*settings, *(set(baseline) - set(settings))) if settings.get(key) != baseline.get(key)]
    values = {
        key: value.removeprefix(f"{output_dir}/") if isinstance(value := settings.get(key), str) else value
        for key in keys
        if key != "output_dir"
    }
    return {
        "start": {key: value for key, value in values.items() if key in START},
        "protocol": {key: value for key, value in values.items() if key not in START},
    }
