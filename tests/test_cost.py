"""The cost of a channel against Torch-Pruning's counter, and its place in the score."""

import copy

import pytest
import torch
import torch_pruning as tp

from ippro_tp import PROImportance
from ippro_tp.graph.groups import groups_of, read_group

from .nets import CASES


def ready(name, **settings):
    case = CASES[name]
    model = case.model(torch.float32)
    imp = PROImportance(**settings)
    pruner = case.pruner(model, imp, **({"global_pruning": True} if settings.pop("scope", None) else {}))
    imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
    return model, imp, pruner


def exponentless(imp, group):
    imp.cost_exponent = 1.0
    record, _ = imp._lookup(group)
    imp._relative_cost(record, group._DG.model)
    return imp._costs[record.key]


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_cost_is_what_goes_away_with_one_channel(name, unit):
    model, imp, pruner = ready(name, cost=unit)
    x = CASES[name].inputs(1, torch.float32)[0]
    before = tp.utils.count_ops_and_params(model, x)
    for group in list(groups_of(pruner)):
        root, width = read_group(group).key.removesuffix(".out"), len(group[0].idxs)
        clone = copy.deepcopy(model)
        other = CASES[name].pruner(clone, None)
        layer = clone.get_submodule(root)
        other.DG.get_pruning_group(layer, other.DG.get_pruner_of_module(layer).prune_out_channels, [0]).prune()
        after = tp.utils.count_ops_and_params(clone, x)
        assert width > 1
        index = 0 if unit == "macs" else 1
        # TP's counter also counts activation modules, one operation an element; functional ones it does not see.
        slack = 0.15 if unit == "macs" and name != "concat" else 0.0
        assert exponentless(imp, group) == pytest.approx(before[index] - after[index], rel=slack)


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
        relative = (4.0 if len(group[0].idxs) == 6 else 1.0) / 2.0  # mean over the three groups
        torch.testing.assert_close(imp(group), plain(group) / relative**0.5)
    imp.cost, imp._costs = (lambda record, model: 0.0), None
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
    counts = [tp.utils.count_ops_and_params(Net(width), x)[unit == "params"] for width in (6, 8, 10)]
    imp = PROImportance(cost=unit)
    model = Net(8).eval()
    pruner = tp.pruner.BasePruner(
        model, x, importance=imp, ignored_layers=[model.fc], in_channel_groups={}, out_channel_groups={},
        num_heads={}, channel_groups={}, root_module_types=[torch.nn.Linear],
    )  # fmt: skip
    imp.calibrate(pruner, [x.expand(2, -1, -1)], progress=False)
    (group,) = groups_of(pruner)
    assert exponentless(imp, group) == pytest.approx((counts[2] - counts[0]) / 4, rel=0.02)


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
    assert imp._positions == {"embed": 6, "hidden": 6, "fc": 1}
