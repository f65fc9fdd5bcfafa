"""Taps against the literal extension layer with real parameters."""

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp

from ippro_tp import PROImportance
from ippro_tp.errors import ObservationError
from ippro_tp.graph.groups import groups_of
from ippro_tp.tracing.extension import LiteralExtension, Tap, Term, require_grad, sample_sums


@pytest.mark.parametrize(
    "sigma", [F.relu, F.silu, F.gelu, torch.tanh, lambda x: x], ids=["relu", "silu", "gelu", "tanh", "identity"]
)
@pytest.mark.parametrize(("shape", "axis"), [((4, 5, 3, 3), 1), ((4, 6, 5), 2), ((4, 5), 1)])
def test_tap_reads_the_gradient_of_D(sigma, shape, axis):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    psi = LiteralExtension(sigma, torch.rand(5, dtype=torch.float64), axis)
    weight = torch.randn(shape, dtype=torch.float64)
    (psi(x) * weight).sum().backward()

    seen = []
    y = sigma(x) if sigma(x) is not x else x.clone()
    tap = Tap((Term(x),), y, axis, 4, seen.append, "sigma")
    (y * weight).sum().backward()
    assert seen[0].shape == (4, 5)
    torch.testing.assert_close(seen[0].sum(0), psi.D.grad)
    assert tap.terms[0].storage != 0


def test_literal_layer_is_not_lossless_in_float32_but_the_tap_is():
    torch.manual_seed(0)
    x = torch.randn(64, 32, 8, 8, requires_grad=True)
    psi = LiteralExtension(F.relu, 1e3 * torch.rand(32))
    y = F.relu(x)
    reference = y.detach().clone()
    Tap((Term(x),), y, 1, 64, lambda sums: None, "relu")
    assert torch.equal(y, reference)
    torch.testing.assert_close(psi(x), reference, atol=1e-3, rtol=0)


def test_a_copy_survives_being_overwritten():
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    y = x * 3
    seen = []
    tap = Tap((Term(y),), y, 1, 1, seen.append, "layer")
    tap.copy_values(y.untyped_storage().data_ptr())
    y.relu_()
    y.sum().backward()
    assert seen[0].tolist() == [[0.0, 6.0]]  # gradient at y before relu_: 0 and 1


def test_unnoticed_overwriting_is_an_error():
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    y = x * 3
    Tap((Term(y),), y, 1, 1, lambda sums: None, "layer3")
    y.relu_()
    with pytest.raises(ObservationError, match=r"layer3.*overwritten"):
        y.sum().backward()


def test_closed_taps_are_silent():
    x = torch.ones(1, 2, requires_grad=True)
    y = x * 2
    seen = []
    tap = Tap((Term(y),), y, 1, 1, seen.append, "layer")
    tap.close()
    tap.close()
    y.sum().backward()
    assert seen == []


def test_rows_of_windows_are_summed_to_samples():
    g = torch.randn(6, 3, 5)
    (sums,) = sample_sums(g, [torch.ones_like(g)], axis=2, batch=2)
    torch.testing.assert_close(sums, g.view(2, 3, 3, 5).sum((1, 2)))
    with pytest.raises(ObservationError, match="batch of 4"):
        sample_sums(g, [g], axis=2, batch=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["planes", "channels last", "small planes", "none"])
def test_sums_over_planes_are_those_of_products(dtype, layout):
    """The fused kernel, and what stands in for it where it does not apply, against products in float64."""
    shape = {"small planes": (6, 5, 3, 3), "none": (6, 5, 0, 4)}.get(layout, (6, 5, 4, 7))
    format_ = torch.channels_last if layout == "channels last" else torch.contiguous_format
    g, x, z = (torch.randn(shape, dtype=dtype).to(memory_format=format_) for _ in range(3))
    found = sample_sums(g, [x, None, z], axis=1, batch=3)
    for sums, value in zip(found, (x.double(), torch.ones_like(x).double(), z.double()), strict=True):
        expected = (g.double() * value).sum((2, 3)).view(3, 2, 5).sum(1)
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
        assert sums.dtype == dtype


@pytest.mark.parametrize("side", [256, 1024])
def test_sums_over_large_planes_are_exact(side):
    g = torch.rand(1, 2, side, side)
    sums, total = sample_sums(g, [g + 1, None], axis=1, batch=1)
    torch.testing.assert_close(sums.double(), (g.double() * (g + 1).double()).sum((2, 3)), rtol=2e-6, atol=0)
    torch.testing.assert_close(total.double(), g.double().sum((2, 3)), rtol=2e-6, atol=0)


def test_half_precision_is_summed_in_float32():
    g = torch.full((1, 1, 300, 300), 1.0, dtype=torch.bfloat16)
    assert sample_sums(g, [g], 1, 1)[0].item() == 90_000.0


def test_require_grad_allows_in_place_and_views():
    base = torch.randn(6, 4)
    for x in (base, base.view(2, 3, 4)):
        out = require_grad(x)
        assert out.requires_grad
        assert torch.equal(out, x)
        out.relu_()
        out.sum().backward()


def test_affine_values_are_those_of_the_norm():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    scale, shift = torch.randn(2, 3, dtype=torch.float64)
    y = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    direct, through = [], []
    Tap((Term(y),), y, 1, 4, direct.append, "norm")
    tap = Tap((Term(x, (scale, shift)),), y, 1, 4, through.append, "norm")
    F.silu(y).sum().backward()
    torch.testing.assert_close(through[0], direct[0])
    assert tap.terms


