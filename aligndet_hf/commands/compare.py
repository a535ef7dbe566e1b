"""`aligndet compare`: does pre-training help on one's own data? Arms x label fractions x seeds, under one protocol."""

import csv
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.formats import load_dataset_source
from ..data.leakage import look_for_leaks
from ..data.splits import is_same_split, nested_subsets
from ..evaluation.image_matches import MATCHES, ImageMatches
from ..files import write_json
from ..flags import flag, nearest, takes_arguments
from ..pipelines.inputs import path_hash, require_weights
from ..pipelines.outcomes import (
    START,
    TRAINED,
    differences_of,
    draw_arms,
    is_without_crops,
    keeps_best,
    mean_costs,
    planned_images,
    require_same_lengths,
    results_of,
    steps_for,
)
from ..pipelines.progress import Progress, planned_steps
from ..pipelines.runner import is_finished, record_of, run_stages
from ..pipelines.stages import (
    Stage,
    fields_of,
    merged,
    needed_for,
    origin_of,
    pseudo_origin_of,
    read_chain,
    require_plain_name,
    resolve_stages,
    setting,
    without_secrets,
)
from ..ranges import PART, SEED, SHARE
from ..reporting import html_report
from ..reporting.comparison import environment, write_report
from ..reporting.paired import Run, compare_runs, resampled_precisions
from ..reporting.pictures import new_figure
from ..reporting.verdict import verdict
from ..runs import RunFolder
from ..training.finetune_arguments import FinetuneArguments
from ..training.publish import tell_comparison
from .chain import PipelineArguments

# What the comparison sets in every stage that has it.
PER_RUN = {"seed": "${seed}", "label_fraction": "${fraction}", "label_seed": "${seed}"}
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

    arms: dict[str, Any] = flag(
        {"plain": {"pretrain": None}, "aligndet": {}},
        "result",
        "names of starting points, and what each changes: stages and their flags, null to leave one out, `chain: "
        "FILE` for the stages of another chain before the last one, `fraction: 1.0` for a share of the labels of its "
        "own, as a ceiling",
    )
    checkpoints: list[str] = flag(
        [], "result", "NAME=DETECTOR: an arm for each, that starts from this checkpoint (folder or Hub id)"
    )
    baseline: str | None = flag(None, "result", "the arm to compare with: `plain`, or else the first, if not given")
    fractions: list[float] = flag(
        [0.01, 0.05, 0.1, 0.2, 1.0], "result", "shares of the labels to fine-tune with", range=PART
    )
    seeds: list[int] = flag(
        [0, 1, 2],
        "result",
        "each draws its labels and trains all arms; a stage with `seed` of its own is run once",
        range=SEED,
    )
    baseline_long: bool = flag(
        False, "result", "add an arm like the baseline with twice its steps, to see whether the baseline has converged"
    )
    baseline_all_compute: bool = flag(
        False,
        "result",
        "add an arm like the baseline whose fine-tuning sees as many images as the costliest other arm in all its "
        "stages",
    )
    target_ap: list[float] = flag(
        [], "output", "AP values (0 to 1) to count the steps to, beside the baseline's last", range=SHARE
    )
    allow_leakage: bool = flag(False, "run", "run although evaluation images are among the training images")

    num_pictures: int = flag(4, "output", "draw what all arms find in this many evaluation images")

    num_parallel: int = flag(1, "run", "runs at the same time, each a process; 0: one after the other in this process")

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
            self._add_arm(name, {self.measured: {"detector": detector}}, "--checkpoints")
        if (self.stages[self.measured] or {}).get("command", self.measured) != "finetune":
            raise ValueError(f"the last stage, {self.measured!r}, must be a `finetune`: it is what the arms share")
        _refuse_what_is_set_here(f"stage {self.measured!r}", self.stages[self.measured])
        _refuse_what_is_set_here("common", self.common)
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

    def _add_arm(self, name: str, changes: dict, flag: str) -> None:
        if self.arms.get(name, changes) != changes:
            raise ValueError(f"{flag} would replace the arm {name!r}: give one of the two another name")
        self.arms = self.arms | {name: changes}


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


