"""
The update of the momentum detector against a Python loop over parameters.

    python benchmarks/ema.py
    python benchmarks/ema.py --device cuda

The detector is a DETR with a ResNet-50, as in the paper. Ours moves all tensors in one call, and leaves alone the
frozen backbone, of which there is one. The loops move every parameter of two full detectors: in place, and as the code
of MoCo does, `old * momentum + new * (1 - momentum)`. The last row is the in-place loop over what ours moves.
"""

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
    copies = [build_detector("detr", backbone=arguments.backbone).to(arguments.device) for _ in range(2)]
    transformers = [nn.ModuleList([copy.model.encoder, copy.model.decoder]) for copy in copies]
    functions = {
        "one call": lambda: model.update_momentum_detector(MOMENTUM),
        "loop of MoCo, two full detectors": lambda: loop_of_moco(*copies),
        "loop in place, two full detectors": lambda: loop_in_place(*copies),
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
