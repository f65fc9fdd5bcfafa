"""Scores of whole batches equal those of batches of one, however a model lays out its samples."""

import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ippro_tp import PROImportance
from ippro_tp.graph.groups import groups_of, read_group

from .nets import make_pruner

torch.manual_seed(0)
IMAGES = torch.randn(5, 3, 8, 8)


class Siamese(nn.Module):
    """Two views in one batch."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.f = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, a, b):
        x = F.relu(self.d(F.relu(self.c(torch.cat((a, b))))))
        one, other = x.mean((2, 3)).chunk(2)
        return self.f((one - other).abs())


class Video(nn.Module):
    """Frames folded into the batch, time first or last."""

    def __init__(self, time_first, move="transpose"):
        super().__init__()
        self.c, self.f, self.time_first, self.move = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), time_first, move

    def forward(self, v):
        n, t = v.shape[:2]
        if self.time_first:
            v = v.movedim(1, 0) if self.move == "movedim" else v.transpose(dim0=0, dim1=1)
        x = F.relu(self.c(v.flatten(0, 1))).mean((2, 3))
        x = x.view(t, n, -1).amax(0) if self.time_first else x.view(n, t, -1).amax(1)
        return self.f(x)


class Windows(nn.Module):
    """Windows as Swin makes them, in the batch before or behind the samples."""

    def __init__(self, first):
        super().__init__()
        self.c, self.q, self.f, self.first = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 4), first

    def forward(self, x):
        x = self.c(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 4, 4, w // 4, 4)
        x = x.permute(2, 4, 0, 3, 5, 1) if self.first else x.permute(0, 2, 4, 3, 5, 1)
        x = F.gelu(self.q(x.reshape(-1, 16, c)))
        x = x.view(-1, n, 16, c).amax((0, 2)) if self.first else x.view(n, -1, c).amax(1)
        return self.f(x)


class Unfolded(nn.Module):
    """MobileViT: pixels of patches beside the samples, as the views of its code make them."""

    def __init__(self):
        super().__init__()
        self.c, self.q, self.f = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.c(x)
        n, c, h, w = x.shape
        x = x.reshape(n * c * (h // 2), 2, w // 2, 2).transpose(1, 2).reshape(n, c, (h // 2) * (w // 2), 4)
        x = x.transpose(1, 3).reshape(n * 4, -1, c)
        x = F.relu(self.q(x)).view(n, 4, -1, c)
        return self.f(x.amax((1, 2)))


class Detector(nn.Module):
    """A list of images, of several sizes maybe."""

    def __init__(self):
        super().__init__()
        self.c, self.f = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, images, targets=None):
        size = max(x.shape[1] for x in images), max(x.shape[2] for x in images)
        x = torch.stack([F.pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1])) for x in images])
        return self.f(F.relu(self.c(x)).amax((2, 3)))


class Table(nn.Module):
    """Positions that a layer makes, added from either side."""

    def __init__(self, first, one=False):
        super().__init__()
        self.e, self.pos, self.up, self.f = nn.Linear(6, 8), nn.Linear(1, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.first, self.one = first, one

    def forward(self, x):
        t, p = self.e(x), self.pos(torch.linspace(-1, 1, x.shape[1])[:, None])
        p = p[None] if self.one else p
        return self.f(F.relu(self.up(p + t if self.first else t + p)).mean(1))


class Queries(nn.Module):
    """Learned queries, repeated for each sample behind the tokens: what depends on no sample is still theirs."""

    def __init__(self):
        super().__init__()
        self.query, self.q = nn.Parameter(torch.randn(7, 6)), nn.Linear(6, 8)
        self.k, self.f = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        q = torch.tanh(self.q(self.query.unsqueeze(1).repeat(1, len(x), 1)))  # (7, N, 8)
        k = self.k(x).amax(1)
        return self.f((q * k).amax(0))


class Encoder(nn.Module):
    """PyTorch's own encoder, tokens first."""

    def __init__(self, batch_first):
        super().__init__()
        self.e, self.f, self.batch_first = nn.Linear(6, 8), nn.Linear(8, 4), batch_first
        self.t = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first), 2, enable_nested_tensor=False
        )

    def forward(self, x):
        x = self.e(x)
        return self.f(self.t(x)[:, 0] if self.batch_first else self.t(x.transpose(0, 1))[0])


class Named(nn.Module):
    """Inputs by name, nested."""

    def __init__(self):
        super().__init__()
        self.c, self.f = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, *, views, scale=1.0):
        a, b = views["a"], views["b"][0]
        return self.f(F.relu(self.c(torch.cat((b, a), 0))).amax((2, 3)).view(2, len(a), -1).sum(0) * scale)


