"""Numbers that forward passes keep as attributes, head sizes above all: set to what the cut layers have now."""

from __future__ import annotations

from torch import nn

from .structure import Structure


def update_numbers(model: nn.Module, structure: Structure) -> None:
    """Set integers of attention modules that stand for a width to the width after the cut.

    Args:
        model: the structure's model or a copy, cut.
        structure: of the model before the cut.
    """
    for prunable in structure.groups.values():
        if prunable.heads < 2:
            continue
        for layer in prunable.record.producers:
            owner = model.get_submodule(layer.name.rpartition(".")[0])
            produced = model.get_submodule(layer.name)
            if not isinstance(produced, nn.Linear):
                continue
            share = len(layer.index) // prunable.attended  # 3 for a joint layer of query, key and value
            before, after = prunable.attended, produced.out_features // share
            _replace(owner, {before: after, before // prunable.heads: after // prunable.heads})
    for module in model.modules():
        patches = getattr(module, "conv_proj", None)
        if type(module).__name__ == "VisionTransformer" and isinstance(patches, nn.Conv2d):  # torchvision's
            setattr(module, "hidden_dim", patches.out_channels)  # noqa: B010  # nn.Module types it as a module


def _replace(owner: nn.Module, numbers: dict[int, int]) -> None:
    """Set what an attention module keeps of its widths; the number of heads stays."""
    for name, value in list(vars(owner).items()):
        if type(value) is int and value in numbers and name not in ("num_heads", "num_attention_heads"):
            setattr(owner, name, numbers[value])
    size = getattr(owner, "head_dim", None)
    if isinstance(size, int) and isinstance(getattr(owner, "scale", None), float):
        owner.scale = size**-0.5
