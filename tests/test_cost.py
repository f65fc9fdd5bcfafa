"""The cost of a channel against counting again without it, and its place in the score."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from ippro_tp import LogitNoise, PROImportance, attention_heads, update_attention
from ippro_tp.calibration.work import measure_work
from ippro_tp.graph.cost import group_cost
from ippro_tp.graph.groups import group_key, groups_of, read_group
from ippro_tp.pruning.counter import count

from .nets import CASES, make_pruner


def cost_of(imp, model, record, unit="macs"):
    return group_cost(record, model, imp._observed.work, unit)


def goes_away(model, pruner_of, key):
    """MACs and parameters that one channel takes with it, by counting again without it."""
    clone = copy.deepcopy(model)
    pruner, forward = pruner_of(clone)
    group = next(g for g in groups_of(pruner) if group_key(g) == key)
    parts = pruner._get_channel_groups(group)
    root, indices = group[0].dep, [group[0].idxs[n * len(group[0].idxs) // parts] for n in range(parts)]
    pruner.DG.get_pruning_group(root.target.module, root.handler, indices).prune()
    update_attention(pruner)
    before, after = count(model, forward), count(clone, forward)
    return parts, before.macs - after.macs, before.params - after.params


def check_by_counting(model, pruner_of, batch, rel):
    pruner, example = pruner_of(model)
    imp = PROImportance(cost="macs").calibrate(pruner, [batch], LogitNoise(), progress=False)
    groups = list(groups_of(pruner))
    for group in groups:
        record = read_group(group)
        parts, macs, params = goes_away(model, pruner_of, record.key)
        assert parts * cost_of(imp, model, record) == pytest.approx(macs, rel=rel)
        assert parts * cost_of(imp, model, record, "params") == pytest.approx(params, rel=rel)
        assert (
            imp._scoring(pruner.DG).cost(record, model)[0]
            == cost_of(imp, model, record) / count(model, example).macs
        )
    return len(groups)


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_cost_is_what_goes_away_with_one_channel(name):
    case = CASES[name]
    x = case.inputs(4, torch.float32)[0]
    check_by_counting(case.model(torch.float32), lambda m: (case.pruner(m, None), x[:1]), x, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "rel"),
    [
        ("resnet10t", {}, 1e-9),
        ("mobilenetv2_035", {}, 1e-9),
        ("regnetx_002", {}, 1e-9),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 0.01),
    ],
)
def test_cost_of_timm_models_is_what_goes_away(name, options, rel):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()

    def pruner_of(model):
        pruner = make_pruner(model, x[:1], None, [model.get_classifier()], num_heads=attention_heads(model))
        return pruner, x[:1]

    x = torch.randn(2, 3, 32, 32)
    assert check_by_counting(model, pruner_of, x, rel) > 2


def test_subclasses_and_convolution_groups_cost_what_goes_away():
    torch.manual_seed(0)
    model = nn.Sequential(
        timm.layers.StdConv2d(3, 8, 3, padding=1), nn.ReLU(), timm.layers.Conv2dSame(8, 12, 3, stride=2),
        nn.ReLU(), nn.Conv2d(12, 16, 3, groups=4), nn.ReLU(), timm.layers.StdConv2d(16, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    assert check_by_counting(model, lambda m: (make_pruner(m, x[:1], None, [m[10]]), x[:1]), x, rel=1e-9) == 4


def test_queries_keys_and_values_of_separate_layers_share_the_products():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8)
            self.proj, self.fc, self.bias = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(12, 5)

        def forward(self, x):
            q, k, v = self.q(x), self.k(x) * 0.5, self.v(x)
            attention = (q @ k.transpose(1, 2) + self.bias(x)).softmax(-1)
            return self.fc(self.proj(attention @ v).mean(1))

    work = measure_work(Attention(), (torch.randn(1, 5, 12),), {}, ("q", "k", "v", "proj", "fc", "bias"))
    assert work.products == {"q": 100.0, "k": 100.0, "v": 100.0, "bias": 100.0}
    assert work.layers == {**dict.fromkeys("qkv", 480), "proj": 480, "fc": 36, "bias": 300}
    assert work.total == sum(work.layers.values()) + 400


def test_auto_divides_only_where_layers_are_ranked_against_each_other():
    case = CASES["residual"]
    model = case.model(torch.float32)
    results = {}
    for scope in (False, True):
        for cost in ("auto", None, "macs"):
            imp = PROImportance(cost=cost, depletion=None)
            pruner = case.pruner(model, imp, global_pruning=scope)
            imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
            results[scope, cost] = [imp(group) for group in groups_of(pruner)]
    assert all(map(torch.equal, results[False, "auto"], results[False, None]))
    assert all(map(torch.equal, results[True, "auto"], results[True, "macs"]))
    pairs = zip(results[True, None], results[True, "macs"], strict=True)
    ratios = [a[a > 0] / b[a > 0] for a, b in pairs]
    for ratio in ratios:
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert len({round(float(r[0]), 4) for r in ratios}) > 1


class Own(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, out) / width**0.5)

    def forward(self, x):
        return x @ self.w


class Scale(nn.Module):
    """Counts nothing."""

    def __init__(self, width, out):
        super().__init__()
        self.w = nn.Parameter(torch.ones(out))

    def forward(self, x):
        return x.repeat_interleave(len(self.w) // x.shape[1], 1) * self.w


class OwnPruner(tp.pruner.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        kept = sorted(set(range(layer.w.shape[-1])) - set(idxs))
        layer.w = self._prune_parameter_and_grad(layer.w, kept, layer.w.dim() - 1)
        return layer

    def prune_in_channels(self, layer, idxs):
        kept = sorted(set(range(layer.w.shape[0])) - set(idxs))
        layer.w = self._prune_parameter_and_grad(layer.w, kept, 0)
        return layer

    def get_out_channels(self, layer):
        return layer.w.shape[-1]

    def get_in_channels(self, layer):
        return layer.w.shape[0]


def test_layers_of_ones_own_cost_what_they_do():
    torch.manual_seed(0)
    model, x = nn.Sequential(Own(12, 24), nn.ReLU(), Own(24, 32), nn.ReLU(), nn.Linear(32, 5)), torch.randn(8, 12)

    def pruner_of(model):
        options = {"customized_pruners": {Own: OwnPruner()}, "root_module_types": [nn.Linear, Own]}
        return make_pruner(model, x[:1], None, [model[4]], global_pruning=True, **options), x[:1]

    assert check_by_counting(model, pruner_of, x, rel=1e-9) == 2
    pruner, _ = pruner_of(model)
    pruner.importance = PROImportance().calibrate(pruner, [x], LogitNoise(), progress=False)
    pruner.step()
    assert model(x).shape == (8, 5)


def test_what_is_not_counted_costs_its_parameters_and_is_said_so():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Flatten(), Scale(8, 8)), torch.randn(8, 6)
    options = {"customized_pruners": {Scale: OwnPruner()}, "root_module_types": [nn.Linear]}
    pruner = make_pruner(model, x[:1], None, [], **options)
    imp = PROImportance(cost="macs").calibrate(pruner, [x], LogitNoise(), progress=False)
    (record,) = imp._records.values()
    assert imp._scoring(pruner.DG).cost(record, model) == (1 / 8, None)
    imp._observed = replace(imp._observed, work=None)
    imp._cache = {}
    share = sum(p.numel() for p in model[0].parameters()) / 8 / sum(p.numel() for p in model.parameters())
    cost, note = imp._scoring(pruner.DG).cost(record, model)
    assert cost >= share
    assert note in imp.report().groups[0].notes


def test_the_paper_estimator_has_no_cost_unless_asked():
    case = CASES["residual"]
    model = case.model(torch.float32)
    scores = []
    for cost in ("auto", None, "macs"):
        imp = PROImportance(estimator="paper", cost=cost)
        pruner = case.pruner(model, imp, global_pruning=True)
        imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
        scores.append(torch.cat([imp(group) for group in groups_of(pruner)]))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_a_callable_cost_is_used_and_checked():
    case = CASES["residual"]
    model = case.model(torch.float32)
    imp = PROImportance(cost=lambda record, model: 4.0 if record.width == 6 else 1.0)
    pruner = case.pruner(model, imp)
    imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
    plain = PROImportance(cost=None)
    plain.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
    for group in groups_of(pruner):
        relative = 4.0 if len(group[0].idxs) == 6 else 1.0
        torch.testing.assert_close(imp(group), plain(group) / relative**0.5)
    imp.cost = lambda record, model: 0.0
    with pytest.raises(ValueError, match="positive"):
        imp(next(groups_of(pruner)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_cost_of_attention_is_the_slope_of_the_counters(unit, batch_first):
    """The count is a polynomial of degree two in the embedding: a symmetric difference is its slope."""

    class Net(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = torch.nn.Linear(3, width)
            self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=batch_first)
            self.fc = torch.nn.Linear(width, 4)

        def forward(self, x):
            y = self.embed(x)
            y = y if batch_first else y.transpose(0, 1)
            y = self.attention(y, y, y)[0]
            return self.fc(y.mean(1 if batch_first else 0))

    x = torch.randn(1, 5, 3)
    counts = [getattr(count(Net(width), x), unit) for width in (6, 8, 10)]
    imp = PROImportance(cost=unit)
    model = Net(8).eval()
    pruner = tp.pruner.BasePruner(
        model, x, importance=imp, ignored_layers=[model.fc], in_channel_groups={}, out_channel_groups={},
        num_heads={}, channel_groups={}, root_module_types=[torch.nn.Linear],
    )  # fmt: skip
    imp.calibrate(pruner, [x.expand(2, -1, -1)], progress=False)
    (group,) = groups_of(pruner)
    cost = cost_of(imp, model, read_group(group), unit)
    assert cost == pytest.approx((counts[2] - counts[0]) / 4, rel=0.02)


@pytest.mark.parametrize("arrangement", ["windows", "tokens first"])
def test_positions_are_counted_wherever_the_samples_lie(arrangement):
    """Swin folds windows into dimension 0, other transformers put tokens there."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.fc = (
                torch.nn.Linear(3, 8),
                torch.nn.Linear(8, 6),
                torch.nn.Linear(6, 4),
            )

        def forward(self, x):
            y = self.embed(x)
            if arrangement == "windows":
                return self.fc(self.hidden(y.reshape(-1, 2, 8)).relu().reshape(len(x), -1, 6).mean(1))
            return self.fc(self.hidden(y.transpose(0, 1)).relu().mean(0))

    model, x = Net().eval(), torch.randn(4, 6, 3)
    imp = PROImportance(cost="macs")
    pruner = tp.pruner.BasePruner(
        model, x[:1], importance=imp, ignored_layers=[model.fc], in_channel_groups={}, out_channel_groups={},
        num_heads={}, channel_groups={},
    )  # fmt: skip
    imp.calibrate(pruner, [x], progress=False)
    assert imp._observed.work.layers == {"embed": 6 * 3 * 8, "hidden": 6 * 8 * 6, "fc": 6 * 4}
