"""Wherever Torch-Pruning takes an importance, ours stand in its place: every pruner, option and idiom."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import Compensation, NotCalibratedError, PROImportance, SpaSPImportance, StaleStatisticsError
from ippro_tp.graph.groups import group_key, groups_of

from .nets import CASES, make_pruner

OURS = {
    "expected": PROImportance,
    "mean, standarization": lambda: PROImportance(group_reduction="mean", normalizer="standarization"),
    "paper": lambda: PROImportance("paper"),
    "spasp": SpaSPImportance,
}
PRUNERS = {
    cls.__name__: cls for cls in (tp.pruner.BasePruner, tp.pruner.BNScalePruner, tp.pruner.GroupNormPruner)
} | {"GrowingRegPruner": tp.pruner.GrowingRegPruner}
assert tp.pruner.MetaPruner is tp.pruner.MagnitudePruner is tp.pruner.BasePruner  # two more names of it


def widths(model):
    """Number of outputs and inputs of every layer."""
    return {
        name: tuple(m.weight.shape[:2])
        for name, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), torch.Tensor)
    }


def images(samples=6, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, size, size, generator=generator), torch.arange(samples) % 4


def calibrate(imp, pruner, data=None, loss_fn=F.cross_entropy):
    return imp.calibrate(pruner, [data or images()], loss_fn, progress=False)


def magnitude():
    return tp.importance.GroupMagnitudeImportance()


def step_and_check(pruner, imp, lowest=True):
    """One step; that the channels of every group with the lowest scores went, and how many of each group."""
    scores = {}
    asked = pruner.importance

    def listen(group, **kwargs):
        found = asked(group, **kwargs)
        scores[pruner.DG._module2name[group[0].dep.target.module]] = found
        return found

    pruner.importance = listen
    removed = {}
    for group in pruner.step(interactive=True):
        name = pruner.DG._module2name[group[0].dep.target.module]
        idxs = sorted(group[0].idxs)
        group.prune()
        removed[name] = len(idxs)
        assert scores[name].isfinite().all()
        if lowest and len(idxs) > 0:
            gone = scores[name][idxs]
            kept = scores[name][[i for i in range(len(scores[name])) if i not in idxs]]
            assert gone.max() <= kept.min()
    pruner.importance = asked
    assert removed
    return removed


def assert_trains(model, *inputs, **kwargs):
    """Forward, backward and a step of an optimizer."""
    out = model(*inputs, **kwargs)
    out = next(iter(out.values())) if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
    assert out.isfinite().all()
    out.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


# -- pruners and scopes ------------------------------------------------------------------------------------------

LOCAL = [
    {},
    {"pruning_ratio": 0.3},
    {"pruning_ratio": 0.8, "max_pruning_ratio": 0.6},
    {"round_to": 2},
    {"ch_sparsity": 0.3},
]


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("options", LOCAL, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:ch_sparsity is deprecated")
def test_local_pruning_removes_the_lowest_and_as_many_as_magnitude(name, options, make):
    case, imp = CASES[name], OURS[make]()
    model = case.model(torch.float32)
    twin = copy.deepcopy(model)
    case.pruner(twin, magnitude(), **options).step()
    pruner = case.pruner(model, imp, **options)
    calibrate(imp, pruner)
    # TP averages scores over the groups of a grouped convolution: there the sums are lowest, not the scores.
    step_and_check(pruner, imp, lowest=name != "transposed")
    assert widths(model) == widths(twin)
    assert_trains(model, images()[0])


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("pruner_name", PRUNERS)
def test_every_pruner_regularises_while_training_and_then_prunes(pruner_name, make):
    case, cls, calls = CASES["residual"], PRUNERS[pruner_name], []

    class Counting(type(OURS[make]())):
        def __call__(self, group, **kwargs):
            calls.append(group)
            return super().__call__(group, **kwargs)

    imp = OURS[make]()
    imp.__class__ = Counting
    model = case.model(torch.float32)
    twin = copy.deepcopy(model)
    case.pruner(twin, magnitude(), cls=cls).step()
    pruner = case.pruner(model, imp, cls=cls)
    x, labels = images()
    calibrate(imp, pruner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    groups = len(list(groups_of(pruner)))
    asks = {"GroupNormPruner": 1, "GrowingRegPruner": 2}  # times that an iteration asks for the scores of a group
    pruner.update_regularizer()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        before = [p.grad.clone() for p in model.parameters()]
        calls.clear()
        if pruner_name != "BasePruner":  # it has no regularizer
            pruner.regularize(model)
            # GroupNormPruner takes the root of scores and skips groups where that is NaN: those of signed scores.
            if not (make == "paper" and pruner_name == "GroupNormPruner"):
                assert not all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
        if pruner_name == "GrowingRegPruner":
            pruner.update_reg()
        assert len(calls) == groups * asks.get(pruner_name, 0)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    step_and_check(pruner, imp)
    assert widths(model) == widths(twin)
    assert_trains(model, x)


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("isomorphic", [False, True])
def test_a_global_ranking_removes_the_lowest_of_all(isomorphic, make):
    case, imp = CASES["residual"], OURS[make]()
    model = case.model(torch.float32)
    options = {"global_pruning": True, "isomorphic": isomorphic, "pruning_ratio": 0.4, "max_pruning_ratio": 0.9}
    pruner = case.pruner(model, imp, **options)
    calibrate(imp, pruner)
    scores = {pruner.DG._module2name[g[0].dep.target.module]: imp(g) for g in groups_of(pruner)}
    removed = {
        pruner.DG._module2name[g[0].dep.target.module]: sorted(g[0].idxs) for g in pruner.step(interactive=True)
    }
    first, second = (f"blocks.{i}.conv1" for i in range(2))
    scopes = [["stem"], [first, second]] if isomorphic else [["stem", first, second]]
    for scope in scopes:
        together = torch.cat([scores[name] for name in scope])
        count = len(together) - int(len(together) * 0.6)
        threshold = together.sort().values[count - 1]
        for name in scope:
            assert removed.get(name, []) == (scores[name] <= threshold).nonzero().view(-1).tolist()


def test_isomorphic_without_global_is_no_worse_than_magnitude():
    """Torch-Pruning then takes positions in the joint ranking for channels of each group."""
    case = CASES["residual"]
    outcomes = []
    for imp in (magnitude(), PROImportance()):
        model = case.model(torch.float32)
        pruner = case.pruner(model, imp, isomorphic=True, pruning_ratio=0.4)
        if isinstance(imp, PROImportance):
            calibrate(imp, pruner)
        try:
            pruner.step()
            outcomes.append(model(images()[0]).isfinite().all().item())
        except (IndexError, RuntimeError):
            outcomes.append(False)
    assert outcomes[1] >= outcomes[0]


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("global_pruning", [False, True], ids=["local", "global"])
def test_ratios_for_layers_blocks_and_tuples_of_them(global_pruning, make):
    case, imp = CASES["residual"], OURS[make]()
    options = {"global_pruning": global_pruning, "pruning_ratio": 0.5}

    def ratios(m):
        return {(m.blocks[0]["conv1"], m.blocks[1]["conv1"]): 0.4, m.stem: 0.2}

    model = case.model(torch.float32)
    twin = copy.deepcopy(model)
    case.pruner(twin, magnitude(), pruning_ratio_dict=ratios(twin), **options).step()
    pruner = case.pruner(model, imp, pruning_ratio_dict=ratios(model), **options)
    calibrate(imp, pruner)
    step_and_check(pruner, imp)
    hidden = [block["conv1"].out_channels for block in model.blocks]
    assert model.stem.out_channels == twin.stem.out_channels == 4
    if global_pruning:  # the two of the tuple were ranked against each other
        assert sum(hidden) == sum(block["conv1"].out_channels for block in twin.blocks) == 6
    else:
        assert hidden == [3, 3]
    assert_trains(model, images()[0])


@pytest.mark.parametrize("make", OURS)
def test_iterative_steps_need_and_take_a_new_calibration_each(make):
    case, imp = CASES["concat"], OURS[make]()
    model = case.model(torch.float32)
    twin = copy.deepcopy(model)
    options = {"iterative_steps": 3, "pruning_ratio": 0.6}
    other = case.pruner(twin, magnitude(), **options)
    pruner = case.pruner(model, imp, **options)
    for step in range(3):
        if step:
            with pytest.raises(StaleStatisticsError, match="alibrate again"):
                imp(next(groups_of(pruner)))
        calibrate(imp, pruner)
        step_and_check(pruner, imp)
        other.step()
        assert widths(model) == widths(twin)
    assert_trains(model, images()[0])
    with pytest.warns(UserWarning, match="exceed the maximum iterative steps"):
        pruner.step()


@pytest.mark.parametrize("make", OURS)
def test_interactive_steps_may_leave_groups_out(make):
    case, imp = CASES["residual"], OURS[make]()
    model = case.model(torch.float32)
    pruner = case.pruner(model, imp)
    calibrate(imp, pruner)
    for group in pruner.step(interactive=True):
        if group[0].dep.target.module is not model.stem:
            group.prune()
    assert model.stem.out_channels == 6
    assert [block["conv1"].out_channels for block in model.blocks] == [2, 2]
    assert_trains(model, images()[0])


# -- channels that are tied --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("keyword", ["out_channel_groups", "channel_groups"])
@pytest.mark.filterwarnings("ignore:channel_groups is deprecated")
def test_channel_groups_lose_the_same_places(keyword, make):
    case, imp = CASES["residual"], OURS[make]()
    model = case.model(torch.float32)
    pruner = case.pruner(model, imp, **{keyword: {model.stem: 2}}, pruning_ratio=0.3)
    calibrate(imp, pruner)
    scores = imp(pruner.DG.get_pruning_group(model.stem, tp.prune_conv_out_channels, list(range(6))))
    expected = scores.view(2, 3).mean(0).argmin().item()
    removed = [g[0].idxs for g in pruner.step(interactive=True) if g[0].dep.target.module is model.stem]
    assert removed == [[expected, expected + 3]]


@pytest.mark.parametrize("make", OURS)
def test_grouped_convolutions_keep_equal_groups(make):
    case, imp = CASES["transposed"], OURS[make]()
    model = case.model(torch.float32)
    pruner = case.pruner(model, imp)
    calibrate(imp, pruner)
    before = {g[0].dep.target.module: imp(g) for g in groups_of(pruner)}
    for group in pruner.step(interactive=True):
        module, idxs = group[0].dep.target.module, sorted(group[0].idxs)
        if module in (model.up, model.grouped):
            lowest = before[module].view(2, 4).mean(0).argsort()[:2].sort().values.tolist()
            assert idxs == [*lowest, *(i + 4 for i in lowest)]
        group.prune()
    assert model.grouped.groups == 2
    assert model.grouped.weight.shape == (4, 2, 3, 3)
    assert_trains(model, images()[0])


def vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}
    return timm.models.VisionTransformer(**{**sizes, **options}).eval()


def attention_options(model, **options):
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    return {"num_heads": heads, "ignored_layers": [model.head], **options}


def refresh_heads(model, pruner):
    """What Torch-Pruning's examples do after a step."""
    for block in model.blocks:
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.head_dim = block.attn.qkv.out_features // (3 * block.attn.num_heads)
        block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prune_num_heads": True, "head_pruning_ratio": 0.3},
        {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.3},
        {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.3, "global_pruning": True},
        {"global_pruning": True, "isomorphic": True, "pruning_ratio": 0.3},
    ],
    ids=str,
)
def test_attention_is_pruned_by_head_and_by_dimension(options, make):
    imp = OURS[make]()
    model = vit()
    twin = copy.deepcopy(model)
    outcome = []
    for net, importance in ((twin, magnitude()), (model, imp)):
        settings = attention_options(net, **options)
        ignored = settings.pop("ignored_layers")
        pruner = make_pruner(net, images(1)[0], importance, ignored, **settings)
        if importance is imp:
            calibrate(imp, pruner)
        pruner.step()
        refresh_heads(net, pruner)
        outcome.append(widths(net))
        assert net(images()[0]).isfinite().all()
    if not options.get("global_pruning"):
        assert outcome[0] == outcome[1]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in vit().parameters())
    assert_trains(model, images()[0])


