from unittest import mock

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf.losses import (
    box_similarity_loss,
    contrastive_diagnostics,
    count_ids,
    focal_class_loss,
    object_contrastive_loss,
    softmax_class_loss,
    varifocal_class_loss,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def flat_golden(name: str, dtype: torch.dtype):
    """A recorded case as rows; the official background id becomes -1."""
    info, case = golden_cases.load(name, dtype)
    ids = [case[key].flatten() for key in ("online_labels", "target_labels")]
    ids = [torch.where(row == info["background_id"], -1, row) for row in ids]
    return info, case, case["online_feats"].flatten(0, -2), case["target_feats"].flatten(0, -2), *ids


def loop_loss(online, momentum, online_ids, momentum_ids, temperature):
    """The loss by a loop over ids, as METHOD 1.1 and 1.2 of the official code read: slow and obvious."""
    online, momentum = F.normalize(online, dim=-1), F.normalize(momentum, dim=-1)
    losses = []
    for identity in online_ids[online_ids >= 0].unique():
        queries, keys = online[online_ids == identity], momentum[momentum_ids == identity]
        if len(keys) == 0:
            keys = queries
        negatives = torch.cat([online[online_ids != identity], momentum[momentum_ids != identity]]).detach()
        positive = (queries @ keys.T / temperature).exp()
        negative = (queries @ negatives.T / temperature).exp().sum(1, keepdim=True)
        losses.append(-(positive / (positive + negative)).log().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", golden_cases.names("a"))
def test_contrastive_loss_and_gradients_equal_the_official_ones(name, dtype):
    info, case, online, momentum, online_ids, momentum_ids = flat_golden(name, dtype)
    online.requires_grad_()
    loss = object_contrastive_loss(online, momentum, online_ids, momentum_ids, info["temperature"])
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(online.grad, case["grad_online"].flatten(0, -2), rtol=0, atol=TOLERANCE[dtype])

    momentum.requires_grad_()
    object_contrastive_loss(online, momentum, online_ids, momentum_ids, info["temperature"]).backward()
    expected = case["grad_target_if_it_required_grad"].flatten(0, -2)
    torch.testing.assert_close(momentum.grad, expected, rtol=0, atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_contrastive_loss_equals_a_loop_over_ids(data):
    ids = st.lists(st.integers(-1, 5), min_size=1, max_size=20)
    online_ids = torch.tensor(data.draw(ids.filter(lambda row: max(row) >= 0)))
    momentum_ids = torch.tensor(data.draw(ids))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    online = torch.randn(len(online_ids), 6, generator=generator, dtype=torch.float64, requires_grad=True)
    momentum = torch.randn(len(momentum_ids), 6, generator=generator, dtype=torch.float64, requires_grad=True)
    arguments = (online, momentum, online_ids, momentum_ids, data.draw(st.sampled_from([0.2, 0.01])))
    with mock.patch("aligndet_hf.losses._BLOCK", data.draw(st.sampled_from([1, 64, 1 << 22]))):
        actual = object_contrastive_loss(*arguments)
    expected = loop_loss(*arguments)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (online, momentum), allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, (online, momentum), allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_contrastive_loss_by_hand():
    # One object and one background row, orthogonal, temperature 1: -log(e / (e + 1 + 1)).
    features, ids = torch.eye(2, dtype=torch.float64), torch.tensor([0, -1])
    expected = -torch.tensor(torch.e / (torch.e + 2), dtype=torch.float64).log()
    torch.testing.assert_close(object_contrastive_loss(features, features, ids, ids, 1.0), expected)


@pytest.mark.parametrize("rows", [4, 0])
def test_no_positive_is_zero_with_a_graph_where_the_official_code_divides_by_zero(rows):
    online = torch.randn(rows, 8, requires_grad=True)
    ids = torch.full((rows,), -1)
    loss = object_contrastive_loss(online, torch.randn(rows, 8), ids, ids)
    loss.backward()
    assert loss.item() == 0 and torch.equal(online.grad, torch.zeros(rows, 8))


def test_no_negatives_is_zero_with_zero_gradient():
    online = torch.randn(3, 8, requires_grad=True)
    ids = torch.zeros(3, dtype=torch.long)
    loss = object_contrastive_loss(online, torch.randn(3, 8), ids, ids)
    loss.backward()
    assert loss.item() == 0 and torch.equal(online.grad, torch.zeros(3, 8))


def test_empty_momentum_view_falls_back_to_the_online_rows():
    online, ids = torch.randn(3, 8, dtype=torch.float64), torch.tensor([0, 0, 1])
    empty = torch.zeros(0, 8, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    loss = object_contrastive_loss(online, empty[0], ids, empty[1])
    torch.testing.assert_close(loss, loop_loss(online, empty[0], ids, empty[1], 0.5))


@pytest.mark.parametrize("ids, count", [([3, -1, 0, 3, 3], 2), ([-1, -2], 0), ([], 0), ([7], 1)])
def test_count_ids(ids, count):
    assert count_ids(torch.tensor(ids, dtype=torch.long)).item() == count


@pytest.mark.parametrize("counts", [{}, {"num_anchors": 4, "max_rows_per_id": 5}])
def test_rows_of_others_repel_and_a_given_number_divides(counts):
    generator = torch.Generator().manual_seed(0)
    online, momentum, others = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    online.requires_grad_()
    ids, others_ids = torch.tensor([4, 4, 0, -1, 1]), torch.full((5,), -1)
    loss = object_contrastive_loss(online, momentum, ids, ids, negatives=others, num_ids=torch.tensor(1.5), **counts)
    # As background of the momentum view; three ids, divided by 1.5 instead.
    expected = 2 * loop_loss(online, torch.cat([momentum, others]), ids, torch.cat([ids, others_ids]), 0.5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, online)[0] for value in (loss, expected)))


def test_low_temperatures_do_not_underflow():
    online, ids = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.arange(5)
    loss, expected = (
        function(online.to(dtype), -online.detach().to(dtype), ids, ids, 0.005)
        for function, dtype in ((object_contrastive_loss, torch.float32), (loop_loss, torch.float64))
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, online)[0] for value in (loss, expected)), rtol=1e-3, atol=1e-3
    )


