"""The log of fine-tuning in words."""

from types import SimpleNamespace

import pytest

from aligndet_hf.training.told_log import line_of


@pytest.mark.parametrize(
    "logs, line",
    [
        ({"loss": 12.34567, "loss_bbox": 0.5, "grad_norm": 3.0, "learning_rate": 2.5e-5, "epoch": 0.5},
         "step 20 of 60: loss 12.35, learning rate 2.5e-05, gradient 3"),
        ({"eval_AP": 0.1234, "eval_AP50": 0.3, "eval_AP75": -1.0, "eval_AP_cell": 0.2, "eval_runtime": 4.4},
         "step 20 of 60: AP 12.3, AP50 30.0 (measured in 4 s)"),
        ({"train_runtime": 3725.2, "train_samples_per_second": 1.2345, "train_loss": 9.0},
         "step 20 of 60: trained for 1:02:05, 1.23 images a second"),
        ({"anything": "else"}, "step 20 of 60: {'anything': 'else'}"),
    ],
)  # fmt: skip
def test_an_entry_of_the_log_in_words(logs, line):
    assert line_of(logs, SimpleNamespace(global_step=20, max_steps=60)) == line
