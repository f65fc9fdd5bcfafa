"""Networks of timm and torchvision, small, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.robustness.inputs import images
from benchmarks.robustness.line import Line


def timm_line(
    name: str, model: str, side: int, keep: tuple[str, ...], plant: str | None = None, **options: Any
) -> Line:
    """A model of timm, ten classes."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(model, num_classes=10, **options)

    return Line(name, f"timm {model}, small", build, images(side), keep, plant, samples=16)


SMALL = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24}
THIN = {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)}
TIMM = (
    timm_line(
        "swin",
        "swin_tiny_patch4_window7_224",
        56,
        ("head.fc", "*.qkv"),
        "layers.0.blocks.1.mlp.fc1",
        img_size=56,
        **SMALL,
    ),
    timm_line(
        "swinv2",
        "swinv2_tiny_window8_256",
        64,
        ("head.fc", "*.qkv", "*.cpb_mlp.*"),
        "layers.0.blocks.1.mlp.fc1",
        img_size=64,
        **SMALL,
    ),
    timm_line(
        "maxvit",
        "test_maxvit",
        64,
        ("head.fc", "*.qkv"),
        "stages.1.blocks.0.attn_grid.mlp.fc1",
        img_size=64,
        embed_dim=(32, 64),
        depths=(1, 1),
        block_type=("M", "M"),
    ),
    timm_line("vit", "test_vit", 64, ("head", "*.qkv"), "blocks.1.mlp.fc1", img_size=64),
    timm_line("vit-registers", "test_vit4", 64, ("head", "*.qkv"), "blocks.1.mlp.fc1", img_size=64, depth=3),
    timm_line(
        "eva",
        "eva02_tiny_patch14_224",
        56,
        ("head", "*.qkv"),
        "blocks.0.mlp.fc1",
        img_size=56,
        embed_dim=48,
        depth=2,
        num_heads=2,
    ),
    timm_line(
        "dinov3",
        "vit_tiny_patch16_dinov3_qkvb",
        64,
        ("head", "*.qkv"),
        "blocks.0.mlp.fc1",
        img_size=64,
        embed_dim=48,
        depth=2,
        num_heads=2,
    ),
    timm_line("mobilevit", "mobilevit_xxs", 64, ("head.fc", "*.qkv"), "stages.3.1.transformer.0.mlp.fc1"),
    timm_line("convnextv2", "convnextv2_atto", 64, ("head.fc",), None, **THIN),
    timm_line("convnext", "test_convnext", 64, ("head.fc",), "stages.1.blocks.0.mlp.fc1"),
    timm_line(
        "repvit",
        "repvit_m0_9",
        64,
        ("head.head.l", "head.head_dist.l"),
        embed_dim=(16, 24, 32, 48),
        depth=(1, 1, 2, 1),
    ),
    timm_line("fastvit", "fastvit_t8", 64, ("head.fc", "*.qkv"), "stages.3.blocks.0.mlp.fc1", layers=(1, 1, 1, 1)),
    timm_line("nfnet", "test_nfnet", 64, ("head.fc",)),
    timm_line("mambaout", "test_mambaout", 64, ("head.fc",)),
    timm_line("efficientnet", "test_efficientnet", 64, ("classifier",)),
)


# -- torchvision -------------------------------------------------------------------------------------------------


class SsdLite(nn.Module):
    """The trainable part of torchvision's ssdlite320: features and heads."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import ssdlite320_mobilenet_v3_large

        whole = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4, width_mult=0.5)
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores and offsets of the anchors."""
        return self.head(list(self.backbone(x).values()))


class MaskHeads(nn.Module):
    """torchvision's heads of Mask R-CNN on a small pyramid, two boxes an image, given."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.fpn = FeaturePyramidNetwork([12, 16], 14)
        self.box_pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
        self.mask_pool = MultiScaleRoIAlign(["0", "1"], 4, 2)
        self.box_head, self.box = TwoMLPHead(14 * 9, 24), FastRCNNPredictor(24, 4)
        self.mask_head, self.mask = MaskRCNNHeads(14, (16, 16), 1), MaskRCNNPredictor(16, 12, 4)

    def forward(self, x: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Classes, boxes and masks."""
        a = self.a(x).relu()
        maps = self.fpn({"0": a, "1": self.b(a).relu()})
        sizes = [tuple(x.shape[-2:])] * len(x)
        scores, offsets = self.box(self.box_head(self.box_pool(maps, list(boxes), sizes)))
        masks = self.mask(self.mask_head(self.mask_pool(maps, list(boxes), sizes)))
        return {name: t.unflatten(0, (len(x), 2)) for name, t in (("s", scores), ("o", offsets), ("m", masks))}


def _boxes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    corners = torch.rand(n, 2, 2, generator=generator) * 12
    return images(32)(n, generator), torch.cat(
        (corners, corners + 6 + 12 * torch.rand(n, 2, 2, generator=generator)), -1
    )


def _mobilenet() -> nn.Module:
    import torchvision

    return torchvision.models.mobilenet_v2(weights=None, num_classes=10, width_mult=0.15)


def _densenet() -> nn.Module:
    import torchvision

    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10)


TORCHVISION = (
    Line("mobilenet", "torchvision's MobileNetV2", _mobilenet, images(32), ("classifier.1",), samples=16),
    Line(
        "densenet",
        "torchvision's DenseNet",
        _densenet,
        images(32),
        ("classifier",),
        "features.denseblock1.denselayer1.conv1",
        "features.denseblock1.denselayer1.norm2",
        padded=True,
        samples=16,
    ),
    Line("ssdlite", "torchvision's ssdlite320, features and heads", SsdLite, images(96), ("head.*",), samples=16),
    Line(
        "mask-rcnn",
        "torchvision's heads of Mask R-CNN",
        MaskHeads,
        _boxes,
        ("box.cls_score", "box.bbox_pred", "mask.mask_fcn_logits"),
        "box_head.fc7",
    ),
)
LINES = (*TIMM, *TORCHVISION)
