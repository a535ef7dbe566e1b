"""What came of stages: results, what they cost, and in what they differ."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.formats import category_names, load_dataset_source
from ..flags import names_of
from ..reporting.comparison_page import ARMS
from ..reporting.predictions import plot_detectors
from ..reporting.run_record import RESULTS, SUMMARY
from ..runs import RECORD
from ..training.finetune_arguments import FinetuneArguments
from .runner import is_finished, record_of
from .stages import Stage, setting

# What an arm may set in the common fine-tuning and still be compared under the same protocol.
START = names_of(FinetuneArguments, "start")
TRAINED = {"pretrain": SUMMARY, "finetune": RESULTS}  # the commands that see images in training: where their steps are


def images_per_step(stage: Stage) -> int:
    """Images in an optimizer step of a stage that trains, of one process."""
    return setting(stage, "per_device_train_batch_size") * setting(stage, "gradient_accumulation_steps")


def require_same_lengths(parsed: Mapping[Stage, Any]) -> None:
    """
    Refuses to lengthen runs that are to be compared: their schedules would be others than of runs that begin now.

    Args:
        parsed (`Mapping[Stage, Any]`): The stages, with the arguments of their commands.

    Raises:
        ValueError: the folder of a stage that trains has a run of another length.
    """
    for stage, arguments in parsed.items():
        record = stage.folder / RECORD
        if stage.command not in TRAINED or not record.is_file():
            continue
        name = "max_steps" if arguments.max_steps > 0 else "num_train_epochs"
        before, now = json.loads(record.read_text(encoding="utf-8")).get("settings", {}), getattr(arguments, name)
        if before.get(name, now) != now:
            raise ValueError(
                f"{stage.folder} was begun with {name} {before[name]}, and now it is {now}: a run that goes on keeps "
                "the learning rates of its former length, and cannot be compared with runs that begin now. Give "
                f"another output_dir, or remove {stage.folder} and all others of this length"
            )


def planned_images(stages: Sequence[Stage]) -> int:
    """
    Images that stages will see in training, counted as often as they are seen: steps times images in a step.

    Raises:
        ValueError: a stage trains for epochs, so that its steps are not known before it runs.
    """
    total = 0
    for stage in stages:
        if stage.command in TRAINED:
            if setting(stage, "max_steps") <= 0:
                raise ValueError(f"stage {stage.name!r} has no max_steps: its steps are not known before it runs")
            total += setting(stage, "max_steps") * images_per_step(stage)
    return total


def costs(stages: Sequence[Stage]) -> dict[str, float]:
    """
    What a run has cost, with all stages that lead to it, also those that other runs share.

    Args:
        stages (`Sequence[Stage]`): The stages of one run, finished; the last is the measured one.

    Returns:
        `dict[str, float]`: `steps_before`, optimizer steps of pre-training and of teachers; `steps`, of the last
        stage; `images`, seen in training by all of them in one process; `seconds_before` and `seconds`.
    """
    steps = [_steps(stage) for stage in stages]
    seconds = [record_of(stage)["seconds"] for stage in stages]
    seen = [count * images_per_step(stage) for count, stage in zip(steps, stages, strict=True) if count]
    return {
        "steps_before": sum(steps[:-1]),
        "steps": steps[-1],
        "images": sum(seen),
        "seconds_before": sum(seconds[:-1]),
        "seconds": seconds[-1],
    }


def mean_costs(runs: Sequence[Sequence[Stage]]) -> dict[str, float] | None:
    """The mean of [`costs`] over the finished ones of several runs; `None` if there is none."""
    found = [costs(stages) for stages in runs if is_finished(stages[-1])]
    return {name: sum(cost[name] for cost in found) / len(found) for name in found[0]} if found else None


def steps_for(images: int, stage: Stage) -> int:
    """The steps in which a stage sees at least this number of images."""
    return math.ceil(images / images_per_step(stage))


def _steps(stage: Stage) -> int:
    if stage.command not in TRAINED:
        return 0
    return json.loads((stage.folder / TRAINED[stage.command]).read_text(encoding="utf-8"))["steps"]


def results_of(stage: Stage) -> dict:
    """What a finished fine-tuning run reached: its `metrics`, its learning `curve`, its `steps`."""
    record = json.loads((stage.folder / RESULTS).read_text())
    classes = list(record["metrics"]["per_class"])
    curve = {}
    for entry in json.loads((stage.folder / "trainer_state.json").read_text())["log_history"]:
        if "eval_AP" in entry:
            per_class = {name: entry[f"eval_AP_{name}"] for name in classes}
            point = {"step": entry["step"], "AP": entry["eval_AP"], "per_class": per_class}
            curve.setdefault(entry["step"], point)  # the last step is measured again, with the weights that are kept
    return {"metrics": record["metrics"], "curve": list(curve.values()), "steps": record["steps"]}


def is_without_crops(stage: Stage) -> bool:
    """Whether a fine-tuning leaves crops out: the default has them."""
    scale = stage.settings.get("crop_scale", True)
    return scale is None or (scale is not True and min(scale) == 1)


def keeps_best(stage: Stage) -> bool:
    """Whether a fine-tuning ends with the best measured weights: the default where it stops early."""
    best = setting(stage, "load_best_model_at_end")
    return setting(stage, "early_stopping_patience") is not None if best is None else best


def differences_of(settings: Mapping, baseline: Mapping, output_dir: Path) -> dict[str, dict]:
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


def draw_arms(
    runs: Sequence[tuple[str, float, Stage]], settings: FinetuneArguments, output_dir: Path, num_images: int
) -> None:
    """
    Draws what the detectors of several arms find in the same evaluation images, for each share of the labels.

    Args:
        runs (`Sequence[tuple[str, float, Stage]]`): Arm, share of the labels and measured stage; of one seed.
        settings (`FinetuneArguments`): What they are measured on.
        output_dir (`Path`): Where to.
        num_images (`int`): How many images.
    """
    source = settings.eval_dataset
    dataset = load_dataset_source(source, settings.eval_split, labels=True, image_dir=settings.eval_image_dir)
    categories = category_names(dataset, source)
    for fraction in dict.fromkeys(fraction for _, fraction, _ in runs):
        path = output_dir / ARMS.format(fraction=f"{fraction:g}")
        detectors = {arm: stage.folder for arm, own, stage in runs if own == fraction and is_finished(stage)}
        if detectors:
            plot_detectors(detectors, dataset, categories, path, num_images)
