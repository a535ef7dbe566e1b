"""The door: what is opened, what is refused, and how it is told."""

import json
import os
import socket

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from aligndet_hf.data import door
from aligndet_hf.data.errors import DataError, ImageError
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.images import decode_image, image_size
from aligndet_hf.data.streaming import load_stream


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 6), (value, 0, 0)).save(path)
    return path


@pytest.fixture
def canary(tmp_path):
    """An image outside the data set, that nothing may read."""
    return write_image(tmp_path / "private" / "passport.png", 77)


@pytest.fixture
def root(tmp_path, canary):
    """A folder with two images."""
    for number in range(2):
        write_image(tmp_path / "data" / f"{number}.png", number)
    return tmp_path / "data"


def walk(root):
    """The images of a folder, and what is left out by reason."""
    found = {}
    for path, reason in door.visit(root):
        found.setdefault(reason, []).append(os.path.relpath(path, root))
    return found.pop(None, []), found


# ---- names ----


@pytest.mark.parametrize(
    "name, expected",
    [
        ("naïve 🚗.jpg", "naïve 🚗.jpg"),
        ("\x1b]0;owned\x07.jpg", "\\x1b]0;owned\\x07.jpg"),
        ("a\nb\u202egpj.exe", "a\\x0ab\\u202egpj.exe"),
        (b"caf\xe9.jpg", "caf\\xe9.jpg"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\xe9.jpg"),
    ],
)
def test_names_are_printed_safely(name, expected):
    assert door.printable(name) == expected
    expected.encode()


def test_long_lists_are_cut():
    assert door.listed("abcdef") == "a, b, c, d, e ..." and door.listed("abc") == "a, b, c"


# ---- one file ----


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    for read in (decode_image, image_size):
        with pytest.raises(ImageError, match=r"x\.jpg: not a regular file but a pipe"):
            read(tmp_path / "x.jpg")


def test_devices_folders_sockets_and_dead_links_are_refused(tmp_path):
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.symlink("nowhere", tmp_path / "dead.png")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket must be short
        listener.bind("s.png")
        os.chdir(here)
        assert door.problem(tmp_path / "s.png") == "not a regular file but a socket"
    assert door.problem(tmp_path / "zero.png") == "not a regular file but a device"
    assert door.problem(tmp_path) == "not a regular file but a folder"
    assert door.problem(tmp_path / "dead.png") == "a link to nothing"
    assert door.problem(tmp_path / "gone.png") == "No such file or directory"
    assert "null byte" in door.problem("a\0b.png")
    assert "name too long" in door.problem("x" * 300).lower()


def test_large_files_are_not_read(tmp_path):
    with open(tmp_path / "x.jpg", "wb") as file:
        file.truncate(8 << 30)  # sparse
    with pytest.raises(ImageError, match="8.0 GiB large, more than the 1 GiB that are read"):
        decode_image(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"x\.jpg: 8.0 GiB large"):
        door.read_text(tmp_path / "x.jpg")
    (tmp_path / "labels.txt").write_text("12345")
    with pytest.raises(DataError, match="labels.txt"):
        door.read_text(tmp_path / "labels.txt", limit=4)
    assert door.read_text(tmp_path / "labels.txt", limit=5) == "12345"


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfnaive")
    assert door.read_text(tmp_path / "a.txt") == "naive"
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"b\.txt: not a text in UTF-8"):
        door.read_text(tmp_path / "b.txt")
    (tmp_path / "c.xml").write_bytes(b'<?xml version="1.0" encoding="klingon"?>')
    with pytest.raises(DataError, match=r"c\.xml: not a text in KLINGON"):
        door.read_text(tmp_path / "c.xml")


def test_addresses_are_not_fetched():
    for address in ("http://127.0.0.1:9/x.png", "file:///etc/x.png", "hf://datasets/a/b/x.png"):
        with pytest.raises(ImageError, match="nothing is fetched"):
            decode_image({"bytes": None, "path": address})


