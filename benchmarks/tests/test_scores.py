from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch_pruning as tp

from benchmarks.criteria.registry import find_criterion
from benchmarks.errors import UsageError
from benchmarks.harness.cost import group_cost, network_cost
from benchmarks.harness.prune import PruneConfig, build_pruner, prune, size, staggered_ratios
from benchmarks.harness.scores import FrozenScores, freeze, group_key, kappa_of, prunable_groups
from ippro_tp import PROImportance
from ippro_tp.estimators.coupling import Coupling
from ippro_tp.estimators.ranking import COUPLING


@pytest.fixture
def pruner(small_task):
    model = copy.deepcopy(small_task.model)
    return build_pruner(model, small_task.example, ("fc",), tp.importance.MagnitudeImportance(p=1))


def test_frozen_scores_prune_like_the_importance_itself(small_task):
    task = small_task
    live = build_pruner(
        copy.deepcopy(task.model), task.example, ("fc",), tp.importance.MagnitudeImportance(p=1), 0.4, "global"
    )
    frozen = freeze(live.importance, live)
    live.step()
    pruned = prune(task.model, task.example, ("fc",), frozen, 0.4, "global", PruneConfig())
    assert torch.equal(live.model(task.example), pruned.model(task.example))


def test_unknown_group_and_wrong_length(pruner):
    group = next(prunable_groups(pruner))
    with pytest.raises(LookupError, match="arm: no scores for the group of"):
        FrozenScores({}, "arm")(group)
    with pytest.raises(LookupError, match=r"3 scores for \d+ channels"):
        FrozenScores({group_key(group): torch.ones(3)}, "arm")(group)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (lambda group: torch.ones(len(group[0].idxs)) / 0, r"(\d+) of \1 scores of '.*' are not finite"),
        (lambda group: torch.ones(len(group[0].idxs) + 1), r"shape \(\d+,\) for \d+ channels"),
    ],
)
def test_bad_scores_are_refused(pruner, importance, message):
    with pytest.raises(ArithmeticError, match=message):
        freeze(importance, pruner, "arm")


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_cost_is_what_goes_away_with_one_channel(small_task, pruner, unit):
    costs = group_cost(pruner, small_task.example, unit)
    before = dict(zip(("macs", "params"), size(pruner.model, small_task.example), strict=True))
    assert len(costs) == 9
    for name, is_output in costs:
        fresh = build_pruner(copy.deepcopy(small_task.model), small_task.example, ("fc",), lambda group: None)
        group = next(g for g in prunable_groups(fresh) if group_key(g) == (name, is_output))
        fresh.DG.get_pruning_group(group[0].dep.target.module, group[0].dep.handler, [1]).prune()
        after = dict(zip(("macs", "params"), size(fresh.model, small_task.example), strict=True))
        assert costs[name, is_output] == before[unit] - after[unit], name


def test_cost_term_changes_ranks_between_groups_only():
    scores = FrozenScores(
        {("a", True): torch.tensor([1.0, 2.0]), ("b", True): torch.tensor([1.0, 2.0]), ("c", True): None}
    )
    divided = scores.ranked(1, costs={("a", True): 4.0, ("b", True): 1.0, ("c", True): 1.0}).scores
    assert torch.allclose(divided["a", True] * 2, divided["b", True])
    assert divided["c", True] is None


@pytest.mark.parametrize(("option", "depletion"), [("auto", "coupled"), ("log", "log"), (None, "none")])
def test_cost_and_depletion_make_the_scores_of_the_package(small_task, option, depletion):
    batches = small_task.calibration(0, 64, 32)
    model = copy.deepcopy(small_task.model)
    imp = PROImportance(seed=0, depletion=option)
    pruner = build_pruner(model, small_task.example, ("fc",), imp, scope="global")
    imp.calibrate(pruner, batches, progress=False)
    own = freeze(find_criterion("pro").build(model, pruner, batches, 0), pruner)
    own = own.ranked(1, depletion, network_cost(small_task.model, small_task.example, ("fc",)))
    wanted = freeze(imp, pruner).scores
    assert wanted.keys() == own.scores.keys()
    factor = {float((scores / wanted[key]).nanmean()) for key, scores in own.scores.items()}  # costs are relative
    for key, scores in own.scores.items():
        torch.testing.assert_close(scores, wanted[key] * max(factor))


def test_depletion_is_refused_where_scores_are_negative_and_counts_units():
    key = ("a", True)
    with pytest.raises(ArithmeticError, match="arm: scores of 'a' are negative"):
        FrozenScores({key: torch.tensor([1.0, -2.0])}, "arm").ranked(1, "log")
    scores = FrozenScores({key: torch.tensor([1.0, 2.0, 3.0, 4.0]), ("b", True): None})
    assert scores.ranked(2, "log").scores[key].tolist() == pytest.approx([1.0, 20 / 9, 30 / 7, 10.0])
    assert scores.ranked(2, "log").scores["b", True] is None
    with pytest.raises(ArithmeticError, match="how the channels of 'a' go together is not known"):
        scores.ranked(2, "coupled0.5")
    tied = FrozenScores(scores.scores, units={key: torch.tensor([0, 1, 0, 1])})
    assert tied.ranked(2, "log").scores[key].tolist() == pytest.approx([1.0, 10 / 3, 3.0, 20 / 3])


def test_a_group_that_is_coupled_but_has_no_scores_stays_without():
    pairs = Coupling(torch.eye(3)[None])
    scores = FrozenScores({("a", True): torch.tensor([1.0, 2.0, 3.0]), ("b", True): None})
    both = replace(scores, couplings=dict.fromkeys(scores.scores, pairs))
    found = both.ranked(2, "coupled0.5").scores
    assert found["b", True] is None
    torch.testing.assert_close(found["a", True], scores.ranked(2, "log").scores["a", True], rtol=1e-5, atol=0)


def test_kinds_of_depletion():
    kinds = ("none", "log", "coupled", "coupled0", "coupled0.5")
    assert [kappa_of(kind) for kind in kinds] == [None, 0.0, COUPLING, 0.0, 0.5]
    for kind in ("joint", "coupled2", "coupledly", "0.5"):
        with pytest.raises(UsageError, match=f"--depletion '{kind}' is not known: none, log, coupled"):
            kappa_of(kind)


def test_staggered_ratios_hold_the_mean_and_are_exact_in_channels(small_task, pruner):
    for ratio in (0.0, 0.05, 0.3, 0.5):
        ratios = staggered_ratios(pruner, ratio, 0.9)
        model = copy.deepcopy(small_task.model)
        fresh = build_pruner(model, small_task.example, ("fc",), pruner.importance, ratio, "local", ratios=ratios)
        sizes = {name: model.get_submodule(name).out_channels for name in ratios}
        fresh.step()
        removed = {name: sizes[name] - model.get_submodule(name).out_channels for name in ratios}
        assert all(abs(removed[n] - ratio * sizes[n]) <= 1 for n in ratios)
        assert abs(sum(removed.values()) - ratio * sum(sizes.values())) <= 0.5 * len(ratios)
