"""The same channels go, whoever asks and however the importance came there; what cannot be is refused."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import (
    LogitNoise,
    NotCalibratedError,
    PROImportance,
    SpaSPImportance,
    StaleStatisticsError,
    attention_heads,
    layers,
    register_activation,
    register_norm,
    update_attention,
)
from ippro_tp.graph.groups import groups_of

from .nets import CASES, make_pruner


class Branches(nn.Module):
    """A branch that matters a thousand times less than the other: its group ranks lowest as a whole."""

    def __init__(self, groups):
        super().__init__()
        self.eps = 1e-3
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.a2 = nn.Conv2d(16, 24, 3, padding=1, groups=groups)
        self.fa, self.fb = nn.Linear(24, 4), nn.Linear(16, 4)

    def forward(self, x):
        a = F.relu(self.a2(F.relu(self.a(x)))).mean((2, 3))
        return self.fa(a) + self.eps * self.fb(F.relu(self.b(x)).mean((2, 3)))


def branches(groups=1):
    torch.manual_seed(0)
    return Branches(groups).eval(), torch.randn(16, 3, 6, 6)


def pruner_of(model, imp, x, **options):
    options = {"global_pruning": True, "pruning_ratio": 0.7, "max_pruning_ratio": 0.8, **options}
    return make_pruner(model, x[:1], imp, [model.fa, model.fb], **options)


HOW = ("state_dict", "pickle", "deepcopy", "second pruner", "equal model", "graph", "model")


def pruned(how, groups, make=PROImportance, **options):
    model, x = branches(groups)
    imp = make()
    pruner = pruner_of(model, imp, x, **options)
    imp.calibrate({"graph": pruner.DG, "model": model}.get(how, pruner), [x], progress=False)
    if how == "state_dict":
        loaded = make()
        loaded.load_state_dict(imp.state_dict())
        imp = loaded
    elif how in ("deepcopy", "pickle"):
        imp = copy.deepcopy(imp) if how == "deepcopy" else pickle.loads(pickle.dumps(imp))
    elif how == "equal model":
        model = copy.deepcopy(model)
    if how not in ("live", "graph", "model"):
        pruner = pruner_of(model, imp, x, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step()
    model(x)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"global_pruning": False}, {"pruning_ratio": 0.4}], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_the_same_channels_go(groups, options):
    live = pruned("live", groups, **options)
    if options.get("global_pruning", True):
        assert 4 <= live["b.weight"].shape[0] <= 5  # not whole: a fifth is left
    for how in HOW:
        other = pruned(how, groups, **options)
        assert all(torch.equal(live[name], other[name]) for name in live), how


def test_the_same_channels_go_with_i_spasp():
    live = pruned("live", 1, SpaSPImportance, global_pruning=False)
    for how in HOW:
        other = pruned(how, 1, SpaSPImportance, global_pruning=False)
        assert all(torch.equal(live[name], other[name]) for name in live), how


@pytest.mark.parametrize("ratio", [0.4, 0.6])
def test_a_dead_group_is_pruned_as_far_as_it_may_be_also_where_others_are_dead_too(ratio):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.fc = (
                nn.Linear(8, 32),
                nn.Linear(8, 32),
                nn.Linear(8, 32),
                nn.Linear(96, 5),
            )

        def forward(self, x):
            return self.fc(F.relu(torch.cat((self.a(x), self.b(x), self.c(x)), 1)))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 8)
    with torch.no_grad():
        model.a.bias.fill_(-99)
        model.b.bias[:16] = -99
    imp = PROImportance()
    options = {"global_pruning": True, "pruning_ratio": ratio, "max_pruning_ratio": 0.9}
    pruner = make_pruner(model, x[:1], imp, [model.fc], **options)
    imp.calibrate(pruner, [x], progress=False)
    pruner.step()
    assert model.a.out_features == 4
    assert model.b.out_features <= 16
    assert model.a.out_features + model.b.out_features + model.c.out_features <= 96 * (1 - ratio) + 1


def vit(**options):
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    return timm.create_model(name, img_size=32, patch_size=16, num_classes=3, depth=2, **options).eval()


@pytest.mark.parametrize("heads", [False, True])
def test_heads_and_their_places_are_units_that_stay(heads):
    model, x = vit(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():  # the first attention does nothing
        model.blocks[0].attn.proj.weight.zero_()
    imp = PROImportance()
    pruner = make_pruner(
        model, x[:1], imp, [model.head], global_pruning=True, pruning_ratio=0.3, max_pruning_ratio=0.5,
        num_heads=attention_heads(model), prune_num_heads=heads, prune_head_dims=not heads, head_pruning_ratio=0.3,
    )  # fmt: skip
    imp.calibrate(pruner, [x], LogitNoise(), progress=False)
    pruner.step()
    update_attention(pruner)
    model(x)
    first = model.blocks[0].attn
    assert first.num_heads == (2 if heads else 3)
    assert first.qkv.out_features == 3 * (2 * 64 if heads else 3 * 32)


@pytest.mark.parametrize("scope", [False, True])
def test_register_tokens_and_heads(scope):
    model, x = vit(reg_tokens=4, no_embed_class=True), torch.randn(4, 3, 32, 32)
    whole = vit(reg_tokens=4, no_embed_class=True)
    imp = PROImportance()
    pruner = make_pruner(
        model, x[:1], imp, [model.head], global_pruning=scope, pruning_ratio=0.25, max_pruning_ratio=0.5,
        num_heads=attention_heads(model),
    )  # fmt: skip
    imp.calibrate(pruner, [x], LogitNoise(), progress=False)
    assert all(imp(group).isfinite().all() for group in groups_of(pruner))
    pruner.step()
    update_attention(pruner)
    assert model(x).shape == (4, 3)
    size = [sum(p.numel() for p in m.parameters()) for m in (model, whole)]
    assert size[0] < 0.9 * size[1]


def test_another_model_of_the_same_shapes_is_refused_and_an_equal_one_is_not():
    model, x = branches()
    imp = PROImportance()
    imp.calibrate(pruner_of(model, imp, x), [x], progress=False)
    equal = copy.deepcopy(model).bfloat16()
    group = next(groups_of(pruner_of(equal, imp, x.bfloat16())))
    assert imp(group).isfinite().all()
    torch.manual_seed(1)
    with pytest.raises(StaleStatisticsError, match="the model is another one, or was trained"):
        imp(next(groups_of(pruner_of(Branches(1).eval(), imp, x))))
    with torch.no_grad():
        model.a.weight += 1  # trained in place: the same model still
    assert imp(next(groups_of(pruner_of(model, imp, x)))).isfinite().all()
    stranger, other = Branches(1).eval(), PROImportance()
    other.calibrate(pruner_of(stranger, other, x), [x], progress=False)
    with pytest.raises(ValueError, match="calibrated on different models"):
        imp.merge(other)


@pytest.mark.parametrize("copied", [False, True])
def test_a_loop_over_groups_scores_all_of_them_first(copied):
    model, x = branches()
    imp = PROImportance()
    imp.calibrate(pruner_of(model, imp, x), [x], progress=False)
    imp, model = copy.deepcopy((imp, model)) if copied else (imp, model)
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    groups = list(graph.get_all_groups(ignored_layers=[model.fa, model.fb]))
    scores = [imp(group) for group in groups]
    root = groups[-1][0].dep.target.module
    graph.get_pruning_group(root, groups[-1][0].dep.handler, scores[-1].argsort()[:3].tolist()).prune()
    left = list(graph.get_all_groups(ignored_layers=[model.fa, model.fb]))
    with pytest.raises(StaleStatisticsError, match=r"score all groups first, then|pruned since"):
        [imp(group) for group in left]


def test_options_changed_after_calibration_take_effect_or_are_refused():
    case = CASES["residual"]
    model = case.model(torch.float32)
    imp = PROImportance()
    pruner = case.pruner(model, imp, global_pruning=True)
    imp.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
    group = next(groups_of(pruner))
    for name, value in (("cost", "params"), ("depletion", "log"), ("cost_exponent", 1.0), ("normalizer", "max")):
        before = imp(group)
        setattr(imp, name, value)
        assert not torch.equal(imp(group), before)
    for name, value in (("power", 2), ("reference", "mean"), ("group_reduction", "sum")):
        changed = copy.deepcopy(imp)
        setattr(changed, name, value)
        with pytest.raises(NotCalibratedError, match=f"{name}={value!r} was chosen after calibration"):
            changed(group)
    with pytest.raises(ValueError, match="power=3; choose one of 1, 2"):
        imp.power = 3
    paper = PROImportance("paper", step_size=0.1)
    paper.calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
    before = paper(group)
    paper.step_size = 10.0
    assert not torch.equal(before, paper(group))


@pytest.mark.parametrize(
    ("estimator", "option"),
    [("expected", {"step_size": 0.1}), ("expected", {"target": "norm"}), ("paper", {"power": 2}),
     ("paper", {"seed": 1}), ("paper", {"reference": "origin"})],
)  # fmt: skip
def test_options_of_the_other_estimator_are_refused(estimator, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.* is an option of estimator="):
        PROImportance(estimator, **option)
    with pytest.raises(TypeError):
        PROImportance(estimator, 0.1)


def test_it_shows_its_options_and_state():
    case = CASES["residual"]
    imp = PROImportance("paper", step_size=0.5, target="norm")
    assert repr(imp) == "PROImportance(estimator='paper', step_size=0.5, target='norm'): not calibrated"
    model = case.model(torch.float32)
    imp = PROImportance(cost=lambda record, model: 1.0).calibrate(
        case.pruner(model, None), [case.inputs(4, torch.float32)], progress=False
    )
    assert repr(imp) == "PROImportance(cost=<lambda>): 4 samples, 3 groups"


def test_norms_and_activations_can_be_registered(monkeypatch):
    monkeypatch.setattr(layers, "_NORMS", list(layers._NORMS))
    monkeypatch.setattr(layers, "_ACTIVATIONS", set(layers._ACTIVATIONS))

    class FilterNorm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

        def forward(self, x):
            return x * self.weight[:, None, None] + self.bias[:, None, None]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(torch.erf(self.conv(x)).mean((2, 3)))

    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    sites = []
    for _ in range(2):
        imp = PROImportance("paper", step_size=0.1)
        imp.calibrate(make_pruner(model, x[:1], imp, [model.fc]), [x], LogitNoise(), progress=False)
        sites.append(imp.report().groups[0].sites["conv"])
        register_activation(torch.erf)
    assert sites == [None, "erf #0"]
    assert not layers.is_channel_norm(FilterNorm(2))
    assert layers.is_channel_norm(register_norm(FilterNorm)(2))