class Noisy(nn.Module):
    """Draws noise in eval mode."""

    def __init__(self):
        super().__init__()
        self.c, self.f = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.c(x + 0 * torch.randn_like(x) + 1e-9 * torch.rand(1))).amax((2, 3))
        return self.f(x)


class Rolled(nn.Module):
    """Channels are turned by one."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.f = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        x = torch.roll(self.c(x), 1, dims=1)
        return self.f(F.relu(self.d(F.relu(x))).mean((2, 3)))


class Closed(nn.Module):
    """Hardly anything comes through, as in a net that is not trained: what follows is the same for all samples."""

    def __init__(self, time_first):
        super().__init__()
        self.c, self.d, self.e, self.f = nn.Conv2d(3, 6, 1), nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)
        self.time_first = time_first

    def forward(self, x):
        x = torch.sigmoid(self.c(x) - 40).flatten(2)
        x = self.d(x.permute(2, 0, 1) if self.time_first else x.transpose(1, 2))
        return self.f(F.gelu(self.e(1e-5 * F.gelu(x))).mean(0 if self.time_first else 1))


class Merged(nn.Module):
    """Samples and channels share an axis for a while: of one sample, it looks like channels."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.b, self.f = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Linear(5, 4)

    def forward(self, x):
        y = self.c(x)
        y = y.reshape(-1, *y.shape[2:]).unsqueeze(1).mul(2).reshape(y.shape)
        return self.f(F.relu(self.b(self.d(y))).amax((2, 3)))


@dataclass
class Case:
    """A model, its batch, and the batch cut into single samples."""

    net: object
    batch: object
    ones: list
    ignored: tuple = ("f",)


def tensors(x):
    return x, [x[i : i + 1] for i in range(len(x))]


def pairs(a, b):
    return (a, b), [(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]


VIDEO, TOKENS = torch.randn(5, 4, 3, 6, 6), torch.randn(5, 7, 6)
SIZES = [torch.randn(3, 8, 8 - i % 2) for i in range(5)]
CASES = {
    "siamese": Case(Siamese, *pairs(IMAGES, IMAGES.flip(0))),
    "frames": Case(lambda: Video(False), *tensors(VIDEO)),
    "time first": Case(lambda: Video(True), *tensors(VIDEO)),
    "movedim": Case(lambda: Video(True, "movedim"), *tensors(VIDEO)),
    "as many frames as samples": Case(lambda: Video(True), *tensors(torch.randn(4, 4, 3, 6, 6))),
    "windows": Case(lambda: Windows(False), *tensors(IMAGES)),
    "windows first": Case(lambda: Windows(True), *tensors(IMAGES)),
    "unfolded": Case(Unfolded, *tensors(IMAGES)),
    "images": Case(Detector, list(IMAGES), [[x] for x in IMAGES]),
    "images, a tuple": Case(Detector, tuple(IMAGES), [(x,) for x in IMAGES]),
    "table behind": Case(lambda: Table(False), *tensors(TOKENS)),
    "table before": Case(lambda: Table(True), *tensors(TOKENS)),
    "table with one row for all": Case(lambda: Table(True, one=True), *tensors(TOKENS)),
    "queries": Case(Queries, *tensors(TOKENS)),
    "encoder": Case(lambda: Encoder(True), *tensors(TOKENS)),
    "encoder, tokens first": Case(lambda: Encoder(False), *tensors(TOKENS)),
    "as many tokens as samples": Case(lambda: Encoder(False), *tensors(torch.randn(5, 5, 6))),
    "by name": Case(
        Named,
        {"views": {"a": IMAGES, "b": [IMAGES.flip(3)]}, "scale": 2.0},
        [{"views": {"a": x[None], "b": [x[None].flip(3)]}, "scale": 2.0} for x in IMAGES],
    ),
    "noise": Case(Noisy, *tensors(IMAGES)),
    "closed": Case(lambda: Closed(False), *tensors(IMAGES)),
    "closed, positions first": Case(lambda: Closed(True), *tensors(IMAGES)),
    "merged": Case(Merged, *tensors(IMAGES)),
    "rolled": Case(Rolled, *tensors(IMAGES)),
}


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple) and isinstance(model, Siamese):
        return model(*inputs)
    return model(inputs)


def scores(case, batches, settings, train=False):
    torch.manual_seed(1)
    model = case.net().train(train)
    imp = PROImportance(cost=None, **settings)
    x = case.ones[0]
    example = x if isinstance(x, dict) else {"images": x} if isinstance(model, Detector) else x
    pruner = make_pruner(
        model, None if isinstance(example, dict) else example, imp, [getattr(model, n) for n in case.ignored],
        forward_fn=(lambda m, _: m(**example)) if isinstance(example, dict) else None,
    )  # fmt: skip
    torch.manual_seed(2)
    weights = torch.randn(5, 4)
    at = 0
    with imp.observe(pruner), warnings.catch_warnings():
        for inputs in batches:
            out = call(model, inputs)
            (out * weights[at : at + len(out)]).sum().div(len(out)).backward()
            at += len(out)
    return {group[0].dep.target.name: imp(group) for group in groups_of(pruner)}, imp


