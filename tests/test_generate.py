"""`aligndet proposals`: what is written, resuming after a kill, what is left alone, and what is refused."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import datasets
import forks
import numpy as np
import PIL.Image
import pytest
from damages import cut, flip

from aligndet_hf import cli
from aligndet_hf.commands import proposals as generate
from aligndet_hf.commands.proposals import ProposalsArguments, generate_proposals
from aligndet_hf.data import shard_search, shards, sources, stream_shards
from aligndet_hf.data.columns import validate_proposals
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.proposal_arguments import KEPT
from aligndet_hf.data.shards import content_hash, writing_to
from aligndet_hf.proposals.opencv import opencv_selective_search

QUICK = {
    "source": "opencv",
    "mode": "single",
    "short_side": 48,
    "max_boxes": 300,
    "nms_threshold": 0.7,
    "max_relative_size": 1.0,
    "shard_size": 2,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


def write_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Small scenes: a few rectangles on a noisy ground, JPEG and PNG in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        pixels = rng.integers(90, 110, (60, 80, 3), dtype=np.uint8)
        for _ in range(4):
            x, y = rng.integers(0, 60), rng.integers(0, 40)
            pixels[y : y + rng.integers(8, 30), x : x + rng.integers(8, 30)] = rng.integers(0, 255, 3)
        paths.append(folder / f"{number:03d}.{'jpg' if number % 2 else 'png'}")
        PIL.Image.fromarray(pixels).save(paths[-1])
    return paths


def arguments(source, output, **changes) -> ProposalsArguments:
    return ProposalsArguments(**{"dataset": str(source), "output_dir": str(output), **QUICK, **changes})


def rows_of(dataset: datasets.Dataset) -> list[dict]:
    return dataset.cast_column("image", datasets.Image(decode=False)).to_list()


@pytest.fixture
def counted(monkeypatch):
    """The images that are searched in this process."""
    searched = []

    def search(image, *args, **kwargs):
        searched.append(image.shape)
        return opencv_selective_search(image, *args, **kwargs)

    monkeypatch.setattr(sources, "opencv_selective_search", search)
    return searched


# ---- what is written ----


def test_output_has_the_images_unchanged_and_their_proposals(tmp_path, capsys):
    paths = write_images(tmp_path / "images", 5)
    result = generate_proposals(arguments(tmp_path / "images", tmp_path / "out"))
    assert result.column_names == ["image", "proposals"] and len(result) == 5
    assert isinstance(result.features["image"], datasets.Image) and result.features["image"].decode
    assert "5 images, 0 of them without boxes" in capsys.readouterr().out
    assert not (tmp_path / "out.partial").exists()

    for source in (result, load_dataset_source(tmp_path / "out")):
        for path, row in zip(paths, rows_of(source), strict=True):
            assert row["image"]["bytes"] == path.read_bytes()
            boxes, scores = opencv_selective_search(decode_image(path), mode="single", short_side=48)
            assert len(boxes) > 1
            np.testing.assert_array_equal(np.array(row["proposals"]["bbox"], dtype=np.float32), boxes)
            np.testing.assert_array_equal(np.array(row["proposals"]["score"], dtype=np.float32), scores)
    assert validate_proposals(load_dataset_source(tmp_path / "out")).boxes == sum(
        len(row["score"]) for row in result["proposals"]
    )


def test_report_and_description_say_how_it_was_made(tmp_path):
    write_images(tmp_path / "images", 3)
    result = generate_proposals(arguments(tmp_path / "images", tmp_path / "out", max_boxes=7))
    report = json.loads((tmp_path / "out" / "proposals.json").read_text())
    counts = [len(row["score"]) for row in result["proposals"]]
    assert max(counts) == 7
    assert report["statistics"] == {
        "train": {
            "images": 3,
            "skipped_images": 0,
            "images_without_boxes": 0,
            "boxes_per_image": {
                "min": min(counts),
                "median": float(np.median(counts)),
                "mean": round(np.mean(counts), 2),
                "max": 7,
            },
        }
    }
    assert report["settings"]["source"] == "opencv"
    assert report["settings"]["max_boxes"] == 7 and report["settings"]["mode"] == "single"
    assert set(report["versions"]) == {"aligndet_hf", "opencv", "numpy", "datasets"}
    assert report["skipped"] == []
    record = json.loads(result.info.description.removeprefix("Proposals: "))
    assert record == {key: report[key] for key in ("settings", "versions")} | {
        "statistics": report["statistics"]["train"]
    }


def test_other_columns_stay_and_an_earlier_column_is_replaced(tmp_path, capsys):
    paths = write_images(tmp_path / "images", 3)
    lines = [
        {"file_name": path.name, "image_id": 10 + i, "objects": {"bbox": [[1, 2, 9, 9 + i]], "category": [i % 2]}}
        for i, path in enumerate(paths)
    ]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "images" / "labels.json").write_text('["cat", "dog"]')
    first = generate_proposals(arguments(tmp_path / "images", tmp_path / "first"))
    assert list(first["image_id"]) == [10, 11, 12]
    assert [row["objects"]["bbox"] for row in rows_of(first)] == [line["objects"]["bbox"] for line in lines]
    assert first.features["objects"]["category"].feature.names == ["cat", "dog"]

    second = generate_proposals(arguments(tmp_path / "first", tmp_path / "second", max_boxes=2))
    assert "column 'proposals' of the split 'train' is replaced" in capsys.readouterr().out
    assert second.column_names == first.column_names
    for before, after in zip(rows_of(first), rows_of(second), strict=True):
        assert len(after["proposals"]["score"]) == 2
        assert before.pop("proposals")["bbox"][:2] == after.pop("proposals")["bbox"]
        assert before == after
    assert second.info.description.count("Proposals: ") == 1


def test_every_split_by_itself_or_one_of_them(tmp_path):
    write_images(tmp_path / "images" / "train", 3, seed=1)
    write_images(tmp_path / "images" / "val", 2, seed=2)
    both = generate_proposals(arguments(tmp_path / "images", tmp_path / "both"))
    assert {name: len(split) for name, split in both.items()} == {"train": 3, "validation": 2}
    one = generate_proposals(arguments(tmp_path / "images", tmp_path / "one", split="validation"))
    assert isinstance(one, datasets.Dataset)
    assert rows_of(one) == rows_of(both["validation"])
    assert len(load_dataset_source(tmp_path / "both", "validation")) == 2
    assert rows_of(load_dataset_source(tmp_path / "one", "validation")) == rows_of(one)  # the split keeps its name
    joined = generate_proposals(arguments(tmp_path / "images", tmp_path / "joined", split="validation+train"))
    assert rows_of(joined) == rows_of(both["validation"]) + rows_of(both["train"])


def test_coco_file_with_images_elsewhere(tmp_path):
    write_images(tmp_path / "pictures", 2)
    images = [{"id": i, "file_name": f"00{i}.{suffix}"} for i, suffix in enumerate(["png", "jpg"])]
    (tmp_path / "unlabelled.json").write_text(json.dumps({"images": images}))
    result = generate_proposals(
        arguments(tmp_path / "unlabelled.json", tmp_path / "out", image_dir=str(tmp_path / "pictures"))
    )
    assert list(result["image_id"]) == [0, 1] and len(result[0]["proposals"]["score"]) > 1


def test_kinds_of_images(tmp_path):
    """Grey, transparent, tiny and long: all have proposals or none, none is lost."""
    folder = tmp_path / "images"
    write_images(folder, 1)
    PIL.Image.new("L", (40, 40), 7).save(folder / "grey.png")
    PIL.Image.new("RGBA", (40, 30), (255, 0, 0, 9)).save(folder / "rgba.png")
    PIL.Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    PIL.Image.new("RGB", (8000, 50)).save(folder / "long.png")
    result = generate_proposals(arguments(folder, tmp_path / "out", shard_size=10))
    assert len(result) == 5
    validate_proposals(result.cast_column("image", datasets.Image(decode=False)))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_left_out_and_listed(tmp_path, capsys, workers):
    paths = write_images(tmp_path / "images", 7)
    paths[0].write_bytes(b"no image")
    paths[3].write_bytes(paths[3].read_bytes()[:400])  # truncated
    result = generate_proposals(arguments(tmp_path / "images", tmp_path / "out", dataloader_num_workers=workers))
    good = [path for number, path in enumerate(paths) if number not in (0, 3)]
    assert [row["image"]["bytes"] for row in rows_of(result)] == [path.read_bytes() for path in good]
    for path, row in zip(good, rows_of(result), strict=True):
        boxes, _ = opencv_selective_search(decode_image(path), mode="single", short_side=48)
        assert row["proposals"]["bbox"] == boxes.tolist()

    report = json.loads((tmp_path / "out" / "proposals.json").read_text())
    assert [(image["split"], image["row"], image["file"]) for image in report["skipped"]] == [
        ("train", 0, str(paths[0])),
        ("train", 3, str(paths[3])),
    ]
    assert str(paths[0]) in report["skipped"][0]["reason"]
    assert report["statistics"]["train"]["images"] == 5
    assert report["statistics"]["train"]["skipped_images"] == 2
    printed = capsys.readouterr().out
    assert "Left out, for they cannot be read: 2" in printed and str(paths[3]) in printed


def test_strategy_by_name_replaces_the_filters(tmp_path):
    write_images(tmp_path / "images", 2)
    result = generate_proposals(
        arguments(tmp_path / "images", tmp_path / "out", strategy="ratio2size0308", short_side=60)
    )
    boxes = np.array([box for row in result["proposals"] for box in row["bbox"]])
    assert len(boxes) and boxes[:, 2:].min() >= 32
    assert (boxes[:, 2:].max(axis=1) / boxes[:, 2:].min(axis=1)).max() <= 2
    assert np.sqrt(boxes[:, 2:].prod(axis=1) / (60 * 80)).max() <= 0.8 + 1e-6


def test_several_processes_give_the_same(tmp_path):
    write_images(tmp_path / "images", 9)
    one = generate_proposals(arguments(tmp_path / "images", tmp_path / "one"))
    two = generate_proposals(arguments(tmp_path / "images", tmp_path / "two", dataloader_num_workers=2, shard_size=3))
    assert rows_of(one) == rows_of(two)
    states = [(tmp_path / name / "state.json").read_text() for name in ("one", "two")]
    assert states[0] == states[1]  # whatever `datasets` made on the way


# ---- again, and after a kill ----


def test_second_run_does_nothing(tmp_path, counted, capsys):
    paths = write_images(tmp_path / "images", 5)
    first = generate_proposals(arguments(tmp_path / "images", tmp_path / "out"))
    assert len(counted) == 5
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = generate_proposals(
        arguments(tmp_path / "images", tmp_path / "out", dataloader_num_workers=2, overwrite_output_dir=True)
    )
    assert len(counted) == 5 and "Nothing to do" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert rows_of(first) == rows_of(second)

    os.utime(paths[0], (1, 1))  # a copy of the folder has other times: the content counts
    generate_proposals(arguments(tmp_path / "images", tmp_path / "out"))
    assert len(counted) == 5
    paths[0].write_bytes(paths[2].read_bytes())
    with pytest.raises(ValueError, match="input_train: not the same.*--overwrite"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out"))


def test_other_settings_need_overwrite(tmp_path, counted):
    write_images(tmp_path / "images", 3)
    before = rows_of(generate_proposals(arguments(tmp_path / "images", tmp_path / "out")))
    changed = {"max_boxes": 3, "nms_threshold": 0.5}
    with pytest.raises(
        ValueError, match="max_boxes: 300 there, 3 now, nms_threshold: 0.7 there, 0.5 now.*--overwrite"
    ):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", **changed))
    assert rows_of(datasets.load_from_disk(str(tmp_path / "out"))) == before and len(counted) == 3
    after = generate_proposals(arguments(tmp_path / "images", tmp_path / "out", overwrite_output_dir=True, **changed))
    assert len(counted) == 6 and max(len(row["score"]) for row in after["proposals"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


def test_folders_of_others_are_never_overwritten(tmp_path):
    write_images(tmp_path / "images", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds thesis.tex.*was not written by `aligndet proposals`"):
            generate_proposals(arguments(tmp_path / "images", tmp_path / "out", overwrite_output_dir=overwrite))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert len(generate_proposals(arguments(tmp_path / "images", tmp_path / "empty"))) == 2


def test_interrupted_anywhere_it_continues(tmp_path, counted, monkeypatch):
    """While a shard is written, in a search, after the last, while saving, and before the result is put in place."""
    write_images(tmp_path / "images", 7)
    expected = rows_of(generate_proposals(arguments(tmp_path / "images", tmp_path / "expected")))
    counted.clear()
    run = arguments(tmp_path / "images", tmp_path / "out")

    class Killed(BaseException):
        pass

    search, replace, new_stream = sources.opencv_selective_search, os.replace, shards.pa.ipc.new_stream

    def kill(*args, **kwargs):
        raise Killed

    def search_five(*args, **kwargs):
        return search(*args, **kwargs) if len(counted) < 5 else kill()

    def write_half(file, schema):
        if "reason" not in schema.names:  # not a shard
            return new_stream(file, schema)
        file.write(b"half")
        kill()

    def replace_files(path, target):
        return kill() if Path(path).is_dir() else replace(path, target)

    for target, name, replacement in [
        (shards.pa.ipc, "new_stream", write_half),
        (sources, "opencv_selective_search", search_five),
        (shards, "_with_proposals", kill),
        (shards, "embed_table_storage", kill),
        (os, "replace", replace_files),
    ]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(target, name, replacement)
            generate_proposals(run)
        assert not (tmp_path / "out").exists()
    # 2 images lost, 2 in a finished shard, 1 lost; then the 5 that were left.
    assert len(counted) == 5 + 5
    assert rows_of(generate_proposals(run)) == expected
    assert len(counted) == 5 + 5 and not (tmp_path / "out.partial").exists()


def test_damaged_shards_are_searched_anew(tmp_path, counted, monkeypatch, capsys):
    write_images(tmp_path / "images", 5)
    run = arguments(tmp_path / "images", tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "_with_proposals", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        generate_proposals(run)
    first, second, _ = sorted((tmp_path / "out.partial").glob("train-0*.arrow"))
    cut(first)
    flip(second)
    result = rows_of(generate_proposals(run))
    assert len(counted) == 5 + 4 and capsys.readouterr().out.count("is damaged, and done anew") == 2
    assert result == rows_of(generate_proposals(arguments(tmp_path / "images", tmp_path / "whole")))


def test_unfinished_run_of_other_settings_is_not_mixed_in(tmp_path, counted, monkeypatch):
    write_images(tmp_path / "images", 4)
    run = arguments(tmp_path / "images", tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "_with_proposals", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        generate_proposals(run)
    with pytest.raises(ValueError, match="another configuration.*.short_side: 48 there, 50 now.*--overwrite"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", short_side=50))
    with pytest.raises(ValueError, match="shard_size: 2 there, 3 now"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", shard_size=3))
    assert len(counted) == 4
    generate_proposals(arguments(tmp_path / "images", tmp_path / "out", short_side=50, overwrite_output_dir=True))
    assert len(counted) == 8


def test_shards_of_other_settings_are_never_delivered(tmp_path, counted, monkeypatch):
    """Whatever a killed run leaves: the names of the files say what they were made with."""
    write_images(tmp_path / "images", 4)
    work = tmp_path / "out.partial"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "_with_proposals", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", max_boxes=7))
    record = json.loads((work / "run.json").read_text())
    record["settings"]["max_boxes"] = 2  # the worst that can be
    (work / "run.json").write_text(json.dumps(record))
    found = generate_proposals(arguments(tmp_path / "images", tmp_path / "out", max_boxes=2))
    assert len(counted) == 8 and [len(row["score"]) for row in found["proposals"]] == [2] * 4
    (work).mkdir()
    (work / "train-000000000.arrow").touch()
    with pytest.raises(ValueError, match="out.partial holds train-000000000.arrow, but no run.json"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", max_boxes=3, overwrite_output_dir=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_where_it_stopped(tmp_path, counted, monkeypatch, number, capsys):
    write_images(tmp_path / "images", 7)
    search = sources.opencv_selective_search

    def signalled(*args, **kwargs):
        if len(counted) == 4:
            os.kill(os.getpid(), number)
        return search(*args, **kwargs)

    flags = [f"--dataset={tmp_path / 'images'}", f"--output_dir={tmp_path / 'out'}", "--shard_size=2"]
    flags += ["--source=opencv", "--short_side=48", "--dataloader_num_workers=0"]
    with monkeypatch.context() as patch:
        patch.setattr(sources, "opencv_selective_search", signalled)
        assert cli.main(["proposals", *flags]) == 128 + number
    told = capsys.readouterr().err
    assert "Stopped after 4 of 7 images, which are kept. Run the same command again to go on." in told
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert cli.main(["proposals", *flags]) == 0 and len(counted) == 7


def test_two_at_the_same_time_one_is_refused(tmp_path, counted, monkeypatch):
    write_images(tmp_path / "images", 3)
    search = sources.opencv_selective_search

    def second(*args, **kwargs):
        for change in ({}, {"max_boxes": 3, "overwrite_output_dir": True}):
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()} .*aligndet proposals"):
                generate_proposals(arguments(tmp_path / "images", tmp_path / "out", **change))
        return search(*args, **kwargs)

    monkeypatch.setattr(sources, "opencv_selective_search", second)
    generate_proposals(arguments(tmp_path / "images", tmp_path / "out"))
    assert len(counted) == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


def in_a_session(argv):
    os.setsid()
    sys.exit(cli.main(argv))


def test_killed_twice_and_started_again(tmp_path, counted):
    """kill -9 of the command with two workers: they end too, finished shards stay, the result is the same."""
    write_images(tmp_path / "images", 24)
    run = arguments(tmp_path / "images", tmp_path / "out", mode="fast", short_side=100)
    names = ["dataset", "output_dir", "source", "mode", "short_side", "shard_size", *KEPT["search"]]
    flags = [f"--{name}={getattr(run, name)}" for name in names]
    work, finished = tmp_path / "out.partial", {}
    for kill, workers in ((1, 2), (2, 0)):
        argv = ["proposals", *flags, f"--dataloader_num_workers={workers}"]
        process = forks.start(in_a_session, argv, console=tmp_path / "console.txt")
        while len(list(work.glob("train-0*.arrow"))) < 3 * kill and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
        deadline = time.monotonic() + 1200
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("the workers outlive the command")
        assert not (tmp_path / "out").exists()
        before, finished = finished, {path: path.stat().st_mtime_ns for path in work.glob("train-0*.arrow")}
        assert before.items() <= finished.items() and 3 * kill <= len(finished) < 12

    resumed = generate_proposals(arguments(tmp_path / "images", tmp_path / "out", mode="fast", short_side=100))
    assert len(counted) == 24 - 2 * len(finished)
    whole = generate_proposals(arguments(tmp_path / "images", tmp_path / "whole", mode="fast", short_side=100))
    assert rows_of(resumed) == rows_of(whole)


def mapped_megabytes() -> float:
    """Memory of this process that is a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssFile")).split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of the process as Linux has it")