@takes_arguments
def compare(arguments: CompareArguments) -> dict:
    """
    Fine-tunes from several starting points with the same labels, steps and evaluation, and says which is better.

    Writes to `output_dir`: `report.html` (one file with everything in it, also what all arms find in the same images),
    `report.md` with its plots, `results.csv` (a line per run), `results.json` (these with their learning curves, and
    the statistics), `label_subsets.json`, `leakage.json`, and the folders of all stages; what several runs share is
    done once, in `shared/`. The same call again goes on with what is not finished, and does nothing where all is.

    Args:
        arguments ([`CompareArguments`]): The configuration.

    Returns:
        `dict`: The content of `results.json`.

    Raises:
        ValueError: a stage has settings that its command does not accept, or another length than the run in its
            folder; or (unless it is allowed) evaluation images are among the training images. Nothing was run.
        ChildProcessError: some runs failed, the others are done and reported. The message lists them.
        Interrupted: SIGTERM or SIGINT, which the running stages got too.
    """
    output_dir = Path(arguments.output_dir)
    new_figure(1, 1)  # says now, not after days, that matplotlib is missing
    written = [RESULTS, TABLE, LEAKAGE, SUBSETS, "report.md", "report.html", "arms-*.jpg"]
    with RunFolder(output_dir, "compare", written=written) as folder:
        folder.claim()
        jobs = plan_jobs(arguments)
        stages = list(dict.fromkeys(stage for job in jobs for stage in job.stages))
        parsed = {stage: stage.write_recipe() for stage in stages}
        require_same_lengths(parsed)
        require_weights({stage: parsed[stage] for stage in stages if not is_finished(stage)}, arguments.variables)
        check = _check_data(arguments, jobs, parsed[jobs[0].measured], output_dir)
        measured = {job.measured: str(job) for job in reversed(jobs)}  # of arms that share it, the first
        names = {stage: str(stage.folder.relative_to(output_dir)) for stage in stages} | measured
        origins = map(tuple, check["leakage"]["sources"]["training"])
        images = dict(zip(origins, check["leakage"]["training_images"], strict=True))
        steps = planned_steps([job.stages for job in jobs], images)
        progress = Progress(stages, names, steps, arguments.num_parallel)
        print(f"{len(jobs)} runs of {len(arguments.arms)} arms, {progress}", flush=True)

        def tell(stage: Stage, failure: str | None) -> None:
            told = []
            if stage in measured and failure is None:
                told = [f"AP {100 * results_of(stage)['metrics']['AP']:.1f}"]
                _report(arguments, jobs, {}, check, output_dir, with_plots=False)
            progress.end(stage, failure, *told)

        failures = run_stages(
            stages,
            num_parallel=arguments.num_parallel,
            launcher=arguments.launcher,
            logs=True,
            keep_going=True,
            on_start=progress.begin,
            on_wait=progress.wait,
            on_end=tell,
            lock=folder.lock,
        )
        results = _report(arguments, jobs, failures, check, output_dir)
        if arguments.num_pictures and results["runs"]:
            runs = [(job.arm, job.fraction, job.measured) for job in jobs if job.seed == arguments.seeds[0]]
            draw_arms(runs, parsed[jobs[0].measured], output_dir, arguments.num_pictures)
        page = html_report.write_report(output_dir)
        trained = [stage.folder for stage in stages if stage.command in TRAINED and is_finished(stage)]
        tell_comparison(trained if results["runs"] else [], json.loads(json.dumps(results)))
    print(f"{' '.join(verdict(results))}\nReport: {page}, the same without pictures of the images: report.md")
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
    jobs = _plan(arguments)
    if controls := _controls(arguments, jobs):
        for name, changes in controls.items():
            arguments._add_arm(name, changes, f"--baseline{name.removeprefix(arguments.baseline)}")
        jobs = _plan(arguments)
    # Measured stages with the same settings are the run of the first arm, and so is a teacher that is trained alike.
    names = list(arguments.arms)
    last_first = sorted(jobs, key=lambda job: names.index(job.arm), reverse=True)
    first = {_key(job.measured.command, job.measured.settings): job.measured.folder for job in last_first}
    return _plan(arguments, first)


