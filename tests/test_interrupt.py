"""Runs that are really killed, and end with the weights of a run that was not."""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file

STEPS = 12  # Three epochs of 8 images in batches of 2.


def start(argv, prepare=None):
    """Starts `aligndet pretrain ...` in a process of its own; `prepare`, a function of this file, runs in it first."""
    output = Path(argv[argv.index("--output_dir") + 1])
    return forks.start(run_command, argv, prepare, console=output / "console.txt")


def run_command(argv, prepare):
    from aligndet_hf.cli import main

    if prepare is not None:
        prepare()
    sys.exit(main(["pretrain", *argv]))


@pytest.fixture(scope="module")
def flags(proposal_folder, detector_folders):
    """A run with dropout, denoising noise, random proposals, live batch norms and means that span checkpoints."""
    detector = detector_folders("rt_detr", dropout=0.1)
    return [
        "--dataset", str(proposal_folder), "--detector", str(detector), "--image_sizes", "64", "96",
        "--num_train_epochs", "3", "--warmup_steps", "4", "--max_proposals", "3", "--proposal_sampling", "random",
        "--learning_rate", "1e-3", "--save_steps", "2", "--logging_steps", "5", "--use_cpu", "--disable_tqdm",
        "--write_report", "false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("uninterrupted")
    process = start([*flags, "--output_dir", str(output)])
    process.join()
    assert process.exitcode == 0, (output / "console.txt").read_text()
    return output


def log_of(output):
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "images_per_second"} for entry in entries]


