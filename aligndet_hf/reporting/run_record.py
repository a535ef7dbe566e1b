"""What was run and what came of it, as the files of a run tell: the one source of its card and its report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import models  # noqa: F401 (registers the configs of pre-training runs)
from ..cards import hub_ids, told
from ..data.shards import read_report
from ..detectors.families import FAMILIES
from ..detectors.published import PUBLISHED
from ..files import read_json

SUMMARY = "pretrain_summary.json"
PRODUCTS = {"aligndet": "detector", "soco": "backbone"}  # of pre-training, by method
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of norms: no weights
SETTINGS, RESULTS = "finetune_settings.json", "results.json"
DIAGNOSIS, SPEED = "diagnosis.json", "speed.json"


@dataclass(kw_only=True)
class RunRecord:
    """
    A finished run of `aligndet pretrain` or `aligndet finetune`.

    Attributes:
        kind (`str`): "pretrain" or "finetune".
        method (`str`): Of pre-training: "aligndet", which gives a detector, or "soco", which gives a backbone.
        config (`PreTrainedConfig`): The configuration of the detector that came out, or of SoCo's model.
        dataset (`str`): Hub id or path of the images.
        origin (`str`, *optional*): What the data set was made from, if it is one of this machine with proposals.
        settings (`dict`): What was run; of pre-training with all numbers of the method, those by default too.
        images, steps (`int`, *optional*): Number of training images, and of optimizer steps.
        base_model (`str`, *optional*): Hub id or path of the detector that the run started from.
        license (`str`, *optional*): Hub name of the licence of the weights.
        command (`str`, *optional*): The command line that does the same.
        versions (`dict[str, str]`): Of Python and the packages.
        proposals (`dict`, *optional*): How the proposals were made, see
            [`~aligndet_hf.data.columns.proposal_record`], and their number as `boxes`.
        metrics (`dict`): What `CocoMetrics.compute()` gave, 0 to 1, or the last entry of the pre-training log.
        evaluation (`dict`): What `metrics` were measured on: `dataset`, `split` and `images`.
        transfer (`dict`, *optional*): The transfer report: names of tensors under `kept`, `reset`, `mismatched` and
            `frozen`.
        backbone (`dict`, *optional*): The report of the weights that a new detector's backbone got.
        comparison (`str`, *optional*): What came of a comparison that it is part of, see
            [`~aligndet_hf.reporting.comparison.summary`].
        pixel_window (`Sequence[float]`, *optional*): The grey levels of images with more than 8 bits that became 0 and
            255, see [`~aligndet_hf.data.bit_depth`].
        parameters (`int`, *optional*): Number of weights of the product.
        input_size (`dict`, *optional*): The `size` of its image processor.
        speed (`dict`, *optional*): What [`~aligndet_hf.evaluation.speed.measure_speed`] found at the end of the run.
        diagnosis (`dict`, *optional*): See [`~aligndet_hf.evaluation.diagnosis.Diagnosis.compute`].
        pretrained (`RunRecord`, *optional*): The run of pre-training that it started from, if it is on this machine.
    """

    kind: Literal["pretrain", "finetune"]
    method: Literal["aligndet", "soco"] = "aligndet"
    config: Any
    dataset: str
    settings: Mapping
    origin: str | None = None
    images: int | None = None
    steps: int | None = None
    base_model: str | None = None
    license: str | None = None
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    proposals: Mapping | None = None
    metrics: Mapping = field(default_factory=dict)
    evaluation: Mapping = field(default_factory=dict)
    transfer: Mapping | None = None
    backbone: Mapping | None = None
    comparison: str | None = None
    pixel_window: Sequence[float] | None = None
    parameters: int | None = None
    input_size: Mapping | None = None
    speed: Mapping | None = None
    diagnosis: Mapping | None = None
    pretrained: "RunRecord | None" = None

    @property
    def data_name(self) -> str:
        """What to call the images: their Hub id, or the name of the folder that they come from."""
        return told(self.dataset if hub_ids(self.dataset) else self.origin or self.dataset)

    @property
    def product(self) -> str | None:
        """The folder inside the run's folder that others load; `None` if they load the run's folder itself."""
        return PRODUCTS[self.method] if self.kind == "pretrain" else None

    @property
    def threshold(self) -> float | None:
        """The best score to cut detections at, on the images they were measured on; `None` if nothing was found."""
        found = self.diagnosis or {}
        return found["best_threshold"] if found.get("f1") else None


def read_run(folder: str | Path) -> RunRecord:
    """
    Reads the record of a finished run.

    Args:
        folder (`str` or `Path`): Its `output_dir`.

    Raises:
        ValueError: the folder holds none.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if summary := read_json(folder / SUMMARY):
        settings = summary["arguments"]
        method = settings.get("method", "aligndet")
        model_config = AutoConfig.from_pretrained(folder)
        numbers = {name: getattr(model_config, name) for name in type(model_config).__annotations__}
        numbers = {name: value for name, value in numbers.items() if name not in model_config.sub_configs}
        is_new = method == "soco" or settings["detector"] in FAMILIES
        return RunRecord(
            kind="pretrain",
            method=method,
            config=model_config.detector_config if method == "aligndet" else model_config,
            origin=read_report(Path(settings["dataset"])).get("dataset"),
            settings=settings | {f"{method}_config": numbers},
            images=summary["data"]["images"],
            base_model=None if is_new else PUBLISHED.get(settings["detector"], settings["detector"]),
            license=summary.get("card_license") or settings.get("card_license"),  # as older runs have it
            proposals=(summary.get("proposals") or {}) | {"boxes": summary["data"].get("proposals")},
            **_common(folder, summary, settings, folder / PRODUCTS[method]),
        )
    results, settings = read_json(folder / RESULTS), read_json(folder / SETTINGS)
    if results and settings:
        common = _common(folder, results, settings, folder)
        return RunRecord(
            kind="finetune",
            speed=read_json(folder / SPEED),
            diagnosis=read_json(folder / DIAGNOSIS),
            pretrained=_pretraining(settings["detector"]),
            config=AutoConfig.from_pretrained(folder),
            settings=settings,
            images=results["images"],
            base_model=PUBLISHED.get(settings["detector"], settings["detector"]) if common["transfer"] else None,
            license=results.get("card_license"),
            evaluation=results.get("evaluation", {}),
            **common,
        )
    raise ValueError(
        f"{folder} holds no finished run of `aligndet pretrain` ({SUMMARY}) or `aligndet finetune` ({RESULTS} and "
        f"{SETTINGS})"
    )


def _common(folder: Path, report: Mapping, settings: Mapping, product: Path) -> dict[str, Any]:
    """What both kinds of run tell: in the report that ends them and in others, and by the files of their product."""
    backbone = read_json(folder / "backbone_report.json")
    processor = read_json(product / "preprocessor_config.json") or {}
    return {
        "dataset": settings["dataset"],
        "steps": report["steps"],
        "metrics": report["metrics"],
        "command": report.get("command"),
        "versions": report.get("versions", {}),
        "transfer": read_json(folder / "transfer_report.json"),
        "backbone": backbone and backbone | {"source": told(backbone["source"])},
        "pixel_window": processor.get("pixel_window"),
        "input_size": processor.get("size"),
        "parameters": _parameters(product),
    }


def _pretraining(detector: str) -> RunRecord | None:
    """The run of pre-training that a detector comes from, if its folder is here."""
    path = Path(detector)
    folders = [folder for folder in (path, path.parent) if (folder / SUMMARY).is_file()]
    return read_run(folders[0]) if folders else None


def _parameters(folder: Path) -> int | None:
    """The number of weights in the files of a model; of the tensors only the shapes are read."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "np") as tensors:
            names = [name for name in tensors.keys() if not name.endswith(STATISTICS)]
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return count or None
