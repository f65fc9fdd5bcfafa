import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from ippro_tp import prune
from ippro_tp.graph.dependency import GraphError, build_graph
from ippro_tp.graph.groups import read_group
from ippro_tp.graph.numbers import register_numbers, set_registered
from ippro_tp.graph.onepass import fresh_copy
from ippro_tp.graph.proof import prove
from ippro_tp.graph.provenance import Provenance
from ippro_tp.graph.trial import cut, difference, reference_outputs

from .nets import (
    NETS,
    VECTORS,
    Apart,
    AsWide,
    C2f,
    Functional,
    Gate,
    InPlace,
    Multihead,
    Shared,
    Split,
    Unknown,
    Windows,
)


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setattr(Provenance, "strict", True)


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


def silenced(model, group):
    """A copy of ``model`` in which nobody reads what the group would lose: columns of readers are zero."""
    silent = copy.deepcopy(model)
    for dep, idxs in group:
        module = silent.get_submodule(group._DG._module2name[dep.target.module])
        if isinstance(module, nn.Embedding):  # a layer that reads shares its weight
            module.weight.data[:, idxs] = 0
        reads = not group._DG.is_out_channel_pruning_fn(dep.handler) and isinstance(module, (nn.Linear, nn.Conv2d))
        if reads and group._DG.is_in_channel_pruning_fn(dep.handler):
            columns = torch.tensor(idxs)
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                columns = columns[columns < module.weight.shape[1]]
            module.weight.data[:, columns] = 0
    return silent


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_every_unit_of_every_group_computes_what_the_original_does_without_its_readers(kind):
    inputs = NETS[kind]
    graph = build_graph(made(kind), inputs)
    prove(graph)
    assert graph._keys
    for group in graph.get_all_groups():
        root = next(
            a for a in graph.axes if a.owner == graph._module2name[group[0].dep.target.module] and a.is_root
        )
        for unit in group.unit.unique()[:2]:
            pruned = fresh_copy(graph.model)
            cut(graph, pruned, unit.view(1))
            wanted = silenced(graph.model, graph.group_of(unit.view(1), root))(inputs)
            torch.testing.assert_close(pruned(inputs), wanted, atol=1e-5, rtol=1e-4)


def widths(kind):
    graph = build_graph(made(kind), NETS[kind])
    verdicts = prove(graph)
    print(verdicts)  # shown where a test fails
    return {
        read_group(group).key: (len(group[0].idxs), len(group.unit.unique())) for group in graph.get_all_groups()
    }


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (C2f, {"cv1.out": (16, 8), "cv2.out": (12, 12)}),
        (Split, {"first.out": (12, 12)}),
        (Windows, {"embed.out": (8, 8), "qkv.out": (24, 4), "fc1.out": (12, 12)}),
        (Apart, {"embed.out": (8, 8), "q.out": (12, 2)}),
        (AsWide, {"embed.out": (12, 4)}),
        (Functional, {"qkv.out": (24, 4)}),
        (Multihead, {"fc1.out": (12, 12)}),
        (InPlace, {"a.out": (4, 4), "b.out": (4, 4)}),
        (Gate, {"a.out": (16, 8), "b.out": (10, 5)}),
        (Shared, {"mid.out": (8, 8)}),
        (Unknown, {"b.out": (12, 12)}),
    ],
)
def test_groups_and_units(kind, wanted):
    assert widths(kind) == wanted


def test_what_stays_says_why():
    graph = build_graph(made(Unknown), NETS[Unknown])
    assert "fft" in graph.left_whole["a.out"]
    assert "cumsum" in graph.left_whole["c.out"]
    assert graph.left_whole["d.out"] == "its channels are the model's output"
    with pytest.raises(GraphError, match="fft"):
        graph.get_pruning_group(graph.model.a, graph.axes[0].handler, [0])


def test_ignored_layers_stay_and_the_model_is_not_touched():
    model = made(Windows).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    graph = build_graph(model, NETS[Windows], ignored_layers=[model.fc1])
    prove(graph)
    assert graph.left_whole["fc1.out"] == "named in ignored_layers"
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_tied_weights_stay_tied():
    model = made(Shared)
    graph = build_graph(model, NETS[Shared])
    group = next(iter(graph.get_all_groups()))
    group.prune([1, 5])
    assert model.back.weight is model.embed.weight
    assert model.mid.weight.shape == (6, 6)


def test_weights_of_a_norm_keep_their_order_however_many_go():
    net = nn.Sequential(nn.Linear(4, 192), nn.LayerNorm(192), nn.Linear(192, 2))
    graph = build_graph(net, torch.randn(1, 4))
    net[1].weight.data = torch.arange(192.0)
    next(iter(graph.get_all_groups())).prune([i for i in range(192) if i % 7])
    assert net[1].weight.tolist() == list(range(0, 192, 7))
    assert net[1].normalized_shape == (28,)


