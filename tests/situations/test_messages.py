"""Odd models, batches and calls: they work, or the message names the cause and the way out."""

import collections

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import ippro_tp
from ippro_tp import Compensation, IPPROError, PROImportance, SpaSPImportance

from .common import bits, explains, group_of, pruner_of, same_bits, told

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, 5)).eval()


def scores(loader, model=None, **options):
    model = model or net()
    imp = PROImportance(depletion=None, cost=None)
    example = X[:1].to(next(model.parameters()).dtype)
    pruner = pruner_of(model, example, imp, [model[6]])
    imp.calibrate(pruner, loader, progress=False, **options)
    return imp(group_of(pruner, model[0]))


@pytest.mark.parametrize("count", [-1, 0, 1.5])
@pytest.mark.parametrize("make", [PROImportance, SpaSPImportance, Compensation])
def test_counts_that_make_no_sense(count, make):
    model = net()
    tool = make()
    target = pruner_of(model, X[:1], tp.importance.MagnitudeImportance(), [model[6]])
    with pytest.raises((ValueError, TypeError), match="max_samples"):
        tool.calibrate(target, X.split(4), max_samples=count, progress=False)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_empty_batches_are_passed_over(where):
    batches = [X[:8], X[8:]]
    batches.insert(where, X[:0])
    torch.testing.assert_close(scores(batches), scores([X[:8], X[8:]]))


@pytest.mark.parametrize(
    "loader", [[], [X[:0]], iter([]), (x for x in ())], ids=["list", "batch", "iter", "generator"]
)
def test_no_samples_at_all(loader):
    with pytest.raises(ValueError, match=r"empty|no samples"):
        scores(loader)


def test_generators_and_max_samples():
    torch.testing.assert_close(scores((x for x in X.split(4)), max_samples=8), scores([X[:8]]))


def test_a_generator_cannot_be_gone_through_twice():
    with pytest.raises(ValueError, match="once"):
        scores((x for x in X.split(4)), passes=2)


Images = collections.namedtuple("Images", "image other")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = net()

    def forward(self, image, other=None):
        return self.n(image)


@pytest.mark.parametrize("target", ["model", "pruner"])
def test_namedtuples_are_inputs(target):
    model, imp = Two().eval(), PROImportance()
    pruner = pruner_of(model, {"image": X[:1]}, imp, [model.n[6]])
    imp.calibrate(model if target == "model" else pruner, [(Images(X, X), None)], progress=False)
    assert imp(group_of(pruner, model.n[0])).max() > 0


def test_batches_by_other_names_than_the_forwards():
    model, imp = Two().eval(), PROImportance()
    pruner = pruner_of(model, {"image": X[:1]}, imp, [model.n[6]])
    before = bits(model)
    with pytest.raises((ValueError, TypeError, IPPROError)) as caught:
        imp.calibrate(pruner, [{"pixel_values": X, "label": torch.zeros(16)}], progress=False)
    assert "pixel_values" in str(caught.value)
    assert "image" in str(caught.value)
    assert same_bits(model, before)


@pytest.mark.parametrize("importance", [PROImportance, SpaSPImportance])
def test_an_importance_given_as_a_class(importance):
    model = net()
    pruner = pruner_of(model, X[:1], importance, [model[6]])
    with pytest.raises(TypeError, match=rf"{importance.__name__}\(\)"):
        pruner.step()


def test_a_frozen_backbone_is_scored():
    model = net()
    reference = scores([X])
    model.requires_grad_(False)
    model[6].requires_grad_(True)
    imp = PROImportance(depletion=None, cost=None)
    for p in model.parameters():
        p.requires_grad_(True)  # Torch-Pruning follows autograd
    pruner = pruner_of(model, X[:1], imp, [model[6]])
    model.requires_grad_(False)
    imp.calibrate(pruner, [X], progress=False)
    torch.testing.assert_close(imp(group_of(pruner, model[0])), reference)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_backbone_frozen_before_the_trace_is_told_of():
    model = net()
    model.requires_grad_(False)
    model[6].requires_grad_(True)
    imp = PROImportance()
    pruner = pruner_of(model, X[:1], imp, [model[6]])
    with pytest.raises((ValueError, IPPROError), match=r"requires_grad|frozen"):
        imp.calibrate(pruner, [X], progress=False)


PARAMETRIZED = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": lambda m: parametrizations.orthogonal(m),
    "old weight_norm": weight_norm,
    "masked": lambda m: prune.l1_unstructured(m, "weight", 0.3),
}


@pytest.mark.parametrize("which", PARAMETRIZED)
@pytest.mark.filterwarnings("ignore")
def test_parametrized_weights(which):
    model = net()
    PARAMETRIZED[which](model[0])
    imp = PROImportance()
    try:
        pruner = pruner_of(model, X[:1], imp, [model[6]])
    except Exception as error:  # Torch-Pruning's own
        pytest.skip(f"Torch-Pruning: {error}")
    with told() as messages:
        try:
            imp.calibrate(pruner, [X], progress=False)
            pruner.step()
        except IPPROError as why:
            explains(why, "parametri", "weight_norm", "torch.nn.utils")
            return
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}")
    model(X)
    assert model[2].out_channels == 3
    assert model[0].out_channels == 4 or any("0" in m for m in messages)


