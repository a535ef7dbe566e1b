"""Output folders: whose run it is, and that only one process works there."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aligndet_hf import files, runs
from aligndet_hf.runs import LOCK, RECORD, RunFolder
from aligndet_hf.training.interrupts import StopSignals

SETTINGS = {"seed": 0, "sizes": [64, 96], "inner": {"rate": 0.1}}


def training(folder, command="pretrain", **options):
    """The folder of a run that works in place."""
    written = ["log.jsonl", "README.md"]
    return RunFolder(folder, command, written=written, kept=["checkpoint-*"], result="summary.json", **options)


def data_set(folder, **options):
    """The folder of a run that works aside."""
    return RunFolder(folder, "proposals", kept=["*.arrow"], aside=True, **options)


def begin(folder, *made, settings=SETTINGS, **options):
    """A run that makes some files and ends before it is finished."""
    with training(folder, **options) as run:
        run.claim(settings=settings)
        for name in made:
            (run.work / name).write_text(json.dumps(settings))


def names(folder):
    return sorted(os.listdir(folder))


def state_of(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def record_of(folder):
    return json.loads((folder / RECORD).read_text())


# ---- whose run it is ----


def test_a_new_folder_gets_a_record_and_keeps_what_others_left(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with training(folder) as run:
        assert run.work == run.path == folder and names(folder) == [LOCK, "notes.txt"]
        assert run.claim(settings=SETTINGS) == {} and not run.is_finished
        assert names(folder) == [LOCK, "notes.txt", RECORD]
    assert names(folder) == ["notes.txt", RECORD]
    assert record_of(folder) == {"command": "pretrain", "settings": SETTINGS}


def test_a_worker_that_imports_a_script_without_the_main_guard_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match="call under `if __name__ == '__main__':`"):
        begin(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [training, data_set])
def test_a_folder_of_photographs_is_refused_before_any_work_and_a_folder_of_runs_is_not(tmp_path, make):
    photos = tmp_path / "photos" / "holidays"
    photos.mkdir(parents=True)
    (photos / "1.JPG").write_bytes(b"a picture")
    before = state_of(tmp_path)
    with pytest.raises(ValueError, match="photos holds holidays, but no run.json: .* Choose a new output_dir"):
        make(photos.parent).__enter__()
    assert state_of(tmp_path) == before
    begin(tmp_path / "outputs" / "one", "checkpoint-2")
    (tmp_path / "outputs" / "empty").mkdir()
    (tmp_path / "outputs" / "notebook.ipynb").touch()
    (tmp_path / "outputs" / ".venv" / "icons").mkdir(parents=True)
    (tmp_path / "outputs" / ".venv" / "icons" / "home.png").write_bytes(b"an icon")
    begin(tmp_path / "outputs")
    assert names(tmp_path / "outputs") == [".venv", "empty", "notebook.ipynb", "one", RECORD]
    assert (tmp_path / "outputs" / ".venv" / "icons" / "home.png").is_file()


def test_a_place_that_leads_nowhere_is_told(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((ValueError, OSError), match="loop"):
        begin(tmp_path / "loop")
    with pytest.raises(ValueError, match="output_dir '~nobody-of-this-name/run' leads nowhere"):
        begin("~nobody-of-this-name/run")


def test_the_same_run_goes_on_until_its_result_is_there(tmp_path):
    begin(tmp_path, "checkpoint-2", "unfinished-checkpoint-3")
    with training(tmp_path) as run:
        run.claim(settings=SETTINGS | {"sizes": (64, 96)})  # as JSON has it
        assert not run.is_finished and names(tmp_path) == [LOCK, "checkpoint-2", RECORD]
        (tmp_path / "summary.json").write_text("{}")
    with training(tmp_path) as run:
        run.claim(settings=SETTINGS)
        assert run.is_finished
        run.extend()
        assert not run.is_finished and not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("content", ["", '{"metrics": ', "[]", "[" * 100_000])
def test_a_damaged_result_is_no_mark_of_a_finished_run(tmp_path, content):
    begin(tmp_path, "checkpoint-2", "summary.json")
    (tmp_path / "summary.json").write_text(content)
    with training(tmp_path) as run:
        run.claim(settings=SETTINGS)
        assert not run.is_finished and (tmp_path / "checkpoint-2").exists()


def test_what_measures_leaves_nothing_of_what_it_measured_before(tmp_path):
    def measure(*made):
        with runs.measuring_folder(tmp_path, "evaluate", ["*.json", "*.png"]):
            for name in made:
                (tmp_path / name).write_text("{}")

    measure("results.json", "predictions.json")
    (tmp_path / "notes.txt").touch()
    measure("results.json", "predictions.png")
    assert names(tmp_path) == ["notes.txt", "predictions.png", "results.json", RECORD]
    with pytest.raises(OSError), runs.measuring_folder(tmp_path, "evaluate", ["*.json", "*.png"]):
        raise OSError
    assert names(tmp_path) == ["notes.txt", "predictions.png", "results.json", RECORD]


def test_another_run_is_refused_untouched_or_cleared(tmp_path):
    begin(tmp_path, "checkpoint-2", "log.jsonl", "notes.txt")
    before, other = state_of(tmp_path), {"seed": 1, "sizes": [64, 96], "inner": {"rate": 0.2}, "new": True}
    with pytest.raises(ValueError) as error, training(tmp_path) as run:
        run.claim(settings=other)
    message = str(error.value)
    assert "seed: 0 there, 1 now" in message and "inner.rate: 0.1 there, 0.2 now" in message
    assert "new: None there, True now" in message and "sizes" not in message and "--overwrite_output_dir" in message
    assert state_of(tmp_path) == before
    begin(tmp_path, settings=other, overwrite=True)
    assert names(tmp_path) == ["notes.txt", RECORD] and record_of(tmp_path)["settings"] == other


def test_of_hashes_it_is_told_only_that_they_differ(tmp_path):
    begin(tmp_path, "checkpoint-2", settings={"content": "a" * 32, "seed": 0})
    with pytest.raises(ValueError, match=r"\(content: not the same, seed: 0 there, 1 now\)"):
        begin(tmp_path, settings={"content": "b" * 32, "seed": 1})


def test_starting_anew_clears_the_same_run_too_but_once(tmp_path):
    begin(tmp_path, "checkpoint-2")
    with training(tmp_path, overwrite=True) as run:
        run.claim(settings=SETTINGS)
        assert names(tmp_path) == [LOCK, RECORD]
        (tmp_path / "checkpoint-1").touch()
        run.claim(data={"images": "a1"})
        assert (tmp_path / "checkpoint-1").exists()
    assert record_of(tmp_path) == {"command": "pretrain", "settings": SETTINGS, "data": {"images": "a1"}}


def test_a_run_that_left_nothing_to_go_on_from_gives_way(tmp_path):
    begin(tmp_path, "log.jsonl")
    begin(tmp_path, settings={"seed": 1})
    assert record_of(tmp_path)["settings"] == {"seed": 1} and not (tmp_path / "log.jsonl").exists()


def test_data_that_is_known_later_counts_too(tmp_path):
    with training(tmp_path) as run:
        run.claim(settings=SETTINGS)
        run.claim(data={"images": "a1"})
        (tmp_path / "checkpoint-1").touch()
    with training(tmp_path) as run:
        run.claim(settings=SETTINGS)
        with pytest.raises(ValueError, match="other data .images: 'a1' there, 'b2' now"):
            run.claim(data={"images": "b2"})
    (tmp_path / "checkpoint-1").unlink()
    with training(tmp_path) as run:  # nothing to go on from: the record is written anew, with all of it
        run.claim(settings=SETTINGS)
        run.claim(data={"images": "b2"})
    assert record_of(tmp_path) == {"command": "pretrain", "settings": SETTINGS, "data": {"images": "b2"}}


def test_what_may_change_is_told_and_recorded_when_it_is_accepted(tmp_path):
    begin(tmp_path, "checkpoint-2", "summary.json")
    with training(tmp_path) as run:
        assert run.claim({"seed"}, settings=SETTINGS | {"seed": 7}) == {"seed": (0, 7)} and run.is_finished
        assert run.claim(data={"images": "a1"}) == {"seed": (0, 7)}
        assert record_of(tmp_path) == {"command": "pretrain", "settings": SETTINGS, "data": {"images": "a1"}}
        run.extend()
    assert record_of(tmp_path)["settings"]["seed"] == 7 and names(tmp_path) == ["checkpoint-2", RECORD]
    with training(tmp_path) as run, pytest.raises(ValueError, match="inner.rate: 0.1 there, 5 now"):
        run.claim({"seed"}, settings=SETTINGS | {"inner": {"rate": 5}})


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_command_is_refused_whatever_is_asked_for(tmp_path, overwrite):
    begin(tmp_path, "checkpoint-2")
    before = state_of(tmp_path)
    with pytest.raises(ValueError, match="holds a run of `aligndet pretrain`.*for `aligndet finetune`"):
        begin(tmp_path, command="finetune", overwrite=overwrite)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["checkpoint-2", "README.md", "summary.json"])
def test_files_without_a_record_are_never_taken(tmp_path, overwrite, name):
    (tmp_path / name).write_text("theirs")
    before = state_of(tmp_path)
    with pytest.raises(ValueError, match=f"holds {name}, but no {RECORD}: it was not written by `aligndet pretrain`"):
        begin(tmp_path, overwrite=overwrite)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"mine": 1}', "[" * 100_000])
def test_a_damaged_record_is_named(tmp_path, content):
    begin(tmp_path, "checkpoint-2")
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ValueError, match=f"{RECORD}"):
        begin(tmp_path, overwrite=True)
    assert (tmp_path / "checkpoint-2").exists()


def test_a_run_killed_while_it_clears_is_still_told_by_its_record(tmp_path, monkeypatch):
    begin(tmp_path, "checkpoint-2", "checkpoint-4")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "remove", killed_at(2, files.remove))
        with pytest.raises(Killed):
            begin(tmp_path, settings={"seed": 1}, overwrite=True)
    assert record_of(tmp_path)["settings"] == SETTINGS
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        begin(tmp_path, settings={"seed": 1})


def test_a_folder_that_cannot_be_written_to_is_told_at_the_claim(tmp_path):
    (tmp_path / "file").touch()
    with training(tmp_path / "file" / "out") as run, pytest.raises(OSError, match="cannot write to .*Not a directory"):
        run.claim(settings=SETTINGS)


def test_only_the_main_process_touches_the_folder(tmp_path):
    answers = iter([None, (True, {"seed": (0, 1)})])
    with training(tmp_path / "run", on_main=lambda *_: next(answers)) as run:
        assert run.claim(settings=SETTINGS) == {"seed": (0, 1)} and run.is_finished
    assert names(tmp_path) == []


# ---- aside ----


class Killed(BaseException):
    pass


def killed_at(call, function):
    """The function, but call number `call` raises instead."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    return counted


