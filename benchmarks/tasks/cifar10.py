"""Task ``cifar10``: networks for 32x32 images on torchvision's data set or on a tree of image folders."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, ImageFolder
from tqdm import tqdm

from benchmarks.errors import UsageError
from benchmarks.models.checkpoints import load_checkpoint
from benchmarks.models.cifar import NETWORKS, frozen_parameters
from benchmarks.tasks.base import Task, TaskConfig, TaskDefaults, TensorImages, flip_and_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DEFAULTS = TaskDefaults(
    criteria=(
        "random", "l1", "l2", "bn", "lamp", "fpgm", "fpgm-fixed", "taylor", "taylor-gate", "hessian",
        "hessian-fixed", "pro", "pro-paper-lam0.001", "pro-paper-lam1",
    ),
    targets=(0.9, 0.75, 0.6, 0.5),
    calibration_images=1000,
    test_images=2000,
)  # fmt: skip


def build(config: TaskConfig) -> Task:
    """Return the task for ``--model`` (resnet56 by default) with the weights in ``--checkpoint``."""
    name = config.model or "resnet56"
    if name not in NETWORKS:
        raise UsageError(f"unknown --model {name!r} for cifar10; known: {', '.join(NETWORKS)}")
    if config.checkpoint is None:
        raise UsageError("task cifar10 needs trained weights; give --checkpoint FILE.safetensors")
    if config.data_dir is None:
        raise UsageError(
            "task cifar10 needs --data-dir: torchvision's CIFAR-10 folder, or one with train/ and test/"
        )
    model = NETWORKS[name](num_classes=10)
    frozen = frozen_parameters(model)
    classifier = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    load_checkpoint(model, config.checkpoint, fixed=frozen)
    train, test = (cifar_images(config.data_dir, split, config.cache_dir) for split in ("train", "test"))
    example = test.batch(torch.tensor([0]))[0]
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    augment = functools.partial(flip_and_crop, border=black)
    return Task("cifar10", name, model, example, train, test, 10, (classifier,), frozen, augment)


def cifar_images(data_dir: Path, split: str, cache_dir: Path) -> TensorImages:
    """Return the ``train`` or ``test`` images; a folder of images is decoded once and kept in ``cache_dir``."""
    if (data_dir / "cifar-10-batches-py").is_dir():
        data = CIFAR10(data_dir, train=split == "train")
        return TensorImages(torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets), MEAN, STD)
    folder = data_dir / split
    if not folder.is_dir():
        raise UsageError(f"no {split} images: neither {data_dir / 'cifar-10-batches-py'} nor {folder} is a folder")
    listing = ImageFolder(folder)
    cached = cache_dir / f"cifar10_{split}_{len(listing)}.pt"
    if cached.exists():
        images = torch.load(cached, weights_only=True)
    else:
        images = _decode(listing, split)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.tmp")
        torch.save(images, partial)
        partial.replace(cached)
    return TensorImages(images, torch.tensor(listing.targets), MEAN, STD)


def _decode(listing: ImageFolder, split: str) -> Tensor:
    pixels = [np.asarray(listing[i][0]) for i in tqdm(range(len(listing)), desc=f"decoding {split}", unit="img")]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
