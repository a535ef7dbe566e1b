"""What differs between the methods of pre-training. The loop, its checkpoints and its log are the same."""

from collections.abc import Callable
from typing import NamedTuple

from . import pretrain_setup, pretrain_soco


class Method(NamedTuple):
    """
    One row of [`METHODS`].

    Attributes:
        build_model: From arguments and data set: the model, what has `image_mean` and `image_std`, and the report of
            loaded weights or `None`.
        build_views: From arguments, accelerator, data set and the model's config: the data set of views, and the
            function that makes batches of its items.
        to_device: From a batch, a device and what has `image_mean` and `image_std`: the model's keyword arguments.
        networks: From a model: its networks without losses, which `torch.compile` can take.
        update_momentum: Moves a model's momentum networks, by a momentum.
        momentum_delay (`int`): The update after step k has the momentum of step k + `momentum_delay`.
        export: Writes what others shall load to `output_dir`.
        product (`str`): The folder in `output_dir` that the next stage starts from.
        next_stage (`str`): How it is told to.
    """

    build_model: Callable
    build_views: Callable
    to_device: Callable
    networks: Callable
    update_momentum: Callable
    momentum_delay: int
    export: Callable
    product: str
    next_stage: str


METHODS = {
    "aligndet": Method(
        pretrain_setup.build_model,
        pretrain_setup.build_views,
        pretrain_setup.to_device,
        lambda model: [model.online_detector.base_model, model.momentum_detector.base_model],
        lambda model, momentum: model.update_momentum_detector(momentum),
        0,
        pretrain_setup.export,
        "detector",
        "aligndet finetune --detector",
    ),
    "soco": Method(
        pretrain_soco.build_model,
        pretrain_soco.build_views,
        pretrain_soco.to_device,
        lambda model: [model.encoder, model.momentum_encoder],
        lambda model, momentum: model.update_momentum_encoder(momentum),
        1,  # the official code updates within the next step: see `update_momentum_encoder`
        pretrain_soco.export,
        "backbone",
        "aligndet pretrain --detector rt_detr --backbone",
    ),
}