def test_ids_beyond_the_official_background_id_count_like_any_other():
    # The official code takes id 256 for background and fails above it.
    generator = torch.Generator().manual_seed(0)
    online, momentum = torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)
    ids = torch.arange(30)
    small = object_contrastive_loss(online, momentum, ids, ids)
    torch.testing.assert_close(object_contrastive_loss(online, momentum, ids + 250, ids + 250), small)


def test_views_are_paired_by_id_and_not_by_position():
    # The official code pairs by list position: a box missing in one view shifts all later ones.
    generator = torch.Generator().manual_seed(0)
    online = torch.randn(6, 8, generator=generator)
    momentum, ids, order = online + 0.01, torch.arange(6), torch.randperm(6, generator=generator)
    loss = object_contrastive_loss(online, momentum, ids, ids)
    torch.testing.assert_close(object_contrastive_loss(online, momentum[order], ids, ids[order]), loss)


def test_half_precision_features_give_a_float32_loss_even_under_autocast():
    features, ids = torch.randn(8, 16), torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = object_contrastive_loss(features.bfloat16(), features.bfloat16(), ids, ids)
    rounded = features.bfloat16().float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, object_contrastive_loss(rounded, rounded, ids, ids), rtol=1e-6, atol=0)


def test_contrastive_loss_rejects_ids_of_another_length():
    with pytest.raises(ValueError, match="same number of rows"):
        object_contrastive_loss(torch.randn(3, 4), torch.randn(3, 4), torch.arange(2), torch.arange(3))
    with pytest.raises(ValueError, match="feature width"):
        object_contrastive_loss(torch.randn(3, 4), torch.randn(3, 5), torch.arange(3), torch.arange(3))


