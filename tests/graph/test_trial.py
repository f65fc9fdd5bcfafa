import copy
from unittest import mock

import pytest
import torch
from torch import nn

from ippro_tp.graph.dependency import build_graph
from ippro_tp.graph.proof import prove
from ippro_tp.graph.trial import Trial, restored, spread

from .nets import NETS, VECTORS, Shared, Windows


class Counting(nn.Module):
    """Scales by a parameter of zeros, and keeps lists, numbers and tensors of its forward passes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.calls, self.seen, self.cache = 0, [], {}

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.cache["last"] = x = self.a(x) * (1 + self.scale) + self.mean
        return self.b(x)


def test_proof_leaves_parameters_of_one_number_as_they_are():
    model = Counting()
    state = copy.deepcopy(model.state_dict())
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert prove(build_graph(model, VECTORS))["a.out"].status == "proved"
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.calls, model.seen, model.cache) == (0, [], {})


def test_tensors_of_several_names_stay_one_where_noise_replaces_them():
    model = Shared()
    nn.init.ones_(model.embed.weight)
    given = model.embed.weight
    assert spread(model, 0).back.weight is model.embed.weight
    assert model.embed.weight is not given
    assert bool((given == 1).all())
    assert len(model.embed.weight.unique()) > 1


def test_recurrent_layers_list_what_replaces_their_parameters():
    model = nn.LSTM(3, 4)
    nn.init.zeros_(model.bias_hh_l0)
    spread(model, 0)
    assert bool(model.bias_hh_l0.any())
    assert model._flat_weights[3] is model.bias_hh_l0


def test_what_is_set_on_modules_is_undone_after_an_exception_too():
    model = Counting()
    weight, calls, seen = model.a.weight, model.calls, model.seen

    def change():
        with restored(model):
            model.a.weight = nn.Parameter(torch.ones(3, 6))
            model.a.out_features, model.more = 3, 1
            model.seen.append(1)
            model.cache["x"] = model.scale
            del model.b
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert model.a.weight is weight
    assert model.a.out_features == 8
    assert isinstance(model.b, nn.Linear)
    assert (model.calls, model.seen, model.cache) == (calls, [], {})
    assert model.seen is seen
    assert not hasattr(model, "more")


@pytest.mark.parametrize("kind", [Windows, Shared])
def test_groups_that_are_right_take_one_trial(kind, monkeypatch):
    torch.manual_seed(3)
    graph = build_graph(kind().eval(), NETS[kind])
    monkeypatch.setattr("ippro_tp.graph.proof._KNOWN", {})
    with mock.patch.object(Trial, "__call__", autospec=True, side_effect=Trial.__call__) as tried:
        verdicts = prove(graph)
    assert any(verdict.status == "proved" for verdict in verdicts.values())
    assert tried.call_count == 1


def test_a_small_difference_is_looked_at_in_double_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 2))
    with torch.no_grad():  # channels 0 and 1 are nearly the same
        net[0].weight[1], net[0].bias[1] = net[0].weight[0], net[0].bias[0]
        net[1].weight[:, 1] = net[1].weight[:, 0] * (1 + 1e-3)
    graph = build_graph(net, torch.randn(3, 6))
    group = next(iter(graph.get_all_groups()))
    assert Trial(graph, 0)(group.unit[:9], graph.axes) == (None, None)
    axis = next(a for a in graph.axes if a.owner == "1" and not a.is_output)
    axis.classes = axis.classes[torch.tensor([1, 0, *range(2, 40)])]
    with mock.patch("ippro_tp.graph.trial.DOUBLE", 0):  # no double precision
        assert Trial(graph, 0)(group.unit[:1], graph.axes) == (None, None)
    problem, _ = Trial(graph, 0)(group.unit[:1], graph.axes)
    assert "differs" in problem
