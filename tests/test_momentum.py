import golden_cases
import pytest
import torch
from torch import nn

from aligndet_hf.momentum import cosine_momentum, suited_momentum, update_momentum

INFO, CASE = golden_cases.load("c_momentum")


@pytest.mark.parametrize(
    ("key", "total", "base"), [("K10", 10, 0.996), ("K1000", 1000, 0.996), ("K10_base0.99", 10, 0.99)]
)
def test_schedule_equals_the_official_one(key, total, base):
    values = torch.tensor([cosine_momentum(step, total, base) for step in range(total)], dtype=torch.float64)
    torch.testing.assert_close(values, CASE[f"momentum_{key}"], rtol=0, atol=1e-12)


def test_schedule_rejects_a_run_without_steps():
    for base, end in ((-0.1, 1), (0.9, 1.1)):
        with pytest.raises(ValueError, match=r"momenta must lie in \[0, 1\]"):
            cosine_momentum(0, 4, base, end)
    with pytest.raises(ValueError, match="total_steps"):
        cosine_momentum(0, 0)


class Parts(nn.Module):
    """A module with the parameter names of the recorded case."""

    def __init__(self, prefix: str):
        super().__init__()
        for name, value in CASE.items():
            if name.startswith(prefix):
                *parents, leaf = name.removeprefix(prefix).split(".")
                module = self
                for parent in parents:
                    if not hasattr(module, parent):
                        module.add_module(parent, nn.Module())
                    module = module.get_submodule(parent)
                module.register_parameter(leaf, nn.Parameter(value.clone()))


def test_updates_equal_the_official_ones_over_ten_steps():
    online, target = Parts("init.online."), Parts("init.target.")
    for step in range(10):
        with torch.no_grad():
            for name, parameter in online.named_parameters():
                parameter += CASE[f"delta.{name}"][step]
        update_momentum(online, target, CASE["momentum_used"][step].item(), copied=("query_embedding",))
        for name, parameter in target.named_parameters():
            torch.testing.assert_close(parameter.data, CASE[f"target_after.{name}"][step], rtol=0, atol=1e-10)


def test_query_embeddings_are_copied_and_never_share_storage():
    # In the official code the two detectors share the storage after the first update.
    assert all(INFO["query_embedding_target_shares_storage_with_online_after_step"])
    online, target = Parts("init.online."), Parts("init.target.")
    update_momentum(online, target, 0.9, copied=("query_embedding",))
    ours, theirs = online.bbox_head.query_embedding.weight, target.bbox_head.query_embedding.weight
    assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    with torch.no_grad():
        ours += 1
    assert not torch.equal(ours, theirs)


def test_buffers_are_copied_where_the_official_code_leaves_them():
    online, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    online(torch.randn(8, 3))
    update_momentum(online, target, 1.0)
    assert torch.equal(target.running_mean, online.running_mean) and target.num_batches_tracked == 1
    assert target.running_mean.data_ptr() != online.running_mean.data_ptr()


def test_shared_tensors_are_left_alone_and_unknown_ones_refused():
    shared = nn.Linear(2, 2)
    online, target = nn.Sequential(shared, nn.Linear(2, 2)), nn.Sequential(shared, nn.Linear(2, 2))
    before = shared.weight.clone()
    update_momentum(online, target, 0.0)
    assert torch.equal(shared.weight, before) and torch.equal(target[1].weight, online[1].weight)
    with pytest.raises(ValueError, match=r"\(Sequential\) holds other tensors or modules .* network: \['1'\]"):
        update_momentum(nn.Sequential(nn.Linear(2, 2)), target, 0.5)


def test_modules_that_were_wrapped_are_refused():
    online, target = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    nn.utils.parametrizations.orthogonal(online[0])
    # `online[0].weight` is there as before, but what learns is another tensor.
    with pytest.raises(ValueError, match=r"0\.\(ParametrizedLinear\) .*'parametrizations', 'weight'\]"):
        update_momentum(online, target, 0.5)


def test_tensors_that_a_module_holds_twice_move_once():
    tied, own = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    online = nn.Sequential(own, own)
    target = nn.Sequential(tied, nn.Linear(2, 2, bias=False))
    target[1].weight = tied.weight
    expected = 0.75 * tied.weight + 0.25 * own.weight
    update_momentum(online, target, 0.75)
    torch.testing.assert_close(tied.weight, expected)


@pytest.mark.parametrize(
    ("steps", "momentum"), [(1, 0.95), (1000, 0.95), (2000, 0.975), (12500, 0.996), (10**6, 0.996)]
)
def test_momentum_suits_the_number_of_steps(steps, momentum):
    assert suited_momentum(steps) == pytest.approx(momentum, abs=1e-12)