@pytest.mark.parametrize("make", OURS)
def test_the_heads_with_the_lowest_mean_score_go(make):
    imp, model = OURS[make](), vit(depth=1)
    options = attention_options(model, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.3)
    pruner = make_pruner(model, images(1)[0], imp, options.pop("ignored_layers"), **options)
    calibrate(imp, pruner)
    asked = {}
    pruner.importance = lambda group: asked.setdefault(group[0].dep.target.module, imp(group))
    removed = {group[0].dep.target.module: sorted(group[0].idxs) for group in pruner.step(interactive=True)}
    projection = model.blocks[0].attn.proj  # Torch-Pruning roots attention at the layer after it
    assert asked[projection].shape == (24,)
    weakest = asked[projection].view(3, 8).mean(1).argmin().item()
    assert removed[projection] == list(range(8 * weakest, 8 * weakest + 8))


# -- single groups -----------------------------------------------------------------------------------------------


class Wide(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip


@pytest.mark.parametrize("make", OURS)
def test_the_example_of_partial_groups_in_torch_prunings_documentation(make):
    imp, model = OURS[make](), Wide().eval()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=images(1)[0])
    imp.calibrate(graph, [images()], F.cross_entropy, progress=False)
    full = imp(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=list(range(12))))
    for idxs in ([2, 6, 9], [9, 2, 6], [11]):
        group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=list(idxs))
        if getattr(imp, "normalizer", None) is None:
            assert torch.equal(imp(group), full[idxs])
        else:  # as in TP, the channels that are asked for are normalised among themselves
            assert torch.equal(imp(group).argsort(), full[idxs].argsort())
    group.prune()
    assert model[0].out_channels == model[1].num_features == model[3].in_channels == 11
    assert_trains(model, images()[0])


