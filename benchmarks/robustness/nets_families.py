"""Networks of the kinds that people write themselves: segmentation, detection, audio, video, generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.robustness.inputs import image, vector
from benchmarks.robustness.line import Line
from benchmarks.robustness.nets_yolo import ConvNorm


class UNet(nn.Module):
    """Down and up with skips; ``out`` channels a pixel."""

    def __init__(self, out: int = 4, transposed: bool = False) -> None:
        super().__init__()
        self.d1, self.d2, self.mid = ConvNorm(3, 12, 3), ConvNorm(12, 16, 3), ConvNorm(16, 20, 3)
        self.t2 = nn.ConvTranspose2d(20, 16, 2, 2) if transposed else nn.Upsample(scale_factor=2)
        self.u2 = ConvNorm((16 if transposed else 20) + 16, 16, 3)
        self.u1, self.head = ConvNorm(16 + 12, 12, 3), nn.Conv2d(12, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map of scores."""
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        y = self.u2(torch.cat((self.t2(self.mid(F.max_pool2d(b, 2))), b), 1))
        return self.head(self.u1(torch.cat((F.interpolate(y, scale_factor=2.0, mode="bilinear"), a), 1)))


class Conv1d(nn.Module):
    """Raw audio: strided and dilated 1D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv1d(1, 12, 8, 4), nn.BatchNorm1d(12)
        self.b, self.c = nn.Conv1d(12, 16, 3, dilation=2), nn.Conv1d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.bn(self.a(x))))))).amax(-1))


class Conv3d(nn.Module):
    """Clips: 3D convolutions, a residual, pooled over time and space."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv3d(3, 12, 3, padding=1), nn.BatchNorm3d(12)
        self.b, self.c, self.head = nn.Conv3d(12, 16, 1), nn.Conv3d(16, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.relu(self.bn(self.a(x)))
        return self.head((x + self.c(F.relu(self.b(F.avg_pool3d(x, 1))))).mean((2, 3, 4)))


class Detr(nn.Module):
    """A backbone, an encoder, a decoder on learned queries, two heads."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.stem, self.proj = ConvNorm(3, 12, 3, 2), nn.Conv2d(12, d, 1)
        self.encoder = nn.TransformerEncoderLayer(d, 2, 24, batch_first=True, dropout=0.0)
        self.decoder = nn.TransformerDecoderLayer(d, 2, 24, batch_first=True, dropout=0.0)
        self.query, self.row, self.col = (
            nn.Embedding(5, d),
            nn.Parameter(torch.rand(4, d)),
            nn.Parameter(torch.rand(4, d)),
        )
        self.cls, self.box = nn.Linear(d, 4), nn.Sequential(nn.Linear(d, 20), nn.ReLU(), nn.Linear(20, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Classes and boxes of the queries."""
        x = self.proj(self.stem(x))
        place = (self.row[:, None] + self.col[None]).flatten(0, 1)
        memory = self.encoder(x.flatten(2).transpose(1, 2) + place)
        y = self.decoder(self.query.weight[None].expand(len(x), -1, -1), memory)
        return {"logits": self.cls(y), "boxes": self.box(y).sigmoid()}


class BiFPN(nn.Module):
    """Two scales fused both ways by learned, normalised weights; heads shared by the scales."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.stem, self.down = ConvNorm(3, 12, 3, 2), ConvNorm(12, 20, 3, 2)
        self.l3, self.l4 = nn.Conv2d(12, c, 1), nn.Conv2d(20, c, 1)
        self.w1, self.w2 = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        self.f3, self.f4 = (nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, groups=c), ConvNorm(c, c)) for _ in range(2))
        self.tower, self.cls, self.box = ConvNorm(c, 18, 3), nn.Conv2d(18, 6, 1), nn.Conv2d(18, 8, 1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Classes and boxes, a map for each scale."""
        a = self.stem(x)
        p3, p4 = self.l3(a), self.l4(self.down(a))
        w1, w2 = F.relu(self.w1), F.relu(self.w2)
        p3 = self.f3((w1[0] * p3 + w1[1] * F.interpolate(p4, scale_factor=2.0)) / (w1.sum() + 1e-4))
        p4 = self.f4((w2[0] * p4 + w2[1] * F.max_pool2d(p3, 2) + w2[2] * p4) / (w2.sum() + 1e-4))
        towers = [self.tower(p) for p in (p3, p4)]
        return [self.cls(t) for t in towers], [self.box(t) for t in towers]


class Vae(nn.Module):
    """Draws noise in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mean, self.log = nn.Linear(12, 24), nn.Linear(24, 6), nn.Linear(24, 6)
        self.dec, self.out = nn.Linear(6, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction."""
        h = F.relu(self.enc(x))
        mean = self.mean(h)
        return self.out(F.relu(self.dec(mean + torch.randn_like(mean) * (0.5 * self.log(h)).exp())))


class SuperResolution(nn.Module):
    """Residual features, pixel shuffle, a skip from the resized input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(12, 20, 3, padding=1),
            nn.Conv2d(20, 12, 1),
        )
        self.up, self.out = nn.Conv2d(12, 32, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The image at twice the size."""
        y = F.relu(self.a(x))
        y = F.relu(F.pixel_shuffle(self.up(y + self.c(F.leaky_relu(self.b(y), 0.2))), 2))
        return self.out(y) + F.interpolate(x, scale_factor=2.0, mode="bilinear")


class Generator(nn.Module):
    """From a vector to an image by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16 * 4)
        self.a, self.bn, self.b = (
            nn.ConvTranspose2d(16, 12, 4, 2, 1),
            nn.BatchNorm2d(12),
            nn.ConvTranspose2d(12, 3, 4, 2, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images."""
        return self.b(F.relu(self.bn(self.a(F.relu(self.fc(z)).view(-1, self.a.in_channels, 2, 2))))).tanh()


class Shuffle(nn.Module):
    """A ShuffleNet unit: halves, depthwise, channel shuffle; squeeze and excitation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.d, self.b = (
            ConvNorm(3, 16, 3),
            ConvNorm(8, 8),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8),
            ConvNorm(8, 8),
        )
        self.squeeze, self.excite, self.head = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat((left, self.b(self.d(self.a(right)))), 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(F.relu(x).mean((2, 3)))


class RolledChannels(nn.Module):
    """Channels rolled and shifted between layers, as in TSM and S2-MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.relu(self.a(x))
        return self.head(F.relu(self.b(torch.roll(x, 3, dims=1) * torch.sigmoid(x))).mean((2, 3)))


LINES = (
    Line(
        "unet", "U-Net with skips, segmentation logits", UNet, image, ("head",), "mid.conv", "mid.bn", padded=True
    ),
    Line(
        "unet-transposed",
        "U-Net with transposed convolutions",
        lambda: UNet(transposed=True),
        image,
        ("head",),
        "mid.conv",
        "mid.bn",
    ),
    Line(
        "conv1d", "1D convolutions", Conv1d, lambda n, g: torch.randn(n, 1, 96, generator=g), ("head",), "a", "bn"
    ),
    Line(
        "conv3d",
        "3D convolutions",
        Conv3d,
        lambda n, g: torch.randn(n, 3, 4, 6, 6, generator=g),
        ("head",),
        "b",
        padded=True,
    ),
    Line("detr", "DETR: encoder, decoder, queries", Detr, image, ("cls", "box.2"), "box.0"),
    Line("bifpn", "BiFPN and shared heads (EfficientDet)", BiFPN, image, ("cls", "box"), "tower.conv", "tower.bn"),
    Line(
        "vae",
        "a VAE that draws noise in eval",
        Vae,
        vector,
        ("out", "mean", "log"),
        "dec",
        draws=True,
        samples=128,
    ),
    Line("super-resolution", "image to image, pixel shuffle", SuperResolution, image, ("out",), "b"),
    Line(
        "generator",
        "transposed convolutions from a vector",
        Generator,
        lambda n, g: torch.randn(n, 8, generator=g),
        ("b",),
        "a",
        "bn",
        padded=True,
    ),
    Line("shuffle", "channel shuffle, squeeze and excitation", Shuffle, image, ("head",), "squeeze"),
    Line("rolled-channels", "torch.roll along channels", RolledChannels, image, ("head",), "b"),
)
