"""The harness's own networks for 32x32 images, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torchvision.models import DenseNet, MobileNetV2

from benchmarks.models.transformers import TRANSFORMERS
from ippro_tp.cli import cifar
from ippro_tp.cli.cifar import frozen_parameters
from ippro_tp.cli.cifar_vgg import CifarVGG

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


def half_mobilenetv2(num_classes: int = 10) -> MobileNetV2:
    """Return torchvision's MobileNetV2 of half the width with the stem's stride alone set to one."""
    model = MobileNetV2(num_classes, width_mult=0.5)
    model.features[0][0].stride = (1, 1)
    return model


def quarter_resnetd(block: type[nn.Module], num_classes: int = 10) -> ResNet:
    """Return timm's ResNet-18-D (BasicBlock) or -26-D (Bottleneck) of a quarter of the width, not pooled first."""
    model = ResNet(
        block, (2, 2, 2, 2), num_classes, stem_type="deep", stem_width=8, avg_down=True, channels=(16, 32, 64, 128)
    )
    model.maxpool = nn.Identity()
    return model


def densenet40(num_classes: int = 10) -> DenseNet:
    """Return torchvision's DenseNet of 40 layers that each add 12 channels, without max-pooling."""
    model = DenseNet(12, (6, 6, 6), 24, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **cifar.NETWORKS,
    "vgg19_quarter": partial(CifarVGG, 19, width=0.25),
    "mobilenetv2": cifar_mobilenetv2,
    "mobilenetv2_half": half_mobilenetv2,
    "resnet18d_quarter": partial(quarter_resnetd, BasicBlock),
    "resnet26d_quarter": partial(quarter_resnetd, Bottleneck),
    "densenet40": densenet40,
    **TRANSFORMERS,
}
"""Each a function of ``num_classes``; the last Linear layer is the classifier."""

__all__ = ["NETWORKS", "frozen_parameters"]