def test_a_format_that_starts_another_program_is_not_opened(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert PIL.Image.open(tmp_path / "x.jpg").format == "EPS"
    with pytest.raises(ImageError, match="not an image of a format"):
        decode_image(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    "suffix", [".jfif", ".jpe", ".JPG", ".avif", ".jp2", ".webp", ".tga", ".ico", ".ppm", ".apng"]
)
def test_every_format_that_pillow_opens_is_taken(tmp_path, suffix):
    write_image(tmp_path / f"x{suffix}", 200)
    assert walk(tmp_path) == ([f"x{suffix}"], {})
    assert decode_image(tmp_path / f"x{suffix}").shape == (6, 8, 3)


def test_what_does_not_open_is_named_with_its_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "image_suffixes", lambda: frozenset({".jpg"}))
    for name in ("a.HEIC", "b.dcm", "c.txt", "d.json"):
        (tmp_path / name).write_bytes(b"x")
    files, left_out = walk(tmp_path)
    assert files == [] and left_out == {
        "HEIC needs a plug-in of Pillow: pip install pillow-heif": ["a.HEIC"],
        "convert it to PNG or TIFF": ["b.dcm"],
    }
    with pytest.raises(ImageError, match="pillow-heif"):
        decode_image(tmp_path / "a.HEIC")


# ---- a folder ----


def test_order_and_hidden_files(root):
    for name in ("b/2.png", "a/deep/3.png", ".hidden/4.png", "b/.5.png"):
        write_image(root / name)
    assert walk(root) == (["0.png", "1.png", "a/deep/3.png", "b/2.png"], {})
    (root / "b" / "2.txt").write_text("x")
    assert list(door.visit(root, lambda name: name.endswith(".txt"))) == [(str(root / "b" / "2.txt"), None)]


def test_links(root, canary):
    os.symlink(".", root / "again")
    os.symlink("0.png", root / "same.png")
    os.symlink(canary, root / "x.png")
    os.symlink(canary.parent, root / "other")
    os.symlink("loop.png", root / "loop.png")
    files, left_out = walk(root)
    assert files == ["0.png", "1.png", "same.png"]
    assert left_out == {
        "a link to a folder outside: give that folder itself": ["other"],
        "a link to nothing": ["loop.png"],
        "a link to a file outside the folder: give the folder of that file": ["x.png"],
    }


def test_the_folder_itself_may_be_a_link(root, tmp_path):
    os.symlink(root, tmp_path / "link")
    assert walk(tmp_path / "link") == (["0.png", "1.png"], {})
    assert door.is_inside(tmp_path / "link" / "0.png", root) and door.is_inside(root / "0.png", tmp_path / "link")


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(tmp_path, canary):
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots" / "0123"
    write_image(repository / "blobs" / "blob.png")
    (snapshot / "train").mkdir(parents=True)
    os.symlink("../../../blobs/blob.png", snapshot / "train" / "x.png")
    os.symlink(canary, snapshot / "train" / "y.png")
    for folder in (snapshot, snapshot / "train"):
        files, left_out = walk(folder)
        assert list(map(os.path.basename, files)) == ["x.png"] and len(left_out) == 1


def test_odd_files_are_listed_and_the_rest_is_read(root):
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    write_image(root / "folder.png" / "inner.png")
    with open(os.fsencode(root) + b"/caf\xe9.png", "wb") as file:
        file.write((root / "0.png").read_bytes())
    files, left_out = walk(root)
    assert list(map(door.printable, files)) == ["0.png", "1.png", "caf\\xe9.png", "folder.png/inner.png"]
    assert left_out == {"not a regular file but a pipe": ["pipe.png"]}
    values = [door.image_value(root / path) for path in files]
    pa.array(values, datasets.Image.pa_type)  # a data set can hold them all
    assert values[2]["bytes"] == (root / "0.png").read_bytes() and values[0]["bytes"] is None
    assert [decode_image(value).shape for value in values] == [(6, 8, 3)] * 4


@pytest.mark.parametrize(
    "name",
    ["../private/passport.png", "a/../../private/passport.png", "..\\private\\passport.png", "/etc/x.png", "C:\\x.png",
     "file:///x.png", "http://x/y.png", "link.png", "folder/passport.png", "a\0b.png"],
)  # fmt: skip
def test_names_that_lead_out_are_refused(root, canary, name):
    os.symlink(canary, root / "link.png")
    os.symlink(canary.parent, root / "folder")
    with pytest.raises(DataError, match="leads out of"):
        door.inside(root, name)


def test_names_that_stay_inside(root):
    write_image(root / "labels" / "x.png")
    write_image(root / "odd\\name.png")
    assert door.inside(root, "labels\\x.png") == root / "labels" / "x.png"
    assert door.inside(root, "../0.png", root / "labels") == root / "0.png"
    assert door.inside(root, str(root / "0.png")) == root / "0.png"
    assert door.inside(root, "odd\\name.png") == root / "odd\\name.png"
    assert door.inside(root, "..hidden/x" + "y" * 300) == root / "..hidden" / ("x" + "y" * 300)
    with pytest.raises(DataError, match="leads out"):
        door.inside(root, "../../private/passport.png", root / "labels")


