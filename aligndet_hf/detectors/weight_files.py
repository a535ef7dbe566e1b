"""
Files of weights, read without running anything that they hold: safetensors, PyTorch's own, and Detectron2's pickles of
NumPy arrays.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..files import first_line, similar_path

# How files of `torch.save` begin: as an archive, or before PyTorch 1.6 as the pickle of a number.
TORCH_BEGINNINGS = (b"PK\x03\x04", bytes.fromhex("80028a0a6cfc9c46f920"))


def read_checkpoint(path: str | Path) -> dict:
    """
    What a file of weights holds, in its own nesting.

    Args:
        path (`str` or `Path`): a `.safetensors` file; a file of `torch.save`, read with `weights_only=True`; or a
            pickle of NumPy arrays, as Detectron2's converters write it.

    Returns:
        `dict`: nested dictionaries of tensors and plain values.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file is damaged, of another kind, or holds more than tensors and plain values. Nothing of
            it is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file{': it is a folder' if path.is_dir() else similar_path(path)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            beginning = file.read(10)
        # Many training scripts save their options, which argparse keeps in a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            if beginning.startswith(TORCH_BEGINNINGS):
                content = torch.load(path, map_location="cpu", weights_only=True)
            else:
                content = _read_arrays(path)
    except pickle.UnpicklingError as error:
        # Not the whole message of PyTorch, which tells how to load the file all the same.
        named = re.search(r"GLOBAL (\S+)|it names (\S+)", str(error))
        what = f"it names {named[1] or named[2]}" if named else "a part is neither a tensor nor a plain value"
        raise ValueError(
            f"{path} holds more than tensors, and loading it could run code ({what}): save its weights alone, with "
            "safetensors.torch.save_file"
        ) from error
    except Exception as error:  # damaged files fail in as many ways as there are bytes
        raise ValueError(f"{path} cannot be read as weights: {first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} cannot be read as weights: it holds one {type(content).__name__}, not names of them")
    return dict(content)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, see [`read_checkpoint`]; keys of nested dictionaries are joined by dots."""
    return flatten(read_checkpoint(path))


def flatten(value: object, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in nested dictionaries, their keys joined by dots; everything else is left out."""
    if isinstance(value, Tensor):
        return {prefix.removesuffix("."): value.detach()}
    found = {}
    if isinstance(value, Mapping):
        for key, item in value.items():
            found |= flatten(item, f"{prefix}{key}.")
    return found


# --- pickles of NumPy arrays -----------------------------------------------------------------------------------------


def _read_arrays(path: Path) -> object:
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            raise ValueError("it is neither a safetensors file, nor one of torch.save, nor a pickle")
        file.seek(0)
        # Pickles of Python 2 hold bytes as text, which latin1 takes as it is.
        try:
            return _as_tensors(_ArrayUnpickler(file, encoding="latin1").load())
        except pickle.UnpicklingError as error:
            raise error if isinstance(error, _NotArraysError) else ValueError(str(error)) from error


class _NotArraysError(pickle.UnpicklingError):
    """A pickle names something that is no array."""


class _ArrayUnpickler(pickle.Unpickler):
    """
    Reads dictionaries, lists, numbers, text and NumPy arrays, and nothing else.

    Whatever else a pickle names is refused before it is imported. The names that NumPy's arrays need stand for the
    classes below, so that not even NumPy's own functions are called with what the file says.
    """

    def find_class(self, module: str, name: str) -> object:
        stand_in = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if stand_in is None:
            raise _NotArraysError(f"it names {module}.{name}")
        return stand_in


class _DataType:
    """Stands for `numpy.dtype`: numbers and truth values of a fixed size."""

    def __init__(self, code: str, *unused: object):
        if not isinstance(code, str) or code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"):
            raise _NotArraysError(f"it has an array of {code}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "<"

    def read(self, data: bytes | str, shape: tuple[int, ...], is_fortran: bool) -> np.ndarray:
        data = data.encode("latin1") if isinstance(data, str) else data
        dtype = np.dtype(self.order + self.code)
        if math.prod(shape) * dtype.itemsize != len(data) or any(size < 0 for size in shape):
            raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
        return array.astype(dtype.newbyteorder("="), order="C")


class _Array:
    """Stands for the array that `numpy.core.multiarray._reconstruct` makes, which is filled afterwards."""

    def __init__(self, *unused: object):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = dtype.read(data, tuple(shape), is_fortran)


class _Class:
    """Stands for `numpy.ndarray`, which pickles name but need not call."""


def _from_buffer(data: bytes, dtype: _DataType, shape: tuple[int, ...], order: str) -> _Array:
    """Stands for `numpy.core.numeric._frombuffer`, with which protocol 5 writes arrays."""
    array = _Array()
    array.value = dtype.read(bytes(data), tuple(shape), order == "F")
    return array


def _scalar(dtype: _DataType, data: bytes | str) -> int | float | bool:
    """Stands for `numpy.core.multiarray.scalar`."""
    return dtype.read(data, (), False).item()


def _no_bytes() -> bytes:
    """Stands for `bytes`, with which Python 3 writes empty ones in old protocols."""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, with which Python 3 writes bytes in old protocols."""
    if encoding != "latin1":
        raise _NotArraysError(f"it has text in {encoding}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Class,
    ("numpy", "dtype"): _DataType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


def _as_tensors(value: object) -> object:
    """The arrays of a pickle as tensors."""
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array has no content")
        return torch.from_numpy(value.value.copy())
    if isinstance(value, Mapping):
        return {str(key): _as_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_tensors(item) for item in value]
    return value
