"""The networks of ``--library cifar``, for 32x32 images, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from .cifar_resnet import DEPTHS, CifarResNet
from .cifar_vgg import LAYOUTS, CifarVGG

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in DEPTHS},
    **{f"vgg{depth}": partial(CifarVGG, depth) for depth in LAYOUTS},
}
"""Each a function of ``num_classes``; the last Linear layer is the classifier."""


def frozen_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that belong to the architecture and are not trained."""
    pattern = getattr(model, "frozen_parameters", None)
    return () if pattern is None else tuple(n for n, _ in model.named_parameters() if pattern.search(n))
