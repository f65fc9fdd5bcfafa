"""What remaining channels predict of each other: against least squares, and from calibration to the scores."""

import itertools

import pytest
import torch
import torch_pruning as tp
from torch import nn

from ippro_tp import NotCalibratedError, PROImportance, prune
from ippro_tp.estimators.ranking import Ranked, depletion_factors, rank
from ippro_tp.estimators.redundancy import RIDGE, Redundancy, moments, removal_order
from ippro_tp.tracing.positions import POSITIONS, spread_rows


def exact(x, centered, read=None):
    """A redundancy of many rows, of which shrinkage takes next to nothing."""
    read = torch.ones(x.shape[1], dtype=torch.bool) if read is None else read
    return Redundancy.of([1e7 * moments(x.double())], read, centered)


def unexplained(x, target, others, centered):
    """Share of a channel that least squares on others, ridged as channels are, and a constant do not explain."""
    x = x.double()
    if centered:
        x = x - x.mean(0)
        scale = x.std(0, correction=0)
        z = x / scale
    else:
        z = x / x.square().mean(0).sqrt()
        z = torch.cat([z, torch.ones(len(z), 1)], 1)
        others = [*others, x.shape[1]]
    gram = z.T @ z / len(z)
    gram = (gram + RIDGE * torch.eye(len(gram))) / (1 + RIDGE)
    inner = gram[others][:, others]
    return float(gram[target, target] - gram[target, others] @ torch.linalg.solve(inner, gram[others, target]))


def brute_force(x, q, centered):
    """The greedy order and what each removal adds: regressions anew for each candidate."""
    n, removed, steps = len(q), [], []

    def loss(gone):
        left = [k for k in range(n) if k not in gone]
        return sum(float(q[i]) * unexplained(x, i, left, centered) for i in gone)

    while len(removed) < n:
        before = loss(removed)
        added = {k: loss([*removed, k]) - before for k in range(n) if k not in removed}
        best = min(added, key=added.get)
        removed.append(best)
        steps.append(added[best])
    return removed, steps


@pytest.mark.parametrize("centered", [True, False])
def test_the_order_is_that_of_regressions_made_anew(centered):
    torch.manual_seed(0)
    x = torch.randn(40, 6) @ torch.randn(6, 6) + torch.randn(6)
    q = torch.rand(6, dtype=torch.double) + 0.1
    order, values = removal_order(q[None], q[None], exact(x, centered).correlation, None)
    wanted, steps = brute_force(x, q, centered)
    assert order[0].tolist() == wanted
    torch.testing.assert_close(values[0], torch.tensor(steps, dtype=torch.double), rtol=2e-3, atol=1e-6)


def test_a_copy_costs_next_to_nothing_until_its_twin_is_gone():
    torch.manual_seed(0)
    x = torch.randn(500, 4)
    x[:, 3] = 2 * x[:, 0]
    scores = torch.tensor([3.0, 1.0, 1.0, 2.9])
    factor = depletion_factors([Ranked(scores, redundancy=exact(x, True))])[0]
    ranked = (factor * scores).argsort().tolist()
    assert (ranked[0], ranked[-1]) == (3, 0)  # the twin that stays carries the loss of both
    plain = depletion_factors([Ranked(scores)], kappa=0)[0]
    assert (plain * scores).argsort()[0] in (1, 2)


def test_a_constant_channel_is_predicted_where_offsets_are_measured_from_zero():
    x = torch.randn(500, 3)
    x[:, 1] = 7 + 0.01 * torch.randn(500)
    inverse = torch.linalg.inv(exact(x, False).correlation[0])
    assert 1 / inverse[1, 1] < 2 * RIDGE
    assert 1 / inverse[0, 0] > 0.9


def test_units_count_by_the_channels_that_are_read():
    """A head: queries that no layer reads stand behind values that one does."""
    torch.manual_seed(0)
    values = torch.randn(400, 2)
    x = torch.cat([torch.zeros(400, 4), values, values + 0.01 * torch.randn(400, 2), torch.randn(400, 2)], 1)
    read = torch.tensor([False] * 4 + [True] * 6)
    unit = torch.tensor([0, 1, 2, 2, 0, 0, 1, 1, 2, 2])
    scores = torch.tensor([1.0] * 10)
    factor = depletion_factors([Ranked(scores, unit, redundancy=exact(x, True, read))])[0]
    first, second, alone = (float(factor[unit == u][0]) for u in range(3))
    assert min(first, second) < 0.5
    assert max(first, second) > alone
    assert all(len(set(factor[unit == u].tolist())) == 1 for u in range(3))


