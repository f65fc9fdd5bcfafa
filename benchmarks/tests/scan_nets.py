"""Networks for the scan, each with one property; a child process imports them by name."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.conv2(F.relu(self.bn1(self.conv1(x))))
        self.with_gradients(x)
        return self.fc(F.silu(x).mean((2, 3)))

    def with_gradients(self, x):
        """Called in the middle of every forward pass."""


class FixedWidth(Net):
    """Runs only while conv2 has 12 channels."""

    def with_gradients(self, x):
        x.view(len(x), 12, -1)


class Untraceable(Net):
    """Has no backward pass."""

    def with_gradients(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")


class Moody(Net):
    """Another activation at every call: nothing that magnitude minds."""

    calls = 0

    def forward(self, x):
        Moody.calls += 1
        x = self.bn1(self.conv1(x))
        x = self.conv2(F.relu(x) if Moody.calls % 2 else F.silu(x))
        return self.fc(x.mean((2, 3)))


class Large(Net):
    """Runs from 96 pixels on."""

    def forward(self, x):
        if x.shape[-1] < 96:
            raise ValueError("too small")
        return super().forward(x)


class Unbuildable(Net):
    """Runs with no input."""

    def forward(self, x):
        raise ValueError(f"{x.shape[-1]} pixels will not do")


class Sleeper(Net):
    """Never ends, but can be interrupted."""

    def with_gradients(self, x):
        time.sleep(600)


class Deaf(Net):
    """Never ends and cannot be interrupted."""

    def with_gradients(self, x):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(600)


class Hungry(Net):
    """Wants 64 GiB."""

    def with_gradients(self, x):
        if torch.is_grad_enabled():
            torch.zeros(2**34)


class Dying(Net):
    """Takes its process with it."""

    def with_gradients(self, x):
        if torch.is_grad_enabled():
            os._exit(3)
