"""
The contrastive loss in one computation against a loop over the proposals' ids.

    python benchmarks/contrastive.py
    python benchmarks/contrastive.py --device cuda

All compute loss and gradient on one batch of random features in which every proposal is matched in every decoder layer
of both views. The loops follow the equations of the paper, id by id: once with a matrix product for all queries of an
id, and once with a copy of the negatives for every query, as batched losses of this kind are often written.
"""

from collections.abc import Callable

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet_hf.losses import object_contrastive_loss

TEMPERATURE = 0.5


def loss_of_one_id(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """Mean over all (query, key) pairs; the denominator of a pair is its own key and all (detached) negatives."""
    queries, keys, negatives = (F.normalize(rows, dim=-1, eps=1e-12) for rows in (queries, keys, negatives.detach()))
    positive = queries @ keys.T / TEMPERATURE
    repulsion = (queries @ negatives.T / TEMPERATURE).logsumexp(1, keepdim=True)
    return (torch.logaddexp(positive, repulsion) - positive).mean()


def loss_of_one_id_with_copies(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """The same, from one copy of the negatives for every query."""
    queries, keys, negatives = (F.normalize(rows, dim=-1, eps=1e-12) for rows in (queries, keys, negatives.detach()))
    positive = torch.einsum("qd,kd->qk", queries, keys) / TEMPERATURE
    negative = torch.einsum("qd,qnd->qn", queries, negatives.repeat(len(queries), 1, 1)) / TEMPERATURE
    logits = torch.cat([positive[..., None], negative[:, None].expand(-1, len(keys), -1)], dim=-1)
    return -logits.log_softmax(-1)[..., 0].mean()


def loop(
    loss_of_one_id: Callable, online: Tensor, momentum: Tensor, online_ids: Tensor, momentum_ids: Tensor
) -> Tensor:
    """The mean over the ids of the online view; an id that the momentum view lacks has the online rows as keys."""
    losses = []
    for identity in online_ids[online_ids >= 0].unique():
        queries, keys = online[online_ids == identity], momentum[momentum_ids == identity]
        negatives = torch.cat([online[online_ids != identity], momentum[momentum_ids != identity]])
        losses.append(loss_of_one_id(queries, keys if len(keys) else queries, negatives))
    return torch.stack(losses).mean()


def make_rows(layers: int, images: int, queries: int, proposals: int, width: int, device: str) -> tuple[Tensor, ...]:
    """Random features of both views and the ids of their rows, layer by layer and image by image."""
    generator = torch.Generator().manual_seed(0)

    def ids() -> Tensor:
        own = [torch.randperm(queries, generator=generator) for _ in range(layers * images)]
        image = torch.arange(images).repeat(layers).repeat_interleave(queries)
        own = torch.cat(own)
        return torch.where(own < proposals, image * proposals + own, -1)

    rows = layers * images * queries
    features = torch.randn(2, rows, width, generator=generator)
    return tuple(tensor.to(device) for tensor in (*features, ids(), ids()))


def main(words: list[str] | None = None) -> dict:
    parser = common.parser(__file__, __doc__, repeats=4)
    for name, value in {"layers": 6, "images": 4, "queries": 100, "proposals": 50, "width": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args(words)
    device = arguments.device
    sizes = [getattr(arguments, name) for name in ("layers", "images", "queries", "proposals", "width")]
    online, *others = make_rows(*sizes, device)
    online.requires_grad_()
    losses = {
        "one computation": lambda: object_contrastive_loss(online, *others, TEMPERATURE),
        "loop over ids": lambda: loop(loss_of_one_id, online, *others),
        "loop over ids, with copies": lambda: loop(loss_of_one_id_with_copies, online, *others),
    }
    functions = {
        name: lambda loss=loss: (value := loss(), *torch.autograd.grad(value, online)) for name, loss in losses.items()
    }
    values = [function() for function in functions.values()]
    times = common.interleaved(functions, arguments.repeats, device)
    rows = common.summary(times)
    for name, function in functions.items():
        rows[name] |= {"extra MB": common.peak_memory(function, device) / 1e6, "waits": common.waits(function, device)}
    results = {
        "sizes": vars(arguments),
        "rows": rows,
        "times faster": {name: common.times_faster(times, "one computation", name) for name in functions},
        "largest difference of a loss": max((value - values[0][0]).abs().item() for value, _ in values),
        "largest difference of a gradient": max((each - values[0][1]).abs().max().item() for _, each in values),
    }
    return common.report(__file__, arguments, results)


if __name__ == "__main__":
    main()
