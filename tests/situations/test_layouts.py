"""However a forward pass lays samples out in rows, a channel's score is the mean of its size sample by sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ippro_tp import ObservationError, PROImportance

from .common import explains, group_of, noise_loss, offsets, plain, pruner_of, told

COUNT = 6


class Net(nn.Module):
    """A layer whose channels are scored, between functions that lay rows out and gather them."""

    def __init__(self, spread, gather) -> None:
        super().__init__()
        self.spread, self.gather = spread, gather
        self.mid, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, *x: Tensor) -> Tensor:
        return self.gather(self.head(torch.tanh(self.mid(self.spread(*x)))), *x)


def frames(n=COUNT):
    return (torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(1)),)


def pairs(n=COUNT):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 5, generator=generator), torch.randn(n, 5, generator=generator)


def triples(n=COUNT):
    return (torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(3)),)


def squares(n=COUNT):
    return (torch.randn(n, 4, 4, 5, generator=torch.Generator().manual_seed(4)),)


def _windows(x):
    return x.view(-1, 2, 2, 2, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 5)


def _back(y):
    return y.view(-1, 2, 2, 2, 2, y.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, y.shape[-1])


LAYOUTS = {
    "as it is": (pairs, lambda a, b: a * b, lambda y, *_: y),
    "cat": (pairs, lambda a, b: torch.cat((a, b)), lambda y, *_: torch.sub(*y.tensor_split(2))),
    "concat of keywords": (
        pairs,
        lambda a, b: torch.concat(tensors=[b, a], dim=-2),
        lambda y, *_: y[: len(y) // 2],
    ),
    "vstack": (pairs, lambda a, b: torch.vstack((a, b, a * b)), lambda y, *_: y.view(3, -1, 3).prod(0)),
    "three views": (triples, lambda x: torch.cat(x.unbind(1)), lambda y, *_: y.unflatten(0, (3, -1)).amax(0)),
    "hstack of views": (triples, lambda x: torch.stack(x.unbind(1), 1).reshape(-1, 5), lambda y, *_: y[1::3]),
    "time first": (
        frames,
        lambda x: x.permute(1, 0, 2).flatten(0, 1),
        lambda y, *_: y.view(4, -1, 3).cumsum(0)[-1],
    ),
    "time first, kept": (frames, lambda x: x.transpose(0, 1), lambda y, *_: y.square().mean(0)),
    "movedim": (frames, lambda x: x.movedim(0, 1).reshape(-1, 5), lambda y, *_: y.reshape(4, -1, 3).amin(0)),
    "moveaxis": (frames, lambda x: torch.moveaxis(input=x, source=1, destination=0), lambda y, *_: y.prod(0)),
    "unbind and cat": (frames, lambda x: torch.cat(list(x.unbind(1)), 0), lambda y, *_: y.view(4, -1, 3).std(0)),
    "split and cat": (frames, lambda x: torch.cat([t[:, 0] for t in x.split(1, 1)]), lambda y, *_: y.chunk(4)[2]),
    "frames": (frames, lambda x: x.reshape(-1, 5), lambda y, *_: y.view(-1, 4, 3).amax(1)),
    "windows": (squares, _windows, lambda y, *_: (_back(y - y.mean(1, keepdim=True)) ** 3).mean((1, 2))),
    "shifted windows": (
        squares,
        lambda x: _windows(x.roll((1, 1), (1, 2))),
        lambda y, *_: (_back(y.softmax(1)).roll((-1, -1), (1, 2))[:, :2] ** 2).sum((1, 2)),
    ),
    "grid, outer first": (
        squares,
        lambda x: x.view(-1, 2, 2, 2, 2, 5).permute(2, 4, 0, 1, 3, 5).reshape(-1, 4, 5),
        lambda y, x: y.amax(1).view(4, len(x), 3).prod(0),
    ),
    "repeated": (pairs, lambda a, b: (a + b).repeat(2, 1) * 0.5, lambda y, *_: y.view(2, -1, 3).prod(0)),
    "interleaved": (
        pairs,
        lambda a, b: (a + b).repeat_interleave(3, dim=0),
        lambda y, *_: y.view(-1, 3, 3).prod(1),
    ),
    "expanded": (pairs, lambda a, b: a.expand(3, -1, -1).reshape(-1, 5), lambda y, *_: y.view(3, -1, 3).prod(0)),
    "one row for all": (frames, lambda x: x.reshape(1, -1, 5), lambda y, x: y.view(len(x), 4, 3).amax(1)),
    "numbered": (
        frames,
        lambda x: x.gather(1, torch.tensor([2, 0]).view(1, 2, 1).expand(len(x), -1, 5)).flatten(0, 1),
        lambda y, *_: y.unflatten(0, (-1, 2)).prod(1),
    ),
    "every other row": (
        pairs,
        lambda a, b: (
            torch.zeros(2 * len(a), 5).index_copy(0, torch.arange(0, 2 * len(a), 2), a)
            + torch.zeros(2 * len(a), 5).index_copy(0, torch.arange(1, 2 * len(a), 2), b)
        ),
        lambda y, *_: y[::2] * y[1::2],
    ),
}


def net(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    inputs, spread, gather = LAYOUTS[name]
    torch.manual_seed(0)
    return Net(spread, gather).eval(), inputs()


@pytest.mark.parametrize("cut", [(6,), (4, 2), (1,) * 6], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_are_those_of_the_samples(name, cut):
    model, x = net(name)
    loss = noise_loss(COUNT, (3,))
    one = [tuple(t[i : i + 1] for t in x) for i in range(COUNT)]
    expected = offsets(model, model.mid, (loss(model(*single), i) for i, single in enumerate(one)))
    imp = plain()
    pruner = pruner_of(model, tuple(t[:1] for t in x), imp, [model.head])
    with imp.observe(pruner):
        first = 0
        for size in cut:
            loss(model(*(t[first : first + size] for t in x)), first).backward()
            first += size
    torch.testing.assert_close(imp(group_of(pruner, model.mid)), expected, rtol=1e-4, atol=1e-6)


class Ragged(nn.Module):
    """Only some of a sample's rows go through the layer, by what they hold."""

    def __init__(self, sort: bool = False) -> None:
        super().__init__()
        self.sort, self.mid, self.head = sort, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        rows = x[chosen]
        order = rows[:, 1].argsort() if self.sort else torch.arange(len(rows))
        y = self.head(F.relu(self.mid(rows[order])))
        out = torch.zeros(len(x), x.shape[1], 3)
        out[chosen] = torch.zeros_like(y).index_copy(0, order, y)
        return out.sum(1)


