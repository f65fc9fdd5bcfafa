"""From decoded images to tensors: as the network wants them, for evaluation and for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform  # type: ignore[attr-defined]
from torch import Tensor
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

from .config import PruneRunConfig
from .listing import Listing, open_image


@dataclass(frozen=True)
class Labelled:
    """A transform of the image that leaves its class alone."""

    transform: Callable[..., Any]

    def __call__(self, image: Image.Image, target: int) -> tuple[Tensor, int]:
        """Return the tensor and the class."""
        return self.transform(image), target


def evaluation(data: dict[str, Any]) -> Callable[..., Any]:
    """Return timm's evaluation transform."""
    return create_transform(**data, is_training=False)


def augmentation(config: PruneRunConfig, data: dict[str, Any]) -> Callable[..., Any]:
    """Return the training transform of ``--augmentation``."""
    kind = config.augmentation
    if kind == "auto":
        kind = "shift" if config.library == "cifar" else "crop"
    size = data["input_size"][-1]
    how = transforms.InterpolationMode(data["interpolation"])
    normal = [transforms.ToTensor(), transforms.Normalize(data["mean"], data["std"])]
    mirror = [transforms.RandomHorizontalFlip()]
    if kind == "crop":
        geometry = [transforms.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=how), *mirror]
    elif kind == "shift":
        whole = [transforms.Resize((size, size), interpolation=how)]
        geometry = [*whole, transforms.RandomCrop(size, padding=size // 8), *mirror]
    elif kind == "flip":
        return transforms.Compose([*mirror, evaluation(data)])
    else:
        return evaluation(data)
    return transforms.Compose([*geometry, *normal])


def mask_size(config: PruneRunConfig, listing: Listing) -> tuple[int, int]:
    """Return height (``--img-size``) and width (in the proportions of the first image) for segmentation."""
    width, height = open_image(listing.train[0][0], "").size
    high = config.img_size or height
    return high, max(round(width / height * high / 8), 1) * 8


class SegmentationTransform:
    """An image and its mask, resized (or cropped at random and mirrored) alike."""

    def __init__(self, data: dict[str, Any], size: tuple[int, int], augment: bool = False) -> None:
        ratio = size[1] / size[0]
        crop = v2.RandomResizedCrop(size, scale=(0.4, 1.0), ratio=(0.9 * ratio, 1.1 * ratio))
        geometry = [crop, v2.RandomHorizontalFlip()] if augment else [v2.Resize(size)]
        to_float = v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True)
        self._transform = v2.Compose([*geometry, to_float, v2.Normalize(data["mean"], data["std"])])

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        """Return the image ``[3, H, W]`` in float32, and the mask ``[H, W]`` of class numbers in int64."""
        numbers = torch.from_numpy(np.array(mask)).long()[None]
        pair = tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(numbers)
        picture, classes = self._transform(*pair)
        return picture.as_subclass(Tensor), classes.as_subclass(Tensor)[0]
