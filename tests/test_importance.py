"""The contract of an importance in Torch-Pruning, and the life of its statistics."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from torch import nn

from ippro_tp import LogitNoise, NotCalibratedError, ObservationError, PROImportance, StaleStatisticsError
from ippro_tp.graph.groups import group_key, groups_of

from .nets import CASES, make_pruner

SETTINGS = [
    {},
    {"power": 2},
    {"group_reduction": "mean"},
    {"group_reduction": "max", "normalizer": "mean"},
    {"estimator": "paper"},
    {"estimator": "paper", "step_size": 1e-8, "target": "norm", "group_reduction": "sum"},
    {"estimator": "paper", "step_size": 0.0, "normalizer": "standarization"},
]


def calibrated(case_name="residual", model=None, samples=6, dtype=torch.float32, **settings):
    case = CASES[case_name]
    model = model or case.model(dtype)
    imp = PROImportance(**settings)
    pruner = case.pruner(model, imp)
    imp.calibrate(pruner, [case.inputs(samples, dtype)], progress=False)
    return model, imp, pruner


def all_scores(imp, pruner):
    return torch.cat([imp(group) for group in groups_of(pruner)])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_float32_finite_and_of_the_groups_length(name, settings):
    _, imp, pruner = calibrated(name, **settings)
    for group in groups_of(pruner):
        scores = imp(group)
        assert scores.dtype == torch.float32
        assert scores.shape == (len(group[0].idxs),)
        assert scores.isfinite().all()
        assert scores.unique().numel() > 1


def test_bad_options_are_named_with_the_choices():
    for option in ({"estimator": "x"}, {"group_reduction": "x"}, {"target": "x"}, {"power": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*choose one of"):
            PROImportance(**option)
    with pytest.raises(ValueError, match="negative"):
        PROImportance(step_size=-1.0)


# -- groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idxs", [[1, 3, 4], [4, 1, 3], [2]])
def test_partial_groups_get_the_scores_of_their_channels(idxs):
    model, imp, pruner = calibrated()
    conv = model.blocks[0]["conv1"]
    full = imp(pruner.DG.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(5))))
    part = imp(pruner.DG.get_pruning_group(conv, tp.prune_conv_out_channels, list(idxs)))
    assert torch.equal(part, full[idxs])


def test_a_group_may_be_rooted_at_any_of_its_layers():
    model, imp, pruner = calibrated()
    at_stem = pruner.DG.get_pruning_group(model.stem, tp.prune_conv_out_channels, list(range(6)))
    at_bn = pruner.DG.get_pruning_group(model.blocks[1]["bn2"], tp.prune_batchnorm_out_channels, [5, 0, 3])
    at_consumer = pruner.DG.get_pruning_group(model.fc, tp.prune_linear_in_channels, list(range(6)))
    assert torch.equal(imp(at_bn), imp(at_stem)[[5, 0, 3]])
    assert torch.equal(imp(at_consumer), imp(at_stem))


def test_scoring_does_not_change_the_group():
    model, imp, pruner = calibrated()
    group = pruner.DG.get_pruning_group(model.stem, tp.prune_conv_out_channels, [4, 1, 3])
    before = [(item.dep, list(item.idxs), list(item.root_idxs)) for item in group]
    imp(group)
    assert before == [(item.dep, list(item.idxs), list(item.root_idxs)) for item in group]


def test_a_group_that_was_not_calibrated_is_an_error():
    case = CASES["concat"]
    model = case.model(torch.float32)
    imp = PROImportance()
    pruner = make_pruner(model, case.inputs(1, torch.float32)[0], imp, [model.fc, model.hidden])
    imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
    group = pruner.DG.get_pruning_group(model.hidden, tp.prune_linear_out_channels, list(range(7)))
    with pytest.raises(NotCalibratedError, match=r"hidden.out.*not part of the calibration"):
        imp(group)


def test_a_group_without_producer_has_no_score():
    model, imp, pruner = calibrated("transformer")

    class Fake(list):
        _DG = pruner.DG

    group = pruner.DG.get_pruning_group(model.fc1, tp.prune_linear_out_channels, list(range(12)))
    fake = Fake(item for item in group if item.dep.target.module is not model.fc1)
    assert imp(fake) is None
    assert imp(fake) is None


# -- the life of the statistics ------------------------------------------------------------------------------


def test_without_statistics_the_error_shows_the_missing_lines():
    case = CASES["residual"]
    model, imp = case.model(torch.float32), PROImportance()
    pruner = case.pruner(model, imp)
    with pytest.raises(NotCalibratedError, match=r"calibrate\(pruner, loader\)[\s\S]*observe\(pruner\)"):
        pruner.step()
    with pytest.raises(NotCalibratedError):
        imp.report()
    with pytest.raises(NotCalibratedError):
        imp.state_dict()


def test_after_a_step_the_statistics_are_stale():
    model, imp, pruner = calibrated()
    pruner.step()
    assert model.stem.out_channels == 3
    case = CASES["residual"]
    second = case.pruner(model, imp)
    for group in groups_of(second):
        with pytest.raises(StaleStatisticsError, match=r"[Cc]alibrate again"):
            imp(group)
    imp.calibrate(second, [case.inputs(4, torch.float32)], progress=False)
    second.step()
    assert model.stem.out_channels == 1


def test_a_group_whose_neighbour_was_pruned_is_stale():
    model, imp, pruner = calibrated("concat")
    pruner.DG.get_pruning_group(model.a, tp.prune_conv_out_channels, [0]).prune()
    group = pruner.DG.get_pruning_group(model.c, tp.prune_conv_out_channels, list(range(6)))
    with pytest.raises(StaleStatisticsError, match="'c' was replaced"):
        imp(group)


def test_iterative_pruning_with_recalibration():
    case = CASES["residual"]
    model, imp = case.model(torch.float32), PROImportance()
    pruner = case.pruner(model, imp, iterative_steps=2)
    widths = []
    for _ in range(2):
        imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
        pruner.step()
        widths.append(model.stem.out_channels)
    assert widths == [4, 3]


def test_scores_serve_a_copy_of_the_model():
    model, imp, pruner = calibrated()
    clone = copy.deepcopy(model)
    other = CASES["residual"].pruner(clone, imp)
    assert torch.equal(all_scores(imp, other), all_scores(imp, pruner))


@pytest.mark.parametrize("settings", SETTINGS[:2] + SETTINGS[4:5], ids=str)
def test_state_dict_survives_a_file(settings):
    _model, imp, pruner = calibrated(**settings)
    file = io.BytesIO()
    torch.save(imp.state_dict(), file)
    file.seek(0)
    loaded = PROImportance(**settings)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(all_scores(loaded, pruner), all_scores(imp, pruner))
    with pytest.raises(ValueError, match="settings"):
        PROImportance(estimator="paper", target="norm").load_state_dict(imp.state_dict())


@pytest.mark.parametrize("spoil", [lambda state: state["extra"].pop("unscored"), lambda state: state.pop("sums")])
def test_a_state_of_another_version_is_refused_and_costs_nothing(spoil):
    _model, imp, pruner = calibrated()
    before, state = all_scores(imp, pruner), imp.state_dict()
    spoil(state)
    with pytest.raises(ValueError, match=r"not a state_dict\(\) of a PROImportance of this version"):
        imp.load_state_dict(state)
    assert torch.equal(all_scores(imp, pruner), before)


@pytest.mark.parametrize("settings", SETTINGS[:3] + SETTINGS[4:6], ids=str)
def test_merging_two_halves_equals_calibrating_on_both(settings):
    case = CASES["residual"]
    model = case.model()
    x, labels = case.inputs(8)
    halves = list(zip(x.split(4), labels.split(4), strict=True))
    imps = [PROImportance(**settings) for _ in range(3)]
    pruner = case.pruner(model, imps[0])
    for imp, batches in zip(imps, (halves, halves[:1], halves[1:]), strict=True):
        imp.calibrate(pruner, batches, loss_fn=F.cross_entropy, progress=False)
    whole, first, second = imps
    first.merge(second)
    torch.testing.assert_close(all_scores(first, pruner), all_scores(whole, pruner))
    empty = PROImportance(**settings)
    empty.merge(whole)
    assert torch.equal(all_scores(empty, pruner), all_scores(whole, pruner))
    with pytest.raises(NotCalibratedError, match=r"nothing|no statistics"):
        whole.merge(PROImportance(**settings))
    with pytest.raises(ValueError, match="settings differ"):
        whole.merge(_with_statistics(PROImportance(power=2, group_reduction="sum"), case))


def _with_statistics(imp, case):
    imp.calibrate(case.pruner(case.model(), imp), [case.inputs(2)], progress=False)
    return imp


def test_reset_forgets_and_every_calibration_starts_anew():
    _model, imp, pruner = calibrated()
    scores = all_scores(imp, pruner)
    imp.calibrate(pruner, [CASES["residual"].inputs(6, torch.float32)], progress=False)
    assert torch.equal(all_scores(imp, pruner), scores)
    imp.reset()
    with pytest.raises(NotCalibratedError):
        all_scores(imp, pruner)


def test_it_can_be_pickled_and_copied():
    _model, imp, pruner = calibrated()
    scores = all_scores(imp, pruner)
    for clone in (pickle.loads(pickle.dumps(imp)), copy.deepcopy(imp)):
        assert torch.equal(all_scores(clone, pruner), scores)


# -- ways to calibrate ---------------------------------------------------------------------------------------


def test_observing_a_bare_model_gives_the_same_scores():
    model, imp, pruner = calibrated()
    x, labels = CASES["residual"].inputs(6, torch.float32)
    bare = PROImportance()
    bare.calibrate(model, [(x, labels)], progress=False)
    assert torch.equal(all_scores(bare, pruner), all_scores(imp, pruner))
    frozen = copy.deepcopy(model).requires_grad_(False)
    bare.calibrate(frozen, [(x, labels)], progress=False)
    assert torch.equal(all_scores(bare, pruner), all_scores(imp, pruner))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_layers_frozen_after_the_pruner_was_built_are_scored():
    case = CASES["residual"]
    model = case.model(torch.float32)
    imp = PROImportance()
    pruner = case.pruner(model, imp)
    imp.calibrate(pruner, [case.inputs(6, torch.float32)], progress=False)
    scores = all_scores(imp, pruner)
    model.requires_grad_(False)
    imp.calibrate(pruner, [case.inputs(6, torch.float32)], progress=False)
    assert torch.equal(all_scores(imp, pruner), scores)


def test_max_samples_cuts_the_last_batch():
    case = CASES["residual"]
    model, imp = case.model(), PROImportance()
    pruner = case.pruner(model, imp)
    x, labels = case.inputs(9)
    batches = list(zip(x.split(4), labels.split(4), strict=True))
    imp.calibrate(pruner, batches, max_samples=6, progress=False)
    cut = all_scores(imp, pruner)
    imp.calibrate(pruner, [(x[:6], labels[:6])], progress=False)
    torch.testing.assert_close(all_scores(imp, pruner), cut)
    assert imp._sums["samples"] == 6


def test_passes_go_through_the_loader_again_under_new_noise():
    case = CASES["residual"]
    model, imp = case.model(), PROImportance()
    pruner = case.pruner(model, imp)
    x, labels = case.inputs(6)
    batches = list(zip(x.split(4), labels.split(4), strict=True))
    once = all_scores(imp.calibrate(pruner, batches, progress=False), pruner)
    thrice = all_scores(imp.calibrate(pruner, batches * 3, progress=False), pruner)
    passes = all_scores(imp.calibrate(pruner, batches, passes=3, progress=False), pruner)
    assert torch.equal(passes, thrice)
    assert not torch.equal(passes, once)
    assert imp._sums["samples"] == 18
    with pytest.raises(ValueError, match="an iterator can be read only once"):
        imp.calibrate(pruner, iter(batches), passes=2)
    with pytest.raises(ValueError, match="passes=0; give a positive"):
        imp.calibrate(pruner, batches, passes=0)
    assert torch.equal(all_scores(imp, pruner), passes)  # what was known is still known


def test_inputs_may_be_tuples_dicts_or_stand_alone():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x, y):
            return {"logits": self.fc(F.relu(self.a(x) + self.b(y)))}

    torch.manual_seed(0)
    model = TwoInputs()
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    pruner = make_pruner(model, (x, y), None, [model.fc])
    results = []
    for batch in (((x, y), None), ({"x": x, "y": y}, None)):
        imp = PROImportance()
        imp.calibrate(pruner, [batch], progress=False)
        results.append(all_scores(imp, pruner))
    assert torch.equal(*results)
    alone = PROImportance()
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    alone.calibrate(make_pruner(net, x, alone, [net[2]]), [x], progress=False)
    with pytest.raises(ValueError, match="ambiguous"):
        alone.calibrate(net, [(x, y, x)], progress=False)


def test_two_losses_of_one_forward_pass_add_up():
    case = CASES["concat"]
    model = case.model()
    x, labels = case.inputs()
    imp = PROImportance()
    pruner = case.pruner(model, imp)
    with imp.observe(pruner):
        F.cross_entropy(model(x), labels).backward()
    expected = all_scores(imp, pruner)
    with imp.observe(pruner):
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()
    torch.testing.assert_close(all_scores(imp, pruner), expected)
    with imp.observe(pruner):  # one backward pass for two forward passes
        parts = [F.cross_entropy(model(a), b) for a, b in zip(x.split(3), labels.split(3), strict=True)]
        sum(parts).backward()
    torch.testing.assert_close(all_scores(imp, pruner), expected)


# -- what TP offers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pruning": True},
        {"global_pruning": True, "isomorphic": True},
        {"round_to": 2},
        {"global_pruning": True, "max_pruning_ratio": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_every_net_is_pruned_in_every_way(name, options):
    case = CASES[name]
    model = case.model(torch.float32)
    x, labels = case.inputs(4, torch.float32)
    imp = PROImportance()
    pruner = case.pruner(model, imp, **options)
    imp.calibrate(pruner, [(x, labels)], progress=False)
    before = sum(p.numel() for p in model.parameters())
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) < before
    F.cross_entropy(model(x), labels).backward()


@pytest.mark.parametrize("cls", [tp.pruner.BNScalePruner, tp.pruner.GroupNormPruner, tp.pruner.GrowingRegPruner])
def test_regularising_pruners_may_ask_for_scores_while_training(cls):
    case = CASES["residual"]
    model = case.model(torch.float32)
    x, labels = case.inputs(4, torch.float32)
    imp = PROImportance()
    pruner = case.pruner(model, imp, cls=cls)
    imp.calibrate(pruner, [(x, labels)], progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        pruner.regularize(model)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    pruner.step()
    assert model.stem.out_channels == 3
    assert model(x).isfinite().all()


def test_interactive_steps():
    model, _imp, pruner = calibrated()
    pruned = [group.prune() for group in pruner.step(interactive=True)]
    assert len(pruned) == 3
    assert model.stem.out_channels == 3


def test_real_models_are_pruned_by_about_the_ratio():
    for build, options in (
        (torchvision.models.mobilenet_v3_small, {}),
        (torchvision.models.DenseNet, {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16}),
    ):
        torch.manual_seed(0)
        model = build(num_classes=10, **options).eval()
        x = torch.randn(2, 3, 32, 32)
        imp = PROImportance()
        pruner = make_pruner(
            model, x[:1], imp, [m for m in model.modules() if getattr(m, "out_features", 0) == 10]
        )
        imp.calibrate(pruner, [(x, torch.tensor([0, 1]))], progress=False)
        before = tp.utils.count_ops_and_params(model, x[:1])[1]
        pruner.step()
        after = tp.utils.count_ops_and_params(model, x[:1])[1]
        assert 0.15 * before < after < 0.5 * before
        assert model(x).isfinite().all()


# -- report --------------------------------------------------------------------------------------------------


def test_the_report_names_sites_fallbacks_ties_and_dead_channels():
    case = CASES["depthwise"]
    model = case.model(torch.float32)
    with torch.no_grad():
        model.expand[1].weight[2], model.expand[1].bias[2] = 0.0, 0.0
        model.dw[1].weight[2], model.dw[1].bias[2] = 0.0, 0.0
    imp = PROImportance()
    pruner = case.pruner(model, imp)
    imp.calibrate(pruner, [case.inputs(6, torch.float32)], progress=False)
    report = imp.report()
    assert len(report) == len(list(groups_of(pruner))) == 2
    hidden, stream = sorted(report, key=lambda row: -row.channels)
    assert set(hidden.producers) == {"expand.1", "dw.1"}
    assert all(site.startswith(("hardtanh", "relu6")) for site in hidden.sites.values())
    assert not hidden.fallback
    scores = imp(next(g for g in groups_of(pruner) if len(g[0].idxs) == 8))
    assert scores[2] == 0
    assert hidden.dead == int((scores == 0).sum()) < 4
    assert stream.sites["project.1"] is None
    assert "identity" in str(report)
    assert hidden.root in str(report)


def test_the_report_shows_what_a_global_ranking_compares():
    case = CASES["residual"]
    model = case.model(torch.float32)
    imp = PROImportance()
    pruner = case.pruner(model, imp, global_pruning=True)
    imp.calibrate(pruner, [case.inputs(6, torch.float32)], progress=False)
    scores = {group_key(group): imp(group) for group in groups_of(pruner)}
    rows = list(imp.report())
    for row in rows:
        assert (row.ranked_low, row.ranked_high) == (float(scores[row.root].min()), float(scores[row.root].max()))
        assert row.ranked_low == pytest.approx(row.low / row.cost)  # nothing is depleted before the first channel
        assert row.ranked_high > row.high / row.cost
    assert len({row.cost for row in rows}) > 1
    assert "ranked" in str(imp.report())

    pruner.step()
    after = list(imp.report())
    assert [row.low for row in after] == [row.low for row in rows]
    assert {row.ranked_low for row in after} == {None}
    assert "ranked" not in str(imp.report())


def test_observation_errors_share_a_base_class():
    from ippro_tp import IPPROError

    assert issubclass(ObservationError, IPPROError)
    assert issubclass(StaleStatisticsError, IPPROError)
    assert issubclass(NotCalibratedError, IPPROError)


def test_full_groups_are_not_read_again(monkeypatch):
    model, pruner = _pruner_for_rereads()
    imp = PROImportance().calibrate(pruner, [torch.randn(4, 3, 8, 8)], progress=False)
    groups = list(groups_of(pruner))
    expected = [imp(group) for group in groups]
    partial = pruner.DG.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=[6, 1])
    few = imp(partial)

    def fail(group):
        raise AssertionError("read again")

    monkeypatch.setattr("ippro_tp.calibration.statistics.read_group", fail)
    again = [imp(group) for group in groups]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    full = next(scores for scores in expected if len(scores) == 8)
    assert torch.equal(few, full[[6, 1]])


def test_a_group_of_other_layers_is_read_and_refused():
    model, pruner = _pruner_for_rereads()
    imp = PROImportance().calibrate(pruner, [torch.randn(4, 3, 8, 8)], progress=False)
    grown = torch.nn.Sequential(model[0], torch.nn.BatchNorm2d(8), model[2], model[3], model[4], model[5]).eval()
    other = tp.pruner.BasePruner(
        grown, torch.randn(1, 3, 8, 8), importance=imp, pruning_ratio=0.5, ignored_layers=[model[5]]
    )
    groups = list(groups_of(other))
    with pytest.raises(StaleStatisticsError, match="which was not in it"):
        list(map(imp, groups))


def _pruner_for_rereads():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 4, 3),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
    ).eval()
    pruner = tp.pruner.BasePruner(
        model, torch.randn(1, 3, 8, 8), importance=None, pruning_ratio=0.5, ignored_layers=[model[5]]
    )
    return model, pruner


@pytest.mark.parametrize("settings", [{}, {"reference": "mean"}, {"estimator": "paper"}], ids=str)
def test_gradients_that_are_all_zero_are_an_error(settings):
    """A softmax of huge logits is one-hot: neither its noise nor its cross-entropy has a gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[1].weight.mul_(1e8)
    imp = PROImportance(**settings)
    pruner = make_pruner(model, torch.randn(1, 4), imp, [model[1]])
    x = torch.randn(5, 4)
    with pytest.raises(ObservationError, match=r"exactly zero(.|\n)*LogitNoise"):
        imp.calibrate(pruner, [(x, model(x).argmax(1))], progress=False)
    imp.calibrate(pruner, [x], LogitNoise(), progress=False)
