"""Which outputs of a model count, what each of them is taken for, and what the loss makes of them."""

import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ippro_tp import FisherNoise, LogitNoise, ObservationError, PROImportance
from ippro_tp.calibration.losses import DefaultLoss
from ippro_tp.calibration.outputs import class_axis, float_outputs
from ippro_tp.graph.groups import groups_of

from .nets import make_pruner


@dataclass
class Returned:
    """A dataclass as models return it."""

    logits: torch.Tensor
    hidden: tuple


def test_all_floating_point_outputs_are_found():
    a, b, c = (torch.zeros(2, i) for i in (3, 4, 5))
    Pair = namedtuple("Pair", "mean spread")
    cases = {
        "output": a,
        "[0] [1]": [a, b],
        "['out'] ['aux']": OrderedDict(out=a, aux=b),
        ".logits .hidden[0] .hidden[1]": Returned(a, (b, c)),
        ".mean .spread": Pair(a, b),
        "[0]['boxes'] [1]['boxes']": [{"boxes": a, "labels": torch.ones(2).long()}, {"boxes": b}],
    }
    for names, value in cases.items():
        assert list(float_outputs(value)) == names.split(" ")
    assert list(float_outputs({"loss": torch.zeros(()), "logits": a, "last": a})) == ["['logits']"]
    assert list(float_outputs({"loss": torch.zeros(())})) == ["['loss']"]
    assert float_outputs([torch.ones(2).long(), None, "text"]) == {}


LABELS = torch.tensor([0, 2, 1, 3, 0, 1])


@pytest.mark.parametrize(
    ("shape", "target", "axis"),
    [
        ((6, 4), None, 1),
        ((6, 4), LABELS, 1),
        ((6, 4), LABELS + 4, None),  # labels of something else
        ((6, 4), torch.randn(6, 4), None),
        ((6, 4), torch.randn(6), None),
        ((6, 4), torch.rand(6, 4).softmax(1), 1),
        ((6, 1), None, None),
        ((6,), None, None),
        ((6, 4, 5, 5), None, None),
        ((6, 4, 5, 5), torch.randint(4, (6, 5, 5)), 1),
        ((6, 4, 5, 5), torch.randint(4, (6, 1, 5, 5)), 1),
        ((6, 4, 5, 5), torch.randint(4, (6, 20, 20)), 1),
        ((6, 4, 5, 5), torch.full((6, 5, 5), 255).index_fill_(1, torch.tensor([1]), 3), 1),
        ((6, 3, 5, 5), torch.rand(6, 3, 5, 5), None),
        ((6, 4, 9), torch.randint(4, (6, 9)), 1),
        ((6, 9, 4), torch.randint(4, (6, 9)), 2),
        ((6, 9, 4), None, None),
        ((6, 4, 4), torch.randint(4, (6, 4)), None),  # cannot be told
        ((6, 9, 4), LABELS, None),
    ],
)
def test_labels_and_shapes_say_what_holds_class_scores(shape, target, axis):
    assert class_axis(torch.randn(shape), "output", True, target).axis == axis


def test_layers_say_where_classes_lie_if_labels_fit_twice():
    x, labels = torch.randn(6, 4, 4), torch.randint(4, (6, 4))
    made = nn.Linear(4, 4)(x), nn.Conv1d(4, 4, 1)(x), nn.Linear(4, 4)(x).transpose(1, 2)
    assert [class_axis(z, "output", True, labels).axis for z in made] == [2, 1, None]
    assert "FisherNoise(dim=" in class_axis(made[2], "output", True, labels).why
    assert class_axis(made[0], ".logits", True, None).axis == 2
    assert class_axis(made[1], "['pred_logits']", False, None).axis == 1


@pytest.mark.parametrize("squash", [torch.sigmoid, torch.tanh, F.normalize, lambda z: z.softmax(1)])
def test_squashed_values_are_no_class_scores(squash):
    z = nn.Linear(3, 4)(torch.randn(6, 3))
    assert class_axis(squash(z), "output", True, None).axis is None


