"""Attention with one Linear layer for query, key and value: what a pruner must know and leave behind."""

from __future__ import annotations

from torch import nn


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Return the joint qkv layers of ``model`` with their numbers of heads, as ``num_heads`` of a TP pruner."""
    return {module.qkv: module.num_heads for module in model.modules() if _is_attention(module)}


def update_attention(pruner) -> None:
    """Tell the attention modules of a pruned model how many heads of which size they have now.

    The forward pass of timm's attention reshapes by numbers that it keeps as attributes, which TP does not know.
    """
    for module in pruner.model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and module.qkv in pruner.num_heads:
            module.num_heads = pruner.num_heads[module.qkv]
            head_dim = module.qkv.out_features // (3 * module.num_heads)
            sizes = {"head_dim": head_dim, "attn_dim": module.num_heads * head_dim, "scale": head_dim**-0.5}
            for name, value in sizes.items():
                if isinstance(getattr(module, name, None), int | float):
                    setattr(module, name, value)


def _is_attention(module: nn.Module) -> bool:
    qkv, heads = getattr(module, "qkv", None), getattr(module, "num_heads", None)
    return isinstance(qkv, nn.Linear) and isinstance(heads, int) and qkv.out_features % (3 * heads) == 0