@pytest.mark.parametrize("make", OURS)
def test_manual_prune_width(make):
    imp, model = OURS[make](), Wide().eval()
    pruner = make_pruner(model, images(1)[0], imp, [model[7]])
    calibrate(imp, pruner)
    scores = imp(pruner.DG.get_pruning_group(model[3], tp.prune_conv_out_channels, list(range(8))))
    weight = model[3].weight.detach().clone()
    pruner.manual_prune_width(model[3], tp.prune_conv_out_channels, scores.argsort()[:2].tolist())
    assert torch.equal(model[3].weight, weight[scores.argsort()[2:].sort().values])
    assert model(images()[0]).isfinite().all()


def test_manual_prune_width_by_ratio_ends_as_with_magnitude():
    """TP passes a tensor on where its layers expect a list, and cuts nothing."""
    outcomes = []
    for imp in (magnitude(), PROImportance()):
        model = Wide().eval()
        pruner = make_pruner(model, images(1)[0], imp, [model[7]])
        if isinstance(imp, PROImportance):
            calibrate(imp, pruner)
        pruner.manual_prune_width(model[3], tp.prune_conv_out_channels, 0.75)
        outcomes.append((model[3].out_channels, model[3].weight.shape))
    assert outcomes[0] == outcomes[1]


# -- layers, parameters and roots of the user's own --------------------------------------------------------------


