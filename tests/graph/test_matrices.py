"""Layers of unknown classes are pruned, scored and refitted like the Linear layers that compute the same."""

import copy

import pytest
import torch
from torch import nn

from ippro_tp import prune
from ippro_tp.graph.dependency import build_graph
from ippro_tp.graph.groups import read_group
from ippro_tp.graph.provenance import Provenance


class Turned(nn.Module):
    """``x @ weight + bias``, by numbers of its own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.made, self.read = outputs, inputs
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.offset = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.offset, x.reshape(-1, x.shape[-1]), self.kernel).view(*x.shape[:-1], self.made)


class Checked(Turned):
    """It looks at both of its numbers."""

    def forward(self, x):
        return super().forward(x.view(*x.shape[:-1], self.read))


class Scaled(Turned):
    """No Linear layer: it scales what it reads."""

    def forward(self, x):
        return super().forward(x * 3)


class Net(nn.Module):
    def __init__(self, layer, width=24):
        super().__init__()
        self.inner = 16
        self.stem, self.up, self.down = layer(6, self.inner), layer(self.inner, width), layer(width, self.inner)
        self.head = layer(self.inner, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(self.up(x).relu()))


def twins(layer, width=24):
    """A net of ``layer`` and the same of Linear layers."""
    torch.manual_seed(0)
    odd, plain = Net(layer, width), Net(nn.Linear, width)
    for name, module in odd.named_children():
        twin = plain.get_submodule(name)
        twin.weight.data, twin.bias.data = module.kernel.data.t().contiguous(), module.offset.data.clone()
    return odd, plain


def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 5, 6) for _ in range(4)]


@pytest.mark.parametrize("layer", [Turned, Checked])
@pytest.mark.parametrize("width", [24, 16], ids=["wide", "square"])
@pytest.mark.parametrize("compensation", [True, False], ids=["refitted", "cut"])
def test_a_layer_of_any_class_is_pruned_like_a_linear_one(layer, width, compensation):
    loader = batches()
    odd, plain = (
        prune(net, loader[0][:1], loader, macs=0.6, compensation=compensation, progress=False)
        for net in twins(layer, width)
    )
    for one, other in zip(odd.steps[0].groups, plain.steps[0].groups, strict=True):
        assert one.key == other.key
        assert one.removed == other.removed
        assert one.scores == pytest.approx(other.scores, rel=1e-4)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(odd.model(x), plain.model(x), rtol=1e-3, atol=1e-4)
    for module in odd.model.children():
        assert (module.read, module.made) == tuple(module.kernel.shape)
    if compensation:
        rows = [step.refitted.rows for step in (odd.steps[0], plain.steps[0])]
        assert [(row.name, row.kept, row.skipped) for row in rows[0]] == [
            (row.name, row.kept, row.skipped) for row in rows[1]
        ]


def test_a_layer_that_does_more_than_multiply_is_cut_and_left_as_it_is():
    loader = batches()
    torch.manual_seed(0)
    net = Net(Scaled)
    result = prune(net, loader[0][:1], loader, macs=0.6, progress=False)
    assert result.macs == pytest.approx(0.6, abs=0.01)
    rows = {row.name: row.skipped for row in result.steps[0].refitted.rows}
    assert rows == dict.fromkeys(("up", "down", "head"), "layers of type Scaled are not covered")


def test_a_second_pass_finds_what_the_first_has_noted():
    net, x = twins(Turned)[0], torch.randn(2, 5, 6)
    facts = build_graph(net, x).facts
    assert {operation for operation, _ in facts.reads} == {"addmm"}
    with torch.no_grad(), Provenance(facts, torch.zeros(len(facts.classes), dtype=torch.bool), replaying=True):
        net(x)  # otherwise it raises


def test_groups_tell_which_side_is_which_and_ignored_ones_keep_their_outputs():
    torch.manual_seed(0)
    net = Net(Turned)
    before = copy.deepcopy(net.state_dict())
    records = [read_group(group) for group in build_graph(net, torch.randn(1, 5, 6)).get_all_groups()]
    sides = {r.key: ([p.name for p in r.producers], [c.name for c in r.consumers]) for r in records}
    assert sides == {"stem.out": (["stem", "down"], ["up", "head"]), "up.out": (["up"], ["down"])}
    graph = build_graph(net, torch.randn(1, 5, 6), ignored_layers=[net.up])
    assert [read_group(group).key for group in graph.get_all_groups()] == ["stem.out"]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
