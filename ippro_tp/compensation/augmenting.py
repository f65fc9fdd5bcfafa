"""The images that a distillation shows: mirrored, shifted and mixed by chance."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

MIRROR: Literal["mirror"] = "mirror"
SHIFT: Literal["shift"] = "shift"
MIX: Literal["mix"] = "mix"
BUILT_IN = (MIRROR, SHIFT, MIX)


def is_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model is called with nothing but ``(B, C, H, W)`` in floating point."""
    image = args[0] if len(args) == 1 and not kwargs else None
    return isinstance(image, Tensor) and image.dim() == 4 and image.is_floating_point()


def varied(images: Tensor, turned: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """``(B, C, H, W)``: those of ``turned`` mirrored; shifted unless ``how`` is "mirror", mixed if it is "mix"."""
    images = mirrored(images, turned)
    if how in (SHIFT, MIX):
        images = shifted(images, generator)
    return mixed(images, generator) if how == MIX else images


def mirrored(images: Tensor, turned: Tensor) -> Tensor:
    """``(B, C, H, W)``, those of ``turned`` mirrored left to right."""
    return torch.where(turned.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of ``(B, C, H, W)`` shifted by chance, by up to an eighth of its size, its border reflected."""
    count, _, height, width = images.shape
    down, right = height // 8, width // 8
    padded = nn.functional.pad(images, (right, right, down, down), mode="reflect")
    top = torch.randint(2 * down + 1, (count, 1), generator=generator) + torch.arange(height)
    left = torch.randint(2 * right + 1, (count, 1), generator=generator) + torch.arange(width)
    rows, columns = top.to(images.device)[:, None, :, None], left.to(images.device)[:, None, None, :]
    down_to = padded.gather(2, rows.expand(-1, images.shape[1], -1, padded.shape[3]))
    return down_to.gather(3, columns.expand(-1, images.shape[1], height, -1))


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """The first half of ``(B, C, H, W)``, each mixed with its predecessor by shares from a uniform distribution.

    mixup (Zhang et al. 2018) without labels: the unpruned model says what a mixed image is.
    """
    half = len(images) // 2
    share = torch.rand(half, 1, 1, 1, generator=generator).to(images)
    return torch.cat([share * images[:half] + (1 - share) * images.roll(1, 0)[:half], images[half:]])
