"""Layers that multiply rows with their weight but are no ``nn.Linear``, refitted as if they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import over


class AsLinear:
    """A layer such as Hugging Face's ``Conv1D`` as a Linear layer over its own memory.

    Made anew after a cut, which replaces the weight.

    Args:
        module: the layer.
        leaf: name of its weight.
        out: axis of the weight along which its outputs lie.

    Raises:
        ValueError: it computes something else than a product with its weight, plus one of its parameters.
    """

    def __init__(self, module: nn.Module, leaf: str, out: int) -> None:
        self.module = module
        weight: Tensor = getattr(module, leaf)
        weight = weight if out == 0 else weight.t()
        self.layers = {"": over(weight, _bias(module, weight))}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer's own forward gives."""
        found: Tensor = self.layers[""](x)
        return found


@torch.no_grad()
def _bias(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The parameter that a layer adds to its products."""
    x = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(3, -1)
    rest = module.forward(x) - x @ weight.t()
    for bias in (None, *module._parameters.values()):
        if bias is None or bias.shape == rest.shape[1:]:
            wanted = torch.zeros_like(rest) if bias is None else bias.expand_as(rest)
            if torch.allclose(rest, wanted, rtol=1e-3, atol=1e-4 * float(weight.abs().max())):
                return bias
    raise ValueError("it does not add one of its parameters to a product with its weight")


def as_linear(module: nn.Module, leaf: str, out: int) -> AsLinear | None:
    """``module`` as a Linear layer, or ``None`` if it computes something else."""
    try:
        return AsLinear(module, leaf, out)
    except Exception:  # whatever a forward pass raises that takes something else than rows
        return None
