"""Layers whose output is added to a residual stream make up for the error of the sum."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ippro_tp import Compensation
from ippro_tp.compensation.additions import Additions
from ippro_tp.compensation.cutlayer import CutLayer

from .test_compensation import removing


class Block(nn.Module):
    """``stream + last(tanh(first(stream)))``; the sum and what ``last`` read are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.last, self.head = self.layers()
        self.sum: Tensor | None = None
        self.read: Tensor | None = None

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def branch(self, x: Tensor) -> Tensor:
        read = torch.tanh(self.first(x))
        self.read = read.detach()
        return self.last(read)

    def add(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def forward(self, x: Tensor) -> Tensor:
        total = self.add(torch.tanh(self.stem(x)))
        self.sum = total.detach()
        return self.head(total)


class Second(Block):
    def add(self, x: Tensor) -> Tensor:
        return torch.add(self.branch(x), x)


class IntoTheStream(Block):
    def add(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.branch(x)
        return x


class Dropped(Block):
    def branch(self, x: Tensor) -> Tensor:
        return F.dropout(super().branch(x), 0.5, self.training)


class LayerScale(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([0.5, -2.0, 1.0, 0.1, 3.0, 1.0, -1.0, 0.3]))

    def branch(self, x: Tensor) -> Tensor:
        return self.gamma * super().branch(x)


class Tokens(Block):
    """Fitted channels last, added channels first."""

    def add(self, x: Tensor) -> Tensor:  # (samples, tokens, channels)
        return (x.transpose(1, 2) + self.branch(x).transpose(1, 2)).transpose(1, 2)


class Convolutions(Block):
    """With BatchNorm, and a shortcut that is a layer, run after the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.running_mean.normal_()
            self.norm.weight.uniform_(-1, 1)

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Conv2d(8, 12, 3, padding=1, bias=False),
            nn.Conv2d(12, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 3, 1),
        )

    def branch(self, x: Tensor) -> Tensor:
        return self.norm(super().branch(x))

    def add(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class InPlace(Convolutions):
    def add(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += self.shortcut(x)
        return y


def rows(x: Tensor, conv: nn.Module) -> Tensor:
    """What a layer reads for each row of its output, with a one for the constant."""
    if isinstance(conv, nn.Conv2d):
        x = F.unfold(x, conv.kernel_size, padding=conv.padding).transpose(1, 2)
    x = x.reshape(-1, x.shape[-1])
    return torch.cat([x, torch.ones(len(x), 1)], 1)


KINDS = [Block, Second, InPlace, IntoTheStream, Dropped, LayerScale, Tokens, Convolutions]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_sum_is_what_the_last_layer_is_fitted_to(kind: type[Block]) -> None:
    """Least squares: what is left of the error of the sum is orthogonal to all that the layer reads."""
    torch.manual_seed(0)
    model = kind().eval()
    x = (
        torch.randn(3, 1, 14, 14) if issubclass(kind, Convolutions) else torch.randn(3, 90, 6)
    )  # of three none is held out
    reference, plain = copy.deepcopy(model), copy.deepcopy(model)
    removals = {name: [1, 4] for name, _ in model.named_children() if name in ("stem", "last", "shortcut")}
    removals["first"] = [0, 2, 3, 9]
    removing(plain, x[:1], removals).step()
    pruner = removing(model, x[:1], removals)
    report = Compensation(ridge=1e-9).calibrate(pruner, [x], progress=False).step(pruner)
    assert not next(row for row in report.rows if row.name == "last").skipped
    left = torch.tensor([c for c in range(8) if c not in removals["last"]])
    channel = 1 if issubclass(kind, Convolutions) else -1

    def gain(pruned: Block) -> float:
        """The share of the error of the sum that the last layer could still take away."""
        with torch.no_grad():
            reference(x), pruned(x)
        assert reference.sum is not None
        assert pruned.sum is not None
        assert pruned.read is not None
        wrong = (reference.sum.index_select(channel, left) - pruned.sum).movedim(channel, -1)
        wrong = wrong.reshape(-1, len(left)).double()
        read = rows(pruned.read, pruned.last).double()
        fitted = read @ torch.linalg.lstsq(read, wrong, driver="gelsd").solution
        return float(fitted.square().sum() / wrong.square().sum())

    assert gain(plain) > 0.1
    assert gain(model) < 1e-6


class ReadTwice(Block):
    def add(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return x + y + y.mean()


class Activated(Block):
    def add(self, x: Tensor) -> Tensor:
        return x + self.branch(x).relu_()


class Returned(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.stem(x))
        y = self.branch(x)
        return self.head(x + y), y


class Scaled(Block):
    def add(self, x: Tensor) -> Tensor:
        return torch.add(x, self.branch(x), alpha=2)


class Overwritten(Block):
    """What ``last`` reads is changed in place before the sum is made."""

    def branch(self, x: Tensor) -> Tensor:
        read = torch.tanh(self.first(x))
        y = self.last(read)
        read.mul_(0.5)
        return y


class Twins(Block):
    """Both terms are layers: the one that reads more makes up for both."""

    def add(self, x: Tensor) -> Tensor:
        return self.head2(x) + self.branch(x)

    def __init__(self) -> None:
        super().__init__()
        self.head2 = nn.Linear(8, 8)


def follow(model: Block) -> set[str]:
    layers = [CutLayer(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad(), Additions(layers) as additions:
        additions.returned(model(torch.randn(5, 6)))
    return additions.added


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        (Block, {"last"}),
        (IntoTheStream, {"last"}),
        (LayerScale, {"last"}),
        (ReadTwice, set()),
        (Activated, set()),
        (Returned, set()),
        (Scaled, set()),
        (Overwritten, set()),
        (Twins, {"last"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_only_what_nothing_else_reads_counts_as_added(kind: type[Block], added: set[str]) -> None:
    assert follow(kind().eval()) == added


def test_what_layers_read_is_not_kept_alive() -> None:
    """All samples go side by side: an input for each block of a deep network would not fit into memory."""
    model, seen = Block().eval(), []
    model.last.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    with torch.no_grad(), Additions([CutLayer("last", model.last)]) as additions:
        model(torch.randn(5, 6))
        model.read = None
        assert additions.added == {"last"}
        assert [x() for x in seen] == [None]


def test_nothing_is_left_behind() -> None:
    model = Convolutions().eval()
    layers = [CutLayer("last", model.last, model.norm)]

    def fail(*args: object) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"), torch.no_grad(), Additions(layers, fail):
        model(torch.randn(2, 1, 6, 6))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        model(torch.randn(2, 1, 6, 6))


def test_a_branch_that_is_never_added_after_the_cut_is_left_alone() -> None:
    """Which way a forward pass goes may depend on what was cut."""

    class Turns(Block):
        def add(self, x: Tensor) -> Tensor:
            y = self.branch(x)
            return x + y if self.first.out_features == 12 else x * y

    torch.manual_seed(0)
    model, x = Turns().eval(), torch.randn(60, 6)
    pruner = removing(model, x[:1], {"first": [0, 2, 3, 9]})
    report = Compensation().calibrate(pruner, [x], progress=False).step(pruner)
    row = next(row for row in report.rows if row.name == "last")
    assert "not added" in row.skipped