def test_diagnostics_of_perfect_and_of_collapsed_embeddings():
    ids = torch.tensor([0, 1, 2, -1])
    perfect = contrastive_diagnostics(torch.eye(4), torch.eye(4), ids, ids)
    assert perfect["positive_similarity"] == 1 and perfect["negative_similarity"] == 0
    assert perfect["rank_accuracy"] == 1
    torch.testing.assert_close(perfect["embedding_spread"], torch.tensor(2 / 3).sqrt())

    collapsed = contrastive_diagnostics(torch.ones(4, 8), torch.ones(4, 8), ids, ids)
    torch.testing.assert_close(collapsed["negative_similarity"], torch.tensor(1.0))
    assert collapsed["embedding_spread"] < 1e-6
    assert collapsed["rank_accuracy"] <= 0.5


def test_diagnostics_by_hand_and_without_objects():
    online, momentum = torch.eye(3), torch.eye(3)[[1, 0, 2]]  # the first two objects look like each other's twin
    ids = torch.arange(3)
    values = contrastive_diagnostics(online, momentum, ids, ids)
    torch.testing.assert_close(values["rank_accuracy"], torch.tensor(1 / 3))
    torch.testing.assert_close(values["positive_similarity"], torch.tensor(1 / 3))
    torch.testing.assert_close(values["negative_similarity"], torch.tensor(2 / 6))
    nothing = contrastive_diagnostics(online, momentum, -torch.ones(3), -torch.ones(3))
    assert all(value.isnan() for value in nothing.values())


def test_softmax_class_loss_by_hand():
    logits = torch.zeros(1, 1, 2, 3)
    total, weights = softmax_class_loss(logits, torch.tensor([[[0, 2]]]), background_weight=0.1)
    torch.testing.assert_close(total, torch.tensor(3.0).log() * torch.tensor([1.1]))
    torch.testing.assert_close(weights, torch.tensor([1.1]))


def test_sigmoid_class_losses_by_hand():
    logits, classes = torch.zeros(1, 1, 2, 1), torch.tensor([[[0, 1]]])  # a matched and an unmatched query
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(focal_class_loss(logits, classes, 0.25, 2.0), log2[None] * 0.25 * (0.25 + 0.75))
    quality = torch.tensor([[[0.5, 0.0]]])
    # The matched query at its target 0.5 costs log 2 times its quality; the negative alpha * p ** gamma * log 2.
    expected = log2[None] * (0.5 + 0.75 * 0.25)
    torch.testing.assert_close(varifocal_class_loss(logits, classes, quality, 0.75, 2.0), expected)


# ---- SoCo ----


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_box_similarity_and_its_gradients_equal_the_official_ones(dtype):
    _, case = golden_cases.load("e02_fpnloss_N4_L4_P4_C32", dtype)
    q, k, correspondence = case["q_raw"].requires_grad_(), case["k_raw"], case["corres"]
    loss = box_similarity_loss(q, k, correspondence)
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(q.grad, case["grad_q_raw"], rtol=0, atol=TOLERANCE[dtype])
    swapped = box_similarity_loss(k, q, correspondence.transpose(1, 2).bool())
    expected = case["loss_swapped_q_is_k_with_corres_T"]
    torch.testing.assert_close(swapped, expected, rtol=0, atol=TOLERANCE[dtype])
    units = box_similarity_loss(F.normalize(q, dim=-1), F.normalize(k, dim=-1), correspondence)
    torch.testing.assert_close(units, case["loss_c4"], rtol=0, atol=TOLERANCE[dtype])


def test_box_similarity_by_hand():
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    k = torch.tensor([[[3.0, 0.0], [0.0, -1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    correspondence = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [0, 0]]])
    assert box_similarity_loss(q, k, correspondence).item() == pytest.approx(0.0)  # (1 - 1) / 2, and nothing
    assert box_similarity_loss(q, k, torch.tensor([[[1, 0], [0, 0]]] * 2)).item() == pytest.approx(-(1 + 0.5**0.5))
    with pytest.raises(ValueError, match=r"expected q \[N, M, C\].* got \[2, 2, 2\]"):
        box_similarity_loss(q, k, correspondence[:1])
