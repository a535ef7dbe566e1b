"""Files of weights: every kind is read, nothing in them is run, and what cannot be read is one clear error."""

import argparse
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aligndet_hf.detectors.weight_files import read_checkpoint, read_tensors

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(3, np.float16),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big endian": np.arange(4, dtype=">f4"),
    "counter": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_arrays_are_read(protocol, tmp_path):
    content = {"model": OrderedDict(ARRAYS), "__author__": "Yue", "matching_heuristics": True, "lr": np.float64(0.1)}
    (tmp_path / "d2.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_checkpoint(tmp_path / "d2.pkl")
    assert found["__author__"] == "Yue" and found["matching_heuristics"] is True and found["lr"] == 0.1
    for name, array in ARRAYS.items():
        tensor = found["model"][name]
        assert (
            isinstance(tensor, torch.Tensor)
            and tensor.dtype == torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).dtype
        )
        assert np.array_equal(tensor.numpy(), array)
        tensor.zero_()  # their own memory, which can be written to


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_are_read(zipped, tmp_path):
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(nheads=4), "epoch": 3}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(tmp_path / "x.pth")["args"].nheads == 4
    assert list(read_tensors(tmp_path / "x.pth")) == ["model.a"]


class Evil:
    """Writes a file when a pickle of it is loaded as pickles usually are."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def evil_contents(trace) -> dict:
    return {
        "a shell": {"model": Evil(os.system, f"touch {trace}")},
        "a process": {"model": Evil(subprocess.check_output, ["touch", str(trace)])},
        "builtins": {"model": Evil(exec, f"open({str(trace)!r}, 'w')")},
        "numpy's own loader": {"model": Evil(np.load, str(trace), "r", True)},
        "an array of objects": {"model": np.array([Evil(os.system, f"touch {trace}")], dtype=object)},
        "an attribute of an allowed module": {"model": Evil(np.ndarray.tofile, np.ones(1), str(trace))},
    }


@pytest.mark.parametrize("kind", evil_contents(""))
@pytest.mark.parametrize("way", ["pickle", "torch", "old torch"])
def test_nothing_in_a_file_is_run(kind, way, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    content = evil_contents(trace)[kind]
    if way == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch")
    with pytest.raises(ValueError, match="holds more than tensors, and loading it could run code") as error:
        read_checkpoint(path)
    assert not trace.exists() and "\n" not in str(error.value) and "evil.pth" in str(error.value)
    assert "weights_only" not in str(error.value)  # no advice to load it all the same


def test_the_evil_files_are_evil(tmp_path):
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(evil_contents(trace)["a shell"]))
    assert trace.exists()


def numpy_pickle(tmp_path) -> bytes:
    return pickle.dumps({"model": ARRAYS}, protocol=2)


def torch_file(tmp_path) -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"a": torch.arange(1000.0)}}, file)
    return file.getvalue()


def safetensors_file(tmp_path) -> bytes:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "a.safetensors")
    return (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("make", [numpy_pickle, torch_file, safetensors_file])
def test_damaged_files_are_one_clear_error_or_what_they_were(make, tmp_path):
    sound = make(tmp_path)
    suffix = ".safetensors" if make is safetensors_file else ".pth"
    path = tmp_path / f"damaged{suffix}"
    generator = np.random.default_rng(0)
    damaged = [sound[: len(sound) * part // 10] for part in range(10)]
    for _ in range(60):
        copy = bytearray(sound)
        for place in generator.integers(0, len(copy), 3):
            copy[place] = generator.integers(256)
        damaged.append(bytes(copy))
    errors = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read_checkpoint(path)  # a changed number is still a number
        except ValueError as error:
            errors += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert errors >= 10


@pytest.mark.parametrize(
    "content", [b"", b"<html>Google Drive - Virus scan warning</html>", b"version https://git-lfs", b"\x89PNG\r\n"]
)
def test_foreign_files_are_one_clear_error(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights: it is neither a safetensors file, nor"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_foreign_archive_and_one_tensor(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("a.txt", "b")
    with pytest.raises(ValueError, match=r"x\.pth cannot be read as weights"):
        read_checkpoint(tmp_path / "x.pth")
    torch.save(torch.ones(3), tmp_path / "one.pth")
    with pytest.raises(ValueError, match="it holds one Tensor, not names of them"):
        read_checkpoint(tmp_path / "one.pth")


def test_an_array_that_claims_more_than_it_has_is_refused(tmp_path):
    sound = pickle.dumps({"a": np.zeros(3, np.float32)}, protocol=2)
    (tmp_path / "x.pkl").write_bytes(sound.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"))
    with pytest.raises(ValueError, match="an array of shape .* has 12 bytes"):
        read_checkpoint(tmp_path / "x.pkl")
