"""Whether a run is long enough, and when it ends."""

import re
from datetime import datetime, timedelta

from transformers import TrainerState

from aligndet_hf.training import run_length
from aligndet_hf.training.run_length import Forecast, finetuning_note, length_note, warmup_note


def test_a_short_run_is_told_how_long_it_should_be():
    assert length_note(4000, 7.0) is None
    # 600 steps are 1.2 epochs: seven epochs are 3,500 steps, fewer than the least.
    assert "600 steps show each image 1.2 times" in length_note(600, 1.2)
    assert "--max_steps 4000" in length_note(600, 1.2)
    assert "--max_steps 14000" in length_note(6000, 3.0)  # many steps, but of many more images
    assert "--max_steps 4000" in length_note(1000, 40.0)  # many epochs of few images


def test_a_short_finetuning_is_told_how_long_others_took():
    assert finetuning_note(1000) is None
    assert "525 steps are few" in finetuning_note(525) and "--max_steps 1200" in finetuning_note(525)


def test_a_warm_up_that_takes_the_whole_run_is_told():
    assert warmup_note(0, 1) is None and warmup_note(99, 100) is None
    assert "100 steps and the warm-up 100, so the learning rate never" in warmup_note(100, 100)


def test_the_end_is_told_once_after_the_first_minute():
    seconds = iter([100.0, 130.0, 160.0])  # the start, and after two steps
    forecast = Forecast(10, 110, clock=lambda: next(seconds))
    assert forecast.after(11) is None
    told = forecast.after(14)  # 4 steps in a minute, and 96 to go
    assert re.match(r"step 14 of 110: 4 steps a minute, up to [0-9.]+ GB of .*; the run ends in 0:24:00, at ", told)
    end = datetime.strptime(re.search(r"at (.*)\.$", told)[1], "%Y-%m-%d %H:%M")
    assert abs(end - datetime.now() - timedelta(minutes=24)) < timedelta(minutes=2)
    assert forecast.after(15) is None  # and no clock is asked any more


def test_fine_tuning_tells_it_too(monkeypatch, capsys):
    seconds = iter([0.0, 30.0, 90.0])
    monkeypatch.setattr(run_length, "Forecast", lambda step, total: Forecast(step, total, clock=lambda: next(seconds)))
    tell, state = run_length.TellForecast(), TrainerState(global_step=2, max_steps=10)
    tell.on_train_begin(None, state, None)
    for _ in range(3):
        state.global_step += 1
        tell.on_step_end(None, state, None)
    # Two steps took 90 seconds, six are left.
    assert capsys.readouterr().out.count("step 4 of 10: 1.33 steps a minute") == 1