class Scale(nn.Module):
    """Multiplies channels by a parameter and adds another."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.scale, self.shift = nn.Parameter(torch.rand(dim) + 0.5), nn.Parameter(torch.randn(dim))

    def forward(self, x):
        return x * self.scale + self.shift


class ScalePruner(tp.pruner.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        keep = sorted(set(range(layer.dim)) - set(idxs))
        layer.dim -= len(idxs)
        layer.scale = self._prune_parameter_and_grad(layer.scale, keep, pruning_dim=0)
        layer.shift = self._prune_parameter_and_grad(layer.shift, keep, pruning_dim=0)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return layer.dim

    get_in_channels = get_out_channels


@pytest.mark.parametrize("make", OURS)
def test_customized_pruners(make):
    torch.manual_seed(0)
    imp = OURS[make]()
    model = nn.Sequential(nn.Linear(6, 10), Scale(10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(7, 6)
    pruner = make_pruner(model, x[:1], imp, [model[5]], customized_pruners={Scale: ScalePruner()})
    calibrate(imp, pruner, (x, torch.arange(7) % 4))
    assert step_and_check(pruner, imp) == {"0": 5, "3": 4}
    assert model[1].scale.shape == (5,)
    assert_trains(model, x)


class Gamma(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.gamma = nn.Conv2d(3, 6, 3, padding=1), nn.Parameter(torch.rand(1, 6, 1, 1) + 0.5)
        self.b, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.fc((x + self.gamma * self.b(x)).mean((2, 3)))


@pytest.mark.parametrize("make", OURS)
def test_unwrapped_parameters(make):
    imp, model = OURS[make](), Gamma().eval()
    pruner = make_pruner(model, images(1)[0], imp, [model.fc], unwrapped_parameters=[(model.gamma, 1)])
    calibrate(imp, pruner)
    assert list(step_and_check(pruner, imp).values()) == [3]
    assert model.gamma.shape == (1, 3, 1, 1)
    assert_trains(model, images()[0])


@pytest.mark.parametrize("make", OURS)
def test_root_module_types_limit_what_is_scored(make):
    imp, case = OURS[make](), CASES["concat"]
    model = case.model(torch.float32)
    pruner = case.pruner(model, imp, root_module_types=[nn.Conv2d])
    calibrate(imp, pruner)
    assert set(step_and_check(pruner, imp)) == {"a", "b", "c"}
    assert model.hidden.out_features == 7
    assert_trains(model, images()[0])


class Sequence(nn.Module):
    """Embedding, LSTM, attention module, PReLU."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.act, self.lstm = nn.Linear(5, 8), nn.PReLU(), nn.LSTM(8, 6, batch_first=True)
        self.hidden, self.fc = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        x, _ = self.lstm(F.relu(self.inp(x)))
        return self.fc(self.act(self.hidden(x[:, -1])))