@pytest.mark.parametrize("settings", [{}, {"group_reduction": "mean"}], ids=["joint", "mean"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_batches_score_as_single_samples_do(case, settings):
    together, imp = scores(case, [case.batch], settings)
    single, _ = scores(case, case.ones, settings)
    assert together.keys() == single.keys()
    assert together
    for name, score in together.items():
        torch.testing.assert_close(score, single[name], rtol=1e-4, atol=1e-6)
        assert score.abs().sum() > 0
    lost = ("channels are not followed through roll: scored at their producers",)
    assert imp.report().notes == (lost if case.net is Rolled else ())


def test_images_of_several_sizes_are_padded_to_one():
    """Padding goes by the largest image of a batch, so that scores of single images are no reference here."""
    case = Case(Detector, SIZES, [[x] for x in SIZES])
    found, imp = scores(case, [SIZES], {})
    assert all(score.isfinite().all() for score in found.values())
    assert not imp.report().notes


def test_the_last_batch_may_be_smaller_even_of_one():
    case = CASES["time first"]
    x = case.batch
    single, _ = scores(case, case.ones, {})
    for cuts in ([2, 2, 1], [4, 1], [1, 4], [3, 2]):
        for name, score in scores(case, x.split(cuts), {})[0].items():
            torch.testing.assert_close(score, single[name], rtol=1e-4, atol=1e-6)


class Experts(nn.Module):
    """Each token goes to the expert it likes best: how many rows an expert sees depends on the data."""

    def __init__(self):
        super().__init__()
        self.e, self.gate, self.f = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 4)
        self.up, self.down = (nn.ModuleList(nn.Linear(*s) for _ in "12") for s in ((8, 6), (6, 8)))

    def forward(self, x):
        y = self.e(x).flatten(0, 1)
        choice, out = self.gate(y).argmax(1), y
        for i in range(2):
            rows = (choice == i).nonzero().view(-1)
            out = out.index_add(0, rows, self.down[i](F.relu(self.up[i](y[rows]))))
        return self.f(out.view(*x.shape[:2], -1).mean(1))


class Pairs(nn.Module):
    """The batch holds pairs of samples, one after another."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.f = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        a, b = F.relu(self.c(x)).mean((2, 3)).chunk(2)
        return self.f(F.relu(self.d(a - b)))


@pytest.mark.parametrize(("net", "x"), [(Experts, torch.randn(6, 5, 6)), (Pairs, IMAGES[:4])])
def test_rows_that_are_nobodys_make_the_batch_the_unit(net, x):
    torch.manual_seed(0)
    model = net().eval()
    imp = PROImportance(cost=None)
    ignored = [model.f, model.gate] if net is Experts else [model.f]
    pruner = make_pruner(model, x[:2], imp, ignored)
    with pytest.warns(RuntimeWarning, match="the batch is the unit"), imp.observe(pruner):
        model(x).square().mean().backward()
    assert any("the batch is the unit" in note for note in imp.report().notes)
    again = PROImportance(cost=None)
    again.load_state_dict(imp.state_dict())
    assert again._notes == imp._notes
    parameters = dict(model.named_parameters())
    loss = model(x).square().mean()
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True, materialize_grads=True)
    grads = dict(zip(parameters, found, strict=True))
    for group in groups_of(pruner):
        dot = sum(
            (parameters[f"{n}.weight"] * grads[f"{n}.weight"]).flatten(1).sum(1)
            + parameters[f"{n}.bias"] * grads[f"{n}.bias"]
            for n in (producer.name for producer in read_group(group).producers)
        )
        torch.testing.assert_close(imp(group), dot.abs().detach(), rtol=1e-3, atol=1e-6)


def test_the_probe_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.bn, self.f = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
            self.calls = 0
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.total += 1
            x = F.dropout(F.relu(self.bn(self.c(x))), 0.5, training=True)
            return self.f(x.mean((2, 3)))

    model, imp = Counting(), PROImportance()
    pruner = make_pruner(model, IMAGES[:2], imp, [model.f])
    model.train()
    calls, total = model.calls, model.total.clone()
    torch.manual_seed(3)
    with imp.observe(pruner):
        start = torch.get_rng_state()
        model(IMAGES).sum().backward()
        assert model.calls == calls + 1
        assert float(model.total) == float(total) + 1
        after = torch.get_rng_state()
        torch.set_rng_state(start)
        F.dropout(torch.ones(5, 6, 6, 6), 0.5, training=True)
        assert torch.equal(torch.get_rng_state(), after)
    assert model.training
    assert model.bn.training