def make(folder, settings=SETTINGS, **options):
    """A run that works aside, to its end; returns whether there was anything to do."""
    with data_set(folder, **options) as run:
        run.claim(settings=settings)
        if run.is_finished:
            return False
        (run.work / "part.arrow").write_text(str(settings))
        (run.work / "dataset").mkdir(exist_ok=True)
        (run.work / "dataset" / "data").write_text((run.work / "part.arrow").read_text())
        run.put_in_place(run.work / "dataset")
    return True


def test_all_or_nothing_is_there(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed), data_set(out) as run:
        run.claim(settings=SETTINGS)
        assert run.work == tmp_path / "out.partial"
        (run.work / "part.arrow").touch()
        raise Killed
    assert names(tmp_path) == ["out.partial"] and names(tmp_path / "out.partial") == ["part.arrow", RECORD]
    with pytest.raises(
        ValueError, match="out.partial holds a run of another .*seed: 0 there, 1 now.*--overwrite_output_dir to"
    ):
        make(out, {"seed": 1})
    assert make(out) and names(tmp_path) == ["out"] and names(out) == ["data", RECORD]
    before = state_of(tmp_path)
    assert not make(out) and not make(out, overwrite=True) and state_of(tmp_path) == before
    with pytest.raises(ValueError, match="/out holds a run of another .*seed: 0 there, 1 now"):
        make(out, {"seed": 1})
    assert state_of(tmp_path) == before
    assert make(out, {"seed": 1}, overwrite=True)
    assert (out / "data").read_text() == str({"seed": 1}) and names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    assert make(tmp_path / "out")  # an empty one may be
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds thesis.tex, but no run.json"):
        make(tmp_path / "theirs", overwrite=overwrite)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file is a file"):
        make(tmp_path / "file", overwrite=overwrite)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "part.arrow").touch()
    with pytest.raises(ValueError, match="new.partial holds part.arrow, but no run.json"):
        make(tmp_path / "new", overwrite=overwrite)
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "precious"


