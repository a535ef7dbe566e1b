from functools import partial

import pytest
import torch
from torch import nn

from aligndet_hf.training import compilation


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(compilation.logger, "warning", messages.append)
    return messages


def compiled_with(backend, monkeypatch) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network compiled by a backend, an input, and what the network made of it before."""
    network, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.randn(4, 3)
    expected, names = network(x), list(network.state_dict())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compilation.compile_networks([network])
    assert list(network.state_dict()) == names
    return network, x, expected


def test_a_network_is_compiled(monkeypatch, warnings):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network, x, expected = compiled_with(backend, monkeypatch)
    assert not graphs
    for _ in range(2):
        assert torch.equal(network(x), expected)
    assert len(graphs) == 1 and not warnings


def test_a_network_that_cannot_be_compiled_runs_as_it_was(monkeypatch, warnings):
    attempts = []

    def backend(graph, inputs):
        attempts.append(graph)
        raise RuntimeError("there is no compiler")

    network, x, expected = compiled_with(backend, monkeypatch)
    for _ in range(2):
        assert torch.equal(network(x), expected)
    assert len(attempts) == len(warnings) == 1
    assert "Sequential" in warnings[0] and "there is no compiler" in warnings[0]
