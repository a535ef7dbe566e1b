"""What models share that train one network beside its moving average."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..momentum import update_momentum


class MomentumModel(PreTrainedModel):
    """
    A model with online networks that are trained, and a momentum copy of each.

    However such a model is made, its momentum networks equal the online ones until they are updated: from a config,
    and from a checkpoint whose tensors are missing or have other shapes.

    To the loop of pre-training, AlignDet and SoCo differ in `networks`, `update_momentum` and `export` alone.
    """

    # A name of a child here would be stripped from the keys of nested models on save, and lose them.
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    #: The name of each momentum network, and the name of the online network that it follows.
    momentum_networks: ClassVar[dict[str, str]] = {}
    #: The update after step k has the momentum of step k + `momentum_delay`.
    momentum_delay: ClassVar[int] = 0
    #: The folder in a run's folder that the next stage starts from, and the command that takes it.
    product: ClassVar[str]
    next_stage: ClassVar[str]

    def networks(self) -> list[nn.Module]:
        """The networks without losses, which `torch.compile` can take."""
        raise NotImplementedError

    def update_momentum(self, momentum: float) -> None:
        """Moves the momentum networks towards the online ones; the share `momentum` of the old values stays."""
        raise NotImplementedError

    def export(self, folder: Path, image_processor: BaseImageProcessor) -> None:
        """Writes what others load into the folder of a run; `image_processor` normalises as training did."""
        raise NotImplementedError

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers initialises what a checkpoint lacks as in its own models, nested detectors included."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """
        Loads a checkpoint as every transformers model does.

        What the checkpoint lacks starts as in a new model, in the online and the momentum network alike. What training
        must not move is frozen again.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if new := set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}:
            model._start(new)
        # transformers rebuilds every parameter on load, and with it `requires_grad=True`.
        model._freeze()
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> None:
        """None: the inputs are pixels."""

    def _freeze(self) -> None:
        """Freezes what training must not move; models freeze more."""
        for name in self.momentum_networks:
            self.get_submodule(name).requires_grad_(False)

    @torch.no_grad()
    def _start(self, names: set[str]) -> None:
        """Gives tensors the values of a new model; pairs with a new tensor both get the online value."""
        tensors, started = self.state_dict(), type(self)(self.config).state_dict()
        for name in names:
            tensors[name].copy_(started[name])
        for momentum, online in self.momentum_networks.items():
            for name, tensor in self.get_submodule(momentum).state_dict().items():
                if not names.isdisjoint({twin := f"{online}.{name}", f"{momentum}.{name}"}):
                    tensor.copy_(tensors[twin])

    def _update_momentum(self, momentum: float, copied: tuple[str, ...] = ()) -> None:
        for name, online in self.momentum_networks.items():
            update_momentum(self.get_submodule(online), self.get_submodule(name), momentum, copied=copied)