def test_killed_while_the_work_is_removed_nothing_old_is_delivered(tmp_path, monkeypatch):
    for call in range(1, 4):  # the shard, the record, the lock
        out = tmp_path / str(call)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", killed_at(call, Path.unlink))
            make(out)
        assert make(out, {"seed": 1}, overwrite=True)
        assert (out / "data").read_text() == str({"seed": 1}) and not (tmp_path / f"{call}.partial").exists()


def test_a_run_that_ended_while_it_wrote_its_record_is_in_nobodys_way(tmp_path, monkeypatch):
    for begun, name in ((make, "out"), (begin, "run")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(files.os, "replace", killed_at(1, files.os.replace))
            begun(tmp_path / name)
        begun(tmp_path / name)
    assert names(tmp_path) == ["out", "run"] and names(tmp_path / "run") == [RECORD]


def test_a_finished_data_set_needs_no_place_to_write(tmp_path):
    make(tmp_path / "out")
    (tmp_path / "out.partial").touch()  # in the way, as in a folder that is read-only
    assert not make(tmp_path / "out")
    with pytest.raises(OSError, match="cannot write to the output folder .*out"):
        make(tmp_path / "out", {"seed": 1}, overwrite=True)


def test_where_content_lies_decides_nothing(tmp_path):
    begin(tmp_path, "checkpoint-2", settings=SETTINGS | {"dataset": "data"})
    elsewhere = SETTINGS | {"dataset": "/mnt/data/"}
    with training(tmp_path) as run:
        assert run.claim(places=["dataset"], settings=elsewhere) == {}
        run.claim(data={"images": "a1"}, start={"dataset": "f0"})
        assert (tmp_path / "checkpoint-2").exists() and record_of(tmp_path)["settings"]["dataset"] == "data"
    with training(tmp_path) as run:
        run.claim(places=["dataset"], settings=elsewhere)
        with pytest.raises(ValueError, match="dataset: 'data' there, '/mnt/data/' now, images: 'a1' there, 'b2' now"):
            run.claim(data={"images": "b2"})
    with training(tmp_path) as run, pytest.raises(ValueError, match="dataset: 'f0' there, 'f1' now"):
        run.claim(places=["dataset"], settings=elsewhere, start={"dataset": "f1"})
    with training(tmp_path) as run, pytest.raises(ValueError, match="dataset: 'data' there, '/mnt/data/' now"):
        run.claim(settings=elsewhere)


def test_what_comes_to_the_place_of_the_output_meanwhile_is_not_replaced(tmp_path):
    with data_set(tmp_path / "out") as run:
        run.claim(settings=SETTINGS)
        (run.work / "dataset").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()
        with pytest.raises(ValueError, match="holds thesis.tex, but no run.json"):
            run.put_in_place(run.work / "dataset")
    assert names(tmp_path / "out") == ["thesis.tex"] and "dataset" in names(tmp_path / "out.partial")


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ValueError, match="disk, a mount point: choose a folder in it"):
        make(tmp_path / "disk")
    assert make(tmp_path / "disk" / "out")


