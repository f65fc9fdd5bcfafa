"""The harness's own networks for 32x32 images, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.models import MobileNetV2

from benchmarks.models.cifar_resnet import DEPTHS, CifarResNet
from benchmarks.models.cifar_vgg import LAYOUTS, CifarVGG

# Expansion, channels, blocks, stride: as torchvision's, but two strides are left out, which 32x32 images bear.
MOBILENET = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def cifar_mobilenetv2(num_classes: int = 10) -> MobileNetV2:
    """Return torchvision's MobileNetV2 with the first two strides of two set to one."""
    model = MobileNetV2(num_classes, inverted_residual_setting=MOBILENET)
    model.features[0][0].stride = (1, 1)
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in DEPTHS},
    **{f"vgg{depth}": partial(CifarVGG, depth) for depth in LAYOUTS},
    "vgg19_quarter": partial(CifarVGG, 19, width=0.25),
    "mobilenetv2": cifar_mobilenetv2,
}
"""Each a function of ``num_classes``; the last Linear layer is the classifier."""


def frozen_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that belong to the architecture and are not trained."""
    pattern = getattr(model, "frozen_parameters", None)
    return () if pattern is None else tuple(n for n, _ in model.named_parameters() if pattern.search(n))
