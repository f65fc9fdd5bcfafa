"""Depletion against a group that is emptied channel by channel, and its place in the score."""

import math

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st

from ippro_tp import PROImportance
from ippro_tp.estimators import ranking
from ippro_tp.estimators.ranking import Ranked
from ippro_tp.graph.groups import groups_of, read_group

from .nets import CASES

SCORES = st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=12)


def depletion_factors(scores, degree=1, unit=None):
    return ranking.depletion_factors([Ranked(scores, unit)], degree)[0]


def emptied(losses):
    """How many times its own loss each channel adds to -Q ln(R/Q), to first order, when those before have gone."""
    order = sorted(range(len(losses)), key=losses.__getitem__)
    left = {channel: sum(losses[other] for other in order[place:]) for place, channel in enumerate(order)}
    return [sum(losses) / left[channel] if left[channel] else 1.0 for channel in range(len(losses))]


@given(SCORES, st.sampled_from([1, 2]))
def test_factors_are_those_of_a_group_that_is_emptied(scores, degree):
    scores = torch.tensor(scores, dtype=torch.float64)
    expected = torch.tensor(emptied(scores.pow(2 / degree).tolist()), dtype=torch.float64)
    torch.testing.assert_close(depletion_factors(scores, degree).pow(2 / degree), expected, rtol=1e-9, atol=0)


@given(SCORES, st.floats(1e-20, 1e20))
def test_the_order_stays_and_scale_does_not_matter(scores, scale):
    scores = torch.tensor(scores, dtype=torch.float64)
    factors = depletion_factors(scores)
    assert (factors >= 1).all()
    assert (factors[scores.argsort(stable=True)].diff() >= 0).all()
    torch.testing.assert_close(depletion_factors(scores * scale), factors)


def test_small_steps_follow_the_logarithm():
    """Many equal channels: the sum of what goes is the integral, -Q ln(R/Q)."""
    scores = torch.linspace(1, 1 + 1e-9, 20000, dtype=torch.float64)
    added = scores * depletion_factors(scores, degree=2)
    assert float(added[:15000].sum()) == pytest.approx(-20000 * math.log(0.25), rel=1e-3)


def test_units_count_by_their_mean():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])  # two heads of two places
    unit = torch.tensor([0, 1, 0, 1])
    assert depletion_factors(scores, 2, unit).tolist() == pytest.approx([1.0, 5 / 3, 1.0, 5 / 3])
    assert depletion_factors(scores, 1, torch.zeros(4, dtype=torch.long)).tolist() == [1.0] * 4


def calibrated(case, model, pruner_options=None, **settings):
    imp = PROImportance(**settings)
    pruner = case.pruner(model, imp, **(pruner_options or {"global_pruning": True}))
    imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
    return imp, list(groups_of(pruner))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ["residual", "concat", "transposed"])
def test_scores_are_multiplied_in_a_global_ranking(name, power):
    case = CASES[name]
    model = case.model(torch.float32)
    plain, groups = calibrated(case, model, power=power, depletion=None)
    emptying, _ = calibrated(case, model, power=power, depletion="log")
    changed = False
    for group in groups:
        scores, record = plain(group), read_group(group)
        names = [layer.name for layer in (*record.producers, *record.consumers)]
        convs = [module for name, module in model.named_modules() if name in names]
        parts = max(getattr(module, "groups", 1) for module in convs)
        losses = scores.double().view(parts, -1).mean(0).pow(2 / power)  # convolution groups: ranked by their mean
        factors = torch.tensor(emptied(losses.tolist())).pow(power / 2).repeat(parts)
        torch.testing.assert_close(emptying(group), scores * factors)
        changed |= not torch.equal(emptying(group), scores)
    assert changed


def test_auto_is_for_global_rankings_with_a_cost():
    case = CASES["residual"]
    model = case.model(torch.float32)
    for options, settings, same in (
        ({"global_pruning": False}, {}, True),
        ({"global_pruning": True}, {"cost": None}, True),
        ({"global_pruning": True}, {"cost": "params"}, False),
        ({"global_pruning": True}, {"estimator": "paper", "cost": "macs"}, True),
        ({"global_pruning": True}, {"reference": "mean"}, False),
    ):
        auto, groups = calibrated(case, model, options, **settings)
        off, _ = calibrated(case, model, options, depletion=None, **settings)
        assert all(torch.equal(auto(group), off(group)) for group in groups) == same
    for settings, how in (({}, "coupled"), ({"group_reduction": "mean"}, "log")):
        auto, groups = calibrated(case, model, **settings)
        named, _ = calibrated(case, model, depletion=how, **settings)
        assert all(torch.equal(auto(group), named(group)) for group in groups)
    forced, groups = calibrated(case, model, {"global_pruning": False}, depletion="log")
    off, _ = calibrated(case, model, {"global_pruning": False}, depletion=None)
    assert not all(torch.equal(forced(group), off(group)) for group in groups)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="depletion='lamp'; choose one of 'auto', 'coupled', 'log', None"):
        PROImportance(depletion="lamp")
    with pytest.raises(ValueError, match=r"scores of Eq\. 4 have a sign"):
        PROImportance(estimator="paper", depletion="log")
    with pytest.raises(ValueError, match='depletion="coupled" goes with'):
        PROImportance(depletion="coupled", group_reduction="sum")


@pytest.mark.parametrize("how", ["log", "coupled"])
@pytest.mark.parametrize("heads", [False, True])
def test_places_of_heads_count_as_one_and_heads_are_left_as_they_are(heads, how):
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, num_classes=3, depth=1).eval()
    x = torch.randn(4, 3, 32, 32)
    scores = []
    for depletion in (None, how):
        imp = PROImportance(depletion=depletion)
        pruner = tp.pruner.BasePruner(
            model, x[:1], importance=imp, global_pruning=True, pruning_ratio=0.5, ignored_layers=[model.head],
            num_heads={model.blocks[0].attn.qkv: 3}, prune_num_heads=heads, prune_head_dims=not heads,
            head_pruning_ratio=0.5, in_channel_groups={}, out_channel_groups={}, channel_groups={},
        )  # fmt: skip
        imp.calibrate(pruner, [x], progress=False)
        groups = {read_group(group).key: imp(group) for group in groups_of(pruner)}
        scores.append(next(value for key, value in groups.items() if "attn" in key))
    factors = (scores[1] / scores[0]).view(3, -1)
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    assert (factors == 1).all() == heads
    if how == "log" and not heads:
        means = scores[0].view(3, -1).mean(0).double()
        expected = torch.tensor(emptied(means.square().tolist()), dtype=torch.float64).sqrt()
        torch.testing.assert_close(factors[0].double(), expected, rtol=1e-5, atol=0)
