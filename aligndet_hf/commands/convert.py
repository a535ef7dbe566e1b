"""`aligndet convert`: a published checkpoint as a detector of transformers, and a detector for other code bases."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from ..arguments import RunArguments, again
from ..cards import BEGIN, END, citations, describe_versions, merge_card, write_card
from ..convnets.modeling_torchvision import TorchvisionDetector
from ..detectors.build import DetectorArguments, open_detector
from ..detectors.converters import read_detector
from ..detectors.converters.folder import PUBLISHED_SIZE, export_detector, save_detector
from ..detectors.converters.layout import ConversionReport
from ..files import clear_write_errors, write_json
from ..flags import REQUIRED, flag, takes_arguments
from ..hub import HubArguments
from ..ranges import COUNT
from ..runs import RunFolder

MAKE_ROOM = "If that is too little, make room, and run the same command again."

_TEMPLATE = Path(__file__).with_name("conversion_card_template.md")
FILES = {"mmdet": "mmdet.pth", "torchvision": "torchvision.safetensors"}


@dataclass(kw_only=True)
class ConvertArguments(RunArguments):
    """Arguments of [`convert`]: the flags of `aligndet convert` and the keys of its recipes."""

    help_groups = {"detector": "Detector", "card_license": "Output"}

    detector: str = flag(
        REQUIRED,
        "start",
        "published file of a detector: .pth, .pkl or .safetensors; with --to, folder or Hub id. The flag can be "
        "written --from",
        aliases=["--from"],
        was="source",
    )
    family: str | None = flag(
        None, "start", "the family that it becomes, where its tensors leave a choice; recognised if not given"
    )
    detector_config: dict[str, Any] | None = again(
        DetectorArguments,
        "detector_config",
        help="fields of the detector's config that the file does not tell, such as "
        "'{\"encoder_attention_heads\": 4}'; 8 heads are the default",
    )
    partial: bool = flag(False, "start", "accept a file that lacks tensors, or has unknown ones, and take what fits")
    to: Literal["transformers", "mmdet", "torchvision"] = flag(
        "transformers", "result", "write the detector for this library: transformers, mmdet 3 or torchvision"
    )
    eval_size: int = flag(
        PUBLISHED_SIZE,
        "result",
        "size to measure and to deploy with: the shorter side in pixels to which the image processor resizes images",
        range=COUNT,
        was="image_size",
    )

    output_dir: str = again(
        RunArguments, "output_dir", help="folder for the detector, its card and conversion_report.json"
    )
    card_license: str | None = again(HubArguments, "card_license")

    def __post_init__(self):
        super().__post_init__()
        if self.to != "transformers" and (self.family or self.detector_config or self.partial):
            raise ValueError(f"family, detector_config and partial are for reading a file, not for --to {self.to}")


@takes_arguments
def convert(arguments: ConvertArguments) -> Path:
    """
    Converts a published checkpoint to a detector of transformers, or a detector to a file of another library.

    Args:
        arguments ([`ConvertArguments`]): The configuration.

    Returns:
        `Path`: the folder of the detector; with `to`, the file.

    Raises:
        ValueError: the file is damaged, holds more than tensors, is of no known layout, or lacks a tensor or has an
            unknown one; with `to`, the other library has no such detector.
        OSError: there is no such file, or the output cannot be written.
    """
    folder = RunFolder(
        arguments.output_dir,
        "convert",
        written=["config.json", "model*.safetensors", "preprocessor_config.json", *FILES.values()],
        result=FILES.get(arguments.to, ConversionReport.file_name),
        overwrite=arguments.overwrite_output_dir,
    )
    with folder:
        return (_write_detector if arguments.to == "transformers" else _write_for_other)(arguments, folder)


def _write_detector(arguments: ConvertArguments, folder: RunFolder) -> Path:
    detector, report = read_detector(
        arguments.detector, arguments.family, arguments.detector_config or {}, arguments.partial
    )
    folder.claim(settings={"source": report.source, "to": arguments.to})
    with clear_write_errors(folder.path, MAKE_ROOM):
        save_detector(detector, folder.path, arguments.eval_size)
        write_card(folder.path / "README.md", conversion_card(report, arguments.card_license))
        write_json(folder.path / report.file_name, asdict(report))
    print(report)
    print(f"{folder.path}: the detector, its card, and every tensor in {report.file_name}")
    return folder.path


def _write_for_other(arguments: ConvertArguments, folder: RunFolder) -> Path:
    detector = open_detector(arguments.detector)
    path = folder.path / FILES[arguments.to]
    folder.claim(settings={"source": Path(arguments.detector).name, "to": arguments.to})
    with clear_write_errors(path, MAKE_ROOM):
        export_detector(detector, arguments.to, path)
    print(f"{path}: a {detector.config.model_type} for {arguments.to}")
    if arguments.to == "torchvision" and isinstance(detector, TorchvisionDetector):
        print(f"Its builder needs, beside the sizes of your images: {detector.torchvision_arguments()}")
    return path


def conversion_card(report: ConversionReport, license: str | None = None) -> str:
    """
    The card of a converted detector.

    Args:
        report ([`~aligndet_hf.detectors.converters.layout.ConversionReport`]): what became of the tensors.
        license (`str`, *optional*): the licence of the weights.
    """
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="object-detection",
            tags=["object-detection", "aligndet-hf"],
            license=license,
        ),
        template_path=str(_TEMPLATE),
        begin=BEGIN,
        end=END,
        report=report,
        versions=describe_versions(),
        citations=citations(report.family),
    )
    return merge_card(str(card))  # the metadata as they are when it is written again