def _key(command: str, settings: Mapping) -> str:
    """What tells a stage from others, wherever it writes to."""
    return json.dumps([command, {name: settings[name] for name in settings if name != "output_dir"}], sort_keys=True)


def _controls(arguments: CompareArguments, jobs: list[Job]) -> dict[str, dict]:
    """The longer arms that are asked for: what they change is what the baseline changes, and the steps."""
    baseline, changes = arguments.baseline, arguments.arms[arguments.baseline] or {}
    measured = next(job for job in jobs if job.arm == baseline).measured

    def arm(length: Mapping) -> dict:
        return {**changes, arguments.measured: merged(changes.get(arguments.measured) or {}, length)}

    found = {}
    if arguments.baseline_long:
        name = "max_steps" if setting(measured, "max_steps") > 0 else "num_train_epochs"
        found[f"{baseline}_long"] = arm({name: 2 * setting(measured, name)})
    if arguments.baseline_all_compute:
        try:
            images = max(planned_images(job.stages) for job in jobs if job.arm != f"{baseline}_long")
        except ValueError as error:
            raise ValueError(f"baseline_all_compute: {error}") from error
        found[f"{baseline}_all_compute"] = arm({"max_steps": steps_for(images, measured)})
    return found


def _plan(arguments: CompareArguments, measured_folders: Mapping[str, Path] | None = None) -> list[Job]:
    """The runs of the arms that there are; the folders of measured stages are known from an earlier plan."""
    folders: dict[str, Path] = dict(measured_folders or {})
    canonical: dict[Path, Stage] = {}

    def resolve(owner: str, changes: Mapping, fraction: float, seed: int) -> list[Stage]:
        fraction = changes.get("fraction", fraction)
        own = {key: value for key, value in changes.items() if key != "fraction"}
        stages, skip, variables = _of_arm(arguments, own)
        values = {"fraction": fraction, "seed": seed}

        def place(name, command, settings, uses):
            told = {"fraction": f"{fraction:g}", "seed": seed}
            varying = "".join(f"-{key}-{value}" for key, value in told.items() if key in uses)
            folder = Path(arguments.output_dir) / owner / f"{name}{varying}"
            if name == arguments.measured and measured_folders is None:
                return folder
            return folders.setdefault(_key(command, settings), folder)

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
                jobs.append(Job(arm, fraction, seed, needed_for(stages)))
                _refuse_other_labels(jobs[-1])
                if not setting(jobs[-1].measured, "do_eval"):
                    raise ValueError(f"arm {arm!r}: do_eval false leaves nothing to compare: leave it out")
    return jobs


def _of_arm(arguments: CompareArguments, changes: Mapping) -> tuple[dict, set[str], dict]:
    """The stages of an arm, the stages that it leaves out, and the variables."""
    changes = dict(changes)
    stages, variables, measured = dict(arguments.stages), arguments.variables, arguments.measured
    if file := changes.pop("chain", None):
        chain = read_chain(file)
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
    _refuse_what_is_set_here(f"stage {measured!r}", stages[measured])
    return stages, skip, variables


def _refuse_what_is_set_here(where: str, settings: Mapping) -> None:
    if set_here := sorted(set(PER_RUN) & set(settings)):
        raise ValueError(f"{where}: {set_here[0]} is set by the comparison (--fractions, --seeds)")


def _refuse_other_labels(job: Job) -> None:
    """A stage before the measured one that learns from labels must not know more of them."""
    shares = ("label_fraction", "label_seed")
    for stage in job.stages[:-1]:
        if not fields_of(stage.command).issuperset(shares):
            continue
        is_same = is_same_split(_labels_of(stage), _labels_of(job.measured))
        if is_same and any(setting(stage, share) != setting(job.measured, share) for share in shares):
            raise ValueError(
                f"arm {job.arm!r}, stage {stage.name!r} would learn from other labels of the same data than the "
                "measured stage: leave label_fraction and label_seed to the comparison"
            )