def test_complex_layers_are_left_whole_and_named():
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w, self.b = nn.Linear(12, 16), nn.Linear(16, 16, dtype=torch.cfloat), nn.Linear(16, 20)
            self.f = nn.Linear(20, 5)

        def forward(self, x):
            y = self.w(torch.relu(self.a(x)).to(torch.cfloat)).abs()
            return self.f(torch.relu(self.b(y)))

    torch.manual_seed(0)
    model, x, imp = Wave().eval(), torch.randn(16, 12), PROImportance()
    pruner = pruner_of(model, x[:1], imp, [model.f])
    try:
        imp.calibrate(pruner, [x], progress=False)
        pruner.step()
    except IPPROError as why:
        explains(why, "complex")
        return
    assert model(x).shape == (16, 5)
    assert model.b.out_features == 10


@pytest.mark.parametrize("tool", [PROImportance, SpaSPImportance, Compensation])
def test_inference_mode(tool):
    model = net()
    made = tool()
    pruner = pruner_of(model, X[:1], tp.importance.MagnitudeImportance(), [model[6]])
    with torch.inference_mode():
        try:
            made.calibrate(pruner, [X], progress=False)
        except IPPROError as why:
            explains(why, "inference_mode")


def test_a_detector_that_needs_targets_is_told_of():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = net()

        def forward(self, images, targets=None):
            if self.training and targets is None:
                raise ValueError("targets should not be none when in training mode")
            y = self.n(images)
            return {"loss": y.square().mean()} if self.training else [{"boxes": y.detach()}]

    model, imp = Detector().eval(), PROImportance()
    pruner = pruner_of(model, X[:1], imp, [model.n[6]], forward_fn=lambda m, x: m.n(x))
    with pytest.raises(IPPROError) as caught:
        imp.calibrate(pruner, [X], progress=False)
    assert "loss_fn" in str(caught.value) or "observe" in str(caught.value)


class My(nn.Module):
    def __init__(self, i, o) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(i, o) / i**0.5)

    def forward(self, x):
        return x @ self.w


class MyPruner(tp.pruner.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        keep = sorted(set(range(layer.w.shape[1])) - set(idxs))
        layer.w = self._prune_parameter_and_grad(layer.w, keep, 1)
        return layer

    def prune_in_channels(self, layer, idxs):
        keep = sorted(set(range(layer.w.shape[0])) - set(idxs))
        layer.w = self._prune_parameter_and_grad(layer.w, keep, 0)
        return layer

    def get_out_channels(self, layer):
        return layer.w.shape[1]

    def get_in_channels(self, layer):
        return layer.w.shape[0]


@pytest.mark.parametrize("options", [{}, {"cost": None}, {"cost": "params"}, {"depletion": None}], ids=str)
def test_custom_layers_in_a_global_ranking(options):
    torch.manual_seed(0)
    model, x = nn.Sequential(My(12, 24), nn.ReLU(), My(24, 32), nn.ReLU(), nn.Linear(32, 5)), torch.randn(16, 12)
    imp = PROImportance(**options)
    pruner = pruner_of(
        model,
        x[:1],
        imp,
        [model[4]],
        global_pruning=True,
        customized_pruners={My: MyPruner()},
        root_module_types=[nn.Linear, My],
    )
    imp.calibrate(pruner, [x], progress=False)
    pruner.step()
    assert model[0].w.shape[1] + model[2].w.shape[1] == pytest.approx(28, abs=2)
    assert model(x).shape == (16, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    wanted = scores([X])
    found = scores([X.to(dtype)], net().to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, wanted, rtol=0.2 if dtype == torch.bfloat16 else 1e-3, atol=0.02 * wanted.max()
    )


NOT_COUNTS = [float("nan"), float("inf"), "8", 2.5, -3]


@pytest.mark.parametrize("option", ["max_samples", "passes"])
@pytest.mark.parametrize("count", NOT_COUNTS, ids=str)
def test_what_is_no_count_is_named(option, count):
    with pytest.raises(ValueError, match=f"{option}=.*whole number"):
        scores([X], **{option: count})


@pytest.mark.parametrize("loader", [X, None, 5], ids=["tensor", "none", "number"])
def test_what_is_no_loader_is_named(loader):
    model = net()
    before = bits(model)
    with pytest.raises(TypeError, match="iterable of batches"):
        scores(loader, model)
    assert same_bits(model, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"importance": PROImportance},
        {"importance": SpaSPImportance},
        {"importance": tp.importance.MagnitudeImportance},
        {"importance": "pro"},
        {"compensation": Compensation},
        {"compensation": "yes"},
    ],
    ids=str,
)
def test_tools_that_are_classes_or_names(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*give"):
        ippro_tp.prune(net(), X[:1], [X], macs=0.5, progress=False, **wrong)
