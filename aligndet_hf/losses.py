"""Losses on tensors: AlignDet's object contrast, SoCo's box similarity and the class losses of detectors.

Every function takes tensors and returns a scalar sum or mean; normalisers that need several processes are arguments.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .boxes import cxcywh_to_xyxy, iou_and_giou

_BLOCK = 1 << 22  # similarities that exist at a time: large enough for matrix products at full speed


# How near to a border of its image, in shares of it, a box touches the border.
BORDER = 0.01


def _unit_rows(features: Tensor) -> Tensor:
    """Rows of length one, in float32 at least: half precision is too coarse for logits divided by a temperature."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1, eps=1e-12)


def object_contrastive_loss(
    online_features: Tensor,
    momentum_features: Tensor,
    online_ids: Tensor,
    momentum_ids: Tensor,
    temperature: float = 0.5,
    *,
    negatives: Tensor | None = None,
    num_ids: Tensor | None = None,
    num_anchors: int | None = None,
    max_rows_per_id: int | None = None,
) -> Tensor:
    r"""
    AlignDet's instance contrast between the queries of two views (Li et al., ICCV 2023, eq. 4; all layers at once).

    Rows of one id attract each other across the views and repel all rows of other ids in both views. For an online
    row \\(q_i\\) and a momentum row \\(k_j\\) of the same id, with all rows scaled to length one,

    $$\ell_{ij} = -\log \frac{\exp(q_i k_j / \tau)}{\exp(q_i k_j / \tau) + \sum_{z} \exp(q_i \bar z / \tau)}$$

    where \\(z\\) runs over the rows of every *other* id in both views (background included) and \\(\bar z\\) is
    detached. The loss is the mean of \\(\ell_{ij}\\) over the pairs of each id, averaged over the ids of the online
    view. An id without a row in the momentum view takes its own online rows as keys, as the official code does.

    Computed without a loop over ids; time grows with `R * (R + S)`, memory with `R + S`. Differentiable once.

    Args:
        online_features (`torch.Tensor` of shape `[R, D]`):
            projected features of the online detector; several rows (decoder layers, regions) may share an id.
        momentum_features (`torch.Tensor` of shape `[S, D]`): the same of the momentum detector.
        online_ids (`torch.Tensor` of shape `[R]`):
            integer id of every online row, unique in the batch; negative for background, whose rows only repel.
        momentum_ids (`torch.Tensor` of shape `[S]`): the ids of the momentum rows.
        temperature (`float`, *optional*, defaults to 0.5): divides the cosine similarities.
        negatives (`torch.Tensor` of shape `[N, D]`, *optional*):
            further rows that repel every object: those that other processes have of their images.
        num_ids (`torch.Tensor` of shape `[]`, *optional*):
            what the sum over the ids is divided by, their number by default; with several processes the mean of their
            numbers, see [`count_ids`].
        num_anchors (`int`, *optional*):
            how many online rows have an id.
        max_rows_per_id (`int`, *optional*):
            how many rows of both views share an id at most. Both numbers save a GPU's user the wait for the ids to be
            counted.

    Returns:
        `torch.Tensor`: a scalar, in float32 at least. Zero, with a graph, if no online row has an id.

    Raises:
        `ValueError`: if ids and features differ in length, or the features of the two views in width.

    Example:

    ```python
    >>> import torch
    >>> from aligndet_hf.losses import object_contrastive_loss

    >>> features, ids = torch.eye(3), torch.tensor([0, 1, -1])
    >>> round(object_contrastive_loss(features, features, ids, ids).item(), 4)
    0.4327

    ```
    """
    _check_rows(online_features, momentum_features, online_ids, momentum_ids)
    if not len(online_ids):
        return _unit_rows(online_features).sum()
    with torch.autocast(online_features.device.type, enabled=False):
        is_anchor = online_ids >= 0
        anchors = is_anchor.nonzero() if num_anchors is None else is_anchor.nonzero_static(size=num_anchors)
        anchors = anchors.squeeze(1)
        same, is_same = _rows_of_same_id(online_ids[anchors], torch.cat([online_ids, momentum_ids]), max_rows_per_id)
        is_online, is_key = is_same & (same < len(online_ids)), is_same & (same >= len(online_ids))
        is_missing = ~is_key.any(1, keepdim=True)
        is_key = torch.where(is_missing, is_online, is_key)

        # Keys carry a gradient. Online rows are keys where others are missing; to ask a GPU would be to wait for it.
        online_keys = online_features if is_missing.is_cuda or is_missing.any() else online_features.detach()
        rows = [online_keys, momentum_features, *([] if negatives is None else [negatives.detach()])]
        scale = 1 / (temperature * math.log(2))  # exp(x / temperature) = 2 ** (x * scale)
        queries = _unit_rows(online_features.index_select(0, anchors)) * scale
        repulsion, attraction = _Similarity.apply(queries, _unit_rows(torch.cat(rows)), same, scale)
        pair_loss = F.softplus((repulsion - attraction) * math.log(2), threshold=40)
        # Each id counts once however many rows and keys it has; the weights of one id's pairs add up to one.
        num_pairs = is_online.sum(1, keepdim=True) * is_key.sum(1, keepdim=True)
        weight = is_key / num_pairs.to(pair_loss.dtype)
        return (pair_loss * weight).sum() / (weight.sum().clamp(min=1) if num_ids is None else num_ids)


