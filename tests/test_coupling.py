"""Coupling against channels that are removed one by one, and its place in the score."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ippro_tp import NotCalibratedError, PROImportance
from ippro_tp.estimators import coupling, ranking
from ippro_tp.estimators.coupling import Coupling, offset_products
from ippro_tp.estimators.ranking import COUPLING, Ranked, depletion_factors
from ippro_tp.graph.groups import groups_of, read_group

from .nets import CASES


def removed_one_by_one(t, kappa):
    """What each channel adds when the cheapest goes, again and again: offsets ``(samples, channels)``."""
    losses = t.square().mean(0)

    def loss(channels):
        return (1 - kappa) * losses[channels].sum() + kappa * t[:, channels].sum(1).square().mean()

    gone, added, level = [], torch.zeros_like(losses), 0.0
    while len(gone) < t.shape[1]:
        left = losses.sum() - losses[gone].sum()
        more = {k: loss([*gone, k]) - loss(gone) for k in range(t.shape[1]) if k not in gone}
        cheapest = min(more, key=more.get)
        level = max(level, float(more[cheapest] * losses.sum() / left))
        added[cheapest] = level
        gone.append(cheapest)
    return added, gone


def offsets(channels, samples=40, seed=0, together=1.0):
    """Offsets that share some directions, of sizes that differ."""
    generator = torch.Generator().manual_seed(seed)
    shared = (
        torch.randn(samples, 3, generator=generator).double()
        @ torch.randn(3, channels, generator=generator).double()
    )
    own = torch.randn(samples, channels, generator=generator).double()
    return (together * shared + own) * torch.rand(channels, generator=generator).add(0.3).double()


def coupling_of(t):
    return Coupling(offset_products(t))


def coupled_factors(scores, pairs, degree=1, unit=None, kappa=COUPLING):
    return depletion_factors([Ranked(scores, unit, pairs)], degree, kappa)[0]


def log_factors(scores, degree):
    return depletion_factors([Ranked(scores)], degree)[0]


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("channels", [1, 2, 9, 31])
def test_factors_are_those_of_channels_that_go_one_by_one(channels, kappa):
    t = offsets(channels)
    wanted, _ = removed_one_by_one(t, kappa)
    scores = t.square().mean(0)
    added = scores * coupled_factors(scores, coupling_of(t), degree=2, kappa=kappa)
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=0)
    root = scores.sqrt() * coupled_factors(scores.sqrt(), coupling_of(t), degree=1, kappa=kappa)
    torch.testing.assert_close(root.square(), wanted, rtol=1e-4, atol=0)


def test_lots_are_as_good_as_one_by_one(monkeypatch):
    t = offsets(300, samples=400, together=0.3)
    scores, pairs = t.square().mean(0), coupling_of(t)
    in_lots = coupled_factors(scores, pairs, degree=2)
    monkeypatch.setattr(ranking, "ROUNDS", 300)
    singly = coupled_factors(scores, pairs, degree=2)
    assert not torch.equal(in_lots, singly)
    ranks = torch.stack([(scores * f).argsort().argsort() for f in (in_lots, singly)]).double()
    assert float(ranks.corrcoef()[0, 1]) > 0.97
    assert float((scores * in_lots).sum() / (scores * singly).sum()) == pytest.approx(1, abs=0.2)


@given(st.lists(st.floats(2**-10, 1e3, width=32), min_size=1, max_size=12, unique=True), st.sampled_from([1, 2]))
def test_without_covariance_it_is_depletion(scores, degree):
    scores = torch.tensor(scores, dtype=torch.float64)
    alone = Coupling(torch.zeros(1, len(scores), len(scores), dtype=torch.float64))
    for pairs, kappa in ((alone, 1.0), (coupling_of(offsets(len(scores))), 0.0)):
        factors = coupled_factors(scores, pairs, degree, kappa=kappa)
        torch.testing.assert_close(factors, log_factors(scores, degree), rtol=1e-4, atol=0)


@given(st.integers(0, 1000), st.floats(1e-12, 1e12))
def test_scores_differ_and_scale_does_not_matter(seed, scale):
    t = offsets(40, samples=8, seed=seed)  # fewer samples than channels: covariances that cancel
    scores = t.abs().mean(0)
    ranked = (scores * coupled_factors(scores, coupling_of(t), kappa=1.0)).float()
    assert len(ranked.unique()) == len(ranked)
    assert (ranked > 0).all()
    scaled = coupled_factors(scores * scale, coupling_of(t * scale), kappa=1.0)
    torch.testing.assert_close((scores * scaled).float(), ranked)


def test_channels_that_do_the_same_cost_more_together_and_opposite_ones_less():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, generator=generator).double()
    for other, dearer in ((a, True), (-0.9 * a, False)):
        t = torch.stack([a, other, b * 1.05], 1)
        scores = t.square().mean(0)
        added = scores * coupled_factors(scores, coupling_of(t), degree=2, kappa=1.0)
        assert (added[:2].max() > added[2]) == dearer


def test_dead_channels_and_groups():
    t = offsets(5)
    t[:, 1] = 0
    scores = t.square().mean(0)
    added = scores * coupled_factors(scores, coupling_of(t), degree=2)
    assert added.isfinite().all()
    assert int(added.argmin()) == 1
    assert added[1] == 0
    assert coupled_factors(torch.zeros(3), coupling_of(torch.zeros(4, 3))).tolist() == [1.0] * 3


def test_wide_groups_are_coupled_in_blocks(monkeypatch):
    monkeypatch.setattr(coupling, "BLOCK", 8)
    t = offsets(20)  # three blocks of seven, the last one short of one
    products = offset_products(t)
    assert products.shape == (3, 7, 7)
    sizes = t.square().mean(0).sqrt()
    pairs = t.T @ t / len(t)
    found = Coupling(products).with_sizes(sizes)
    for number, channels in enumerate(torch.arange(20).split(7)):
        wanted = 3 * pairs[channels][:, channels]
        torch.testing.assert_close(found[number, : len(channels), : len(channels)], wanted)
    assert found[2, 6].count_nonzero() == 0
    factors = coupled_factors(sizes, Coupling(products))
    assert factors.shape == (20,)
    assert len((sizes * factors).unique()) == 20


def test_groups_do_not_mind_each_other(monkeypatch):
    widths = [5, 9, 5, 1, 9, 5]
    groups = [
        Ranked(offsets(w, seed=i).abs().mean(0), None, coupling_of(offsets(w, seed=i)))
        for i, w in enumerate(widths)
    ]
    groups.append(Ranked(groups[1].scores, torch.arange(9) % 3, groups[1].coupling))
    groups.append(Ranked(groups[1].scores))
    alone = [depletion_factors([group])[0] for group in groups]
    for most in (1 << 25, 60):
        monkeypatch.setattr(ranking, "AT_ONCE", most)
        for one, own in zip(depletion_factors(groups), alone, strict=True):
            assert torch.equal(one, own)
    assert len({len(own.unique()) for own in alone}) > 2


def test_positions_that_are_one_have_one_score():
    t = offsets(4)
    both = torch.cat([t, torch.zeros_like(t)], 1)  # what is gathered stands at the first of the tied positions
    tied = torch.arange(8) % 4
    scores = t.square().mean(0)
    factors = coupled_factors(scores[tied], Coupling(offset_products(both), tied), degree=2, unit=tied)
    torch.testing.assert_close(factors, coupled_factors(scores, coupling_of(t), degree=2)[tied])


def test_units_share_a_factor_and_one_alone_is_left_as_it_is():
    t = offsets(6)
    scores = t.abs().mean(0)
    factors = coupled_factors(scores, coupling_of(t), unit=torch.tensor([0, 1, 2, 0, 1, 2]))
    assert torch.equal(factors[:3], factors[3:])
    assert len(factors.unique()) == 3
    assert coupled_factors(scores, coupling_of(t), unit=torch.zeros(6, dtype=torch.long)).tolist() == [1.0] * 6


def test_units_of_equal_channels_are_the_channels():
    t = offsets(5)
    twice, unit = torch.cat([t, t], 1), torch.arange(10) % 5
    scores = twice.square().mean(0)
    # A unit of two equal channels has, per channel, twice the product with another unit.
    wanted = coupled_factors(scores[:5], coupling_of(t), degree=2, kappa=0.5)
    factors = coupled_factors(scores, coupling_of(twice), degree=2, unit=unit, kappa=0.25)
    torch.testing.assert_close(factors[:5], wanted, rtol=1e-4, atol=0)


def joint_offset(model, record, x, labels, tapped, channel, eps=1e-5):
    """d loss_n / d s of each sample with a channel of a group scaled by 1 + s, by central differences."""
    losses = []
    for sign in (1, -1):
        handles = []
        for layer in tapped:
            factor = torch.ones(layer.channels, dtype=x.dtype)
            factor[layer.index[layer.root == channel]] += sign * eps

            def scale(module, args, output, factor=factor):
                return output * factor.view(1, -1, *[1] * (output.dim() - 2))

            handles.append(model.get_submodule(layer.name).register_forward_hook(scale))
        with torch.no_grad():
            losses.append(F.cross_entropy(model(x), labels, reduction="none"))
        for handle in handles:
            handle.remove()
    return (losses[0] - losses[1]) / (2 * eps)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ["residual", "concat", "depthwise"])
def test_scores_in_a_global_ranking_are_those_of_channels_removed_together(name, power):
    case = CASES[name]
    model, (x, labels) = case.model(), case.inputs()
    plain = PROImportance(depletion=None, power=power, reference="origin")
    default = PROImportance(power=power, reference="origin")
    pruner = case.pruner(model, default, global_pruning=True)
    for imp in (plain, default):
        imp.calibrate(pruner, [(x[:2], labels[:2]), (x[2:], labels[2:])], F.cross_entropy, progress=False)
    moved = 0.0
    for group in groups_of(pruner):
        record = read_group(group)
        tapped = [layer for layer in record.producers if layer.name not in default._observed.wiring.norm_of]
        each = [joint_offset(model, record, x, labels, tapped, channel) for channel in range(record.width)]
        pairs = coupling_of(torch.stack(each, 1))
        torch.testing.assert_close(
            default.coupling(group).correlation.double(), pairs.correlation, rtol=1e-3, atol=1e-4
        )
        scores = plain(group)  # divided by the same cost
        wanted = scores * coupled_factors(scores, pairs, degree=power)
        torch.testing.assert_close(default(group).double(), wanted, rtol=1e-2, atol=0)
        alone = scores * log_factors(scores, power)
        moved = max(moved, float((default(group) / alone).log().abs().max()))
    assert moved > 0.1
    assert {plain.coupling(group) for group in groups_of(pruner)} == {None}


def test_it_must_be_chosen_before_calibration_and_survives_saving():
    case = CASES["residual"]
    model, batch = case.model(torch.float32), case.inputs(4, torch.float32)
    plain, coupled = PROImportance(depletion=None), PROImportance(depletion="coupled")
    pruner = case.pruner(model, coupled, global_pruning=True)
    for imp in (plain, coupled):
        imp.calibrate(pruner, [batch], progress=False)
    group = next(iter(groups_of(pruner)))
    plain.depletion = "coupled"
    with pytest.raises(NotCalibratedError, match="depletion='coupled' was chosen after calibration"):
        plain(group)
    copied = PROImportance(depletion="coupled")
    copied.load_state_dict(coupled.state_dict())
    torch.testing.assert_close(copied(group), coupled(group))
    with pytest.raises(ValueError, match="settings differ"):
        coupled.merge(PROImportance(depletion="log").calibrate(pruner, [batch], progress=False))
