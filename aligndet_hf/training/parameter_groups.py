"""Learning rates of a detector's parts: of its backbone, of what a checkpoint passed on, and from layer to layer."""

import re
from collections.abc import Collection

from torch import nn

_IN_SEQUENCE = r"(layer|block|stage)s?\d*"  # names of what holds numbered parts, each of which feeds the next


def parameter_groups(
    detector: nn.Module,
    backbone: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    backbone_learning_rate: float | None = None,
    transferred: Collection[str] = (),
    transferred_learning_rate: float | None = None,
    layer_decay: float = 1.0,
) -> list[dict]:
    """
    Groups of parameters for an optimizer: what is frozen is in none, norms and biases do not decay.

    Args:
        detector (`nn.Module`): The detector.
        backbone (`nn.Module`): Its backbone.
        learning_rate (`float`): Peak rate of what has no rate of its own.
        weight_decay (`float`): Weight decay of parameters with more than one dimension.
        backbone_learning_rate (`float`, *optional*): Peak rate of the backbone.
        transferred (`Collection[str]`): Names of the tensors that a checkpoint passed on.
        transferred_learning_rate (`float`, *optional*): Peak rate of the transferred tensors outside the backbone.
        layer_decay (`float`, *optional*, defaults to 1.0):
            The rate of a layer is this factor times the rate of the next one, from the heads down to the first layer
            of the backbone (Bao et al. 2022, BEiT): see [`layer_depths`]. It is for what has learnt before: the
            backbone, and what a checkpoint passed on. What is new learns at the whole rate, wherever it lies.

    Returns:
        `list[dict]`: `params`, `lr` and `weight_decay` of each group.

    Raises:
        ValueError: `layer_decay` changes nothing, as all that has learnt before is frozen.
    """
    in_backbone = {id(parameter) for parameter in backbone.parameters()}
    named = [(name, parameter) for name, parameter in detector.named_parameters() if parameter.requires_grad]
    depths = layer_depths([name for name, _ in detector.named_parameters()])
    deepest, transferred = max(depths.values(), default=0), set(transferred)
    learnt = {name for name, parameter in named if name in transferred or id(parameter) in in_backbone}
    if layer_decay != 1.0 and not learnt:
        raise ValueError(
            "layer_decay changes nothing: the backbone is frozen, and all else is new. Start from a checkpoint, or "
            "train the backbone (freeze_backbone false)."
        )
    groups: dict[tuple[bool, bool, bool, int], dict] = {}
    for name, parameter in named:
        of_backbone, passed_on = id(parameter) in in_backbone, name in transferred
        rate = learning_rate
        if of_backbone:
            rate = learning_rate if backbone_learning_rate is None else backbone_learning_rate
        elif passed_on and transferred_learning_rate is not None:
            rate = transferred_learning_rate
        above = deepest - depths[name] if layer_decay != 1.0 and name in learnt else 0
        key = (of_backbone, passed_on and transferred_learning_rate is not None, parameter.ndim > 1, above)
        group = {"params": [], "lr": rate * layer_decay**above, "weight_decay": weight_decay if key[2] else 0.0}
        groups.setdefault(key, group)["params"].append(parameter)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def layer_depths(names: list[str]) -> dict[str, int]:
    """
    How deep in a detector each parameter lies, from its name.

    A numbered part of what is called layers, blocks or stages (`...layers.0.`, `...blocks.2.`, `...layer1.0.`) is one
    layer. Other numbered parts lie side by side, such as the projections of several levels and the heads of several
    layers: all of them together are one layer. What comes between two layers belongs to the layer before. Names come
    in the order in which detectors declare their parts, from the image to the heads.

    Args:
        names (`list[str]`): Names of all parameters, in their order.

    Returns:
        `dict[str, int]`: 0 for the first layer, and so on.

    Example:

    ```python
    >>> from aligndet_hf.training.parameter_groups import layer_depths

    >>> layer_depths(["stem.weight", "blocks.0.weight", "blocks.1.weight", "head.0.weight", "head.1.weight"])
    {'stem.weight': 0, 'blocks.0.weight': 1, 'blocks.1.weight': 2, 'head.0.weight': 3, 'head.1.weight': 3}

    ```
    """
    depths, seen, depth = {}, {}, 0
    for name in names:
        if numbered := re.match(r"(.*?([^.]+))\.\d+(?=\.)", name):
            part, kind = numbered.groups()
            layer = numbered.group() if re.fullmatch(_IN_SEQUENCE, kind) else part
            depth = seen.setdefault(layer, len(seen) + 1)
        depths[name] = depth
    return depths
