"""What cannot be calibrated is refused with its cause and the way out; what is only odd works."""

import collections
import copy

import pytest
import torch
from torch import nn

from ippro_tp import ObservationError, PROImportance, SpaSPImportance

from .nets import make_pruner

X = torch.randn(8, 3, 12, 12)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()  # fmt: skip


class Wrapped(nn.Module):
    """A model with other parameters of ``forward``."""

    def __init__(self):
        super().__init__()
        self.n = net()

    def forward(self, image, other=None):
        return self.n(image)


class WantsTargets(Wrapped):
    """A model that wants its targets."""

    def forward(self, image, targets):
        return self.n(image) + 0 * targets["size"][:, None]


def samples(loader, model=None, **options):
    model = model or net()
    imp = PROImportance()
    pruner = make_pruner(model, X[:1], imp, [model[6]])
    imp.calibrate(pruner, loader, progress=False, **options)
    return int(imp._sums["samples"])


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_samples_is_positive(count):
    with pytest.raises(ValueError, match=f"max_samples={count}; give a positive"):
        samples(X.split(4), max_samples=count)


def test_empty_batches_are_left_out():
    assert samples([X[:0], X[:4], X[:0], X[4:]]) == 8
    assert samples([[], ([], None), (list(X), None)], Listed()) == 8
    with pytest.raises(ValueError, match="the loader is empty"):
        samples([X[:0]])
    model = net()
    with pytest.raises(ObservationError, match="empty batch"), PROImportance().observe(model):
        model(X[:0])


class Listed(nn.Sequential):
    """Takes a list of images."""

    def __init__(self):
        super().__init__(*net())

    def forward(self, images):
        return super().forward(torch.stack(list(images)) if isinstance(images, (list, tuple)) else images)


def test_lists_of_images_are_cut_and_counted_image_by_image():
    assert samples([(list(X[:6]), None), (list(X[6:]), None)], Listed()) == 8
    assert samples([(tuple(X), None)], Listed(), max_samples=5) == 5
    assert samples([X[:1], X], None, max_samples=5) == 5
    with pytest.raises(ValueError, match=r"\(images, None\)"):
        samples([list(X)], Listed())


def test_named_tuples_and_dicts_of_inputs():
    for fields in ("image other", "other image", "a b"):
        Inputs = collections.namedtuple("Inputs", fields)
        inputs = Inputs(X, X)
        PROImportance().calibrate(Wrapped(), [(inputs, None)], progress=False)
    PROImportance().calibrate(Wrapped(), [{"image": X}, {"other": None, "image": X}], progress=False)


@pytest.mark.parametrize(
    ("model", "batch", "match"),
    [
        (Wrapped(), {"picture": X, "label": torch.zeros(8)}, r"takes \(image, other=None\).*'picture', 'label'"),
        (WantsTargets(), X, r"takes \(image, targets\), the batch gives 1 inputs"),
        (net(), (((X, X), None)), "2 inputs"),
    ],
)
def test_batches_that_do_not_fit_the_model(model, batch, match):
    for make in (PROImportance, SpaSPImportance):
        with pytest.raises(ValueError, match=match):
            make().calibrate(model, [batch], progress=False)


def test_a_model_that_wants_its_targets_gets_them():
    PROImportance().calibrate(WantsTargets(), [((X, {"size": torch.ones(8)}), None)], progress=False)


def test_an_error_of_the_model_itself_is_its_own():
    model = net()
    model[6].forward = lambda x: nn.functional.linear(x, None)
    with pytest.raises(TypeError, match="linear"):
        PROImportance().calibrate(model, [X], progress=False)


def test_frozen_layers_are_named():
    model = net().requires_grad_(False)
    model[6].requires_grad_(True)
    with pytest.raises(ObservationError, match=r"no group(.|\n)*'0', '2'(.|\n)*requires_grad_\(True\) before"):
        samples([X], model)
    model = net()
    model[0].requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="1 layers with frozen weights are in no group"):
        samples([X], model)
    assert not model[0].weight.requires_grad
    model = net()
    imp = PROImportance()
    pruner = make_pruner(model, X[:1], imp, [model[6]])
    model.requires_grad_(False)  # afterwards is fine
    imp.calibrate(pruner, [X], progress=False)


def test_weights_that_are_computed_are_refused():
    for norm in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm):
        model = net()
        norm(model[2])
        with pytest.raises(ObservationError, match=r"weight of '2' is computed(.|\n)*remove_parametrizations"):
            samples([X], model)


def test_inference_mode_is_refused_where_gradients_are_needed():
    model, imp = net(), PROImportance()
    pruner = make_pruner(model, X[:1], imp, [model[6]])
    with torch.inference_mode(), pytest.raises(ObservationError, match="inference_mode"):
        imp.calibrate(pruner, [X], progress=False)
    with torch.inference_mode():
        SpaSPImportance().calibrate(pruner, [X], progress=False)


def test_complex_layers_are_refused():
    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 8, dtype=torch.complex64), nn.Linear(8, 5)

        def forward(self, x):
            return self.b(self.a(x + 0j).abs())

    with pytest.raises(ObservationError, match=r"'a' has complex weights(.|\n)*ignored_layers"):
        PROImportance().calibrate(Wave(), [torch.randn(4, 12)], progress=False)


@pytest.mark.parametrize("bad", [PROImportance, nn.Linear])
def test_a_class_is_no_object(bad):
    with pytest.raises(TypeError, match="not the class"):
        PROImportance().calibrate(bad, [X], progress=False)


def test_a_refusal_leaves_everything_as_it_was():
    model = Wrapped().train()
    model.n[0].weight.grad = torch.ones_like(model.n[0].weight)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        PROImportance().calibrate(model, [{"picture": X}], progress=False)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.n[0].weight.grad, torch.ones_like(model.n[0].weight))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
