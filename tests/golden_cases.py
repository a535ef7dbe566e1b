"""Reads the recorded inputs and outputs of the official AlignDet code in `tests/golden`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"


def names(prefix: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.safetensors"))


def load(name: str, dtype: torch.dtype = torch.float64) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the tensors of a case, floating point tensors in `dtype`."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    return json.loads((FOLDER / f"{name}.json").read_text()), cast