@pytest.mark.parametrize("embedded", [True, False])
def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch, embedded):
    """80 MB of images are hashed and saved: in files, and mapped from a data set of their own."""
    blob = np.random.default_rng(0).bytes(400_000)
    for number in range(200):
        (tmp_path / f"{number:03d}.png").write_bytes(blob)
    source = load_dataset_source(tmp_path)
    if embedded:
        shards.save_split(source, tmp_path / "saved")
        source = load_dataset_source(tmp_path / "saved")
    before, mapped, reopened = mapped_megabytes(), [], shards.reopened
    del blob

    def watched(*args):
        mapped.append(mapped_megabytes() - before)
        return reopened(*args)

    monkeypatch.setattr(shards, "reopened", watched)
    monkeypatch.setattr(shards, "_ROWS_AT_ONCE", 16)
    monkeypatch.setattr(shards, "_FILE_BYTES", 30_000_000)
    tracemalloc.start()
    content_hash(source)
    shards.save_split(source, tmp_path / "copy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(mapped) == 2 * 13 and max(mapped) < 30 and peak < 30e6
    copy = datasets.load_from_disk(str(tmp_path / "copy"))
    assert copy.data["image"].num_chunks <= 12  # a batch that is mapped costs some memory, however small it is
    assert len(copy.cache_files) == 3 and content_hash(copy.cast_column("image", datasets.Image(decode=False)))
    assert rows_of(copy) == rows_of(datasets.load_from_disk(str(tmp_path / "saved")) if embedded else copy)
    assert [row["image"]["path"] for row in rows_of(copy)] == [f"{number:03d}.png" for number in range(200)]


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 4)
    monkeypatch.setattr(shard_search, "_init_worker", os._exit)
    with pytest.raises(ChildProcessError, match="run the same again, with fewer"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", dataloader_num_workers=2))


# ---- what is refused ----


def test_unwritable_output(tmp_path):
    write_images(tmp_path / "images", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder .*file"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "file" / "out"))
    with pytest.raises(ValueError, match="file is a file"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "file"))


def test_full_disk_keeps_what_is_finished(tmp_path, counted, monkeypatch):
    write_images(tmp_path / "images", 6)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        search = generate.search_shard
        patch.setattr(generate, "search_shard", lambda shard, *rest: full() if shard.start else search(shard, *rest))
        with pytest.raises(DataError, match="No space left on device.*run the same command again"):
            generate_proposals(arguments(tmp_path / "images", tmp_path / "out"))
    assert len(generate_proposals(arguments(tmp_path / "images", tmp_path / "out"))) == 6 and len(counted) == 6


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        generate_proposals(arguments(tmp_path / "nowhere", tmp_path / "out"))
    datasets.Dataset.from_dict({"picture": [1]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="no column 'image'; found 'picture'"):
        generate_proposals(arguments(tmp_path / "saved", tmp_path / "out"))
    write_images(tmp_path / "images" / "train", 1)
    with pytest.raises(DataError, match="no split 'test'; found train"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", split="test"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="None of the 1 images of the split 'train' can be read.*a.jpg"):
        generate_proposals(arguments(tmp_path / "broken", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "slow"}, "mode must be one of single, fast, quality, got 'slow'"),
        ({"short_side": 0}, "short_side must be from 1 to 32767"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be 0 or more"),
        ({"strategy": "size3"}, "Unknown filter strategy 'size3'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        arguments("images", "out", **change)


def test_content_hash_sees_all_content_and_only_content(tmp_path):
    paths = write_images(tmp_path / "images", 40)
    dataset = load_dataset_source(tmp_path / "images").add_column("caption", ["a"] * 40)
    expected = content_hash(dataset)
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert content_hash(load_dataset_source(tmp_path / "saved")) == expected  # embedded or in files
    assert content_hash(dataset.select(range(39))) != expected
    assert content_hash(dataset.select([1, 0, *range(2, 40)])) != expected
    assert content_hash(dataset.remove_columns("caption").add_column("caption", ["a"] * 39 + ["b"])) != expected
    paths[35].write_bytes(paths[35].read_bytes() + b"0")
    assert content_hash(dataset) != expected


def test_content_hash_sees_every_box_and_score(tmp_path):
    write_images(tmp_path / "images", 3)
    images = load_dataset_source(tmp_path / "images")

    def hash_of(boxes, number=1.0, names=("a", None, "c")):
        column = {"found": [{"bbox": row, "score": [number] * len(row)} for row in boxes], "name": list(names)}
        return content_hash(datasets.concatenate_datasets([images, datasets.Dataset.from_dict(column)], axis=1))

    boxes = [[[0.0, 1, 2, 3], [4, 5, 6, 7]], [], [[8, 9, 10, 11]]]
    hashes = [
        hash_of(boxes),
        hash_of(boxes, 1.5),
        hash_of([boxes[0][:1], [boxes[0][1]], boxes[2]]),  # the same values, in other rows
        hash_of([boxes[0], [], [[8, 9, 10, 12]]]),
        hash_of(boxes, names=("a", "", "c")),
    ]
    assert len(set(hashes)) == 5 and hash_of(boxes) == hashes[0]


def test_command_line(tmp_path, capsys):
    write_images(tmp_path / "images", 2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"dataset: {tmp_path / 'images'}\nsource: opencv\nmode: single\nshort_side: 48\ndataloader_num_workers: 1\n"
    )
    argv = ["proposals", "--config", str(recipe), "--output_dir", str(tmp_path / "out"), "--disable_tqdm"]
    assert cli.main(argv) == 0
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) == 2
    assert cli.main([*argv, "--max_boxes", "5"]) == 2
    assert "error: " in capsys.readouterr().err


# ---- streams ----


@pytest.fixture
def parquet(tmp_path):
    """Nine images, one of them broken, as parquet files of five and four rows; and the same as a folder."""
    paths = write_images(tmp_path / "images", 9)
    paths[6].write_bytes(b"no image")
    dataset = datasets.Dataset.from_dict({"number": list(range(9)), "image": [path.read_bytes() for path in paths]})
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    (tmp_path / "parquet").mkdir()
    for part, rows in enumerate((range(5), range(5, 9))):
        dataset.select(rows).to_parquet(tmp_path / "parquet" / f"train-{part:05d}-of-00002.parquet")
    return tmp_path / "parquet"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_same(parquet, tmp_path, counted, capsys, workers):
    expected = generate_proposals(arguments(parquet, tmp_path / "whole"))
    run = arguments(parquet, tmp_path / "out", streaming=True, dataloader_num_workers=workers)
    result = generate_proposals(run)
    assert result.features == expected.features and rows_of(result) == rows_of(expected)
    report = json.loads((tmp_path / "out" / "proposals.json").read_text())
    assert [(image["row"], report["statistics"]["train"]["images"]) for image in report["skipped"]] == [(6, 8)]
    assert not (tmp_path / "out.partial").exists()
    counted.clear()
    generate_proposals(run)
    assert "Nothing to do" in capsys.readouterr().out and not counted


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_a_stream(parquet, tmp_path, monkeypatch, counted, size):
    expected = rows_of(generate_proposals(arguments(parquet, tmp_path / "whole")))
    counted.clear()

    class OneOfSeveral(generate.Launch):
        number = 0

        def __enter__(self):
            self.rank, self.size = self.number, size
            return self

        def on_main(self, function, *args):
            if function.__name__ == "finish" and self.rank < size - 1:
                raise StopIteration  # another process would be waited for
            return function(*args)

        def wait(self):
            pass

    monkeypatch.setattr(generate, "Launch", OneOfSeveral)
    for OneOfSeveral.number in range(size):
        with contextlib.suppress(StopIteration):
            result = generate_proposals(arguments(parquet, tmp_path / "out", streaming=True))
    assert rows_of(result) == expected and len(counted) == 8


def test_a_stream_interrupted_anywhere_continues(parquet, tmp_path, monkeypatch, counted):
    expected = rows_of(generate_proposals(arguments(parquet, tmp_path / "whole")))
    counted.clear()

    class Killed(Exception):
        pass

    read, replace, calls = stream_shards.read_shard, os.replace, []

    def killed_now(*args):
        calls.append(None)
        if len(calls) % 7 == 0:
            raise Killed

    def read_shard(*args):
        for item in read(*args):
            killed_now()
            yield item

    def replaced(*args):
        killed_now()
        replace(*args)

    monkeypatch.setattr(stream_shards, "read_shard", read_shard)
    monkeypatch.setattr(os, "replace", replaced)
    kills = 0
    while True:
        try:
            result = generate_proposals(arguments(parquet, tmp_path / "out", streaming=True))
            break
        except Killed:
            kills += 1
        for rows in sorted((tmp_path / "out.partial").glob("*.rows"))[: kills == 3]:
            rows.write_bytes(rows.read_bytes()[:-1])
    assert kills > 3 and rows_of(result) == expected
    assert len(counted) <= 8 + 2 * kills  # a kill costs no more than a shard


def test_an_empty_split_of_a_stream_is_told(parquet, tmp_path):
    for path in parquet.iterdir():
        datasets.Dataset.from_parquet(str(path)).select([]).to_parquet(path)
    with pytest.raises(DataError, match="The split 'train' of the stream has no rows"):
        generate_proposals(arguments(parquet, tmp_path / "out", streaming=True, dataloader_num_workers=0))


def test_what_does_not_stream(tmp_path):
    write_images(tmp_path / "images", 1)
    with pytest.raises(DataError, match="leave out --streaming"):
        generate_proposals(arguments(tmp_path / "images", tmp_path / "out", streaming=True))
    with pytest.raises(ValueError, match="streaming does not go with"):
        arguments(tmp_path, tmp_path / "out", streaming=True, image_dir="x")


@pytest.mark.parametrize(
    ("error", "is_of_writing"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied", "{parent}/out.partial"), True),
        (PermissionError(errno.EACCES, "Permission denied", "{parent}"), True),
        (PermissionError(errno.EACCES, "Failed to open '{parent}/out.partial/x.arrow'"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "{parent}/images/a::b.png"), False),
        (PermissionError(errno.EACCES, "Permission denied", "{parent}/images/a.png"), False),
        (OSError("a model lacks its config"), False),
    ],
)
def test_only_what_fails_in_writing_is_blamed_on_the_output(error, is_of_writing, tmp_path):
    place = [part.format(parent=tmp_path) if isinstance(part, str) else part for part in error.args]
    name = [error.filename.format(parent=tmp_path)] if error.filename else []
    error = type(error)(*place, *name)
    with pytest.raises(DataError if is_of_writing else type(error), match="Cannot write to" if is_of_writing else ""):
        with writing_to(tmp_path / "out"):
            raise error
