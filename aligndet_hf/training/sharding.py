"""FSDP2: parameters and optimizer state that are cut over the processes, made whole for checkpoints and exports.

Checkpoints and exports equal an unsharded run's, so that either can go on with the other's. Without FSDP all of
this passes through what it is given.
"""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, recursively_apply
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import AutoModelForPreTraining, PreTrainedModel

from .checkpointing import Checkpoint


def require_supported(accelerator: Accelerator, method: str, compiled: bool = False) -> None:
    """
    Refuses what was not tested, or would train in silence as something else.

    Raises:
        `ValueError`: DeepSpeed; FSDP of version 1, on CPUs, with fp16, of SoCo, of compiled networks, or of a torch
            that cannot reduce the gradients of parameters that a batch does not use.
    """
    fsdp_wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "pre-training does not run under DeepSpeed, which takes optimizer steps by itself. FSDP2 shards the same "
            "state: accelerate launch --config_file $(aligndet recipes accelerate_fsdp2) ..."
        )
    if fsdp_wanted and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("FSDP needs several processes with a GPU each: leave it out of the Accelerate configuration")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("pre-training runs under FSDP of version 2 only: set fsdp_version: 2")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("pre-training under FSDP runs in float32 or with bf16, got fp16")
        if method != "aligndet":
            raise ValueError(f"FSDP is for --method aligndet, this is {method}")
        if compiled:
            raise ValueError("torch_compile and FSDP have not been tried together: leave one of them out")
        from torch.distributed.fsdp import FSDPModule

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ValueError(f"pre-training under FSDP needs torch 2.15 or newer, found {torch.__version__}")


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """`accelerator.prepare`, for models that leave some parameters without a gradient in some batches."""
    if accelerator.is_fsdp2:
        # Parameters stay in float32, and autocast chooses the precision of every operation, as without FSDP.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        model.set_reduce_scatter_unused_params(True)
    return model, optimizer


@torch.no_grad()
def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Running statistics of the main process for all, which DistributedDataParallel does by itself."""
    if accelerator.is_fsdp2:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def whole_model(accelerator: Accelerator, model: PreTrainedModel) -> PreTrainedModel | None:
    """
    The model with all of its parameters. All processes must call this.

    Returns:
        `PreTrainedModel`: the model itself if it is whole. Otherwise a copy on the CPU in the main process, and `None`
        in the others.
    """
    if not accelerator.is_fsdp2:
        return model
    state = _whole(model.state_dict(), accelerator.is_main_process)
    if not accelerator.is_main_process:
        return None
    copy = _unsharded(model)
    copy.load_state_dict(state)
    return copy


def whole_optimizer_state(accelerator: Accelerator, optimizer: Optimizer) -> dict | None:
    """The optimizer's `state_dict`, whole, or `None` where [`whole_model`] is. All processes must call this."""
    if not accelerator.is_fsdp2:
        return optimizer.state_dict()
    state = _whole(optimizer.state_dict(), accelerator.is_main_process)
    return state if accelerator.is_main_process else None


@torch.no_grad()
def load_checkpoint(
    accelerator: Accelerator, checkpoint: Checkpoint, model: PreTrainedModel, optimizer: Optimizer
) -> dict:
    """Loads a checkpoint into the model and the optimizer, and returns all that is in its `optimizer.pt`."""
    if not accelerator.is_fsdp2:
        saved = checkpoint.load(model)
    else:
        copy = _unsharded(model)
        saved = checkpoint.load(copy)
        whole = copy.state_dict()
        for name, value in model.state_dict().items():
            value.copy_(_cut_like(value, whole[name]))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, state in saved["optimizer"]["state"].items():
            for name, value in state.items():
                if value.shape == parameters[index].shape:
                    state[name] = _cut_like(parameters[index], value)
    optimizer.load_state_dict(saved["optimizer"])
    return saved


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be cut over the processes, whole. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration, whole and on the CPU."""
    return AutoModelForPreTraining.from_config(model.config)


def _whole(value, keep: bool):
    """Nested dictionaries and lists with whole tensors on the CPU; only the processes that keep them get copies."""

    def whole(tensor: DTensor) -> torch.Tensor | None:
        tensor = tensor.full_tensor()
        return tensor.cpu() if keep else None

    return recursively_apply(whole, value, test_type=lambda entry: isinstance(entry, DTensor))


def _cut_like(value: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut over the processes as `value` is; every process has the same `whole`."""
    if not isinstance(value, DTensor):
        return whole
    return distribute_tensor(whole.to(value.device), value.device_mesh, value.placements, src_data_rank=None)
