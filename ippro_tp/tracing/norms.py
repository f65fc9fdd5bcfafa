"""What a BatchNorm in eval mode does to each channel: a scale and a shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class NormScales:
    """Scales and shifts of a model's BatchNorm layers, computed once as long as they do not change."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], tuple[Tensor, Tensor]]] = {}

    def of(
        self, layer: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """``(scale, shift)``, each ``(channels,)``, float32 or wider, of a normalisation's call.

        Args:
            layer: name of the layer.
            func: the function of PyTorch that it calls.
            args: the call's arguments.
            kwargs: the same.

        Returns:
            ``None`` for anything but a BatchNorm that uses running statistics.
        """
        if func is not F.batch_norm:
            return None
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        if given.get("training", False) or given["running_mean"] is None or given["running_var"] is None:
            return None
        state = [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
        versions = tuple(-1 if t is None else t._version for t in state)
        if self._known.get(layer, (None,))[0] != versions:
            self._known[layer] = versions, _scale_and_shift(given)
        return self._known[layer][1]


@torch.no_grad()
def _scale_and_shift(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mean, variance = given["running_mean"], given["running_var"]
    wide = torch.promote_types(variance.dtype, torch.float32)
    scale = (variance.to(wide) + given.get("eps", 1e-5)).rsqrt()
    if given.get("weight") is not None:
        scale = scale * given["weight"].to(wide)
    shift = -mean.to(wide) * scale
    return scale, shift if given.get("bias") is None else shift + given["bias"].to(wide)
