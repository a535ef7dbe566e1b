"""
The contrastive loss in one computation against a loop over the proposals' ids.

    python benchmarks/contrastive.py
    python benchmarks/contrastive.py --device cuda

All compute loss and gradient on one batch of random features in which every proposal is matched in every decoder layer
of both views. The official loop computes what AlignDet's code does, in its order: id by id, a copy of the negatives
for every key, the product of all queries with each copy, and a cross-entropy over all pairs. The frugal loop has one
matrix product for all queries of an id. The bare products, of all queries with the rows of both views and back, are
what no method can do without.
"""

from collections.abc import Callable
from functools import partial

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet_hf.losses import object_contrastive_loss

TEMPERATURE = 0.5


def unit(*rows: Tensor) -> list[Tensor]:
    return [F.normalize(each, dim=-1, eps=1e-12) for each in rows]


def official_loss(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """Mean over all (query, key) pairs of one id; class 0 of a pair is its key, the others are all negatives."""
    queries, keys, negatives = unit(queries, keys, negatives.detach())
    rows = torch.cat([keys[:, None], negatives.expand(len(keys), -1, -1)], dim=1)  # [keys, 1 + negatives, width]
    logits = torch.bmm(queries.expand(len(keys), -1, -1), rows.mT) / TEMPERATURE  # [keys, queries, 1 + negatives]
    return F.cross_entropy(logits.flatten(0, 1), torch.zeros(len(keys) * len(queries), dtype=int, device=keys.device))


def frugal_loss(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """The same, without a copy of the negatives."""
    queries, keys, negatives = unit(queries, keys, negatives.detach())
    positive = queries @ keys.T / TEMPERATURE
    repulsion = (queries @ negatives.T / TEMPERATURE).logsumexp(1, keepdim=True)
    return (torch.logaddexp(positive, repulsion) - positive).mean()


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


def loss_and_gradient(loss: Callable, online: Tensor) -> tuple[Tensor, Tensor]:
    value = loss()
    return value, *torch.autograd.grad(value, online)


@torch.no_grad()
def products(queries: Tensor, rows: Tensor) -> Tensor:
    return queries @ rows.T @ rows


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
        "one computation": partial(object_contrastive_loss, online, *others, TEMPERATURE),
        "official loop": partial(loop, official_loss, online, *others),
        "frugal loop": partial(loop, frugal_loss, online, *others),
    }
    functions = {name: partial(loss_and_gradient, loss, online) for name, loss in losses.items()}
    values = [function() for function in functions.values()]
    functions["bare products"] = partial(products, online.detach()[others[1] >= 0], torch.cat([online, others[0]]))
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