class Biased(nn.Module):
    """A table over two axes of positions, as in Swin v2: channels of its network meet those of the trunk."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(3, 3, 2))
        self.cpb, self.a, self.b = nn.Linear(2, 4), nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x):
        bias = self.cpb(self.table).view(9, 4).sum(1)
        return self.b(self.a(x).relu() + bias.mean())


def test_what_every_channel_depends_on_ties_none_of_them():
    graph = build_graph(made(Biased), VECTORS)
    prove(graph)
    assert [len(group.unit.unique()) for group in graph.get_all_groups() if group.unit.numel() == 9] == [9]


def test_groups_shrink_after_a_step():
    model = made(C2f)
    graph = build_graph(model, NETS[C2f])
    next(g for g in graph.get_all_groups() if len(g[0].idxs) == 12).prune([0, 3])
    group = next(g for g in graph.get_all_groups() if graph._module2name[g[0].dep.target.module] == "cv2")
    assert len(group[0].idxs) == 10
    group.prune([9])
    assert model(NETS[C2f]).shape == (2, 5)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("follow", [False, True])
def test_reference_norms_see_the_channels_that_remain(follow):
    model, x = made(Normed), NETS[Gate]
    with torch.no_grad():
        model.norm.weight.normal_()
        model.norm.bias.normal_()
    graph = build_graph(model, x)
    group = next(iter(graph.get_all_groups()))
    if follow:
        graph.facts.reads.clear()
    found = reference_outputs(graph, model, group.unit[[1, 4]])[0]
    keep = [0, 2, 3, 5, 6, 7]
    y = model.a(x)[:, keep]
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + model.norm.eps).sqrt()
    y = y * model.norm.weight[keep] + model.norm.bias[keep]
    torch.testing.assert_close(found, y @ model.b.weight[:, keep].T + model.b.bias)


def test_proof_finds_a_wrong_group_and_leaves_it_whole():
    model, x = made(Windows), NETS[Windows]
    graph = build_graph(model, x)
    axis = next(a for a in graph.axes if a.owner == "fc2" and not a.is_output)
    axis.classes = axis.classes.flip(0)
    verdicts = prove(graph)
    assert verdicts["fc1.out"].status == "whole"
    assert "differs" in graph.left_whole["fc1.out"]
    assert verdicts["embed.out"].status == "proved"


def test_a_second_graph_of_the_same_model_is_known_already(monkeypatch):
    first, second = (build_graph(made(Windows), NETS[Windows]) for _ in range(2))
    verdicts = prove(first)
    monkeypatch.setattr("ippro_tp.graph.proof.Bench.prove", None)
    assert prove(second) == verdicts
    assert [len(axis.classes) for axis in second.axes] == [len(axis.classes) for axis in first.axes]


def test_a_second_graph_ties_the_same_channels():
    first, second = (build_graph(made(AsWide), NETS[AsWide]) for _ in range(2))
    verdicts = prove(first)
    assert verdicts["embed.out"].status == "repaired"
    assert "as many" in verdicts["embed.out"].reason
    assert prove(second) == verdicts
    next(iter(second.get_all_groups())).prune([0, 1, 2])
    assert second.model.num_heads == 3
    assert second.model.qkv[1].weight.shape == (27, 9)
    assert second.model(NETS[AsWide]).shape == made(AsWide)(NETS[AsWide]).shape


def test_registered_numbers_count_the_axis_they_name():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.other = 8, 8
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).view(-1, self.width))

    register_numbers(f"{Kept.__module__}.{Kept.__qualname__}")(lambda module: {"width": "a.out"})
    graph = build_graph(Kept(), NETS[Gate])
    assert prove(graph)["a.out"].status == "proved"
    plain = Kept()
    tp.prune_linear_out_channels(plain.a, [0, 1])
    tp.prune_linear_in_channels(plain.b, [0, 1])
    set_registered(plain)
    assert (plain.width, plain.other) == (6, 8)
    assert plain(NETS[Gate]).shape == (3, 2)
    next(iter(graph.get_all_groups())).prune([2, 3, 4])
    assert graph.model.width == 5
    assert graph.model(NETS[Gate]).shape == (3, 2)


def test_one_split_of_sizes_shrinks_where_its_channels_go():
    model, x = made(Split), NETS[Split]
    graph = build_graph(model, x)
    prove(graph)
    group = next(iter(graph.get_all_groups()))
    group.prune([1, 2, 10])
    assert model.sizes == [2, 7]
    assert model(x).shape == (3, 3)


def test_cut_of_many_units_equals_the_reference():
    model, x = made(Windows), NETS[Windows]
    graph = build_graph(model, x)
    prove(graph)
    gone = torch.cat([group.unit.unique()[:2] for group in graph.get_all_groups()])
    pruned = fresh_copy(model)
    cut(graph, pruned, gone)
    assert difference([pruned(x)], reference_outputs(graph, model, gone)) < 1e-5


class Doubling(nn.Linear):
    """A layer derived from one of PyTorch's, with a number of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.half = self.out_features

    def forward(self, x):
        return super().forward(x).view(-1, self.half) * 2


