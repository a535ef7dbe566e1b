"""
The update of the momentum detector against a Python loop over parameters.

    python benchmarks/ema.py
    python benchmarks/ema.py --device cuda

The detector is a DETR with a ResNet-50, as in the paper. Ours leaves alone the frozen backbone, of which there is one.
The loops move every parameter of a whole second network, backbone and projector included, as AlignDet's official code
does: as MoCo writes it, `old * momentum + new * (1 - momentum)`, and in place. The last two rows are both of the
encoder and the decoder alone.
"""

import copy

import common
import torch
from torch import nn

from aligndet_hf import AlignDetForPreTraining
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.momentum import update_momentum

MOMENTUM = 0.996


@torch.no_grad()
def loop_in_place(online: nn.Module, momentum_module: nn.Module) -> None:
    for new, old in zip(online.parameters(), momentum_module.parameters(), strict=True):
        old.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)


@torch.no_grad()
def loop_of_moco(online: nn.Module, momentum_module: nn.Module) -> None:
    for new, old in zip(online.parameters(), momentum_module.parameters(), strict=True):
        old.data = old.data * MOMENTUM + new.data * (1 - MOMENTUM)


def main(words: list[str] | None = None) -> dict:
    parser = common.parser(__file__, __doc__, repeats=15)
    parser.add_argument("--backbone", default="resnet50", help="timm name of the detector's backbone")
    arguments = parser.parse_args(words)
    detector = build_detector("detr", backbone=arguments.backbone).to(arguments.device)
    model = AlignDetForPreTraining.from_detector(detector).to(arguments.device)
    networks = [nn.ModuleList(copy.deepcopy([detector, model.projector])) for _ in range(2)]
    transformers = [nn.ModuleList([network.model.encoder, network.model.decoder]) for network, _ in networks]
    functions = {
        "one call": lambda: model.update_momentum_detector(MOMENTUM),
        "loop of MoCo, whole networks": lambda: loop_of_moco(*networks),
        "loop in place, whole networks": lambda: loop_in_place(*networks),
        "one call, encoder and decoder": lambda: update_momentum(*transformers, MOMENTUM),
        "loop in place, encoder and decoder": lambda: loop_in_place(*transformers),
    }
    times = common.interleaved(functions, arguments.repeats, arguments.device)
    ours, moco, in_place, own, own_loop = functions
    results = {
        "rows": common.summary(times),
        "times faster": {
            "than the loop of MoCo": common.times_faster(times, ours, moco),
            "than the loop in place": common.times_faster(times, ours, in_place),
            "on the same tensors": common.times_faster(times, own, own_loop),
        },
    }
    return common.report(__file__, arguments, results, "transformers")


if __name__ == "__main__":
    main()