def test_lstm_and_prelu_are_scored_and_pruned_as_far_as_torch_pruning_can():
    x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    for make in OURS.values():
        model, imp = Sequence().eval(), make()
        calibrate(imp, whole := make_pruner(model, x[:1], imp, [model.fc]), (x, torch.arange(6) % 4))
        scored = {whole.DG._module2name[g[0].dep.target.module]: imp(g) for g in groups_of(whole)}
        assert scored["lstm"].shape == (6,)
        if make is SpaSPImportance:  # only Conv and Linear layers tell it what a channel is worth
            assert scored.pop("inp") is None
        assert all(s.isfinite().all() for s in scored.values())
        # TP 1.6.1 cannot cut an LSTM's outputs, whatever the criterion, so it is left out.
        calibrate(imp, pruner := make_pruner(model, x[:1], imp, [model.fc, model.lstm]), (x, torch.arange(6) % 4))
        step_and_check(pruner, imp)
        assert (model.hidden.out_features, model.fc.in_features) == (4, 4)
        assert_trains(model, x)


# -- ways to call a model ----------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Takes tensors, names or a dict; gives a dict and a tuple."""

    def __init__(self, output="tensor"):
        super().__init__()
        torch.manual_seed(0)
        self.output = output
        self.a, self.b = nn.Linear(5, 8), nn.Linear(3, 8)
        self.c, self.fc = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x, y, double=False):
        z = self.fc(F.gelu(self.c(F.relu(self.a(x) + self.b(y) * (2 if double else 1)))))
        return {"tensor": z, "dict": {"out": z, "aux": z.sum()}, "tuple": (z, [z * 2])}[self.output]


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("form", ["tuple", "dict", "forward_fn", "output dict", "output_transform"])
def test_several_inputs_and_outputs(form, make):
    imp = OURS[make]()
    model = TwoInputs({"output dict": "dict", "output_transform": "tuple"}.get(form, "tensor")).eval()
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    inputs, options = (x, y), {}
    if form == "dict":
        inputs = {"x": x, "y": y}
    if form == "forward_fn":
        options["forward_fn"] = lambda m, batch: m(*batch, double=True)
    if form == "output_transform":
        options["output_transform"] = lambda out: out[1][0]
    pruner = make_pruner(model, inputs, imp, [model.fc], **options)
    labels = torch.arange(6) % 4

    def loss_of(out):
        return F.cross_entropy(
            out["out"] if form == "output dict" else out[0] if isinstance(out, tuple) else out, labels
        )

    with imp.observe(pruner):
        for _ in range(2):
            out = model(*inputs, double=True) if form == "forward_fn" else model(x=x, y=y)
            if imp.needs_gradients:
                loss_of(out).backward()
    step_and_check(pruner, imp)
    assert (model.a.out_features, model.b.out_features, model.c.out_features) == (4, 4, 3)
    assert_trains(model, x, y)


# -- idioms ------------------------------------------------------------------------------------------------------


