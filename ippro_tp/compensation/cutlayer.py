"""A Conv or Linear layer while Torch-Pruning cuts it: which outputs are left, and its weight as matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

PLAIN_FORWARDS = {
    layer.forward
    for layer in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}
"""Layers that use their weight as it is."""


class CutLayer:
    """Follows a layer through the cuts.

    Args:
        name: dotted module name.
        module: the layer, not yet pruned.
        norm: the BatchNorm that alone reads its output, if there is one.
    """

    def __init__(self, name: str, module: nn.Linear | _ConvNd, norm: _BatchNorm | None) -> None:
        self.name, self.module, self._norm = name, module, norm
        self._transposed = isinstance(module, _ConvNd) and module.transposed
        self.all_inputs = module.in_channels if isinstance(module, _ConvNd) else module.in_features
        outputs = module.out_channels if isinstance(module, _ConvNd) else module.out_features
        self._outputs = list(range(outputs))

    @property
    def inputs(self) -> int:
        """Input channels (columns of a Linear layer) that are left."""
        return self.module.in_channels if isinstance(self.module, _ConvNd) else self.module.in_features

    @property
    def outputs(self) -> Tensor:
        """``(outputs left,)`` int64: their numbers before the cuts."""
        return torch.tensor(self._outputs)

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a Linear layer."""
        return self.module.groups if isinstance(self.module, _ConvNd) else 1

    @property
    def features(self) -> int:
        """What one filter reads: channels of its group times taps."""
        weight: Tensor = self.module.weight
        across = 0 if self._transposed else 1
        return weight[0].numel() if across else weight.numel() // (self.groups * weight.shape[1])

    @property
    def constant(self) -> str:
        """Where a change of the mean output can go: ``"bias"``, ``"norm"`` or, if nowhere, ``""``."""
        if self.module.bias is not None:
            return "bias"
        return "norm" if self._norm is not None and self._norm.running_mean is not None else ""

    @property
    def unfit(self) -> str:
        """Why the weight cannot be changed; empty if it can."""
        if parametrize.is_parametrized(self.module) or hasattr(self.module, "weight_g"):
            return "its weight is parametrized"
        if type(self.module).forward not in PLAIN_FORWARDS and not _is_linear_after_all(self.module):
            return "its class has a forward of its own, which may change the weight (standardisation, say)"
        return ""

    def remove_outputs(self, idxs: Iterable[int]) -> None:
        """Note that the output channels ``idxs``, in present numbering, are about to be cut."""
        gone = set(idxs)
        self._outputs = [c for i, c in enumerate(self._outputs) if i not in gone]

    def matrix(self) -> Tensor:
        """``(groups, features, outputs of a group)`` float64: the weight."""
        weight: Tensor = self.module.weight.detach().double()
        if self._transposed:  # (inputs, outputs of a group, *kernel)
            matrix: Tensor = weight.flatten(2).unflatten(0, (self.groups, -1)).transpose(2, 3).flatten(1, 2)
        else:
            matrix = weight.flatten(1).unflatten(0, (self.groups, -1)).transpose(1, 2)
        return matrix

    def add(self, delta: Tensor | None, constant: Tensor | None) -> None:
        """Change the weight by ``(groups, features, outputs)`` and the mean output by ``(groups, outputs)``."""
        if delta is not None:
            weight: Tensor = self.module.weight
            total = self.matrix() + delta
            if self._transposed:
                taps = weight[0, 0].numel()
                total = total.unflatten(1, (-1, taps)).transpose(2, 3).flatten(0, 1)
            else:
                total = total.transpose(1, 2).flatten(0, 1)
            weight.copy_(total.reshape(weight.shape))
        if constant is None:
            return
        if self.module.bias is not None:
            self.module.bias.add_(constant.flatten())
        elif self._norm is not None and self._norm.running_mean is not None:
            self._norm.running_mean.sub_(constant.flatten())


def _is_linear_after_all(module: nn.Module) -> bool:
    """Whether a subclass of ``nn.Linear`` computes what that does, as timm's, which casts in TorchScript only."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    probe = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    with torch.no_grad():
        try:
            found = module.forward(probe)
        except (TypeError, ValueError, RuntimeError):  # it wants something else: not a plain layer
            return False
        wanted = nn.functional.linear(probe, weight, module.bias)
        return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted)


def norm_after(graph: Any, module: nn.Module) -> _BatchNorm | None:
    """The BatchNorm that is the only reader of ``module``'s output and reads nothing else."""
    node = graph.module2node.get(module)
    if node is None or len(node.outputs) != 1:
        return None
    after = node.outputs[0]
    found = after.module
    return found if isinstance(found, _BatchNorm) and len(after.inputs) == 1 else None