@pytest.mark.parametrize("sort", [False, True])
def test_rows_whose_number_hangs_on_the_data_are_right_or_told(sort):
    torch.manual_seed(0)
    model, (x,) = Ragged(sort).eval(), frames(COUNT)
    loss = noise_loss(COUNT, (3,))
    expected = offsets(model, model.mid, (loss(model(x[i : i + 1]), i) for i in range(COUNT)))
    imp = plain()
    pruner = pruner_of(model, x[:1], imp, [model.head])
    with told() as messages:
        try:
            with imp.observe(pruner):
                loss(model(x), 0).backward()
        except ObservationError as why:
            explains(why, "rows", "sample")
            return
        found = imp(group_of(pruner, model.mid))
    right = torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert right or any("batch" in message for message in [*messages, str(imp.report())])


MIXING = {
    "the neighbour": lambda y: y - y.roll(1, 0),
    "the mean": lambda y: y - y.mean(0, keepdim=True),
    "all pairs": lambda y: torch.softmax(y @ y.T, 1) @ y,
    "the first": lambda y: y * y[:1],
    "sorted": lambda y: y.sort(0).values,
}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix_are_refused_or_told(name):
    torch.manual_seed(0)
    model = Net(lambda x: x, lambda y, x: MIXING[name](y)).eval()
    x = pairs()[0]
    imp = PROImportance()
    pruner = pruner_of(model, x[:1], imp, [model.head])
    with told() as messages:
        try:
            imp.calibrate(pruner, [x], progress=False)
        except ObservationError as why:
            explains(why, "sample")
            return
    assert any("sample" in m or "batch" in m for m in [*messages, str(imp.report())]), messages