def test_through_a_link_the_output_is_where_the_link_leads(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to("large")
    (tmp_path / "dangling").symlink_to("new")
    assert make(tmp_path / "link") and not make(tmp_path / "large") and make(tmp_path / "dangling")
    assert names(tmp_path) == ["dangling", "large", "link", "new"] and (tmp_path / "link").is_symlink()
    with data_set(tmp_path / "large"), pytest.raises(ValueError, match="in use"), data_set(tmp_path / "link"):
        pass


# ---- one process at a time ----


def test_a_second_run_is_refused_with_the_holder(tmp_path):
    with training(tmp_path) as run:
        with pytest.raises(ValueError, match="is in use by another process: wait"), training(tmp_path):
            pass
        run.claim(settings=SETTINGS)
        held = rf"is in use by process {os.getpid()} on .* \(aligndet pretrain, since"
        with pytest.raises(ValueError, match=held), training(tmp_path, command="finetune", overwrite=True):
            pass
        with data_set(tmp_path / "out") as other, pytest.raises(ValueError, match="in use"), data_set(other.path):
            pass
    with training(tmp_path) as run:
        run.claim(settings=SETTINGS)
    assert names(tmp_path) == [RECORD]


def test_a_run_aside_and_one_in_place_keep_each_other_out(tmp_path):
    with training(tmp_path / "out") as run:
        run.claim(settings=SETTINGS)
        with pytest.raises(ValueError, match="out is in use by process .* .aligndet pretrain"), data_set(run.path):
            pass
        assert names(tmp_path) == ["out"]
    with data_set(tmp_path / "new") as run:
        run.claim(settings=SETTINGS)
        with pytest.raises(ValueError, match="new.partial is in use .* .aligndet proposals"), training(run.path):
            pass
    with training(tmp_path / "new") as run:
        run.claim(settings=SETTINGS)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to("../precious")
    with pytest.raises(OSError, match="cannot write to the output folder"):
        begin(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_record_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / RECORD)
    with pytest.raises(ValueError, match="run.json, which tells whose run this is, is damaged .not a file"):
        begin(tmp_path)


def in_a_fork(function):
    """Forks a process that calls a function, says so, and waits to be killed; returns its id when it has."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        function()
        os.write(done, b".")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_killed_run_can_be_started_again_at_once_while_its_loading_processes_live(tmp_path):
    loading = tmp_path / "loading"

    def run():
        folder = training(tmp_path).__enter__()
        folder.claim(settings=SETTINGS)
        loading.write_text(str(in_a_fork(lambda: None)))

    killed = in_a_fork(run)
    with pytest.raises(ValueError, match=f"in use by process {killed} "), training(tmp_path):
        pass
    kill(killed)
    os.kill(int(loading.read_text()), 0)  # it lives
    begin(tmp_path, "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "loading", RECORD]
    os.kill(int(loading.read_text()), signal.SIGKILL)


def test_of_a_run_killed_at_its_very_end_nothing_is_left_beside_the_output(tmp_path):
    def run():
        folder = data_set(tmp_path / "out").__enter__()
        folder.claim(settings=SETTINGS)
        (folder.work / "dataset").mkdir()
        folder._clear_work = lambda: None
        folder.put_in_place(folder.work / "dataset")

    kill(in_a_fork(run))
    assert names(tmp_path / "out.partial") == [LOCK, RECORD]
    assert not make(tmp_path / "out") and names(tmp_path) == ["out"]


def test_a_refused_run_leaves_the_lock_of_a_killed_one_as_it_is(tmp_path):
    def run():
        training(tmp_path).__enter__().claim(settings=SETTINGS)
        (tmp_path / "checkpoint-1").touch()

    kill(in_a_fork(run))
    before = state_of(tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        begin(tmp_path, settings={"seed": 1})
    assert state_of(tmp_path) == before and LOCK in names(tmp_path)


def test_a_process_that_is_given_the_lock_keeps_others_out(tmp_path):
    with training(tmp_path) as run:
        run.claim()
        code = "import sys; sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=[run.lock])
        (tmp_path / "copy").hardlink_to(tmp_path / LOCK)
    os.replace(tmp_path / "copy", tmp_path / LOCK)  # as if this process had been killed, not ended
    with pytest.raises(ValueError, match="in use by process"), training(tmp_path):
        pass
    child.communicate()
    begin(tmp_path)


def test_a_lock_file_that_vanishes_is_made_anew(tmp_path, monkeypatch):
    """The holder ends between our opening its file and locking it."""
    holder = training(tmp_path).__enter__()
    holder.claim()
    flock, calls = runs.fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            holder.__exit__()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(runs.fcntl, "flock", late)
    with training(tmp_path), pytest.raises(ValueError, match="in use"), training(tmp_path):
        pass
    assert len(calls) == 3


def test_without_locks_all_else_works(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "fcntl", None)
    assert make(tmp_path / "out") and not make(tmp_path / "out")
    begin(tmp_path / "run", "checkpoint-1")
    assert names(tmp_path / "run") == ["checkpoint-1", RECORD]


# ---- files ----


def test_a_folder_half_removed_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model").touch()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files.shutil, "rmtree", killed_at(2, files.shutil.rmtree))
        files.remove(tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["unfinished-removal-checkpoint-1"]
    (tmp_path / "checkpoint-1").mkdir()
    files.remove(tmp_path / "checkpoint-1")
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"shar", b"shardX", b"shard", b"Shard"])
def test_a_sealed_file_that_changed_is_told_and_removed(tmp_path, capsys, content):
    path = tmp_path / "shard.arrow"
    (tmp_path / "part").write_bytes(b"shard")
    files.seal_file(tmp_path / "part", path)
    assert files.is_sound(path) and names(tmp_path) == ["shard.arrow"] and capsys.readouterr().out == ""
    seal = path.read_bytes()[5:]
    path.write_bytes(content + (seal if content in (b"shardX", b"Shard") else b""))
    assert not files.is_sound(path) and not files.is_sound(path) and names(tmp_path) == []
    assert capsys.readouterr().out == f"{path} is damaged, and done anew.\n"


def test_files_are_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows, which also syncs nothing that was opened for reading only."""
    open_, sync, flags = os.open, os.fsync, {}

    def windows_open(path, mode, *args):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        descriptor = open_(path, mode, *args)
        flags[descriptor] = mode
        return descriptor

    def windows_sync(descriptor):
        assert flags[descriptor] & 3 != os.O_RDONLY
        sync(descriptor)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_sync)
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1} and flags


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_word_on_how_to_go_on(tmp_path, number):
    with pytest.raises(runs.Interrupted, match="same command again to go on") as error, training(tmp_path) as run:
        run.claim(settings=SETTINGS)
        os.kill(os.getpid(), number)
    assert error.value.signal == number and names(tmp_path) == [RECORD]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("failure", [None, RuntimeError("no worker")])
def test_a_signal_that_does_not_end_a_training_ends_what_follows(tmp_path, number, failure):
    with pytest.raises(runs.Interrupted, match="stopped") as error, training(tmp_path), StopSignals(None) as stop:
        os.kill(os.getpid(), number)
        assert stop.number == number
        if failure:
            raise failure
    assert error.value.signal == number
    with pytest.raises(runs.Interrupted, match="saved"), training(tmp_path), StopSignals(None):
        os.kill(os.getpid(), number)
        raise runs.Interrupted("saved", number)


def test_a_signal_that_meets_a_finalizer_is_not_lost(tmp_path):
    class Doomed:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(runs.Interrupted, match="SIGTERM: stopped"), training(tmp_path):
        Doomed()
        time.sleep(600)