def test_soft_pruning_zeroes_the_same_channels_again():
    case, imp = CASES["residual"], PROImportance()
    model = case.model(torch.float32)
    pruner = case.pruner(model, imp, iterative_steps=4, pruning_ratio=0.9)

    def soft_step():
        calibrate(imp, pruner)
        chosen = {}
        for group in pruner.step(interactive=True):
            for dep, idxs in group:
                layer, fn = dep.target.module, dep.handler
                if fn in (tp.prune_conv_in_channels, tp.prune_linear_in_channels):
                    layer.weight.data[:, idxs] = 0
                elif fn in (tp.prune_conv_out_channels, tp.prune_batchnorm_out_channels):
                    layer.weight.data[idxs] = 0
                    if layer.bias is not None:
                        layer.bias.data[idxs] = 0
            chosen[group[0].dep.target.module] = set(group[0].idxs)
        return chosen

    before = widths(model)
    first, second = soft_step(), soft_step()
    assert widths(model) == before
    assert first.keys() == second.keys()
    for module, idxs in first.items():
        assert idxs < second[module]  # those that are zero stay the least important
        group = pruner.DG.get_pruning_group(module, tp.prune_conv_out_channels, sorted(idxs))
        calibrate(imp, pruner)
        assert (imp(group) == 0).all()


