"""Kinds of layers that the rooms have to tell apart, and the registers of those that users may add to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

NOT_PRODUCERS = (nn.LayerNorm, nn.PReLU)

Norm = TypeVar("Norm", bound=type[nn.Module])
Function = TypeVar("Function", bound=Callable[..., Any])
_NORMS: list[type[nn.Module]] = [_BatchNorm, _InstanceNorm, nn.GroupNorm]
# fmt: off
_ACTIVATIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "prelu", "rrelu", "threshold", "gelu",
    "silu", "mish", "hardswish", "softplus", "softsign", "tanh", "sigmoid", "hardsigmoid", "logsigmoid",
    "relu_", "hardtanh_", "leaky_relu_", "elu_", "selu_", "celu_", "rrelu_", "threshold_", "silu_", "mish_",
    "hardswish_", "tanh_", "sigmoid_", "hardsigmoid_",
}
# fmt: on


def register_norm(cls: Norm) -> Norm:
    """Count a class of layers among the channel norms, as a decorator or a call.

    A channel norm works channel by channel (or on few channels), with its channels in dimension 1. It takes the
    scale of the filter before it away, so its affine ``weight`` and ``bias`` are the filter. A LayerNorm mixes all
    channels and is none.

    Example:
        >>> @register_norm
        ... class FilterNorm(nn.Module): ...
        >>> is_channel_norm(FilterNorm()), is_channel_norm(nn.LayerNorm(2))
        (True, False)
    """
    _NORMS.append(cls)
    return cls


def register_activation(function: Function) -> Function:
    """Count a function of PyTorch, built-in or a custom operator, among the activations that follow a layer.

    It has to be element-wise, with the tensor as its first argument.

    Example:
        >>> import torch
        >>> _ = register_activation(torch.erf)
        >>> is_activation("erf"), is_activation("softmax")
        (True, False)
    """
    _ACTIVATIONS.add(function.__name__)
    return function


def is_channel_norm(module: nn.Module) -> bool:
    """Whether a layer is a channel norm, see :func:`register_norm`."""
    return isinstance(module, tuple(_NORMS))


def is_activation(name: str) -> bool:
    """Whether the function of PyTorch that is called ``name`` counts as the activation after a layer."""
    return name in _ACTIVATIONS


def is_writer(module: nn.Module) -> bool:
    """Whether a layer writes channels of its own, although its inputs and outputs are pruned by one function.

    Torch-Pruning treats such layers like element-wise ones.
    """
    return is_channel_norm(module) or isinstance(module, (_ConvNd, nn.MultiheadAttention, nn.Embedding))


def forget_caches(module: nn.Module) -> None:
    """Empty dicts of plain tensors that a forward pass filled: they hold widths of the past."""
    for key, value in vars(module).items():
        if (
            key not in ("_parameters", "_buffers", "_modules")
            and isinstance(value, dict)
            and value
            and all(isinstance(v, Tensor) for v in value.values())
        ):
            value.clear()


@contextmanager
def unfused() -> Iterator[None]:
    """Transformer layers call their layers, without the fused path of inference and its nested tensors."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
