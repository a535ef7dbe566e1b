"""The arguments of `aligndet proposals`: its flags and the keys of its recipes."""

import math
from dataclasses import dataclass
from typing import Literal

from ..arguments import (
    InferenceArguments,
    LabelledArguments,
    LoadingArguments,
    PixelWindowArguments,
    ProgressArguments,
    RunArguments,
    again,
    is_trained,
)
from ..flags import flag
from ..hub import HubDatasetArguments
from ..proposals.filters import parse_strategy
from ..proposals.opencv import MODES
from ..proposals.selective_search import PRESETS
from ..ranges import COUNT, PIXELS, POSITIVE, SHARE, Range
from .bit_depth import parse_rule
from .sources import SOURCES
from .streaming import is_stream

# Sources that find boxes everywhere, and what is kept of any source if nothing else is said. A detector that learns
# from overlapping boxes finds every object several times (docs/results.md): of a search a few boxes that are apart.
SEARCHES = ("selective_search", "opencv")
_BOUNDS = ("max_boxes", "nms_threshold", "min_side", "min_relative_size", "max_relative_size")
KEPT = {
    "search": dict(zip(_BOUNDS, (10, 0.2, 0.0, 0.04, 0.8), strict=True)),
    "other": dict(zip(_BOUNDS, (300, 0.7, 0.0, 0.04, 1.0), strict=True)),
    # AlignDet's and SoCo's `ratio3size0008`; neither paper says how many boxes it keeps, or how far apart.
    "paper": dict(zip(_BOUNDS, (300, 0.7, 32.0, 0.0, 0.8), strict=True)),
}