def _labels_of(stage: Stage) -> tuple[str, str | None]:
    """Where a stage takes its labels from: the data set and the split."""
    prefix = "labelled_" if setting(stage, "labelled_dataset") else ""
    return setting(stage, f"{prefix}dataset"), setting(stage, f"{prefix}split")


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
    rows = {seed: {f"{share:g}": chosen for share, chosen in by.items()} for seed, by in subsets.items()}
    write_json(output_dir / SUBSETS, {"dataset": settings.dataset, "split": settings.split, "rows": rows})
    held_out = (settings.eval_dataset, settings.eval_split, settings.eval_image_dir)
    trained = [(stage, job.stages) for job in jobs for stage in job.stages if stage.command in TRAINED]
    origins = [origin(stage, stages) for stage, stages in trained for origin in (origin_of, pseudo_origin_of)]
    seen = sorted(set(filter(None, origins)))
    places = {source: Path(source[0]).expanduser() for source in [held_out, *seen]}
    content = [path_hash(place, source[2] or None) for source, place in places.items() if place.exists()]
    leakage = look_for_leaks(held_out, seen, content, output_dir / LEAKAGE)
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


# ---- the results ----


def _differences(arguments: CompareArguments, jobs: list[Job], output_dir: Path) -> dict[str, dict]:
    """In what each arm differs from the baseline in any of its runs, each beside the one with the same labels."""
    found: dict[str, dict] = {arm: {"start": {}, "protocol": {}} for arm in arguments.arms}
    baseline = {(job.fraction, job.seed): job.measured for job in jobs if job.arm == arguments.baseline}
    for job in jobs:
        settings = baseline[job.fraction, job.seed].settings
        for part, values in differences_of(job.measured.settings, settings, output_dir).items():
            found[job.arm][part] = values | found[job.arm][part]  # of several values the first
    return found


def _report(arguments, jobs, failures, check, output_dir, with_plots=True) -> dict:
    """Writes all results that there are by now, and returns them."""
    runs, rows, resampled = [], [], {}
    for job in jobs:
        if is_finished(job.measured):
            found = results_of(job.measured)
            if with_plots and (matches := job.measured.folder / MATCHES).is_file():
                resampled[job.arm, job.fraction, job.seed] = resampled_precisions(ImageMatches.load(matches))
            runs.append(Run(job.arm, job.fraction, job.seed, found["metrics"], found["curve"]))
            row = {"arm": job.arm, "fraction": job.fraction, "seed": job.seed, "steps": found["steps"]}
            row |= {key: value for key, value in found["metrics"].items() if key != "per_class"}
            rows.append(row | {f"AP_{name}": value for name, value in found["metrics"]["per_class"].items()})
    stages = list(dict.fromkeys(stage for job in jobs for stage in job.stages))
    costs = {arm: mean_costs([job.stages for job in jobs if job.arm == arm]) for arm in arguments.arms}
    measured = {job.arm: job.measured for job in reversed(jobs)}  # the first of each arm
    baseline = measured[arguments.baseline].settings
    results = {
        "config": {
            name: without_secrets(getattr(arguments, name), stages)
            for name in ("stages", "common", "variables", "arms", "baseline", "fractions", "seeds", "target_ap")
        },
        "environment": environment(),
        "baseline": arguments.baseline,
        "arms": _differences(arguments, jobs, output_dir),
        "protocol": {
            key: value for key, value in baseline.items() if key not in START | set(PER_RUN) | {"output_dir"}
        },
        **check,
        "stages": [
            {"folder": str(stage.folder.relative_to(output_dir)), "command": stage.command} | record_of(stage)
            for stage in stages
            if is_finished(stage)
        ],
        "costs": costs,
        "without_crops": [arm for arm in arguments.arms if is_without_crops(measured[arm])],
        "best_weights": [arm for arm in arguments.arms if keeps_best(measured[arm])],
        "seconds": {
            arm: {"before": cost and cost["seconds_before"], "measured": cost and cost["seconds"]}
            for arm, cost in costs.items()
        },
        "failures": {str(stage.folder.relative_to(output_dir)): reason for stage, reason in failures.items()},
        "planned": len(jobs),
        "runs": [dataclasses.asdict(run) for run in runs],
        "statistics": {
            f"{fraction:g}": arms
            for fraction, arms in compare_runs(runs, arguments.baseline, arguments.target_ap, resampled).items()
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
