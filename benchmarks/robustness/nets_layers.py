"""Unusual layers and parameters: recurrent, called twice, parametrized, frozen, complex, of other precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.robustness.inputs import image, tokens, vector
from benchmarks.robustness.line import Line
from benchmarks.robustness.nets_calls import PLANTED, Encoder


class Recurrent(nn.Module):
    """LSTM or GRU between Linear layers."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(6, 16), kind(16, 12, batch_first=True)
        self.mid, self.head = nn.Linear(12, 14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        y, _ = self.rnn(F.relu(self.embed(x)))
        return self.head(F.relu(self.mid(y[:, -1])))


class Twice(nn.Module):
    """A layer called twice on what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.mid, self.head = (
            nn.Conv2d(3, 12, 3),
            nn.Conv2d(12, 12, 1),
            nn.Conv2d(12, 14, 1),
            nn.Linear(14, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.relu(self.stem(x))
        x = x + F.relu(self.shared(x))
        x = x + 0.5 * F.relu(self.shared(x))
        return self.head(F.relu(self.mid(x)).mean((2, 3)))


class Classifier(nn.Module):
    """An encoder and a head; weights treated by a function."""

    def __init__(self, treat: Any = None) -> None:
        super().__init__()
        self.encoder, self.mid, self.head = Encoder(), nn.Linear(16, 14), nn.Linear(14, 5)
        if treat is not None:
            treat(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.head(F.relu(self.mid(self.encoder(x))))


class Attention(nn.Module):
    """Patches, ``nn.TransformerEncoder`` with an optional padding mask, the first token out."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked, self.embed = masked, nn.Linear(6, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        mask = torch.arange(x.shape[1]) >= 4 + 3 * (x[:, :1, 0] > 0) if self.masked else None
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=mask)[:, 0])


class Gated(nn.Module):
    """SwiGLU from one layer, halves by chunk, and GEGLU from two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.both, self.down = nn.Linear(12, 16), nn.Linear(16, 40), nn.Linear(20, 16)
        self.gate, self.up, self.out, self.head = (
            nn.Linear(16, 18),
            nn.Linear(16, 18),
            nn.Linear(18, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.embed(x)
        a, b = self.both(x).chunk(2, -1)
        x = x + self.down(F.silu(a) * b)
        return self.head(x + self.out(F.gelu(self.gate(x)) * self.up(x)))


class Spectrum(nn.Module):
    """A layer of complex numbers in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wave, self.mid, self.head = (
            nn.Linear(12, 16),
            nn.Linear(9, 9, dtype=torch.cfloat),
            nn.Linear(16, 14),
            nn.Linear(14, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = torch.fft.irfft(self.wave(torch.fft.rfft(F.relu(self.embed(x)))), n=16)
        return self.head(F.relu(self.mid(x)))


class GroupNorms(nn.Module):
    """GroupNorm, InstanceNorm, grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gn, self.b = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, groups=4)
        self.norm, self.c, self.head = nn.InstanceNorm2d(16, affine=True), nn.Conv2d(16, 14, 1), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.head(F.relu(self.c(F.relu(self.norm(self.b(F.relu(self.gn(self.a(x)))))))).mean((2, 3)))


def _frozen(model: Classifier) -> None:
    model.encoder.requires_grad_(False)


def _spectral(model: Classifier) -> None:
    parametrizations.spectral_norm(model.encoder.a)


def _weight(model: Classifier) -> None:
    parametrizations.weight_norm(model.mid)


def _double(n: int, generator: torch.Generator) -> Tensor:
    return image(n, generator).double()


LINES = (
    Line("lstm", "an LSTM between layers", lambda: Recurrent(nn.LSTM), tokens, ("head",), "mid"),
    Line("gru", "a GRU between layers", lambda: Recurrent(nn.GRU), tokens, ("head", "rnn"), "mid"),
    Line("twice", "a layer called twice", Twice, image, ("head",), "mid"),
    Line("frozen", "a frozen backbone", lambda: Classifier(_frozen), image, ("head",), "mid"),
    Line("spectral-norm", "spectral_norm on a layer", lambda: Classifier(_spectral), image, ("head",), "mid"),
    Line("weight-norm", "weight_norm on a layer", lambda: Classifier(_weight), image, ("head",), *PLANTED),
    Line(
        "bfloat16",
        "a bfloat16 model",
        lambda: Classifier().bfloat16(),
        lambda n, g: image(n, g).bfloat16(),
        ("head",),
        *PLANTED,
    ),
    Line("float64", "a float64 model", lambda: Classifier().double(), _double, ("head",), *PLANTED),
    Line(
        "encoder",
        "nn.TransformerEncoder",
        lambda: Attention(False),
        tokens,
        ("head", "embed"),
        "encoder.layers.0.linear1",
    ),
    Line(
        "encoder-masked",
        "nn.TransformerEncoder with a padding mask",
        lambda: Attention(True),
        tokens,
        ("head", "embed"),
        "encoder.layers.0.linear1",
    ),
    Line("gated", "SwiGLU by chunk, GEGLU by two layers", Gated, vector, ("head",)),
    Line("complex", "a complex layer between", Spectrum, vector, ("head", "wave"), "mid"),
    Line("group-norms", "GroupNorm, InstanceNorm, grouped convolution", GroupNorms, image, ("head",), "c"),
)
