"""Accuracy, and BatchNorm re-estimation after pruning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

Batch = tuple[Tensor, Tensor]


def accuracy(model: nn.Module, batches: Iterable[Batch], device: str | torch.device) -> float:
    """Return the top-1 accuracy of ``model``, in eval mode, as a fraction."""
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for images, labels in batches:
            images = images.to(device, memory_format=torch.channels_last)
            right += int((model(images).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return right / total


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch], device: str | torch.device) -> None:
    """Replace all BatchNorm statistics by those of ``batches`` (mean over batches); end in eval mode."""
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        update_bn((images.to(device, memory_format=torch.channels_last) for images, _ in batches), model)
    model.eval()