def test_numbers_of_derived_layers_are_lowered_once():
    net = nn.Sequential(
        Doubling(6, 8), nn.GroupNorm(1, 8), nn.PReLU(8), Doubling(8, 4), nn.LayerNorm(4), Doubling(4, 2)
    )
    graph = build_graph(net, VECTORS)
    prove(graph)
    for group in list(graph.get_all_groups()):
        graph.get_pruning_group(group[0].dep.target.module, group[0].dep.handler, [0, 2]).prune()
    layers = [net[0], net[3], net[5]]
    assert [(m.in_features, m.out_features, m.half) for m in layers] == [(6, 6, 6), (6, 2, 2), (2, 2, 2)]
    assert all(m.weight.shape == (m.out_features, m.in_features) for m in layers)
    assert (net[1].num_channels, net[2].num_parameters, net[4].normalized_shape) == (6, 6, (2,))
    assert net(VECTORS).shape == (3, 2)


class Caching(nn.Module):
    """Keeps a tensor of its forward pass, as LeViT does with attention biases."""

    def __init__(self):
        super().__init__()
        self.a, self.bias, self.b, self.cache = nn.Linear(6, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 2), {}

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        return self.b((self.a(x) + self.cache["bias"]).relu())


def test_a_tensor_kept_from_a_forward_pass_is_forgotten():
    torch.manual_seed(0)
    result = prune(Caching().eval(), VECTORS, [VECTORS, VECTORS], ratio=0.5, progress=False)
    assert result.model.bias.shape == (4,)
    assert result.model(VECTORS).shape == (3, 2)


class Attention(nn.Module):
    """As timm's, with norms of query and key that all heads share."""

    def __init__(self, heads, normed):
        super().__init__()
        self.num_heads, self.size = heads, 6
        self.qkv, self.proj = nn.Linear(8, 3 * heads * 6), nn.Linear(heads * 6, 8)
        self.q_norm, self.k_norm = (nn.LayerNorm(6) if normed else nn.Identity() for _ in range(2))

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("heads", [2, 3, 4])
def test_heads_go_however_few_and_whatever_norm_they_share(heads, normed):
    torch.manual_seed(0)
    net = nn.Sequential(Attention(heads, normed), nn.ReLU(), nn.Linear(8, 2)).eval()
    graph = build_graph(net, torch.randn(2, 5, 8))
    verdicts = prove(graph)
    assert verdicts["0.qkv.out"].status != "whole"
    groups = {read_group(group).key: read_group(group).units for group in graph.get_all_groups()}
    assert groups["0.qkv.out"] == heads


class Aggregated(nn.Module):
    """As in CoaT: one token is made of two by a convolution over them, along whose positions lie the channels."""

    def __init__(self, kernel):
        super().__init__()
        self.one, self.other, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 2)
        self.aggregate = nn.Conv1d(2, 1, kernel, padding=kernel // 2)

    def forward(self, x):
        x = self.one(x)
        x = torch.stack([x, x + self.other(x)], 1)
        return self.last(self.aggregate(x)[:, 0])


@pytest.mark.parametrize(("kernel", "wanted"), [(1, ["one.out"]), (3, [])])
def test_a_convolution_of_single_positions_does_not_mix_them(kernel, wanted):
    torch.manual_seed(0)
    graph = build_graph(Aggregated(kernel).eval(), VECTORS)
    assert [read_group(group).key for group in graph.get_all_groups()] == wanted
    assert all(verdict.status == "proved" for key, verdict in prove(graph).items() if key in wanted)


class SingleHead(nn.Module):
    """As SHViT's: attention on some channels; their number counts those of the input and of the values."""

    def __init__(self):
        super().__init__()
        self.dim, self.some, self.size = 20, 7, 5
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 20, 1), nn.Conv2d(7, 17, 1), nn.Conv2d(20, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        part, rest = torch.split(x, [self.some, self.dim - self.some], 1)
        q, k, v = torch.split(self.qkv(part).flatten(2), [self.size, self.size, self.some], 1)
        part = (v @ (q.transpose(1, 2) @ k).softmax(-1)).view(x.shape[0], self.some, *x.shape[2:])
        return self.proj(torch.cat([part, rest], 1))


def test_a_number_that_counts_channels_of_two_layers_ties_them():
    torch.manual_seed(0)
    net, x = SingleHead().eval(), torch.randn(2, 3, 4, 4)
    graph = build_graph(net, x)
    prove(graph)
    records = {read_group(group).key: read_group(group) for group in graph.get_all_groups()}
    assert {key: record.units for key, record in records.items()} == {"stem.out": 20, "qkv.out": 5}
    assert graph.left_whole == {"proj.out": "its channels are the model's output"}
    result = prune(net, x, [x], macs=0.5, scope="local", compensation=False, progress=False)
    assert result.model(x).shape == net(x).shape
    assert (result.model.some, result.model.size) < (7, 5)