@dataclass(kw_only=True)
class ProposalsArguments(
    HubDatasetArguments, RunArguments, ProgressArguments, PixelWindowArguments, LabelledArguments
):
    """Arguments of [`generate_proposals`]: the flags of `aligndet proposals` and the keys of its recipes."""

    help_groups = {
        "streaming": "Data",
        "source": "Where boxes come from",
        "max_boxes": "Which to keep",
        "dataloader_num_workers": "Run",
        "export_json": "Output",
    }

    dataset: str = again(
        LabelledArguments,
        "dataset",
        help="images: folder, label file, folder of save_to_disk or Hub id; labels are not needed",
    )
    output_dir: str = again(
        RunArguments, "output_dir", help="folder for the dataset with the column `proposals`; must be new"
    )
    split: str | None = again(
        LabelledArguments, "split", help="split of the dataset; all of them, each by itself, if not given"
    )
    streaming: bool = flag(False, "data", "search images while they are downloaded, instead of all of them after that")

    source: str | None = flag(
        None,
        "result",
        "selective_search; opencv: the same as OpenCV has it; detector: the boxes of a trained model; column: boxes "
        "that the dataset has; json: a proposal file of AlignDet or SoCo; random: boxes that have not seen the "
        "image, as a control. If not given, the one that the following flags are of, else selective_search",
    )
    preset: str | None = flag(
        None,
        "result",
        "selective_search: tiny (fastest), default, or quality (most boxes); of any source `paper`: keep boxes as "
        "AlignDet does, with its bounds of size, instead of a few that are apart",
    )
    mode: str | None = flag(
        None, "result", "opencv: single, fast (the default) or quality (about 0.03, 0.2 and 0.8 s an image)"
    )
    short_side: int | None = flag(
        None, "result", "opencv: search on a copy with this shorter side in pixels, 200 if not given", range=PIXELS
    )
    detector: str | None = flag(
        None,
        "start",
        "detector: folder, Hub id or short name of any transformers detector, or of a mask generator like SAM",
        is_path=True,
    )
    score_threshold: float | None = flag(
        None, "result", "detector: lowest score of a box, 0.05 if not given", range=SHARE
    )
    per_device_eval_batch_size: int | None = again(
        InferenceArguments,
        "per_device_eval_batch_size",
        default=None,
        help="detector: images per forward pass, 8 if not given",
    )
    column: str | None = flag(None, "data", "column: its name, proposals if not given; objects for the labels")
    proposals_file: str | None = flag(
        None, "data", "json: the file, in COCO format; every annotation is a proposal", is_path=True
    )

    max_boxes: int | None = flag(
        None,
        "result",
        "store at most this many boxes of an image, the best first; 10 of a search, 300 of other sources if not given",
        range=COUNT,
    )
    nms_threshold: float | None = flag(
        None,
        "result",
        "drop a box that overlaps a better one by more (IoU); less variety, more objects; 0.2 for a search, 0.7 for "
        "other sources if not given",
        range=SHARE,
    )
    max_aspect_ratio: float = flag(3.0, "result", "longer side over shorter side", range=Range(1, also=math.inf))
    min_side: float | None = flag(None, "result", "smallest width and height in pixels of the image; 0 if not given")
    min_relative_size: float | None = flag(
        None, "result", "smallest sqrt(box area / image area); large values lose small objects; 0.04 if not given"
    )
    max_relative_size: float | None = flag(
        None,
        "result",
        "largest sqrt(box area / image area); 0.8 for a search, 1 for other sources if not given",
        range=POSITIVE,
    )
    max_borders: int = flag(
        4,
        "result",
        "drop boxes that touch more than this many borders of the image; 1 leaves more objects among them",
        range=Range(0, 4),
    )
    relax_if_empty: bool = flag(
        True, "result", "for an image left without boxes drop the bounds of size and borders, then the aspect ratio"
    )
    strategy: str | None = flag(
        None, "result", "a filter of SoCo or AlignDet by name, e.g. ratio3size0308post, instead of the six above"
    )
    rerank: Literal["ring", "none"] = flag(
        "none",
        "result",
        "ring: put those boxes first that differ most from the ring around them, in features of a frozen backbone; "
        "so more of the first ones are objects",
    )
    backbone: str | None = flag(
        None, "start", "rerank: timm name of that backbone, or a folder, whose weights come with it"
    )
    backbone_weights: str | None = flag(
        None, "start", "rerank: a .safetensors file with timm's names, or 'timm' to download them"
    )

    dataloader_num_workers: int | None = again(
        LoadingArguments,
        "dataloader_num_workers",
        default=None,
        help="processes that load images and search them; 0: this one; one per core, but 0 for the source detector, "
        "if not given",
    )
    shard_size: int = flag(32, "run", "images between two saves; a killed run loses no more", range=COUNT)
    export_json: str | None = flag(None, "output", "also write the proposals to this file, in AlignDet's COCO format")

    def __post_init__(self):
        super().__post_init__()
        self.streaming |= is_stream(self.dataset)
        is_paper = self.preset == "paper"
        self.preset = None if is_paper else self.preset
        for name, known in (("source", SOURCES), ("preset", PRESETS), ("mode", MODES)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.source is None:
            owners = (
                name for name, row in SOURCES.items() if any(getattr(self, key) is not None for key in row.settings)
            )
            self.source = next(owners, "selective_search")
        for source, (_, settings, _) in SOURCES.items():
            for name, default in settings.items():
                given = getattr(self, name)
                if source != self.source and given is not None:
                    raise ValueError(f"{name} is for --source {source}, not for {self.source}")
                if source == self.source and given is None:
                    if default is None:
                        raise ValueError(f"--source {source} needs --{name}")
                    setattr(self, name, default)
        kept = KEPT["paper"] if is_paper else KEPT["search" if self.source in SEARCHES else "other"]
        for name, default in kept.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.streaming and (self.source == "json" or self.image_dir):
            raise ValueError("streaming does not go with --source json and image_dir: leave it out")
        if self.min_relative_size > self.max_relative_size:
            raise ValueError(
                f"no box has a relative size from {self.min_relative_size:g} (min_relative_size) to "
                f"{self.max_relative_size:g} (max_relative_size)"
            )
        if self.strategy is not None:
            parse_strategy(self.strategy)
        parse_rule(self.pixel_window)
        if self.rerank == "none":
            # A chain gives its backbone to all commands that know the flag.
            self.backbone = self.backbone_weights = None
        if self.rerank == "ring" and not (self.backbone and is_trained(self.backbone, self.backbone_weights)):
            raise ValueError("--rerank ring needs --backbone and --backbone_weights: random features rank nothing")

    def source_settings(self) -> dict:
        """What the chosen source takes of these arguments."""
        return {name: getattr(self, name) for name in SOURCES[self.source].settings}

    def input_column(self) -> str | None:
        """The column that the source reads, beside the images."""
        return {"column": self.column, "json": "proposals"}.get(self.source)

    def selection(self) -> dict:
        """Keyword arguments of [`~aligndet_hf.proposals.filters.select_indices`]."""
        names, filters = ["max_boxes", "nms_threshold"], parse_strategy(self.strategy) if self.strategy else {}
        if self.strategy is None:
            names += ["max_aspect_ratio", "min_side", "min_relative_size", "max_relative_size", "max_borders"]
            names += ["relax_if_empty"]
        return {name: getattr(self, name) for name in names} | filters
