"""Whatever a model returns, each output counts, at its own scale, by a loss that fits it."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ippro_tp import FisherNoise, LogitNoise, ObservationError, PROImportance

from .common import error, group_of, pruner_of, told


@dataclasses.dataclass
class Answer:
    scores: Tensor
    depth: Tensor


class Dotted(OrderedDict):
    """As Hugging Face's ModelOutput: a mapping with attributes."""

    def __getattr__(self, name):
        return self[name]


Pair = namedtuple("Pair", "a b")
CONTAINERS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"out": a, "aux": b},
    "dict with logits": lambda a, b: {"loss": None, "logits": a, "hidden": b},
    "dotted": lambda a, b: Dotted(logits=a, hidden_states=(b,)),
    "dataclass": Answer,
    "namedtuple": Pair,
    "nested": lambda a, b: {"tasks": [{"x": a}, (b, torch.arange(3))], "name": "net"},
}


class Branches(nn.Module):
    """Two branches of their own, two outputs."""

    def __init__(self, how, scale=1.0, out=(5, 4)) -> None:
        super().__init__()
        self.how, self.scale = how, scale
        self.a, self.fa = nn.Linear(6, 16), nn.Linear(16, out[0])
        self.b, self.fb = nn.Linear(6, 16), nn.Linear(16, out[1])

    def forward(self, x):
        return self.how(self.fa(F.relu(self.a(x))), self.scale * self.fb(F.relu(self.b(x))))


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def traced(model, x):
    """What Torch-Pruning can follow: it knows tensors in tuples, lists and dicts."""
    return model.fa(F.relu(model.a(x))), model.fb(F.relu(model.b(x)))


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_branch_counts(name):
    torch.manual_seed(0)
    model = Branches(CONTAINERS[name]).eval()
    imp = PROImportance(cost=None)
    pruner = pruner_of(model, X[:1], imp, [model.fa, model.fb], forward_fn=traced)
    imp.calibrate(pruner, [X], progress=False)
    a, b = imp(group_of(pruner, model.a)), imp(group_of(pruner, model.b))
    assert a.max() > 0
    assert b.max() > 0


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_each_output_counts_at_its_own_scale(scale):
    shares = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        model = Branches(CONTAINERS["tuple"], factor, out=(1, 1)).eval()  # no classes: white noise
        imp = PROImportance(cost=None, depletion=None)
        pruner = pruner_of(model, X[:1], imp, [model.fa, model.fb])
        imp.calibrate(pruner, [X], progress=False)
        a, b = imp(group_of(pruner, model.a)), imp(group_of(pruner, model.b))
        shares.append(float(b.sum() / a.sum()))
    assert shares[1] == pytest.approx(shares[0], rel=0.3)


def test_a_branch_without_gradient_is_named():
    class Detached(Branches):
        closed = False

        def forward(self, x):
            b = self.fb(F.relu(self.b(x)))
            return self.fa(F.relu(self.a(x))), b.detach() if self.closed else b

    torch.manual_seed(0)
    model = Detached(None).eval()
    imp = PROImportance()
    pruner = pruner_of(model, X[:1], imp, [model.fa, model.fb])
    model.closed = True
    with told() as messages:
        imp.calibrate(pruner, [X], progress=False)
    assert any("b" in m.replace("'", " ").replace(".out", "").split() for m in messages), messages


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_moves_all_values_of_an_image_alike_counts(kernel):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, kernel, padding=kernel // 2)
    ).eval()
    with torch.no_grad():  # the first four paint grey
        net[2].weight[:, :4] = net[2].weight[:1, :4] * 10
        net[2].weight[:, 4:] *= 0.1
    x = torch.rand(16, 3, 8, 8)
    wanted = net(x)
    imp = PROImportance()
    pruner = pruner_of(net, x[:1], imp, [net[2]])
    imp.calibrate(pruner, [x], progress=False)
    scores = imp(group_of(pruner, net[0]))
    assert scores[:4].min() > scores[4:].max()
    pruner.step()
    assert error(net(x), wanted) < 0.1


def calibrated(model, x, keep, **options):
    imp = PROImportance(cost=None, depletion=None)
    pruner = pruner_of(model, x[:1], imp, keep)
    imp.calibrate(pruner, [x], progress=False, **options)
    return imp, pruner


def token_net(form):
    torch.manual_seed(0)
    if form == "(N, C, L)":
        return nn.Sequential(nn.Conv1d(6, 12, 1), nn.ReLU(), nn.Conv1d(12, 5, 1)).eval(), torch.randn(8, 6, 7), 1
    if form == "(N, C, H, W)":
        return (
            nn.Sequential(nn.Conv2d(6, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 1)).eval(),
            torch.randn(8, 6, 7, 7),
            1,
        )
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).eval(), torch.randn(8, 7, 6), -1


@pytest.mark.parametrize("form", ["(N, L, C)", "(N, C, L)", "(N, C, H, W)"])
def test_class_scores_lie_where_they_lie_or_are_taken_for_none(form):
    """What all classes have in common means nothing to a softmax: Fisher noise along the right axis, or white."""
    model, x, axis = token_net(form)
    imp, pruner = calibrated(model, x, [model[2]])
    found = imp(group_of(pruner, model[0]))
    candidates = []
    for loss in (FisherNoise(dim=axis), LogitNoise()):
        other, other_pruner = calibrated(token_net(form)[0], x, [], loss_fn=loss)
        candidates.append(other(group_of(other_pruner, other_pruner.model[0])))
    correlations = [float(torch.corrcoef(torch.stack((found, c)))[0, 1]) for c in candidates]
    assert max(correlations) > 0.9, correlations
    assert any(word in str(imp.report()).lower() for word in ("fisher", "white", "noise")), "report() says which"


def test_axes_can_be_told():
    model, x, _ = token_net("(N, L, C)")
    imp, pruner = calibrated(model, x, [model[2]], loss_fn=FisherNoise(dim=2))
    assert imp(group_of(pruner, model[0])).max() > 0


@pytest.mark.parametrize("out", [1, 8])
@pytest.mark.parametrize("how", ["regression", "embedding", "sigmoid"])
def test_numbers_that_are_no_class_scores_are_calibrated(how, out):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f = nn.Linear(6, 16), nn.Linear(16, out)

        def forward(self, x):
            y = self.f(F.relu(self.a(x)))
            if how == "embedding":
                return F.normalize(y, dim=1) if out > 1 else y
            return y.sigmoid() if how == "sigmoid" else y.squeeze(-1)

    torch.manual_seed(0)
    model = Net().eval()
    imp, pruner = calibrated(model, X, [model.f])
    scores = imp(group_of(pruner, model.a))
    assert scores.count_nonzero() > 8


def test_an_output_without_numbers_is_refused():
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.f(F.relu(self.a(x))).argmax(1)

    model, imp = Labels().eval(), PROImportance()
    pruner = pruner_of(model, X[:1], imp, [model.f], forward_fn=lambda m, x: m.f(F.relu(m.a(x))))
    with pytest.raises(ObservationError, match="floating-point"):
        imp.calibrate(pruner, [X], progress=False)
