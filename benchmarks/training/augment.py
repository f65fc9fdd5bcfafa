"""Augmentation of whole batches by tensor operations on their device; nothing waits for the host.

Images are ``[N, 3, H, W]`` with values 0 to 1; random numbers come from the device's default generator.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ANGLE, MAX_SHEAR, MAX_SCALE, MAX_COLOUR = math.radians(30), 0.3, 0.3, 0.8
"""What ``distortion=1`` reaches: radians, tangents, a factor 1 ± s, a factor 1 ± s."""


def shift_and_mirror(images: Tensor, padding: int = 4) -> Tensor:
    """Return each image shifted by up to ``padding`` pixels, black coming in, and mirrored by half of the time."""
    n, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=device)
    columns = left + torch.arange(width, device=device)
    mirrored = torch.rand(n, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height, device=device)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    sample = torch.arange(n, device=device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def distort(images: Tensor, strength: float) -> Tensor:
    """Return half of the images rotated, sheared and scaled, and half with other colours, drawn apart."""
    n, device = len(images), images.device

    def draw(largest: float, chance: Tensor) -> Tensor:
        return (2 * torch.rand(n, device=device) - 1) * (largest * strength) * chance

    moved, coloured = (torch.rand(2, n, device=device) < 0.5).float()
    angle, shear, scale = (draw(x, moved) for x in (MAX_ANGLE, MAX_SHEAR, MAX_SCALE))
    cos, sin, zero = angle.cos() * (1 + scale), angle.sin() * (1 + scale), torch.zeros_like(angle)
    rows = torch.stack([cos, cos * shear - sin, zero, sin, sin * shear + cos, zero], 1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid.to(images.dtype), mode="bilinear", align_corners=False)

    brightness, contrast, saturation = (1 + draw(MAX_COLOUR, coloured).view(-1, 1, 1, 1) for _ in range(3))
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp(0, 1)


def erase(images: Tensor, share: float, largest: float = 0.5) -> Tensor:
    """Return the images, of a ``share`` of which a rectangle of up to ``largest`` sides is noise."""
    n, device = len(images), images.device
    box = _boxes(images, largest * (0.3 + 0.7 * torch.rand(2, n, device=device)))
    hit = (torch.rand(n, device=device) < share)[:, None, None]
    return torch.where((box & hit)[:, None], torch.rand_like(images), images)


def _boxes(images: Tensor, sides: Tensor) -> Tensor:
    """Return masks ``[N, H, W]`` of one rectangle each, of given sides (parts of the whole), lying inside."""
    spans = []
    for size, side in zip(images.shape[2:], sides, strict=True):
        length = (side * size).round()
        start = (torch.rand(len(side), device=side.device) * (size - length + 1)).floor()
        place = torch.arange(size, device=side.device)
        spans.append((place >= start[:, None]) & (place < (start + length)[:, None]))
    return spans[0][:, :, None] & spans[1][:, None, :]


def mix(images: Tensor, targets: Tensor, draws: random.Random) -> tuple[Tensor, Tensor]:
    """Mix each image, and its target, with another one of the batch: by CutMix or by mixup, for the whole batch.

    Args:
        images: ``[N, 3, H, W]``.
        targets: Probabilities ``[N, classes]``.
        draws: Of the kind and, for mixup, the share.

    Returns:
        Images and targets, which hold both classes in the shares in which they can be seen.
    """
    partner = torch.randperm(len(images), device=images.device)
    if draws.random() < 0.5:
        own = draws.betavariate(0.8, 0.8)
        return own * images + (1 - own) * images[partner], own * targets + (1 - own) * targets[partner]
    side = (1 - torch.rand(len(images), device=images.device)).sqrt()
    box = _boxes(images, torch.stack([side, side]))
    share = box.float().mean((1, 2))[:, None].to(targets.dtype)
    pasted = torch.where(box[:, None], images[partner], images)
    return pasted, (1 - share) * targets + share * targets[partner]
