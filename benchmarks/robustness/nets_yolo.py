"""YOLO's blocks written out: C2f, C3k2, SPPF, Detect with DFL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.robustness.inputs import image
from benchmarks.robustness.line import Line


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, i: int, o: int, k: int = 1, s: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """YOLO's: two convolutions and a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvNorm(c, c, 3), ConvNorm(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        return x + self.cv2(self.cv1(x))


class C3k(nn.Module):
    """Two branches, one of them through bottlenecks."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = ConvNorm(c, c // 2), ConvNorm(c, c // 2), ConvNorm(c, c)
        self.m = nn.Sequential(Bottleneck(c // 2), Bottleneck(c // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """Chunks of one convolution, each block fed with the last, all concatenated."""

    def __init__(self, i: int, o: int, n: int = 2, k: bool = False) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = ConvNorm(i, o), ConvNorm((2 + n) * self.c, o)
        self.m = nn.ModuleList(C3k(self.c) if k else Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Pooled three times, concatenated."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvNorm(i, i // 2), ConvNorm(i * 2, o)

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        y = [self.cv1(x)]
        y.extend(F.max_pool2d(y[-1], 3, 1, 1) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Detect(nn.Module):
    """Boxes by distributions over distances (DFL) and classes, for each scale."""

    def __init__(self, channels: tuple[int, ...], classes: int = 4, bins: int = 4) -> None:
        super().__init__()
        self.bins, self.classes = bins, classes
        self.cv2 = nn.ModuleList(nn.Sequential(ConvNorm(c, 12, 3), nn.Conv2d(12, 4 * bins, 1)) for c in channels)
        self.cv3 = nn.ModuleList(nn.Sequential(ConvNorm(c, 12, 3), nn.Conv2d(12, classes, 1)) for c in channels)
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False)
        self.dfl.weight.data[:] = torch.arange(float(bins)).view(1, bins, 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """``(N, 4 + classes, anchors)``."""
        maps = [torch.cat((a(x), b(x)), 1) for a, b, x in zip(self.cv2, self.cv3, features, strict=True)]
        box, cls = torch.cat([m.flatten(2) for m in maps], 2).split((4 * self.bins, self.classes), 1)
        n, _, anchors = box.shape
        box = self.dfl(box.view(n, 4, self.bins, anchors).transpose(2, 1).softmax(1)).view(n, 4, anchors)
        return torch.cat((box, cls.sigmoid()), 1)


class Yolo(nn.Module):
    """A small detector of C2f (or C3k2) blocks, SPPF, one way down and up."""

    def __init__(self, k: bool = False) -> None:
        super().__init__()
        self.stem, self.c1 = ConvNorm(3, 16, 3, 2), C2f(16, 16, 1, k)
        self.down, self.c2, self.sppf = ConvNorm(16, 24, 3, 2), C2f(24, 24, 2, k), SPPF(24, 24)
        self.up, self.detect = C2f(40, 16, 1, k), Detect((16, 24))

    def forward(self, x: Tensor) -> Tensor:
        """Detections."""
        p3 = self.c1(self.stem(x))
        p4 = self.sppf(self.c2(self.down(p3)))
        p3 = self.up(torch.cat((F.interpolate(p4, scale_factor=2.0), p3), 1))
        return self.detect([p3, p4])


class OneC2f(nn.Module):
    """One C2f between a stem and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = ConvNorm(3, 16, 3), C2f(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.head(self.block(self.stem(x)).mean((2, 3)))


LINES = (
    Line(
        "c2f",
        "C2f: chunks, concatenated (YOLOv8)",
        OneC2f,
        image,
        ("head",),
        "block.m.0.cv1.conv",
        "block.m.0.cv1.bn",
        padded=True,
    ),
    Line(
        "yolo",
        "C2f, SPPF, Detect with DFL",
        Yolo,
        lambda n, g: torch.randn(n, 3, 16, 16, generator=g),
        ("detect.dfl", "detect.cv2.0.1", "detect.cv2.1.1", "detect.cv3.0.1", "detect.cv3.1.1"),
        "detect.cv2.0.0.conv",
        "detect.cv2.0.0.bn",
    ),
    Line(
        "c3k2",
        "C3k2 blocks (YOLO11)",
        lambda: Yolo(True),
        lambda n, g: torch.randn(n, 3, 16, 16, generator=g),
        ("detect.dfl", "detect.cv2.0.1", "detect.cv2.1.1", "detect.cv3.0.1", "detect.cv3.1.1"),
        "detect.cv2.0.0.conv",
        "detect.cv2.0.0.bn",
    ),
)
