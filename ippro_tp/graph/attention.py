"""Attention with one Linear layer for query, key and value, as in timm: the sizes that pruning must update."""

from __future__ import annotations

from typing import Any

from torch import nn

from .numbers import set_registered


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """The fused ``qkv`` layers of a model and their numbers of heads, for ``num_heads=`` of a pruner.

    Args:
        model: every module with a Linear layer ``qkv`` and an int ``num_heads`` counts as attention.

    Example:
        >>> attention_heads(nn.Linear(2, 2))
        {}
    """
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        qkv, heads = getattr(module, "qkv", None), getattr(module, "num_heads", None)
        if isinstance(qkv, nn.Linear) and isinstance(heads, int) and qkv.out_features % (3 * heads) == 0:
            found[qkv] = heads
    return found


def update_attention(pruner: Any) -> None:
    """Update the numbers and sizes of heads that the attention modules of a pruned model store.

    Their forward pass reshapes by attributes (``num_heads``, ``head_dim``, ``attn_dim``, ``scale``) that
    Torch-Pruning does not update. So do other classes, by numbers that are registered
    (:func:`~ippro_tp.graph.numbers.register_numbers`; ``hidden_dim`` of torchvision's ViT is). Modules whose
    layers kept their widths are not touched.

    Args:
        pruner: a ``torch_pruning`` pruner built with ``num_heads=attention_heads(model)``, after its step.
    """
    heads = getattr(pruner, "num_heads", {})
    set_registered(pruner.model)
    for module in pruner.model.modules():
        qkv = getattr(module, "qkv", None)
        if not isinstance(qkv, nn.Linear) or qkv not in heads:
            continue
        count = heads[qkv]
        size = qkv.out_features // (3 * count)
        now = (getattr(module, "num_heads", None), getattr(module, "head_dim", None))
        if now[0] == count and now[1] in (size, None):
            continue
        module.num_heads = count
        for name, value in (("head_dim", size), ("attn_dim", count * size), ("scale", size**-0.5)):
            if isinstance(getattr(module, name, None), (int, float)):
                setattr(module, name, value)
