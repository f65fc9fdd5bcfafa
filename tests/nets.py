"""Small networks of every kind that matters, each with the layers a pruner must ignore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn


class Residual(nn.Module):
    """conv-bn-relu, two residual blocks with one shared in-place ReLU each, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv1": nn.Conv2d(6, 5, 3, padding=1, bias=False),
                    "bn1": nn.BatchNorm2d(5),
                    "conv2": nn.Conv2d(5, 6, 3, padding=1, bias=False),
                    "bn2": nn.BatchNorm2d(6),
                }
            )
            for _ in range(2)
        )
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            y = self.relu(block["bn1"](block["conv1"](x)))
            y = block["bn2"](block["conv2"](y))
            y += x
            x = self.relu(y)
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted residual: expand, depthwise, linear projection, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(True))
        self.expand = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True))
        self.dw = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True)
        )
        self.project = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.dw(self.expand(x)))
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches with biases and functional activations, concatenated, flattened into a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.c = nn.Conv2d(9, 6, 3, stride=2, padding=1)
        self.hidden = nn.Linear(6 * 16, 7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), F.silu(self.b(x))], 1)
        x = F.max_pool2d(F.relu_(self.c(x)), 1)
        return self.fc(torch.relu(self.hidden(x.flatten(1))))


class Transposed(nn.Module):
    """Strided conv, transposed conv, grouped conv."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.up(F.elu(self.down(x))), 0.1)
        return self.fc(F.relu(self.grouped(x)).mean((2, 3)))


class TransformerBlock(nn.Module):
    """Patch embedding, pre-norm attention with separate projections, MLP with GELU, final norm."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, stride=4)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 12), nn.Linear(12, dim)
        self.fc = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.proj(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.fc(self.norm3(x).mean(1))


@dataclass(frozen=True)
class Case:
    """A network, its input and what must not be pruned."""

    name: str
    build: Callable[[], nn.Module]
    ignored: tuple[str, ...] = ("fc",)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return model.to(dtype)  # the same numbers in every dtype

    def inputs(self, samples: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(0, 4, (samples,), generator=generator)

    def pruner(self, model: nn.Module, importance, **options) -> tp.pruner.BasePruner:
        return make_pruner(
            model,
            self.inputs(1, next(model.parameters()).dtype)[0],
            importance,
            [model.get_submodule(n) for n in self.ignored],
            **options,
        )


def make_pruner(model, example, importance, ignored=(), cls=None, **options):
    """A pruner with its own dictionaries: TP's defaults are shared between pruners."""
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    options = {"pruning_ratio": 0.5, **fresh, **options}
    return (cls or tp.pruner.BasePruner)(
        model, example, importance=importance, ignored_layers=list(ignored), **options
    )


CASES = {
    case.name: case
    for case in (
        Case("residual", Residual),
        Case("depthwise", Depthwise),
        Case("concat", Concat),
        Case("transposed", Transposed),
        Case("transformer", TransformerBlock, ("fc", "q", "k", "v")),
    )
}
