"""The learning rate as a function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligndet_hf.training.schedules import learning_rate, milestone_steps


def rates(total_steps, **kwargs):
    return [learning_rate(step, 1.0, total_steps, **kwargs) for step in range(total_steps)]


def test_constant():
    assert rates(4, schedule="constant") == [1, 1, 1, 1]


def test_warm_up_rises_to_the_peak_and_starts_above_zero():
    assert rates(6, schedule="constant", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_step_decays_at_each_milestone():
    assert rates(6, schedule="step", milestones=[2, 4]) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_by_hand():
    # 2 steps of warm-up, then cos(0), cos(pi/4), cos(pi/2), cos(3pi/4) of the remaining 4.
    expected = [1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    assert rates(6, schedule="cosine", warmup_steps=2) == pytest.approx(expected)


def test_the_peak_scales():
    assert learning_rate(0, 2e-4, 10, "step", milestones=[0]) == pytest.approx(2e-5)


@pytest.mark.parametrize(
    "milestones, expected",
    [([0.8], [40]), ([40], [400]), ([0.5, 8, 11.5], [25, 80, 115]), ([1], [10]), ([], [])],
)
def test_milestones_are_fractions_below_one_and_epochs_from_one(milestones, expected):
    assert milestone_steps(milestones, total_steps=50, steps_per_epoch=10) == expected


@given(
    total_steps=st.integers(1, 200),
    warmup_steps=st.integers(0, 300),
    schedule=st.sampled_from(["constant", "step", "cosine"]),
)
def test_always_between_zero_and_the_peak_and_falling_after_the_warm_up(total_steps, warmup_steps, schedule):
    values = rates(total_steps, schedule=schedule, warmup_steps=warmup_steps, milestones=[total_steps // 2])
    assert all(0 < value <= 1 for value in values)
    after = values[warmup_steps:]
    assert all(later <= earlier for earlier, later in zip(after, after[1:], strict=False))
