"""Compensation never makes a model worse: random nets, shared weights, views, NaN, odd tensors, failures."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import Compensation, IPPROError, PROImportance

from .common import bits, error, explains, pruner_of, same_bits, told


class VAE(nn.Module):
    def __init__(self, how="randn_like") -> None:
        super().__init__()
        self.how = how
        self.e, self.mu, self.lv = nn.Linear(32, 64), nn.Linear(64, 8), nn.Linear(64, 8)
        self.d1, self.d2 = nn.Linear(8, 64), nn.Linear(64, 32)

    def noise(self, mu):
        if self.how == "normal_":
            return torch.empty_like(mu).normal_()
        if self.how == "distribution":
            return torch.distributions.Normal(torch.zeros_like(mu), 1.0).rsample()
        if self.how == "dropout":
            return F.dropout(torch.ones_like(mu), 0.5, training=True)
        return torch.randn_like(mu)

    def decode(self, z):
        return self.d2(F.relu(self.d1(z)))

    def forward(self, x):
        h = F.relu(self.e(x))
        mu, lv = self.mu(h), self.lv(h)
        return self.decode(mu + self.noise(mu) * torch.exp(0.5 * lv))


def pruned(model, x, keep, compensate, ratio=0.3, example=None, batches=None):
    """The plain errors' and the compensated model, cut alike."""
    imp = PROImportance()
    pruner = pruner_of(model, x[:1] if example is None else example, imp, keep(model), pruning_ratio=ratio)
    imp.calibrate(pruner, batches or [x], progress=False)
    if not compensate:
        pruner.step()
        return None
    comp = Compensation()
    comp.calibrate(pruner, batches or [x], progress=False)
    return comp.step(pruner)


@pytest.mark.parametrize("how", ["randn_like", "normal_", "distribution", "dropout"])
def test_nets_that_draw_noise(how):
    torch.manual_seed(0)
    base, x = VAE(how).eval(), torch.randn(256, 32)
    z = torch.randn(256, 8)
    with torch.no_grad():
        wanted = base.decode(z)
    errors = []
    for compensate in (False, True):
        model = copy.deepcopy(base)
        try:
            pruned(model, x, lambda m: [m.d2, m.mu, m.lv], compensate)
        except IPPROError as why:
            explains(why, "random", "noise", "draws")
            return
        errors.append(error(model.decode(z), wanted))
    assert errors[1] <= 1.02 * errors[0]


class Tied(nn.Module):
    def __init__(self, how="embedding") -> None:
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(96, 32)
        self.head, self.other = nn.Linear(32, 50, bias=False), nn.Linear(32, 50, bias=False)
        if how == "embedding":
            self.head.weight = self.emb.weight
        else:
            self.other.weight = self.head.weight

    def forward(self, ids):
        x = self.emb(ids).mean(1)
        y = x + 3 * self.down(F.relu(self.up(x)))
        return self.head(y) + self.other(x)


@pytest.mark.parametrize("how", ["embedding", "two heads"])
def test_shared_weights(how):
    torch.manual_seed(0)
    base = Tied(how).eval()
    x, new = torch.randint(0, 50, (256, 4)), torch.randint(0, 50, (256, 4))
    with torch.no_grad():
        wanted = base(new)
    errors = []
    for compensate in (False, True):
        model = copy.deepcopy(base)
        pruned(model, x, lambda m: [m.emb, m.down, m.head, m.other], compensate, ratio=0.7)
        assert (model.head.weight is model.emb.weight) == (how == "embedding")
        if compensate and how == "embedding":
            assert torch.equal(model.emb.weight, base.emb.weight)
        errors.append(error(model(new), wanted))
    assert errors[1] <= errors[0]


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.f = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 1), nn.Linear(16, 5)

    def forward(self, a, b):
        y = F.relu(self.d(F.relu(self.c(torch.cat((a, b)))))).mean((2, 3))
        ya, yb = y.chunk(2)
        return self.f(ya * yb)


@pytest.mark.parametrize("memory", [1 << 30, 20_000])
def test_views_in_one_batch_beyond_one_chunk(memory):
    torch.manual_seed(0)
    base = Views().eval()
    a, b, a2, b2 = (torch.randn(48, 3, 6, 6) for _ in range(4))
    with torch.no_grad():
        wanted = base(a2, b2)
    errors = []
    for compensate in (False, True):
        model, imp, comp = copy.deepcopy(base), PROImportance(), Compensation(memory=memory)
        pruner = pruner_of(model, {"a": a[:1], "b": b[:1]}, imp, [model.f], pruning_ratio=0.3)
        batches = [((a[i : i + 16], b[i : i + 16]), None) for i in range(0, 48, 16)]
        imp.calibrate(pruner, batches, progress=False)
        if compensate:
            comp.calibrate(pruner, batches, progress=False)
            comp.step(pruner)
        else:
            pruner.step()
        errors.append(error(model(a2, b2), wanted))
    assert errors[1] <= errors[0] * 1.01