@pytest.mark.parametrize("make", OURS)
def test_nothing_of_ours_is_saved_with_the_model(make, tmp_path):
    case, imp = CASES["residual"], OURS[make]()
    model = case.model(torch.float32)
    keys = list(model.state_dict())
    pruner = case.pruner(model, imp)
    calibrate(imp, pruner)
    scores = [imp(g) for g in groups_of(pruner)]
    torch.save(imp, tmp_path / "imp.pt")
    loaded = torch.load(tmp_path / "imp.pt", weights_only=False)
    for clone in (pickle.loads(pickle.dumps(imp)), copy.deepcopy(imp), loaded):
        if make == "spasp":
            clone.bind(pruner)  # a pruner is not pickled
        assert all(map(torch.equal, scores, (clone(g) for g in groups_of(pruner))))
    assert list(model.state_dict()) == keys
    pruner.step()
    x = images()[0]
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(whole(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    file = io.BytesIO()
    torch.save(tp.state_dict(model), file)
    file.seek(0)
    rebuilt = case.model(torch.float32)
    tp.load_state_dict(rebuilt, state_dict=torch.load(file, weights_only=False))
    assert widths(rebuilt) == widths(model)
    assert torch.equal(rebuilt(x), model(x))


@pytest.mark.parametrize("make", OURS)
def test_a_pruning_history_can_be_replayed(make):
    case, imp = CASES["depthwise"], OURS[make]()
    model = case.model(torch.float32)
    fresh = copy.deepcopy(model)
    pruner = case.pruner(model, imp, iterative_steps=2)
    for _ in range(2):
        calibrate(imp, pruner)
        pruner.step()
    history = pickle.loads(pickle.dumps(pruner.pruning_history()))
    assert history
    graph = tp.DependencyGraph().build_dependency(fresh, images(1)[0])
    graph.load_pruning_history(history)
    assert widths(fresh) == widths(model)
    assert torch.equal(fresh(images()[0]), model(images()[0]))


# -- shapes ------------------------------------------------------------------------------------------------------


class Reshape(nn.Module):
    """A Linear layer whose outputs become maps of a transposed convolution, and are flattened at the end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.up = nn.Linear(6, 4 * 8), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = F.relu(self.linear(x)).view(-1, self.up.in_channels, 2, 2)
        return self.fc(torch.flatten(F.relu(self.up(x)), 1))


class Cascade(nn.Module):
    """Concatenations of concatenations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(10, 8, 1)
        self.norm, self.fc = nn.BatchNorm2d(18), nn.Linear(18, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = torch.cat([x, F.relu(self.b(x))], 1)
        return self.fc(F.relu(self.norm(torch.cat([y, self.c(y)], 1))).mean((2, 3)))


class Chunks(nn.Module):
    """A tensor that is split between two layers."""

    def __init__(self, first=6):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(first, 6, 1), nn.Conv2d(12 - first, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x, y = torch.split(F.relu(self.a(x)), [self.b.in_channels, self.c.in_channels], 1)
        return self.fc((F.relu(self.b(x)) + F.silu(self.c(y))).mean((2, 3)))


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("build", [Cascade, Chunks])
def test_concatenations_and_splits(build, make):
    imp, model = OURS[make](), build().eval()
    twin = copy.deepcopy(model)
    make_pruner(twin, images(1)[0], magnitude(), [twin.fc]).step()
    pruner = make_pruner(model, images(1)[0], imp, [model.fc])
    calibrate(imp, pruner)
    removed = step_and_check(pruner, imp)
    assert removed.keys() >= {"a", "b" if build is Cascade else "c"}
    if build is Cascade:  # how a split tensor's channels fall to its readers depends on the scores
        assert widths(model) == widths(twin)
    assert_trains(model, images()[0])


def test_groups_whose_index_maps_are_impossible_are_left_whole():
    """Torch-Pruning exchanges the parts of an uneven split: its own criteria fail on them."""
    model = Chunks(4).eval()
    with pytest.raises(IndexError):
        make_pruner(copy.deepcopy(model), images(1)[0], magnitude(), [model.fc]).step()
    for make in OURS.values():
        net, imp = copy.deepcopy(model), make()
        pruner = make_pruner(net, images(1)[0], imp, [net.fc])
        with pytest.warns(RuntimeWarning, match="index map is impossible"):
            calibrate(imp, pruner)
        records = {record.key: record for record in imp._records.values()}
        assert any(record.problems for record in records.values())
        for group in groups_of(pruner):
            scores = imp(group)
            assert (scores is None) == bool(records[group_key(group)].problems)
        pruner.step()
        assert net(images(1)[0]).isfinite().all()


@pytest.mark.parametrize("make", OURS)
def test_a_linear_layer_whose_outputs_become_maps(make):
    """Four positions of the group are one channel of the next layer: TP removes the channel if it removes any."""
    imp, model = OURS[make](), Reshape().eval()
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    pruner = make_pruner(
        model, x[:1], imp, [model.fc], root_module_types=[nn.ConvTranspose2d, nn.Linear], pruning_ratio=0.1
    )
    calibrate(imp, pruner, (x, torch.arange(6) % 4))
    linear = next(g for g in groups_of(pruner) if g[0].dep.target.module is model.linear)
    scores = imp(linear)
    assert scores.shape == (32,)
    lowest = {i // 4 for i in scores.argsort()[:4].tolist()}
    pruner.step()
    # in_channels itself is wrong then: TP 1.6.1 subtracts the number of positions.
    assert model.up.weight.shape[0] == 8 - len(lowest)
    assert model.linear.out_features == 4 * model.up.weight.shape[0]


@pytest.mark.parametrize("make", OURS)
def test_a_single_channel_is_left_alone(make):
    torch.manual_seed(0)
    imp = OURS[make]()
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    pruner = make_pruner(model, images(1)[0], imp, [model[4]])
    x, _ = images()
    with imp.observe(pruner):
        out = model(x)
        if imp.needs_gradients:
            out.square().mean().backward()
    assert step_and_check(pruner, imp) == {"2": 3}
    assert model[0].out_channels == 1


# -- normalizers and reductions ----------------------------------------------------------------------------------

NORMALIZERS = ["sum", "standarization", "mean", "max", "gaussian", "sentinel_0.5", "lamp", torch.log1p, None]


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("estimator", ["expected", "paper"])
def test_normalizers_are_those_of_torch_pruning(normalizer, estimator):
    case = CASES["residual"]
    model = case.model(torch.float32)
    pruner = case.pruner(model, None)
    plain = calibrate(PROImportance(estimator), pruner)
    imp = calibrate(PROImportance(estimator, normalizer=normalizer), pruner)
    theirs = tp.importance.GroupMagnitudeImportance(normalizer=normalizer)
    for group in groups_of(pruner):
        scores, raw = imp(group), plain(group)
        expected = theirs._normalize(raw.clone(), normalizer)
        torch.testing.assert_close(scores, expected.nan_to_num(0.0), rtol=1e-5, atol=1e-6)
        assert scores.isfinite().all()
        if estimator == "expected":  # of positive scores the order stays
            assert torch.equal(scores.argsort(), raw.argsort())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.importance = imp
        step_and_check(pruner, imp)


@pytest.mark.parametrize("reduction", ["joint", "mean", "sum", "max", "prod", "first"])
@pytest.mark.parametrize("estimator", ["expected", "paper"])
def test_reductions_prune_as_many_as_magnitude(reduction, estimator):
    case = CASES["depthwise"]
    model = case.model(torch.float32)
    twin = copy.deepcopy(model)
    case.pruner(twin, magnitude()).step()
    imp = PROImportance(estimator, group_reduction=reduction)
    pruner = case.pruner(model, imp)
    calibrate(imp, pruner)
    step_and_check(pruner, imp)
    assert widths(model) == widths(twin)


@pytest.mark.parametrize("reduction", ["gate", None])
def test_reductions_that_give_no_score_a_channel_are_refused(reduction):
    with pytest.raises(ValueError, match=r"group_reduction=.*choose one of 'joint', 'mean'"):
        PROImportance(group_reduction=reduction)


# -- compensation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pruner_name"),
    [*(("residual", name) for name in PRUNERS), *((name, "BasePruner") for name in CASES)][1:],
)
def test_compensation_steps_for_every_pruner(name, pruner_name):
    case, imp, comp = CASES[name], PROImportance(), Compensation()
    model = case.model(torch.float32)
    twin = copy.deepcopy(model)
    case.pruner(twin, magnitude(), cls=PRUNERS[pruner_name]).step()
    pruner = case.pruner(model, imp, cls=PRUNERS[pruner_name])
    calibrate(imp, pruner)
    comp.calibrate(pruner, [images(16)], progress=False)
    report = comp.step(pruner)
    assert report.rows
    assert widths(model) == widths(twin)
    assert_trains(model, images()[0])


def test_models_of_torchvision_and_timm_end_as_with_magnitude():
    torch.manual_seed(0)
    for name in ("resnet18", "mobilenetv3_small_050", "regnetx_002"):
        options = {"channels": (8, 8, 16, 16)} if name == "resnet18" else {}
        model = timm.create_model(name, num_classes=4, **options).eval()
        twin = copy.deepcopy(model)
        x = images(4, 32)[0]
        make_pruner(twin, x[:1], magnitude(), [twin.get_classifier()]).step()
        imp = PROImportance()
        pruner = make_pruner(model, x[:1], imp, [model.get_classifier()])
        imp.calibrate(pruner, [x], progress=False)
        pruner.step()
        assert widths(model) == widths(twin)
        assert model(x).isfinite().all()


def test_a_pruner_without_calibration_says_what_is_missing():
    case = CASES["residual"]
    for cls, make in zip(PRUNERS.values(), OURS.values(), strict=True):
        pruner = case.pruner(case.model(torch.float32), make(), cls=cls)
        with pytest.raises(NotCalibratedError, match=r"calibrate\(pruner, loader\)"):
            pruner.step()


def _one_group_lowest(**options):
    """A net whose second layer hardly matters, and a global pruner that would remove a third of all channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(10, 4),
    ).eval()  # fmt: skip
    imp = PROImportance(cost=lambda record, _: 1e12 if record.key == "2.out" else 1.0)
    pruner = make_pruner(
        model, images()[0][:1], imp, [model[6]], global_pruning=True, pruning_ratio=0.35, **options
    )
    calibrate(imp, pruner)
    return model, imp, pruner


@pytest.mark.parametrize("steps", [1, 2])
def test_a_group_that_ranks_lowest_as_a_whole_is_pruned_to_the_ratio_given(steps):
    model, imp, pruner = _one_group_lowest(max_pruning_ratio=0.8, iterative_steps=steps)
    for step in range(steps):
        if step:
            calibrate(imp, pruner)
        pruner.step()
    assert model[2].out_channels == 2
    model(images()[0])


def test_a_group_that_is_left_whole_is_told_of():
    model, _, pruner = _one_group_lowest()
    with pytest.warns(RuntimeWarning, match="all channels of 1 groups (.|\n)*'2.out'(.|\n)*max_pruning_ratio"):
        pruner.step()
    assert model[2].out_channels == 10


def test_scores_outside_a_step_are_plain():
    _, imp, pruner = _one_group_lowest(max_pruning_ratio=0.8)
    for group in groups_of(pruner):
        record, _ = imp._lookup(group)
        plain = imp._ranked(record, pruner.DG)
        assert torch.equal(imp(group), plain)
