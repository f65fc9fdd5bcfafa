"""The same channels go, whoever asks: a copy, a saved state, a second pruner, the graph, the model."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import IPPROError, PROImportance, SpaSPImportance

from .common import explains, group_of, pruner_of, widths

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    def __init__(self, groups=1, eps=1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 32, 3, padding=1)
        self.a2, self.fa, self.fb = nn.Conv2d(32, 64, 3, groups=groups), nn.Linear(64, 4), nn.Linear(32, 4)

    def forward(self, x):
        a = F.relu(self.a2(F.relu(self.a(x)))).mean((2, 3))
        return self.fa(a) + self.eps * self.fb(F.relu(self.b(x)).mean((2, 3)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.f = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.embed(x.flatten(2)[:, :, :6])
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))
        return self.f((x + self.down(F.gelu(self.up(x)))).mean(1))


def build(kind):
    torch.manual_seed(0)
    return (Attending() if kind == "heads" else Branches(groups=8 if kind == "groups" else 1)).eval()


def pruner(model, imp, **options):
    kept = [model.f] if isinstance(model, Attending) else [model.fa, model.fb]
    heads = {"num_heads": {model.qkv: 4}} if isinstance(model, Attending) else {}
    options = {"global_pruning": True, "pruning_ratio": 0.6, "max_pruning_ratio": 0.9, **heads, **options}
    return pruner_of(model, X[:1], imp, kept, **options)


def other(how, imp, make):
    if how == "state_dict":
        found = make()
        found.load_state_dict(imp.state_dict())
        return found
    if how == "pickle":
        return pickle.loads(pickle.dumps(imp))
    return copy.deepcopy(imp) if how == "deepcopy" else imp


WAYS = ("state_dict", "pickle", "deepcopy", "second pruner", "second model", "graph", "model")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "groups", "heads"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_same_channels_go(way, kind, scope):
    shared = {"global_pruning": scope == "global"}
    live = build(kind)
    imp = PROImportance()
    first = pruner(live, imp, **shared)
    imp.calibrate(first, [X], progress=False)
    first.step()

    model, imp = build(kind), PROImportance()
    asking = pruner(model, imp, **shared)
    try:
        target = {"graph": asking.DG, "model": model}.get(way, asking)
        imp.calibrate(target, [X], progress=False)
        if way == "second model":
            model = copy.deepcopy(model)
        if way not in ("graph", "model"):
            imp = other(way, imp, PROImportance)
            asking = pruner(model, imp, **shared)
        asking.step()
    except IPPROError as why:
        assert way in ("graph", "model")
        explains(why, "pruner")
        return
    assert widths(model) == widths(live)
    for name, value in live.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_two_models_of_the_same_shapes_are_an_error():
    model, imp = build("plain"), PROImportance()
    imp.calibrate(pruner(model, imp), [X], progress=False)
    torch.manual_seed(1)
    stranger = Branches().eval()
    with pytest.raises(IPPROError):
        pruner(stranger, imp).step()


@pytest.mark.parametrize("option", [("cost", None), ("depletion", None), ("normalizer", "max"), ("power", 2)])
def test_options_changed_after_calibration_take_effect_or_are_refused(option):
    name, value = option
    results = []
    for before in (True, False):
        model = build("plain")
        imp = PROImportance(**({name: value} if before else {}))
        asking = pruner(model, imp)
        imp.calibrate(asking, [X], progress=False)
        try:
            if not before:
                setattr(imp, name, value)
            results.append(imp(group_of(asking, model.a)))
        except (IPPROError, AttributeError, ValueError):
            return
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("make", [PROImportance, SpaSPImportance])
def test_the_low_level_loop_works_or_says_what_to_do(make):
    model, imp = build("plain"), make()
    graph = tp.DependencyGraph().build_dependency(model, X[:1])
    imp.calibrate(graph, [X], progress=False)
    try:
        for group in graph.get_all_groups(ignored_layers=[model.fa, model.fb]):
            scores = imp(group)
            graph_fn, layer = group[0].dep.handler, group[0].dep.target.module
            cut = graph.get_pruning_group(layer, graph_fn, idxs=scores.argsort()[: len(scores) // 2].tolist())
            cut.prune()
    except IPPROError as why:
        explains(why, "all groups")
        return
    assert widths(model)["a"] == 16
    assert model(X).shape == (16, 4)


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 32) for _ in range(3))
        self.f = nn.Linear(96, 5)

    def forward(self, x):
        return self.f(F.relu(torch.cat((self.a(x), self.b(x), self.c(x)), 1)))


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.6])
def test_a_group_without_importance_is_pruned_to_the_maximum(ratio):
    torch.manual_seed(0)
    model, x = Dead(), torch.randn(64, 8)
    with torch.no_grad():
        model.a.bias.fill_(-99)
        model.b.bias[:16] = -99
    imp = PROImportance()
    asking = pruner_of(
        model, x[:1], imp, [model.f], global_pruning=True, pruning_ratio=ratio, max_pruning_ratio=0.9
    )
    imp.calibrate(asking, [x], progress=False)
    asking.step()
    assert model.a.out_features <= 4
    assert model.b.out_features + model.c.out_features >= 32  # what is dead goes, also beyond the ratio


def test_several_steps_of_a_search_tell_a_thing_once():
    from .common import told

    model, imp = build("plain"), PROImportance()
    asking = pruner(model, imp)
    imp.calibrate(asking, [X], progress=False)
    with told() as messages:
        for ratio in (0.2, 0.3, 0.4, 0.5):
            pruner(copy.deepcopy(model), imp, pruning_ratio=ratio).step()
    assert len(messages) == len(set(messages))