def assert_same_result(output, expected):
    for name in ("model.safetensors", "detector/model.safetensors"):
        weights, reference = load_file(output / name), load_file(expected / name)
        assert weights.keys() == reference.keys()
        differing = [key for key in weights if not torch.equal(weights[key], reference[key])]
        assert differing == []
    assert log_of(output) == log_of(expected)
    assert [entry["step"] for entry in log_of(output)] == [5, 10, STEPS]
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    assert json.loads((output / "pretrain_summary.json").read_text())["metrics"] == last
    left = {path.name for path in output.glob("*checkpoint*")}
    assert left == {f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"}


def finish(argv, output):
    process = start(argv)
    process.join()
    assert process.exitcode == 0, (output / "console.txt").read_text()


# ---- where to kill: each of these runs in the process that it ends ----


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_on_call(owner, name, call, before=None, when=lambda *args, **kwargs: True):
    """
    Replace `owner.name` so that call number `call`, of those for which `when` holds, runs `before` instead and is the
    last thing that happens.
    """
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.extend([None] if when(*args, **kwargs) else [])
        if len(calls) == call:
            if before is not None:
                before(*args, **kwargs)
            kill_me()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def in_the_first_step():
    from aligndet_hf.models import AlignDetForPreTraining

    kill_on_call(AlignDetForPreTraining, "update_momentum_detector", 2)  # Call 1 is that of `from_detector`.


def between_backward_and_optimizer_step():
    kill_on_call(torch.optim.AdamW, "step", 3)


def between_optimizer_and_momentum_step():
    from aligndet_hf.models import AlignDetForPreTraining

    kill_on_call(AlignDetForPreTraining, "update_momentum_detector", 3)


def half_way_through_the_model_file():
    from aligndet_hf.training import checkpointing

    kill_on_call(checkpointing, "save_model", 1, lambda model, path: path.write_bytes(b"\0" * 1000))


def before_the_checkpoint_gets_its_name():
    from aligndet_hf.training import checkpointing

    kill_on_call(checkpointing.os, "replace", 2, when=lambda _, path: Path(path).name.startswith("checkpoint-"))


def between_epochs():
    from aligndet_hf.data.sampling import EpochBatchSampler

    kill_on_call(EpochBatchSampler, "set_epoch", 3)  # Call 1 is the constructor's, call 2 the epoch we resume in.


def half_way_through_a_line_of_the_log():
    from aligndet_hf.training.run_log import RunLog

    def write_half(log, step, *args, **values):
        with open(log.path, "a") as file:
            file.write(json.dumps({"step": step, **values})[:30])

    kill_on_call(RunLog, "write", 1, write_half)


def while_an_old_checkpoint_is_removed():
    from aligndet_hf.training import checkpointing

    def remove_half(folder):
        (folder / "model.safetensors").unlink()

    kill_on_call(checkpointing.shutil, "rmtree", 1, remove_half, when=lambda folder, **kwargs: not kwargs)


def during_the_export():
    from aligndet_hf.models import AlignDetForPreTraining

    kill_on_call(AlignDetForPreTraining, "export_detector", 1)


PHASES = [
    in_the_first_step,
    between_backward_and_optimizer_step,
    half_way_through_the_model_file,
    between_optimizer_and_momentum_step,
    before_the_checkpoint_gets_its_name,
    between_epochs,
    half_way_through_a_line_of_the_log,
    while_an_old_checkpoint_is_removed,
    during_the_export,
]


def test_kill_in_every_phase(flags, uninterrupted, tmp_path):
    argv = [*flags, "--output_dir", str(tmp_path)]
    for phase in PHASES:
        process = start(argv, phase)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"{phase.__name__}: {(tmp_path / 'console.txt').read_text()}"
    finish(argv, tmp_path)
    assert_same_result(tmp_path, uninterrupted)
    assert (tmp_path / "console.txt").read_text().count("Resuming from") > 3


class InStep:
    """
    Touches `mark` in each step, and waits there: for some seconds, or until there is the file `until`. The run is a
    process group of its own, with the processes that load its data.
    """

    def __init__(self, mark, seconds=0.0, until=None):
        self.mark, self.seconds, self.until = mark, seconds, until

    def __call__(self):
        from aligndet_hf.commands import pretrain
        from aligndet_hf.models import AlignDetForPreTraining

        os.setpgrp()
        original = AlignDetForPreTraining.forward

        def slow(model, *args, **kwargs):
            self.mark.touch()
            time.sleep(self.seconds)
            if self.until is not None:
                wait_for(self.until.exists)
            return original(model, *args, **kwargs)

        AlignDetForPreTraining.forward = slow
        pretrain.write_result = lambda *_: wait_for(lambda: False)  # it does not end before it is ended


def wait_for(condition):
    until = time.monotonic() + 1200
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_kill_at_random_moments(flags, uninterrupted, tmp_path):
    argv, mark, chance = [*flags, "--output_dir", str(tmp_path)], tmp_path / "mark", random.Random(0)
    for _ in range(5):
        mark.unlink(missing_ok=True)
        process = start(argv, InStep(mark, seconds=0.1))
        wait_for(mark.exists)
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "console.txt").read_text()
    finish(argv, tmp_path)
    assert_same_result(tmp_path, uninterrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_resume(flags, uninterrupted, tmp_path, number, code):
    """A signal to all of its processes, as terminals and batch systems send it."""
    argv, mark, until = [*flags, "--output_dir", str(tmp_path)], tmp_path / "mark", tmp_path / "until"
    process = start([*argv, "--dataloader_num_workers", "2"], InStep(mark, until=until))
    wait_for(mark.exists)
    os.killpg(process.pid, number)
    until.touch()
    process.join()
    assert process.exitcode == code
    console = (tmp_path / "console.txt").read_text()
    assert f"{signal.Signals(number).name}: stopped after step 1 of {STEPS}" in console
    assert "Run the same command again to resume." in console and "Traceback" not in console
    assert (tmp_path / "checkpoint-1").is_dir()
    finish(argv, tmp_path)
    assert_same_result(tmp_path, uninterrupted)


def disk_full_after_the_first_checkpoint():
    """No file may grow beyond 20 kB any more: writes fail half way, as on a full disk."""
    from aligndet_hf.training import pretrain_loop as pretrain

    original, calls = pretrain.save_checkpoint, []

    def save_checkpoint(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return original(*args, **kwargs)

    pretrain.save_checkpoint = save_checkpoint


def test_a_full_disk_leaves_the_last_good_checkpoint(flags, uninterrupted, tmp_path):
    argv = [*flags, "--output_dir", str(tmp_path)]
    process = start(argv, disk_full_after_the_first_checkpoint)
    process.join()
    assert process.exitcode == 2
    console = (tmp_path / "console.txt").read_text()
    assert "error: could not write" in console and "checkpoint-4" in console and "Traceback" not in console
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-2"}
    finish(argv, tmp_path)
    assert_same_result(tmp_path, uninterrupted)


def test_another_configuration_is_refused_and_nothing_is_touched(flags, tmp_path):
    argv = [*flags, "--output_dir", str(tmp_path)]
    process = start(argv, between_epochs)
    process.join()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "console.txt"}
    process = start([*argv, "--learning_rate", "2e-3", "--seed", "1"])
    process.join()
    assert process.exitcode == 2
    console = (tmp_path / "console.txt").read_text()
    assert "learning_rate: 0.001 there, 0.002 now" in console and "seed: 0 there, 1 now" in console
    assert "--overwrite_output_dir" in console and "Traceback" not in console
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "console.txt"}
    assert before == after


def test_a_finished_run_is_left_alone(flags, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name != "console.txt"}
    finish([*flags, "--output_dir", str(uninterrupted)], uninterrupted)
    assert "is finished" in (uninterrupted / "console.txt").read_text()
    after = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name != "console.txt"}
    assert before == after
