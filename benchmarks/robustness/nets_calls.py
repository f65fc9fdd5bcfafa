"""Unusual inputs and outputs: containers, several tasks and scales, one encoder for two views, tied tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.robustness.inputs import image, pair, vector
from benchmarks.robustness.line import Line


class Encoder(nn.Module):
    """Convolution, BatchNorm, ReLU, 1x1 convolution, ReLU, means."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        return F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2, 3))


class Siamese(nn.Module):
    """One encoder called twice, distances out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(16, 8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Differences of the embeddings."""
        return self.head(self.encoder(a)) - self.head(self.encoder(b))


@dataclasses.dataclass
class Answer:
    """A model's own output class."""

    scores: Tensor
    depth: Tensor | None = None


class Heads(nn.Module):
    """One encoder, two tasks; the output in any of several containers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.encoder = how, Encoder()
        self.mid, self.one, self.two = nn.Linear(16, 14), nn.Linear(14, 5), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        """Whatever ``how`` says."""
        y = self.encoder(x)
        one, two = self.one(F.relu(self.mid(y))), self.two(y)
        if self.how == "dataclass":
            return Answer(one, two)
        if self.how == "nested":
            return {"tasks": {"scores": one, "more": [two, (two * 2, None)]}, "ids": torch.arange(len(x))}
        if self.how == "detached":
            return {"scores": one, "aux": self.two(y.detach())}
        return one, two


class Scales(nn.Module):
    """Maps of several sizes in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.down = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 14, 3, 2, 1),
        )
        self.m3, self.m4 = nn.Conv2d(12, 12, 1), nn.Conv2d(14, 12, 1)
        self.h3, self.h4 = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Two maps."""
        a = F.silu(self.bn(self.stem(x)))
        return [self.h3(F.silu(self.m3(a))), 100 * self.h4(F.silu(self.m4(F.silu(self.down(a)))))]


class Tokens(nn.Module):
    """An embedding of ids, an MLP in a residual stream, ``(N, L, C)`` or ``(N, C, L)`` or tied weights out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table, self.norm = how, nn.Embedding(30, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = (
            nn.Linear(12, 20),
            nn.Linear(20, 12),
            nn.Linear(12, 30 if how == "tied" else 6, bias=False),
        )
        if how == "tied":
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of each token."""
        x = self.table(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x.cumsum(1)))))
        x = x if mask is None else x * mask[..., None]
        y = self.head(x)
        return y.transpose(1, 2) if self.how == "channels" else y.mean(1) if self.how == "tied" else y


class Normalised(nn.Module):
    """Embeddings of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mid, self.head = Encoder(), nn.Linear(16, 14), nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings."""
        return F.normalize(self.head(F.relu(self.mid(self.encoder(x)))), dim=1)


def ids(n: int, generator: torch.Generator) -> Tensor:
    """Seven ids."""
    return torch.randint(0, 30, (n, 7), generator=generator)


def masked_ids(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids and a mask, by name, the mask first."""
    return {"mask": (torch.rand(n, 7, generator=generator) > 0.3).float(), "ids": ids(n, generator)}


def _heads(how: str) -> Line:
    return Line(f"outputs-{how}", f"two heads, {how} output", lambda: Heads(how), image, ("one", "two"), "mid")


PLANTED = ("encoder.a", "encoder.bn")
LINES = (
    Line("siamese", "one encoder called twice", Siamese, pair, ("head",), *PLANTED),
    _heads("tuple"),
    _heads("dataclass"),
    _heads("nested"),
    _heads("detached"),
    Line("outputs-scales", "maps of several sizes, one a hundred times larger", Scales, image, ("h3", "h4"), "m3"),
    Line("tokens", "token classifier, (N, L, C)", lambda: Tokens("tokens"), ids, ("head", "table"), "up"),
    Line("channels", "token classifier, (N, C, L)", lambda: Tokens("channels"), ids, ("head", "table"), "up"),
    Line(
        "dict-inputs",
        "inputs by name, the mask first",
        lambda: Tokens("tokens"),
        masked_ids,
        ("head", "table"),
        "up",
    ),
    Line("tied", "embedding and head share a table", lambda: Tokens("tied"), ids, ("head", "table"), "up"),
    Line("normalised", "embeddings of length one", Normalised, image, ("head",), "mid"),
    Line(
        "regression",
        "one number out",
        lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 14), nn.Tanh(), nn.Linear(14, 1)),
        vector,
        ("4",),
        "0",
        samples=128,
    ),
)
