"""`torch.compile` where it works, and plain PyTorch where it does not."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


def compile_networks(networks: list[nn.Module]) -> None:
    """
    Compiles the forward passes of networks, in place; names of parameters and checkpoints stay as they are.

    Compilation takes place in the first call. A network that cannot be compiled runs as it was, after a warning.

    Args:
        networks (`list[nn.Module]`): networks without losses: a matching is no work for a compiler.
    """
    for network in networks:
        network.forward = _compiled_or_plain(network.forward, type(network).__name__)


def _compiled_or_plain(forward: Callable, name: str) -> Callable:
    compiled = torch.compile(forward)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                compiled = None
                reason = " ".join(str(error).strip().splitlines()[:2])
                logger.warning(f"torch.compile failed for {name}, which runs without it from now on: {reason}")
        return forward(*args, **kwargs)

    return call