def test_noise_along_the_axis_that_is_asked_for():
    z = torch.randn(3, 4, 5, requires_grad=True)
    for dim in (1, 2, -1):
        (noise,) = torch.autograd.grad(FisherNoise(dim=dim)(z, None), z)
        torch.testing.assert_close(noise.sum(dim), torch.zeros_like(noise.sum(dim)), atol=1e-6, rtol=0)
    with pytest.raises(ObservationError, match=r"FisherNoise\(dim=1\)"):
        FisherNoise()(z, None)
    for dim in (0, 3):
        with pytest.raises(ObservationError, match="no class scores along"):
            FisherNoise(dim=dim)(z, None)
    tokens = nn.Linear(5, 7)(z)
    (noise,) = torch.autograd.grad(FisherNoise()(tokens, None), tokens)
    torch.testing.assert_close(noise.sum(2), torch.zeros(3, 4), atol=1e-6, rtol=0)


def test_an_only_output_is_taken_as_by_the_noise_alone():
    for shape, alone in (((6, 10), FisherNoise(seed=3)), ((6, 3, 4, 4), LogitNoise(seed=3))):
        z, default = torch.randn(shape), DefaultLoss(seed=3)
        for part in z.split([1, 2, 3]):
            assert torch.equal(default(part, None), alone(part, None))


def test_outputs_count_by_how_they_vary_and_not_by_their_size_or_scale():
    torch.manual_seed(0)
    w = torch.ones(3, requires_grad=True)
    base = torch.randn(64, 3, 16, 16), 100 + 5 * torch.randn(64, 3), 1e-3 * torch.randn(64, 1)
    sizes = torch.zeros(3)
    loss = DefaultLoss()
    for _ in range(50):
        outputs = [z * w[i] for i, z in enumerate(base)]
        outputs[1] = 100 + (base[1] - 100) * w[1]
        (grad,) = torch.autograd.grad(loss({"map": outputs[0], "few": outputs[1:]}, None), w)
        sizes += grad.square() / 50
    assert sizes.max() < 3 * sizes.min()
    assert len(loss.notes) == 3
    assert all("white noise" in note for note in loss.notes)


class Heads(nn.Module):
    """Two heads, one of which a loss may forget."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = (nn.Conv2d(*s, 3, padding=1) for s in ((3, 8), (8, 6), (8, 6)))
        self.fa, self.fb = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return {"near": self.fa(F.relu(self.a(x))), "far": [self.fb(F.relu(self.b(F.max_pool2d(x, 2))))]}


def test_no_branch_is_forgotten_without_a_word():
    model, x = Heads(), torch.randn(4, 3, 8, 8)
    imp = PROImportance(cost=None)
    pruner = make_pruner(model, x[:1], imp, [model.fa, model.fb])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imp.calibrate(pruner, [x], progress=False)
    medians = {row.root: row.median for row in imp.report()}
    assert len(medians) == 3
    assert max(medians.values()) < 20 * min(medians.values())
    notes = imp.report().notes
    assert len(notes) == 2
    assert "['near']" in notes[0]
    assert "white noise" in str(imp.report())
    with pytest.warns(RuntimeWarning, match=r"no gradient reached 1 groups(.|\n)*'b\.out'"), imp.observe(pruner):
        model(x)["near"].square().mean().backward()
    assert any("'b.out'" in note for note in imp.report().notes)


def test_what_paints_gray_counts():
    """An image-to-image net: hidden channels that move all colours alike are no less worth."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    with torch.no_grad():
        net[2].weight[:, :4] = net[2].weight[:1, :4] * 10
        net[2].weight[:, 4:] *= 0.1
    imp = PROImportance()
    pruner = make_pruner(net, torch.rand(1, 3, 8, 8), imp, [net[2]])
    imp.calibrate(pruner, [torch.rand(8, 3, 8, 8)], progress=False)
    (group,) = groups_of(pruner)
    assert set(imp(group).topk(4).indices.tolist()) == {0, 1, 2, 3}


def test_segmentation_gets_class_noise_where_labels_say_so():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    imp = PROImportance()
    pruner = make_pruner(net, torch.rand(1, 3, 8, 8), imp, [net[2]])
    imp.calibrate(pruner, [(torch.rand(8, 3, 8, 8), torch.randint(3, (8, 8, 8)))], progress=False)
    assert "Fisher noise along dimension 1: the labels fit" in imp.report().notes[0]
    again = PROImportance()
    again.load_state_dict(imp.state_dict())
    assert again.report().notes == imp.report().notes
