"""All of CIFAR-10 as 8-bit tensors on the device: 180 MB that never travel again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.errors import UsageError
from benchmarks.tasks.cifar10 import cifar_images

ARCHIVE = "cifar10.npz"
SPLITS = ("train", "test")
CLASSES = 10


@dataclass(frozen=True)
class Split:
    """8-bit images ``[N, 3, H, W]`` and integer labels ``[N]`` on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


def load(data_dir: Path, cache_dir: Path, device: torch.device) -> tuple[Split, Split]:
    """Return the training and the test images on ``device``.

    Args:
        data_dir: Holds ``cifar10.npz`` with ``train_images`` ``[N, 32, 32, 3]``, ``train_labels``, ``test_images``
            and ``test_labels``, or what the task ``cifar10`` takes.
        cache_dir: Where decoded images are kept.
        device: Where to put them.

    Raises:
        UsageError: There are no such images.
    """
    archive = data_dir / ARCHIVE
    if not archive.is_file():
        found = [cifar_images(data_dir, split, cache_dir) for split in SPLITS]
        return tuple(Split(f.images.to(device), f.labels.to(device)) for f in found)  # type: ignore[return-value]
    with np.load(archive) as arrays:
        names = [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]
        if missing := [name for name in names if name not in arrays]:
            raise UsageError(f"{archive} lacks {', '.join(missing)}")
        tensors = [torch.from_numpy(arrays[name]).to(device) for name in names]
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return tuple(Split(x.permute(0, 3, 1, 2).contiguous(), y.long()) for x, y in pairs)  # type: ignore[return-value]
