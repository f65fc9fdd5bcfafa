"""Transformers and their hybrids for 32x32 images: the kinds that people use, small enough to train in minutes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


def vit(num_classes: int = 10, dim: int = 192, depth: int = 6, heads: int = 3) -> VisionTransformer:
    """Return timm's pre-norm ViT with a class token on 8x8 patches of 4x4 pixels."""
    return VisionTransformer(
        img_size=32,
        patch_size=4,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        drop_path_rate=0.1,
    )


class CCT(nn.Module):
    """Compact Convolutional Transformer (Hassani et al. 2021, arXiv 2104.05704).

    A tokenizer of 3x3 convolutions, each with ReLU and a 3x3 max-pooling of stride two; learned positions;
    pre-norm blocks; and sequence pooling: the mean of all tokens, weighted by a softmax over what a Linear layer
    gives each. CCT-2/3x2 is the default: two convolutions, two blocks of width 128 with two heads and an MLP of
    the same width.

    Args:
        num_classes: Number of outputs.
        dim: Width of the stream.
        depth: Number of blocks.
        heads: Heads of each attention.
        mlp_ratio: Width of the MLP's hidden layer over ``dim``.
        stem: Outputs of the tokenizer's first convolutions; ``dim`` is the last one's.
    """

    def __init__(
        self,
        num_classes: int = 10,
        dim: int = 128,
        depth: int = 2,
        heads: int = 2,
        mlp_ratio: float = 1.0,
        stem: tuple[int, ...] = (64,),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for planes, out in zip((3, *stem), (*stem, dim), strict=True):
            layers += [nn.Conv2d(planes, out, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        self.tokenizer = nn.Sequential(*layers)
        side = 32 >> (len(stem) + 1)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, dim))
        rates = torch.linspace(0, 0.1, depth).tolist()
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, drop_path=rate) for rate in rates))
        self.norm = nn.LayerNorm(dim)
        self.pool = nn.Linear(dim, 1)
        self.fc = nn.Linear(dim, num_classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``[N, 3, 32, 32]``."""
        x = self.tokenizer(x).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x + self.pos_embed))
        weights = self.pool(x).softmax(1)
        return self.fc((weights * x).sum(1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)


def convnext(num_classes: int = 10) -> ConvNeXt:
    """Return timm's ConvNeXt with a stem of stride two, and kernels that shrink with the maps: 7, 5, 3."""
    model = ConvNeXt(
        num_classes=num_classes,
        depths=(2, 2, 6, 1),
        dims=(64, 128, 256, 384),
        kernel_sizes=(7, 5, 3, 3),
        drop_path_rate=0.1,
    )
    model.stem[0] = nn.Conv2d(3, 64, 2, stride=2)  # patch_size=2 would halve the maps once more
    nn.init.trunc_normal_(model.stem[0].weight, std=0.02)
    nn.init.zeros_(model.stem[0].bias)
    return model


def swin(num_classes: int = 10) -> SwinTransformer:
    """Return timm's Swin Transformer on 16x16 patches of 2x2 pixels, with windows of 4x4, shifted by turns."""
    return SwinTransformer(
        img_size=32,
        patch_size=2,
        num_classes=num_classes,
        embed_dim=64,
        depths=(2, 4, 2),
        num_heads=(2, 4, 8),
        window_size=4,
        drop_path_rate=0.1,
    )


def mobilevit(num_classes: int = 10) -> ByobNet:
    """Return MobileViT with the widths of timm's ``mobilevit_xs``, whose first and last strides of two are one."""
    first, second, *rest = ((32, 1, 1), (48, 2, 2), (64, 2, 96, 2), (80, 2, 120, 4), (96, 1, 144, 3))
    blocks: list = [_inverted_residual(channels, stride, depth) for channels, stride, depth in (first, second)]
    for channels, stride, dim, depth in rest:
        settings = {"transformer_dim": dim, "transformer_depth": depth, "patch_size": 2}
        attention = ByoBlockCfg(type="mobilevit", d=1, c=channels, s=1, block_kwargs=settings)
        blocks.append((_inverted_residual(channels, stride, 1), attention))
    layout = ByoModelCfg(
        blocks=tuple(blocks),
        stem_chs=16,
        stem_type="3x3",
        stem_pool="",
        downsample="",
        act_layer="silu",
        num_features=384,
    )
    model = ByobNet(layout, num_classes=num_classes)
    model.stem.conv.stride = (1, 1)
    return model


def _inverted_residual(channels: int, stride: int, depth: int) -> ByoBlockCfg:
    settings = {"bottle_in": True, "linear_out": True}
    return ByoBlockCfg(type="bottle", d=depth, c=channels, s=stride, gs=1, br=4.0, block_kwargs=settings)


TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "cct2_3x2": CCT,
    "convnext": convnext,
    "swin": swin,
    "mobilevit": mobilevit,
}
"""Each a function of ``num_classes``; the last Linear layer is the classifier."""