# ---- a data set that names files ----


def image_rows(values):
    return pa.chunked_array(
        [pa.array(values[:4], datasets.Image.pa_type), pa.array(values[4:], datasets.Image.pa_type)]
    )


def test_rows_that_name_files_elsewhere_are_refused(root, canary, monkeypatch):
    monkeypatch.chdir(root)
    own = [{"bytes": b"x", "path": str(canary)}, {"bytes": None, "path": str(root / "0.png")}, None]
    own += [{"bytes": None, "path": None}, {"bytes": None, "path": "hf://datasets/a/b@1/x.png"}]
    own += [{"bytes": None, "path": "zip://x.png::hf://datasets/a/b@1/x.zip"}]
    roots = [root, "hf://datasets/a/b@"]
    door.require_inside(image_rows(own), roots, "set")
    strange = [str(canary), "../private/passport.png", "http://127.0.0.1/x.png", "hf://datasets/a/bc@1/x.png"]
    strange += ["zip://hf://datasets/a/b@1/x::/etc/passwd", "file:///etc/x.png", "/etc/passwd"]
    for path in strange:
        dataset = image_rows([*own, {"bytes": None, "path": path}])
        with pytest.raises(DataError, match="set: 1 images .*row 6: "):
            door.require_inside(dataset, roots, "set")
        door.require_inside(dataset.slice(0, 6), roots, "set")
    with pytest.raises(DataError, match=r"2 images"):
        door.require_inside(image_rows([own[1], own[1]]), ["/nowhere"], "set")


def test_slices_of_a_table_are_read_in_their_place(root, canary):
    images = pa.array([{"bytes": None, "path": str(canary)}, {"bytes": np.zeros(3).tobytes(), "path": None}] * 2)
    assert [row for row, _ in door.strange_paths(images, [root])] == [0, 2]
    assert [row for row, _ in door.strange_paths(images.slice(1), [root])] == [1]


@pytest.mark.parametrize("kind", ["parquet", "stream", "saved"])
def test_a_downloaded_data_set_cannot_name_files_of_this_machine(root, canary, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def read(folder):
        return list(load_stream(folder, "train")[0]) if kind == "stream" else load_dataset_source(folder)

    values = [{"bytes": (root / "0.png").read_bytes(), "path": "0.png"}, {"bytes": None, "path": str(canary)}]
    for number, rows in enumerate((values[:1], values)):
        folder = tmp_path / f"downloaded{number}"
        table = pa.table({"image": pa.array(rows, datasets.Image.pa_type)})
        dataset = datasets.Dataset(
            table, info=datasets.DatasetInfo(features=datasets.Features(image=datasets.Image()))
        )
        folder.mkdir()
        if kind == "saved":
            # As `save_to_disk`, which would embed the file.
            with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            dataset.info.write_to_directory(str(folder))
            state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "x", "_split": "train"}
            state |= {
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
            }
            (folder / "state.json").write_text(json.dumps(state))
        else:
            dataset.cast_column("image", datasets.Image(decode=False)).to_parquet(folder / "train.parquet")
        if number == 0:
            assert len(read(folder)) == 1
        else:
            with pytest.raises(DataError, match=r"1 images are not in the data set.*row 1: '.*passport\.png'"):
                read(folder)


def test_an_image_folder_tells_what_it_leaves_out(root, canary, caplog):
    os.symlink(canary, root / "x.png")
    (root / "y.heic").write_bytes(b"x")
    assert len(load_dataset_source(root)) == 2
    if ".heic" not in door.image_suffixes():
        assert "left out: 1 (HEIC needs a plug-in of Pillow: pip install pillow-heif): y.heic" in caplog.text
    assert "left out: 1 (a link to a file outside the folder: give the folder of that file): x.png" in caplog.text


def test_missing_and_damaged_files_of_a_label_file_are_listed_together(root):
    (root / "cut.png").write_bytes(write_image(root / "0.png").read_bytes()[:45])
    names = ["0.png", "gone.png", "cut.png", "1.png", "away.png"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    (root / "labels.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    with pytest.raises(DataError) as error:
        load_dataset_source(root / "labels.json")
    lines = str(error.value).splitlines()
    assert "3 of 5 images cannot be read" in lines[0] and "there is no file" in lines[1] and "there is no" in lines[3]
    assert "image 2: " in lines[2] and "cut.png" in lines[2]
