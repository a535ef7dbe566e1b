"""Running stages: order, what is skipped, failures, parallel processes, signals, and what a kill leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aligndet_hf.data.formats import category_names, load_dataset_source
from aligndet_hf.data.label_export import export_labels
from aligndet_hf.data.synthetic import write_synthetic_folder
from aligndet_hf.pipelines import inputs, runner
from aligndet_hf.pipelines.inputs import path_hash
from aligndet_hf.pipelines.runner import is_finished, record_of, run_stages
from aligndet_hf.pipelines.stages import Stage
from aligndet_hf.runs import Interrupted, RunFolder

# A stage that writes when it started, works for a while or until another has started, and makes its folder.
SCRIPT = """
import pathlib, sys, time
folder, seconds, code, until = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
order = folder.parent / "order"
with open(order, "a") as file:
    file.write(folder.name + "\\n")
time.sleep(seconds)
while until and until not in order.read_text().split():
    time.sleep(0.01)
print("error: no luck" if code else "done")
folder.mkdir(exist_ok=True)
sys.exit(code)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes stages; their processes run the script above instead of this package."""

    def command(stage, launcher):
        words = [str(stage.folder), str(stage.settings["seconds"]), str(stage.settings["code"])]
        words.append(stage.settings["until"])
        return [sys.executable, "-c", SCRIPT, *words]

    monkeypatch.setattr(runner, "_command", command)

    def make(name, needs=(), seconds=0.0, code=0, until=""):
        settings = {"output_dir": str(tmp_path / name), "seconds": seconds, "code": code, "until": until}
        return Stage(name, "evaluate", settings, needs=list(needs))

    return make


def order(tmp_path) -> list[str]:
    return (tmp_path / "order").read_text().split()


def test_stages_run_after_those_they_need_and_only_once(make, tmp_path):
    first = make("first")
    stages = [first, make("second", [first])]
    ended, start = [], time.perf_counter()
    assert run_stages(stages, on_end=lambda stage, failure: ended.append((stage.name, failure))) == {}
    assert order(tmp_path) == ["first", "second"] and ended == [("first", None), ("second", None)]
    assert record_of(first)["settings"] == first.settings
    assert 0 < record_of(first)["seconds"] < time.perf_counter() - start + 0.1  # which is rounded
    assert run_stages(stages) == {} and order(tmp_path) == ["first", "second"]

    first.settings["seconds"] = 0.1  # other settings: its command has to say whether that matters
    assert not is_finished(first)
    run_stages(stages)
    assert order(tmp_path) == ["first", "second", "first"]


def test_the_seconds_of_a_stage_are_those_of_all_its_processes(make):
    stage = make("first", code=1)
    stage.folder.mkdir()
    run_stages([stage])
    part = stage.beside(".part.json")
    part.write_text(json.dumps({"seconds": 1000}))  # as if its process had been interrupted after that time
    run_stages([stage])
    assert 1000 < json.loads(part.read_text())["seconds"] < 2000
    stage.settings["code"] = 0
    run_stages([stage])
    whole = record_of(stage)["seconds"]
    assert 1000 < whole < 2000 and not part.exists()
    stage.settings["seconds"] = 0.1  # longer: its command goes on where it was
    run_stages([stage])
    assert whole < record_of(stage)["seconds"] < 2000
    stage.settings["seconds"] = 0.2
    stage.folder.rmdir()  # anew
    run_stages([stage])
    assert record_of(stage)["seconds"] < 1000


def test_other_data_and_another_run_before_it_make_a_stage_unfinished(make, tmp_path):
    (tmp_path / "data").mkdir()
    image = tmp_path / "data" / "1.png"
    image.write_bytes(b"one")
    first = make("first")
    first.settings["dataset"] = str(tmp_path / "data")
    second = make("second", [first])
    second.settings["detector"] = str(first.folder)
    (first.folder).mkdir()
    (first.folder / "run.json").write_text("{}")
    stages = [first, second]
    assert run_stages(stages) == {} and all(map(is_finished, stages))
    image.write_bytes(b"two")
    assert [is_finished(stage) for stage in stages] == [False, True]
    image.write_bytes(b"one")
    (first.folder / "run.json").write_text('{"settings": {}}')
    assert [is_finished(stage) for stage in stages] == [True, False]


def test_finished_stages_are_known_in_a_folder_that_was_moved(make, tmp_path, monkeypatch):
    def stages_in(folder):
        first, other = (Stage(name, "evaluate", {"output_dir": str(folder / name)}) for name in ("first", "first-2"))
        settings = {"output_dir": str(folder / "arm" / "second"), "detector": f"{first.folder}/checkpoint-2"}
        second = Stage("second", "evaluate", settings | {"dataset": str(other.folder)}, needs=[first, other])
        for stage in (first, other, second):
            stage.settings |= {"seconds": 0.0, "code": 0, "until": ""}
        return [first, other, second]

    stages = stages_in(tmp_path / "früher")
    (tmp_path / "früher" / "arm").mkdir(parents=True)
    (stages[0].folder / "checkpoint-2").mkdir(parents=True)
    assert run_stages(stages) == {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "früher").rename("moved")
    for folder in (Path("moved"), tmp_path / "moved"):
        moved = stages_in(folder)
        assert all(map(is_finished, moved))
        moved[2].settings["detector"] = str(moved[1].folder / "checkpoint-2")
        assert [is_finished(stage) for stage in moved] == [True, True, False]


def test_the_images_of_a_label_file_count(tmp_path):
    write_synthetic_folder(tmp_path / "data", {"train": 2}, seed=0, image_size=(32, 32))
    images = load_dataset_source(tmp_path / "data", "train")
    export_labels({"train": images}, category_names(images, "data"), tmp_path / "coco", "coco")
    labels = tmp_path / "coco" / "annotations" / "instances_train.json"
    before = path_hash(labels)
    assert path_hash(labels) == before
    image = next((tmp_path / "coco" / "images").rglob("*.*"))
    content = image.read_bytes()
    image.write_bytes(content + b"0")
    inputs._content.cache_clear()  # of this process, which would not look again at a label file that is the same
    assert path_hash(labels) != before


def test_a_failure_is_reported_with_what_the_stage_said_and_the_others_go_on(make, tmp_path):
    bad = make("bad", code=2)
    stages = [bad, make("after", [bad]), make("other")]
    failures = run_stages(stages, logs=True, keep_going=True)
    assert {stage.name: reason for stage, reason in failures.items()} == {
        "bad": f"no luck; its log is {tmp_path}/bad.log",
        "after": f"needs {tmp_path}/bad, which failed",
    }
    assert is_finished(stages[2]) and not is_finished(bad)
    bad.settings["code"] = 0
    assert run_stages(stages, keep_going=True) == {}
    assert sorted(order(tmp_path)) == ["after", "bad", "bad", "other"]


def test_without_keep_going_a_failure_is_the_end(make, tmp_path):
    assert [stage.name for stage in run_stages([make("bad", code=1), make("other")])] == ["bad"]
    assert order(tmp_path) == ["bad"]


def test_parallel_processes_share_cores_and_gpus_and_wait_for_what_they_need(make, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []
    popen = subprocess.Popen

    def spy(*args, env, **kwargs):
        seen.append((env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"], kwargs["pass_fds"]))
        return popen(*args, env=env, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", spy)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    first = make("first", until="second")
    with RunFolder(tmp_path, "chain") as folder:  # each ends only because the next one runs beside it
        folder.claim()
        lock = folder.lock
        run_stages([first, make("second", until="third"), make("third", [first])], num_parallel=2, lock=lock)
    assert set(order(tmp_path)[:2]) == {"first", "second"} and order(tmp_path)[2] == "third"
    assert seen == [("2", "5", (lock,)), ("2", "7", (lock,)), ("2", "5", (lock,))]  # the third takes the first's place


def test_what_builds_on_output_that_is_gone_is_refused(make, tmp_path):
    first = make("first")
    second = make("second", [first])
    run_stages([first, second])
    first.folder.rmdir()
    with pytest.raises(ValueError, match="second was made from .*first, which is gone: remove it too"):
        run_stages([first, second])
    second.folder.rmdir()
    run_stages([first, second])
    assert order(tmp_path) == ["first", "second"] * 2


def test_what_was_made_from_a_stage_that_has_changed_since_is_a_failure(make, tmp_path):
    def leave_a_record(stage, failure):
        ended.append((stage.name, failure))
        (stage.folder / "run.json").write_text(json.dumps(stage.settings))

    first, ended = make("first"), []
    second = make("second", [first])
    second.settings["detector"] = str(first.folder)
    run_stages([first, second], on_end=leave_a_record)
    first.settings["seconds"] = 0.1  # longer: its command goes on where it was
    reason = f"{second.folder} was made from {first.folder} as it was before: remove it too, to do both anew."
    assert run_stages([first, second], on_end=leave_a_record) == {second: reason}
    assert order(tmp_path) == ["first", "second", "first"] and ended[2:] == [("first", None), ("second", reason)]


def test_what_other_settings_would_leave_behind_is_told_before_anything_runs(make, tmp_path):
    first, middle = make("first"), make("middle")
    middle.needs, stages = [first], [first, middle]
    last = make("last", [middle])
    assert run_stages([*stages, last]) == {}
    first.settings |= {"split": "test", "dataset": "the same elsewhere"}
    made = f"first was made with split 'validation' ('test' now), and {middle.folder}, {last.folder} from it"
    with pytest.raises(ValueError, match=re.escape(made)):
        run_stages([*stages, last])
    assert order(tmp_path) == ["first", "middle", "last"]
    for stage in (middle, last):
        stage.folder.rmdir()
    assert run_stages([*stages, last]) == {} and order(tmp_path)[3:] == ["first", "middle", "last"]
    first.settings["disable_tqdm"] = True  # of no influence on what comes out
    assert run_stages([*stages, last]) == {} and order(tmp_path)[6:] == ["first"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_and_nothing_more_starts(make, tmp_path, number):
    first = make("first", seconds=3600)
    helper = f"import os, pathlib, time\norder = pathlib.Path({str(tmp_path / 'order')!r})"
    helper += "\nwhile not order.exists() or not order.read_text(): time.sleep(0.05)"
    helper += f"\nos.kill({os.getpid()}, {int(number)})"
    process = subprocess.Popen([sys.executable, "-c", helper])
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="same command again") as interrupted:
        run_stages([first, make("second")], logs=True)
    assert interrupted.value.signal == number
    assert process.wait() == 0 and order(tmp_path) == ["first"] and not is_finished(first)
    assert signal.getsignal(number) is before


def test_a_bug_in_this_process_is_a_failed_stage(make, monkeypatch):
    def crash(command, argv):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner.cli, "run", crash)
    stage = make("stage")
    assert "RuntimeError: out of memory" in run_stages([stage], num_parallel=0, logs=True)[stage]
    monkeypatch.setattr(runner.cli, "run", lambda command, argv: 130)
    with pytest.raises(Interrupted):
        run_stages([stage], num_parallel=0)


def test_training_is_started_with_the_launcher():
    words = {}
    for command in ("finetune", "clusters"):
        stage = Stage(command, command, {"output_dir": "out/s"})
        words[command] = runner._command(stage, "accelerate launch --num_processes 2")
    rest = ["--config", "out/s.yaml"]
    assert words["finetune"] == "accelerate launch --num_processes 2 -m aligndet_hf finetune".split() + rest
    assert words["clusters"] == [sys.executable, "-m", "aligndet_hf", "clusters", *rest]


def test_a_broken_record_counts_as_none(make):
    stage = make("stage")
    stage.folder.mkdir()
    cut = json.dumps({"settings": stage.settings, "seconds": 1})[:-5]
    for text in (cut, "[]", '{"settings": {}}', '{"settings": 1, "seconds": 1}'):
        stage.beside(".json").write_text(text)
        assert not is_finished(stage)


@pytest.mark.parametrize("num_parallel", [0, 1])
def test_a_token_reaches_the_process_of_its_stage_and_no_file(num_parallel, tmp_path, monkeypatch):
    token, seen = "hf_" + "x" * 34, tmp_path / "seen"
    words = [sys.executable, "-c", f"import os; open({str(seen)!r}, 'w').write(os.environ['HF_TOKEN'])"]
    monkeypatch.setattr(runner, "_command", lambda stage, launcher: words)
    monkeypatch.setattr(runner.cli, "run", lambda *_: seen.write_text(os.environ["HF_TOKEN"]) and 0)
    monkeypatch.setenv("HF_TOKEN", "mine")
    stage = Stage("finetune", "finetune", {"output_dir": str(tmp_path / "finetune")}, secrets={"hub_token": token})
    assert run_stages([stage], num_parallel=num_parallel) == {}
    assert seen.read_text() == token and os.environ["HF_TOKEN"] == "mine"
    seen.unlink()
    assert [token in path.read_text() for path in tmp_path.iterdir() if path.is_file()] == [False]
