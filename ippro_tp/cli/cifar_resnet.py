"""CIFAR ResNet-20/32/44/56 with option-A shortcuts that a dependency graph can prune.

The classic CIFAR ResNet (He et al. 2016, Sec. 4.2) has no parameters in its shortcuts: where the stage
changes, the input is subsampled by two and padded with zero channels. A dependency graph cannot follow such
padding, so the residual streams would stay out of reach. The same map is a 1x1 convolution of stride two with
fixed weights 0 and 1; it is exact to the bit, and prunable.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEPTHS = (20, 32, 44, 56)


def option_a_shortcut(in_planes: int, planes: int) -> nn.Conv2d:
    """Return the 1x1 stride-2 convolution that equals ``pad(x[:, :, ::2, ::2])`` with zero channels around."""
    conv = nn.Conv2d(in_planes, planes, kernel_size=1, stride=2, bias=False)
    offset = planes // 4
    weight = torch.zeros(planes, in_planes)
    weight[offset : offset + in_planes] = torch.eye(in_planes)
    conv.weight.data.copy_(weight[:, :, None, None])
    return conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a fixed 1x1 convolution where the shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Identity() if stride == 1 else option_a_shortcut(in_planes, planes)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(residual(x) + shortcut(x))``."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth ``6 n + 2`` for 32x32 images: three stages of ``n`` blocks with 16, 32 and 64 channels."""

    frozen_parameters = re.compile(r"\.shortcut\.weight$")
    """Parameters that belong to the architecture and are not trained."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"no CIFAR ResNet of depth {depth}; known depths: {', '.join(map(str, DEPTHS))}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``[N, 3, 32, 32]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