def test_channels_that_nobody_reads_keep_their_loss():
    read = torch.tensor([True, False])
    factor = depletion_factors([Ranked(torch.ones(2), redundancy=exact(torch.randn(50, 2), True, read))])[0]
    assert factor.min() == pytest.approx(1, abs=0.05)


def test_no_channel_ranks_below_those_removed_before():
    torch.manual_seed(1)
    redundancy = exact(torch.randn(300, 20) @ torch.randn(20, 20), True)
    scores = torch.rand(20)
    q = (scores.double() / scores.max()).square()
    order, _ = removal_order(q[None], q[None], redundancy.correlation, None)
    ranked = rank([Ranked(scores, redundancy=redundancy)])[0]
    assert ranked.argsort().tolist() == order[0].tolist()


@pytest.mark.parametrize("unit", [False, True])
def test_blocks_of_wide_groups_are_emptied_side_by_side(unit, monkeypatch):
    monkeypatch.setattr("ippro_tp.estimators.coupling.BLOCK", 4)
    torch.manual_seed(0)
    x = torch.randn(100, 7)
    redundancy = exact(x, False)
    assert redundancy.correlation.shape == (2, 5, 5)
    scores = torch.rand(7) + 0.1
    number = torch.arange(7) if unit else None
    factor = depletion_factors([Ranked(scores, number, redundancy=redundancy)])[0]
    assert factor.shape == (7,)
    assert bool(factor.isfinite().all())
    assert float(factor.min()) > 0


def test_few_rows_predict_little():
    torch.manual_seed(0)
    x = torch.randn(8, 30)
    read = torch.ones(30, dtype=torch.bool)
    inverse = torch.linalg.inv(Redundancy.of([moments(x)], read, True).correlation[0])
    assert float((1 / inverse.diagonal()).min()) > 0.5  # 8 rows explain 30 channels wholly, by chance


def test_moments_add_up_over_batches():
    x = torch.randn(12, 5)
    torch.testing.assert_close(moments(x), moments(x[:5]) + moments(x[5:]))


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 20, 17), 1), ((6, 50, 3), 2), ((6, 3), 1), ((6, 3, 7), 1)])
def test_rows_are_those_of_the_samples_one_by_one(shape, axis):
    x = torch.randn(shape)
    rows = spread_rows(x, axis)
    torch.testing.assert_close(rows, torch.cat([spread_rows(one, axis) for one in x.split(1)]))
    assert rows.shape[1] == 3
    assert len(rows) <= POSITIONS * 6
    known = {tuple(row) for row in x.movedim(axis, -1).reshape(-1, 3).tolist()}
    assert all(tuple(row) in known for row in rows.tolist())


# -- from calibration to scores ---------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3), nn.Linear(8 * 9, 6)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu().flatten(1))


def calibrated(batches, **options):
    torch.manual_seed(0)
    model = Net()
    importance = PROImportance(compensated=True, **options)
    pruner = tp.pruner.BasePruner(
        model, torch.randn(1, 3, 5, 5), importance, global_pruning=True, ignored_layers=[model.c]
    )
    importance.calibrate(pruner, batches, progress=False)
    return model, pruner, importance


def scores_of(pruner, importance):
    return torch.cat([importance(g) for g in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers)])


def test_statistics_are_those_of_the_readers_inputs():
    x = torch.randn(20, 3, 5, 5)
    model, _, importance = calibrated(x.split(5))
    sums = importance.state_dict()["sums"]
    inputs = model.a(x).relu()
    torch.testing.assert_close(sums["moments/a.out/b"], moments(spread_rows(inputs, 1)))
    flat = model.b(inputs).relu()  # the positions of a flattened map are rows of its channel
    torch.testing.assert_close(sums["moments/b.out/c"], moments(flat.movedim(1, -1).reshape(-1, 8)))