def count_ids(ids: Tensor) -> Tensor:
    """
    The number of different ids that are not negative, without a wait for the device.

    Args:
        ids (`torch.Tensor` of shape `[R]`): integer ids; negative for background.

    Returns:
        `torch.Tensor`: a float scalar.
    """
    ordered = ids.sort().values
    is_new = ordered.diff(prepend=ordered.new_full((1,), -1)) != 0
    return (is_new & (ordered >= 0)).sum().float()


def _rows_of_same_id(ids: Tensor, among: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """
    The places of every id `[A]` among others `[N]`, as a table `[A, width]`, and which of its entries count.

    By sorting, which is cheaper than a matrix of comparisons. Rows with fewer places repeat the last one.
    """
    among, order = among.sort()
    first, end = torch.searchsorted(among, ids), torch.searchsorted(among, ids, right=True)
    width = max((end - first).tolist(), default=1) if width is None else width
    places = first[:, None] + torch.arange(width, device=ids.device)
    return order[torch.minimum(places, end[:, None] - 1)], places < end[:, None]


class _Similarity(torch.autograd.Function):
    """
    Binary logarithm of the sum of 2 to the power of queries' similarities to the rows of other ids, `[Q, 1]`, and
    similarities to the rows of the same id. None is beyond `largest`, in either direction.

    Gradients flow to the queries, and to the rows of the same id; negatives are detached. What the backward pass needs
    is the mean of the negatives that repel a query: computed here, a block of the matrix `[Q, N]` can be forgotten
    before the next, so memory grows with Q + N. Blocks are changed in place, as fresh memory costs more than what is
    computed in it; powers of 2 take half the time of powers of e.
    """

    @staticmethod
    def forward(ctx, queries: Tensor, rows: Tensor, same: Tensor, largest: float) -> tuple[Tensor, Tensor]:
        repulsion, attraction, mean = [], [], []
        blocks = -(-len(queries) * len(rows) // _BLOCK) or 1
        for block, own in zip(queries.chunk(blocks), same.chunk(blocks), strict=True):
            similarity = block @ rows.T
            attraction.append(similarity.gather(1, own))
            similarity.scatter_(1, own, -torch.inf)
            shift = None
            if largest > 60:  # a sum of powers could leave the range of float32
                # finite, for queries without any other row
                shift = similarity.amax(1, keepdim=True).clamp_(min=-largest)
                similarity -= shift
            power = similarity.exp2_()
            total = power.sum(1, keepdim=True)
            repulsion.append(total.log2() if shift is None else total.log2() + shift)
            mean.append((power @ rows).div_(total.clamp_(min=torch.finfo(total.dtype).tiny)))
        ctx.save_for_backward(queries, rows, same, torch.cat(mean))
        return torch.cat(repulsion), torch.cat(attraction)

    @staticmethod
    @once_differentiable
    def backward(ctx, repulsion: Tensor, attraction: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        queries, rows, same, mean = ctx.saved_tensors
        to_queries = F.embedding_bag(same, rows, per_sample_weights=attraction, mode="sum").addcmul_(mean, repulsion)
        if not ctx.needs_input_grad[1]:
            return to_queries, None, None, None
        pulls = (attraction[..., None] * queries[:, None]).flatten(0, 1)
        return to_queries, torch.zeros_like(rows).index_add_(0, same.flatten(), pulls), None, None


def _check_rows(online_features: Tensor, momentum_features: Tensor, online_ids: Tensor, momentum_ids: Tensor) -> None:
    if online_features.shape[:-1] != online_ids.shape or momentum_features.shape[:-1] != momentum_ids.shape:
        raise ValueError(
            "features and ids must have the same number of rows, got "
            f"{tuple(online_features.shape)} with {tuple(online_ids.shape)} ids (online) and "
            f"{tuple(momentum_features.shape)} with {tuple(momentum_ids.shape)} ids (momentum)"
        )
    if online_features.shape[-1] != momentum_features.shape[-1]:
        raise ValueError(
            f"the views differ in feature width: {online_features.shape[-1]} and {momentum_features.shape[-1]}"
        )


def box_similarity_loss(q: Tensor, k: Tensor, correspondence: Tensor) -> Tensor:
    r"""
    SoCo's attraction between the boxes of two views (Wei et al., NeurIPS 2021): boxes that correspond shall be alike.

    $$\ell = -\frac{2}{N} \sum_{n} \frac{\sum_{ij} A_{ij} \, \hat q_i \hat k_j}{\sum_{ij} A_{ij} + 10^{-6}}$$

    with all rows scaled to length one. There are no negatives: what keeps the embeddings apart is that `k` comes from
    a momentum network, without gradient. SoCo adds this loss up over both directions of every pair of views.

    Args:
        q (`torch.Tensor` of shape `[N, M, C]`): predictions of the online network, M boxes of each of N images.
        k (`torch.Tensor` of shape `[N, M, C]`): projections of the momentum network, of the other view.
        correspondence (`torch.Tensor` of shape `[N, M, M]`): `A`, 1 or true where box i of `q` and box j of `k` show
            the same proposal; a box may correspond to none and to several.

    Returns:
        `torch.Tensor`: a scalar from -2 (all alike) to 2, in float32 at least. An image without correspondence adds 0.

    Raises:
        `ValueError`: if the shapes do not fit.

    Example:

    ```python
    >>> import torch
    >>> from aligndet_hf.losses import box_similarity_loss

    >>> boxes = torch.eye(3)[None]
    >>> round(box_similarity_loss(boxes, boxes, torch.eye(3)[None]).item(), 4)
    -2.0

    ```
    """
    if q.ndim != 3 or q.shape[::2] != k.shape[::2] or correspondence.shape != (*q.shape[:2], k.shape[1]):
        raise ValueError(
            "expected q [N, M, C], k [N, M, C] and correspondence [N, M, M], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(correspondence.shape)}"
        )
    with torch.autocast(q.device.type, enabled=False):
        similarity = _unit_rows(q) @ _unit_rows(k).transpose(1, 2)
        weight = correspondence.to(similarity.dtype)
        return -2 * ((similarity * weight).sum((1, 2)) / (weight.sum((1, 2)) + 1e-6)).mean()


@torch.no_grad()
def contrastive_diagnostics(
    online_features: Tensor, momentum_features: Tensor, online_ids: Tensor, momentum_ids: Tensor
) -> dict[str, Tensor]:
    """
    What a contrastive loss alone does not tell: whether the embeddings separate objects or collapse.

    Args:
        online_features, momentum_features, online_ids, momentum_ids:
            as for [`object_contrastive_loss`]; one decoder layer is enough.

    Returns:
        `dict[str, torch.Tensor]` of scalars: `positive_similarity` and `negative_similarity`, mean cosines to
        momentum rows of the same and of other ids; `rank_accuracy`, the share of online objects whose most similar
        momentum object is their own; `embedding_spread`, the root mean square distance of the momentum objects from
        their mean (0 when all are equal, near 1 when they fill the sphere). NaN where nothing can be measured.
    """
    online, momentum = _unit_rows(online_features), _unit_rows(momentum_features)
    is_object, is_key = online_ids >= 0, momentum_ids >= 0
    similarity = online @ momentum.T
    is_pair = (online_ids[:, None] == momentum_ids) & is_object[:, None]
    has_key = is_pair.any(1)
    nearest = momentum_ids[similarity.masked_fill(~is_key, -2.0).argmax(1)] if len(momentum) else online_ids - 1
    direction = _masked_mean(momentum, is_key[:, None].expand_as(momentum), dim=0)
    return {
        "positive_similarity": _masked_mean(similarity, is_pair),
        "negative_similarity": _masked_mean(similarity, ~is_pair & is_object[:, None]),
        "rank_accuracy": _masked_mean((nearest == online_ids).to(online.dtype), has_key),
        "embedding_spread": _masked_mean((momentum - direction).square().sum(-1), is_key).sqrt(),
    }


def best_box_diagnostics(scores: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """
    Whether a detector looks at its images: one that does not finds the same box in all of them.

    A detector that answers every image with the same large rectangle has falling losses and similarities like
    one that has learnt, and nothing to pass on.

    Args:
        scores (`torch.Tensor` of shape `[images, queries]`): how sure each query is of its object.
        boxes (`torch.Tensor` of shape `[images, queries, 4]`): normalised `cxcywh` boxes.

    Returns:
        `dict[str, torch.Tensor]` of scalars: `best_box_sameness`, the mean IoU of the best boxes of two images (1: the
        same in all), NaN for a single image; and `best_box_borders`, the share of best boxes that touch two borders or
        more of their image.

    Example:

    ```python
    >>> import torch
    >>> from aligndet_hf.losses import best_box_diagnostics

    >>> boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]], [[0.5, 0.5, 0.2, 0.2]], [[0.25, 0.5, 0.5, 1.0]]])
    >>> found = best_box_diagnostics(torch.zeros(3, 1), boxes)
    >>> {name: round(float(value), 3) for name, value in found.items()}
    {'best_box_sameness': 0.359, 'best_box_borders': 0.333}

    ```
    """
    rows = torch.arange(len(boxes), device=boxes.device)
    corners = cxcywh_to_xyxy(boxes[rows, scores.argmax(1)].float())
    iou, _ = iou_and_giou(corners[:, None], corners[None])
    others = len(boxes) * (len(boxes) - 1)
    touched = (corners[:, :2] <= BORDER).sum(1) + (corners[:, 2:] >= 1 - BORDER).sum(1)
    return {
        "best_box_sameness": (iou.sum() - iou.diagonal().sum()) / others if others else iou.new_tensor(float("nan")),
        "best_box_borders": (touched >= 2).float().mean(),
    }


def _masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean where the mask is set, NaN where it is nowhere set; unlike indexing, no wait for the device."""
    return (values * mask).sum(dim) / mask.sum(dim)


def softmax_class_loss(
    logits: Tensor, classes: Tensor, background_weight: float, query_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Cross-entropy over the classes and "no object" (DETR, Carion et al., ECCV 2020).

    Args:
        logits (`torch.Tensor` of shape `[..., queries, classes + 1]`): the last class is "no object".
        classes (`torch.Tensor` of shape `[..., queries]`): target class, `classes` for unmatched queries.
        background_weight (`float`): weight of the unmatched queries.
        query_weights (`torch.Tensor` of the shape of `classes`, *optional*): a further weight of each query.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the weighted sum and the sum of the weights, each of the leading shape
        without images and queries, `[...][:-1]`; the caller divides.
    """
    background = logits.shape[-1] - 1
    weight = torch.ones_like(classes, dtype=logits.dtype).masked_fill(classes == background, background_weight)
    weight = weight if query_weights is None else weight * query_weights
    loss = F.cross_entropy(logits.flatten(0, -2), classes.flatten(), reduction="none").view_as(classes)
    return (loss * weight).flatten(1).sum(1), weight.flatten(1).sum(1)


def focal_class_loss(
    logits: Tensor, classes: Tensor, alpha: float = 0.25, gamma: float = 2.0, query_weights: Tensor | None = None
) -> Tensor:
    """
    Sigmoid focal loss (Lin et al., ICCV 2017), summed over images, queries and classes.

    Args:
        logits (`torch.Tensor` of shape `[sets, images, queries, classes]`): class scores.
        classes (`torch.Tensor` of shape `[sets, images, queries]`): target class, `classes` for unmatched queries.
        alpha, gamma (`float`, *optional*): balance of positives, and focus.
        query_weights (`torch.Tensor` of shape `[sets, images, queries]`, *optional*): weight of each query's loss.

    Returns:
        `torch.Tensor` of shape `[sets]`.
    """
    target = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    prob = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    error = prob * (1 - target) + (1 - prob) * target
    return _sum_of_sets(loss * error**gamma * (alpha * target + (1 - alpha) * (1 - target)), query_weights)


def varifocal_class_loss(
    logits: Tensor,
    classes: Tensor,
    quality: Tensor,
    alpha: float = 0.75,
    gamma: float = 2.0,
    query_weights: Tensor | None = None,
) -> Tensor:
    """
    Varifocal loss (Zhang et al., CVPR 2021): the score of a matched query learns the IoU of its box.

    Args:
        logits (`torch.Tensor` of shape `[sets, images, queries, classes]`): class scores.
        classes (`torch.Tensor` of shape `[sets, images, queries]`): target class, `classes` for unmatched queries.
        quality (`torch.Tensor` of shape `[sets, images, queries]`): detached IoU of matched queries, 0 elsewhere.
        alpha, gamma (`float`, *optional*): weight and focus of the negatives.
        query_weights (`torch.Tensor` of shape `[sets, images, queries]`, *optional*): weight of each query's loss.

    Returns:
        `torch.Tensor` of shape `[sets]`: the sum over images, queries and classes.
    """
    is_class = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    target = is_class * quality[..., None]
    weight = alpha * logits.detach().sigmoid() ** gamma * (1 - is_class) + target
    loss = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none")
    return _sum_of_sets(loss, query_weights)


def matchability_class_loss(
    logits: Tensor,
    classes: Tensor,
    quality: Tensor,
    alpha: float | None = None,
    gamma: float = 2.0,
    query_weights: Tensor | None = None,
) -> Tensor:
    """
    Matchability-aware loss (DEIM, Huang et al., CVPR 2025): like varifocal, but badly placed matches weigh in full.

    Args:
        logits (`torch.Tensor` of shape `[sets, images, queries, classes]`): class scores.
        classes (`torch.Tensor` of shape `[sets, images, queries]`): target class, `classes` for unmatched queries.
        quality (`torch.Tensor` of shape `[sets, images, queries]`): detached IoU of matched queries, 0 elsewhere.
        alpha (`float`, *optional*): weight of the negatives; `None` for 1.
        gamma (`float`, *optional*): focus of the negatives, and power of the IoU in the target.
        query_weights (`torch.Tensor` of shape `[sets, images, queries]`, *optional*): weight of each query's loss.

    Returns:
        `torch.Tensor` of shape `[sets]`: the sum over images, queries and classes.
    """
    is_class = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    target = (is_class * quality[..., None]) ** gamma
    weight = (1.0 if alpha is None else alpha) * logits.detach().sigmoid() ** gamma * (1 - is_class) + is_class
    loss = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none")
    return _sum_of_sets(loss, query_weights)


def iou_aware_class_loss(
    logits: Tensor, classes: Tensor, quality: Tensor, alpha: float = 0.25, query_weights: Tensor | None = None
) -> Tensor:
    """
    IoU-aware binary cross-entropy (Align-DETR, Cai et al., 2023; used by LW-DETR and RF-DETR).

    A matched query learns the target `score ** alpha * IoU ** (1 - alpha)`, at least 0.01; the others learn 0 with
    weight `score ** 2`, through which their gradient flows as well.

    Args:
        logits (`torch.Tensor` of shape `[sets, images, queries, classes]`): class scores.
        classes (`torch.Tensor` of shape `[sets, images, queries]`): target class, `classes` for unmatched queries.
        quality (`torch.Tensor` of shape `[sets, images, queries]`): detached IoU of matched queries, 0 elsewhere.
        alpha (`float`, *optional*, defaults to 0.25): share of the score in the target.
        query_weights (`torch.Tensor` of shape `[sets, images, queries]`, *optional*): weight of each query's loss.

    Returns:
        `torch.Tensor` of shape `[sets]`: the sum over images, queries and classes.
    """
    is_class = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].bool()
    prob = logits.sigmoid()
    target = (prob.detach() ** alpha * quality[..., None] ** (1 - alpha)).clamp(min=0.01) * is_class
    negative_weight = torch.where(is_class, 1 - target, prob**2)
    # The logarithms from the logits: the logarithm of a rounded probability is infinite at its ends.
    loss = -target * F.logsigmoid(logits) - negative_weight * F.logsigmoid(-logits)
    return _sum_of_sets(loss, query_weights)


def _sum_of_sets(loss: Tensor, query_weights: Tensor | None) -> Tensor:
    """The sum over all but the first dimension of `[sets, images, queries, classes]`, weighted by query."""
    return (loss if query_weights is None else loss * query_weights[..., None]).flatten(1).sum(1)