class Shared(nn.Module):
    """A layer on two things."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mid, self.f = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 20), nn.Linear(20, 4)

    def forward(self, x):
        one, two = F.relu(self.a(x) + self.b(x)), F.relu(self.a(x) - self.b(x))
        return self.f(F.relu(self.mid(one)) * F.relu(self.mid(two)))


def test_layers_called_several_times_are_fitted_to_all_calls():
    torch.manual_seed(0)
    base, x, new = Shared().eval(), torch.randn(256, 6), torch.randn(256, 6)
    with torch.no_grad():
        base.a.weight[1], base.a.bias[1] = base.a.weight[0], base.a.bias[0]  # the stream holds one channel twice
        base.b.weight[1], base.b.bias[1] = base.b.weight[0], base.b.bias[0]
        wanted = base(new)
    model = copy.deepcopy(base)

    class One(tp.importance.Importance):
        def __call__(self, group, **_):
            scores = torch.ones(len(group[0].idxs))
            scores[1] = 0
            return scores

    keep = [model.f, model.mid]
    pruner = pruner_of(model, x[:1], One(), keep, pruning_ratio=1 / 16 - 1e-6)
    comp = Compensation()
    comp.calibrate(pruner, [x], progress=False)
    report = comp.step(pruner)
    assert model.a.out_features == 15, report
    assert error(model(new), wanted) < 1e-6, report


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, 5)).eval()


X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value):
    model = net()
    before = bits(model)
    x = X.clone()
    x[3, 0, 0, 0] = value
    pruner = pruner_of(model, X[:1], tp.importance.MagnitudeImportance(), [model[6]])
    comp = Compensation()
    try:
        comp.calibrate(pruner, [x], progress=False)
        report = str(comp.step(pruner))
    except IPPROError as why:
        assert same_bits(model, before)
        explains(why, "nan", "finite")
        return
    assert "nan%" not in report.lower()
    assert "inf%" not in report.lower()
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(60, 32), nn.Linear(32, 5)
        self.t = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, ids, mask):
        return self.f(self.t(self.e(ids), src_key_padding_mask=mask)[:, 0])


def test_nested_tensors_inside_are_covered_or_refused_before_the_cut():
    torch.manual_seed(0)
    model = Encoder().eval()
    ids = torch.randint(0, 60, (16, 12))
    mask = torch.arange(12).expand(16, -1) >= torch.randint(4, 12, (16, 1))
    batch = {"ids": ids, "mask": mask}
    keep = [model.e, model.f, *(part for layer in model.t.layers for part in (layer.self_attn, layer.linear2))]
    pruner = pruner_of(model, {"ids": ids[:1], "mask": mask[:1]}, tp.importance.MagnitudeImportance(), keep)
    with torch.no_grad():
        wanted = model(ids, mask)
    before = bits(model)
    comp = Compensation()
    try:
        comp.calibrate(pruner, [batch], progress=False)
        comp.step(pruner)
    except IPPROError:
        assert same_bits(model, before)
        return
    assert model.t.layers[0].linear1.out_features == 32
    compensated = error(model(ids, mask), wanted)
    plain = Encoder().eval()
    torch.manual_seed(0)
    plain = Encoder().eval()
    keep = [plain.e, plain.f, *(part for layer in plain.t.layers for part in (layer.self_attn, layer.linear2))]
    pruner_of(plain, {"ids": ids[:1], "mask": mask[:1]}, tp.importance.MagnitudeImportance(), keep).step()
    assert compensated < error(plain(ids, mask), wanted)


def test_a_step_that_fails_leaves_the_model_to_the_bit():
    model = net()
    before = bits(model)
    pruner = pruner_of(model, X[:1], tp.importance.MagnitudeImportance(), [model[6]])
    comp = Compensation().calibrate(pruner, [X], progress=False)

    def repair(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        comp.step(pruner, repair=repair)
    assert same_bits(model, before)
    assert model[0].out_channels == 8
    torch.testing.assert_close(model(X), net()(X), rtol=0, atol=0)


def test_a_bad_state_keeps_the_samples():
    model = net()
    pruner = pruner_of(model, X[:1], tp.importance.MagnitudeImportance(), [model[6]])
    comp = Compensation().calibrate(pruner, [X], progress=False)
    state = comp.state_dict()
    for bad in ({}, {"nonsense": 1}, {**state, **dict.fromkeys(list(state)[:1], "x")}):
        with pytest.raises((ValueError, KeyError, TypeError, IPPROError)):
            comp.load_state_dict(bad)
    assert comp.step(pruner).rows


class Selfish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.mha, self.f = (
            nn.Linear(6, 16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 4),
        )
        self.up = nn.Linear(16, 16)

    def forward(self, x):
        x = F.relu(self.e(x))
        y, _ = self.mha(x, x, x, need_weights=False)
        return self.f(F.relu(self.up(x + y)).mean(1))


def test_attention_layers_of_torch_are_refitted():
    torch.manual_seed(0)
    base, x, new = Selfish().eval(), torch.randn(128, 5, 6), torch.randn(128, 5, 6)
    with torch.no_grad():
        wanted = base(new)
    errors = {}
    for compensate in (False, True):
        model = copy.deepcopy(base)
        pruner = pruner_of(
            model,
            x[:1],
            tp.importance.MagnitudeImportance(),
            [model.f],
            num_heads={model.mha: 4},
            pruning_ratio=0.25,
        )
        if compensate:
            comp = Compensation()
            comp.calibrate(pruner, [x], progress=False)
            report = str(comp.step(pruner))
            assert "MultiheadAttention are not covered" not in report
        else:
            pruner.step()
        errors[compensate] = error(model(new), wanted)
    assert errors[True] <= errors[False]


def test_nothing_is_said_twice():
    model = net()
    pruner = pruner_of(model, X[:1], tp.importance.MagnitudeImportance(), [model[6]])
    with told() as messages:
        Compensation().calibrate(pruner, [X], progress=False).step(pruner)
    assert len(messages) == len(set(messages))