def test_scores_are_the_same_for_batches_of_one_and_after_a_merge():
    x = torch.randn(12, 3, 5, 5)
    _, pruner, importance = calibrated(x.split(6))
    _, lone, one_by_one = calibrated(x.split(1))
    torch.testing.assert_close(scores_of(pruner, importance), scores_of(lone, one_by_one), rtol=0.3, atol=0)
    # noise is drawn batch by batch, so compare the statistics of what was read, which hold none
    mine, theirs = importance.state_dict()["sums"], one_by_one.state_dict()["sums"]
    names = [name for name in mine if name.startswith("moments/")]
    assert len(names) == 2
    for name in names:
        torch.testing.assert_close(mine[name], theirs[name])
    importance.merge(one_by_one)
    torch.testing.assert_close(importance.state_dict()["sums"][names[0]], 2 * theirs[names[0]])


def test_forward_passes_without_a_backward_pass_do_not_count():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 5, 5)
    importance = PROImportance(compensated=True)
    pruner = tp.pruner.BasePruner(model, x[:1], importance, ignored_layers=[model.c])
    with importance.observe(pruner):
        model(x).square().sum().backward()
        model(x)
    rows = importance.state_dict()["sums"]["moments/a.out/b"][0, -1, -1]
    assert int(rows) == len(spread_rows(model.a(x), 1))


def test_local_pruners_remove_copies_too():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for first, second in itertools.pairwise(range(0, 12, 2)):
            model.a.weight[second + 1], model.a.bias[second + 1] = model.a.weight[first], model.a.bias[first]
    x = torch.randn(32, 3, 5, 5)
    importance = PROImportance(compensated=True)
    pruner = tp.pruner.BasePruner(model, x[:1], importance, pruning_ratio=0.41, ignored_layers=[model.b, model.c])
    kept = model.a.weight.detach().clone()
    importance.calibrate(pruner, x.split(8), progress=False)
    pruner.step()
    remaining = [next(i for i in range(12) if torch.equal(w, kept[i])) for w in model.a.weight.detach()]
    filters = {tuple(kept[i].flatten().tolist()) for i in remaining}
    assert len(filters) == len(remaining) == 7  # one of each pair


def test_options_that_do_not_go_together_are_refused():
    for options in (
        {"estimator": "paper"},
        {"depletion": "log"},
        {"depletion": None},
        {"group_reduction": "mean"},
    ):
        with pytest.raises(ValueError, match="compensated=True"):
            PROImportance(compensated=True, **options)
    with pytest.raises(ValueError, match="compensated"):
        PROImportance(compensated="yes")


def test_chosen_after_calibration_is_refused():
    _, pruner, importance = calibrated(torch.randn(8, 3, 5, 5).split(4))
    importance.compensated = False
    with pytest.raises(NotCalibratedError, match="calibrate again"):
        scores_of(pruner, importance)


@pytest.mark.parametrize(("given", "compensation", "expected"), [
    ("auto", True, True), ("auto", False, False), (False, True, False), (True, False, True),
])  # fmt: skip
def test_prune_decides_by_whether_it_refits(given, compensation, expected, monkeypatch):
    seen = []
    calibrate = PROImportance.calibrate
    monkeypatch.setattr(
        PROImportance, "calibrate", lambda self, *a, **k: (seen.append(self.compensated), calibrate(self, *a, **k))
    )
    importance = PROImportance(compensated=given)
    x = torch.randn(16, 3, 5, 5)
    prune(Net(), x[:1], x.split(8), macs=0.6, importance=importance, compensation=compensation, progress=False)
    assert seen == [expected]
    assert importance.compensated == given


def test_prune_leaves_an_importance_that_cannot_take_it_alone():
    x = torch.randn(16, 3, 5, 5)
    result = prune(Net(), x[:1], x.split(8), macs=0.6, importance=PROImportance(depletion="log"), progress=False)
    assert result.macs == pytest.approx(0.6, abs=0.01)


def test_the_cost_counts_more_if_the_network_is_refitted():
    assert PROImportance(compensated=True).cost_exponent == pytest.approx(0.6)
    assert PROImportance(compensated=True, power=2).cost_exponent == pytest.approx(1.2)
    assert PROImportance().cost_exponent == pytest.approx(0.5)
    assert PROImportance(compensated=True, cost_exponent=0.3).cost_exponent == pytest.approx(0.3)
