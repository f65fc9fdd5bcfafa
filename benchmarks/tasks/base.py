"""What a task is: a trained network, images to calibrate, tune and test on, and the layers to leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Images ``[N, C, H, W]`` after the evaluation transform, and integer labels ``[N]``."""

HELDOUT_FRACTION = 0.1
SPLIT_SEED = 0


@dataclass(frozen=True)
class TaskConfig:
    """Which task, network and data; the flags mean what they mean in timm."""

    task: str = "digits"
    """digits, cifar10 or imagefolder."""
    model: str = ""
    """Network; empty for the task's own default."""
    data_dir: Path | None = None
    """Folder of the images."""
    checkpoint: Path | None = None
    """Weights: .safetensors, or a PyTorch state dict."""
    pretrained: bool = False
    """Download the library's own weights (imagefolder only)."""
    crop_pct: float | None = None
    """Part of the resized image that the centre crop keeps (imagefolder only); 1 for images as they are."""
    batch_size: int = 250
    """Images per forward pass, in calibration, BatchNorm re-estimation and test."""
    cache_dir: Path = Path("runs/cache")
    """Where decoded images and the digits network are kept."""
    device: str = "cpu"
    """Where networks run: cpu, cuda, cuda:1."""


@dataclass(frozen=True)
class TaskDefaults:
    """The grid that ``compare`` runs for a task when the command line names no other."""

    criteria: tuple[str, ...]
    targets: tuple[float, ...]
    calibration_images: int
    scopes: tuple[str, ...] = ("local", "global")
    seeds: tuple[int, ...] = (0, 1, 2)
    test_images: int = 0
    costs: tuple[str, ...] = ("none",)
    depletions: tuple[str, ...] = ("none",)


class ImageSet(Protocol):
    """Images that can be read by position."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def batch(self, indices: Tensor) -> Batch:
        """Return the transformed images and labels at ``indices``, in that order."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Decoded 8-bit images in memory, normalised when read."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Batch:
        """Return normalised images ``[N, C, H, W]`` in float32, and labels."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (self.images[indices].float() / 255 - mean) / std, self.labels[indices]


@dataclass
class Task:
    """A trained network with its data. Every split is a pure function of its seed."""

    name: str
    model_name: str
    model: nn.Module
    example: Tensor
    train: ImageSet
    test: ImageSet
    num_classes: int
    ignored: tuple[str, ...]
    """Names of layers that keep their outputs: the classifier."""
    frozen: tuple[str, ...] = ()
    """Names of parameters that fine-tuning leaves alone."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    """Training-time augmentation of a batch, for fine-tuning and, if asked, BatchNorm re-estimation."""
    _split: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held_out = int(len(order) * HELDOUT_FRACTION)
        self._split = order[held_out:], order[:held_out]

    def calibration(self, seed: int, count: int, batch_size: int) -> list[Batch]:
        """Draw ``count`` images of the training split without replacement, with the evaluation transform."""
        pool = self._split[0]
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return [self.train.batch(pool[part]) for part in order[:count].split(batch_size)]

    def augmented(self, batches: list[Batch], seed: int) -> list[Batch]:
        """Return ``batches`` as training would show them."""
        if self.augment is None:
            return batches
        generator = torch.Generator().manual_seed(seed)
        return [(self.augment(images, generator), labels) for images, labels in batches]

    def evaluation(self, split: str, limit: int, batch_size: int) -> Iterator[Batch]:
        """Yield the ``test`` split, or the ``heldout`` part of train, or ``limit`` random ones of it (0: all)."""
        images = self.test if split == "test" else self.train
        pool = torch.arange(len(images)) if split == "test" else self._split[1]
        if 0 < limit < len(pool):
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(SPLIT_SEED))
            pool = pool[order[:limit].sort().values]
        for part in pool.split(batch_size):
            yield images.batch(part)

    @property
    def training_images(self) -> int:
        """Return the number of images of an epoch of :meth:`training`."""
        return len(self._split[0])

    def training(self, generator: torch.Generator, batch_size: int) -> Iterator[Batch]:
        """Yield one augmented, shuffled epoch of the training split without its held-out part."""
        pool = self._split[0]
        for part in pool[torch.randperm(len(pool), generator=generator)].split(batch_size):
            images, labels = self.train.batch(part)
            yield (self.augment(images, generator) if self.augment else images), labels


def flip_and_crop(
    images: Tensor, generator: torch.Generator, padding: int = 4, border: Tensor | None = None
) -> Tensor:
    """Return ``images`` mirrored at random, and shifted by up to ``padding`` pixels.

    Args:
        images: ``[N, C, H, W]``.
        generator: Of the shifts and reflections.
        padding: Largest shift.
        border: Value of each channel beyond the border, ``[C]``: that of black, which is not 0 where images are
            normalised. BatchNorm statistics are other ones with borders of the mean colour. ``None``: 0.
    """
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    height, width = images.shape[-2:]
    beyond = torch.zeros(images.shape[1]) if border is None else border
    padded = torch.nn.functional.pad(images - beyond.view(-1, 1, 1), (padding,) * 4) + beyond.view(-1, 1, 1)
    top, left = torch.randint(0, 2 * padding + 1, (2, len(images)), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    sample, channel = (
        torch.arange(len(images))[:, None, None, None],
        torch.arange(images.shape[1])[None, :, None, None],
    )
    return padded[sample, channel, rows, columns]