class _Net(torch.nn.Module):
    """Convolutions with an activation, in place or not, that something else may read first."""

    def __init__(self, norm, act, inplace, read_before=False, residual=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Conv2d(6, 6, 3, padding=1)
        self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(6) if norm else torch.nn.Identity() for _ in "12"])
        self.norms.train(norm == "train")
        self.act, self.inplace, self.read_before, self.residual = act, inplace, read_before, residual
        self.fc = torch.nn.Linear(6, 4)
        for module in self.norms:
            if norm:
                torch.nn.init.uniform_(module.weight, -1, 1)
                torch.nn.init.normal_(module.bias)
                torch.nn.init.normal_(module.running_mean)

    def forward(self, x):
        x = self.act(self.norms[0](self.conv1(x)), inplace=self.inplace)
        y = self.norms[1](self.conv2(x))
        before = y * 0.5 if self.read_before else 0.0
        if self.residual and self.inplace:
            y += x
        elif self.residual:
            y = y + x
        return self.fc((self.act(y, inplace=self.inplace) + before).mean((2, 3)))


@pytest.mark.parametrize("estimator", ["expected", "paper"])
@pytest.mark.parametrize("norm", ["", "eval", "train"])
@pytest.mark.parametrize(("act", "copies"), [(F.relu, 0), (F.relu6, 0), (F.silu, 2)])
def test_in_place_activations_give_the_same_scores_without_copies(monkeypatch, estimator, norm, act, copies):
    in_place, made = _scores(monkeypatch, _Net(norm, act, True), estimator)
    plain, none = _scores(monkeypatch, _Net(norm, act, False), estimator)
    torch.testing.assert_close(in_place, plain)
    assert none == 0
    # A norm that uses running statistics is read from its input; ReLU lets no gradient through where it cuts, but
    # the extension of the paper needs what it cut.
    assert made == (0 if norm == "eval" else copies if estimator == "expected" else 2)


@pytest.mark.parametrize("options", [{"read_before": True}, {"residual": True}])
@pytest.mark.parametrize("norm", ["", "eval"])
@pytest.mark.parametrize("estimator", ["expected", "paper"])
def test_what_others_read_first_is_kept(monkeypatch, options, norm, estimator):
    in_place, made = _scores(monkeypatch, _Net(norm, F.relu, True, **options), estimator)
    plain, _ = _scores(monkeypatch, _Net(norm, F.relu, False, **options), estimator)
    torch.testing.assert_close(in_place, plain)
    # Eval-mode norms, and their sums with other tensors, are read from what autograd keeps.
    activations = 2 if estimator == "paper" else 0
    assert made == (0 if norm else activations + (estimator == "expected" or "residual" in options))


def _scores(monkeypatch, net, estimator):
    made = []
    original = Term.apart_from

    def apart_from(term, storage):
        made.extend([term] * (term.storage == storage))
        return original(term, storage)

    monkeypatch.setattr(Term, "apart_from", apart_from)
    imp = PROImportance(estimator=estimator)
    x, labels = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
    training = {m for m in net.norms if m.training}
    pruner = tp.pruner.BasePruner(net, x[:1], importance=imp, pruning_ratio=0.5, ignored_layers=[net.fc])
    with imp.observe(pruner):
        net.eval()
        for module in training:
            module.train()
        F.cross_entropy(net(x), labels).backward()
    monkeypatch.setattr(Term, "apart_from", original)
    return torch.cat([imp(group) for group in groups_of(pruner)]), len(made)


class _Overwritten(torch.nn.Module):
    """A summand of a tapped sum is overwritten: by the sum, or after the activation has read the sum."""

    def __init__(self, in_place, by_sum=False):
        super().__init__()
        torch.manual_seed(0)
        self.in_place, self.by_sum = in_place, by_sum
        self.conv1, self.conv2 = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Conv2d(6, 6, 3, padding=1)
        self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(6) for _ in "12"]).eval()
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, x):
        x = self.norms[0](self.conv1(x)).tanh()
        shortcut = F.avg_pool2d(x, 1)
        y = self.norms[1](self.conv2(x))
        if self.by_sum:
            if self.in_place:
                shortcut += y
            return self.fc(F.relu(shortcut if self.in_place else shortcut + y).mean((2, 3)))
        y = F.relu(y + shortcut)
        return self.fc((y + (shortcut.mul_(2) if self.in_place else shortcut * 2)).mean((2, 3)))


def test_a_summand_that_is_overwritten_later_is_copied(monkeypatch):
    in_place, made = _scores(monkeypatch, _Overwritten(True), "paper")
    plain, none = _scores(monkeypatch, _Overwritten(False), "paper")
    torch.testing.assert_close(in_place, plain)
    assert (made, none) == (1, 0)


def test_a_sum_that_overwrites_a_summand_is_read_itself(monkeypatch):
    in_place, made = _scores(monkeypatch, _Overwritten(True, by_sum=True), "paper")
    plain, _ = _scores(monkeypatch, _Overwritten(False, by_sum=True), "paper")
    torch.testing.assert_close(in_place, plain)
    assert made == 0
