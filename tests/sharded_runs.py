"""What `test_distributed.py` starts in two processes: a run under DDP, under FSDP2, and begun under DDP."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from aligndet_hf.commands import pretrain as module
from aligndet_hf.training import sharding


def under_fsdp(build):
    """Accelerate offers FSDP on GPUs only; its code and torch's run on CPUs just as well."""

    def build_sharded(arguments):
        accelerator = build(arguments)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
        )
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        sharding.require_supported(accelerator, arguments.method)
        return accelerator

    return build_sharded


def main(dataset: str, detector: str, folder: str) -> None:
    folder, build, prepare, counts = Path(folder), module.build_accelerator, sharding.prepare, []

    def counted(*args):
        prepared = prepare(*args)
        counts.append([isinstance(parameter, DTensor) for parameter in prepared[0].parameters()])
        return prepared

    sharding.prepare = counted

    def run(name):
        fields = {"image_sizes": [64], "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-4}
        fields |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_proposals": 4}
        fields |= {"use_cpu": True, "disable_tqdm": True, "write_report": False, "output_dir": str(folder / name)}
        module.pretrain(module.PretrainArguments(dataset=dataset, detector=detector, **fields))
        AcceleratorState._reset_state(reset_partial_state=True)

    # One group of processes for all runs: its ports cannot be used anew at once.
    Accelerator.end_training = lambda accelerator: None
    run("ddp")
    module.build_accelerator = under_fsdp(build)
    run("fsdp")
    assert not any(counts[0]) and all(counts[1])
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "ddp", folder / "taken over")
        shutil.rmtree(folder / "taken over" / "checkpoint-4")
        for name in ("pretrain_summary.json", "model.safetensors"):
            (folder / "taken over" / name).unlink()
    torch.distributed.barrier()
    run("taken over")
    torch.distributed.destroy_process_group()
