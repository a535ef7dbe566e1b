"""The average of a detector's weights over the steps of fine-tuning, measured and kept in place of the last ones."""

import copy
from pathlib import Path

from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback

from ..momentum import update_momentum

WEIGHTS = "average.safetensors"


class WeightAverage(TrainerCallback):
    """
    The exponential moving average of a detector's weights (Tarvainen & Valpola 2017; RT-DETR and D-FINE publish it).

    `average = m * average + (1 - m) * weights` after each step `t`, with `m = min(decay, (1 + t) / (10 + t))`: short
    runs forget their start as well. Running statistics are copied. What is frozen is shared, not copied.

    Args:
        detector (`PreTrainedModel`): The detector that is trained.
        decay (`float`): The highest momentum, in (0, 1).

    Attributes:
        detector (`PreTrainedModel`): The detector with the average weights, in evaluation mode.

    Raises:
        `ValueError`: for a decay outside (0, 1).
    """

    def __init__(self, detector: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, such as 0.999, got {decay}")
        frozen = {id(parameter): parameter for parameter in detector.parameters() if not parameter.requires_grad}
        self.detector = copy.deepcopy(detector, memo=frozen).eval().requires_grad_(False)
        self.decay = decay

    def momentum(self, step: int) -> float:
        """The momentum of the update after this many optimizer steps, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        update_momentum(model, self.detector, self.momentum(state.global_step))

    def save(self, folder: str | Path) -> None:
        """Writes the average weights into the folder of a checkpoint."""
        save_model(self.detector, str(Path(folder) / WEIGHTS))

    def load(self, folder: str | Path) -> None:
        """
        Reads the average weights of a checkpoint.

        Raises:
            ValueError: the checkpoint has none, or weights of another detector.
        """
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise ValueError(f"{folder} has no {WEIGHTS}: the run was started without --ema_decay")
        try:
            load_model(self.detector, str(path), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the detector: {error}") from error
