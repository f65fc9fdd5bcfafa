"""A Conv or Linear layer while Torch-Pruning cuts it: which outputs are left, and its weight as matrices."""

from __future__ import annotations

from collections.abc import Iterable

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
"""Layers that use their weight as it is; others are measured."""


class CutLayer:
    """Follows a layer through the cuts.

    Args:
        name: dotted module name.
        module: the layer, not yet pruned.
        norm: the BatchNorm that alone reads its output, if there is one.
    """

    def __init__(self, name: str, module: nn.Linear | _ConvNd, norm: _BatchNorm | None = None) -> None:
        self.name, self.module, self.norm = name, module, norm
        self.all_inputs = self.inputs
        outputs = module.out_channels if isinstance(module, _ConvNd) else module.out_features
        self._outputs = list(range(outputs))
        self._before: list[tuple[Tensor, Tensor]] = []

    @property
    def inputs(self) -> int:
        """Input channels (columns of a Linear layer) that are left."""
        return self.module.in_channels if isinstance(self.module, _ConvNd) else self.module.in_features

    @property
    def outputs(self) -> Tensor:
        """``(outputs left,)`` int64: their numbers before the cuts."""
        return torch.tensor(self._outputs, dtype=torch.long)

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a Linear layer."""
        return self.module.groups if isinstance(self.module, _ConvNd) else 1

    @property
    def features(self) -> int:
        """What one filter reads: channels of its group times taps."""
        weight: Tensor = self.module.weight
        return weight.numel() // (self.groups * weight.shape[1]) if self._transposed else weight[0].numel()

    @property
    def taps(self) -> int:
        """Positions that one filter reads."""
        return self.module.weight.shape[2:].numel() if isinstance(self.module, _ConvNd) else 1

    @property
    def constant(self) -> str:
        """Where a change of the mean output can go: ``"bias"``, ``"norm"`` or, if nowhere, ``""``."""
        if self.module.bias is not None:
            return "bias"
        return "norm" if self.norm is not None and self.norm.running_mean is not None else ""

    @property
    def unfit(self) -> str:
        """Why the weight cannot be changed, whatever the layer computes; empty if it can."""
        if parametrize.is_parametrized(self.module) or hasattr(self.module, "weight_g"):
            return "its weight is parametrized"
        if not self.module.weight.is_floating_point():
            return f"its weight is {str(self.module.weight.dtype).removeprefix('torch.')}"
        return ""

    @property
    def plain(self) -> bool:
        """Whether the layer is known to use its weight as it is; otherwise that has to be measured."""
        return type(self.module).forward in PLAIN_FORWARDS and "forward" not in vars(self.module)

    def remove_outputs(self, idxs: Iterable[int]) -> None:
        """Note that the output channels ``idxs``, in present numbering, are about to be cut."""
        gone = set(idxs)
        self._outputs = [c for i, c in enumerate(self._outputs) if i not in gone]

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(groups, features, outputs of a group)``: the weight; features are taps times channels."""
        weight: Tensor = self.module.weight.detach().to(dtype)
        if isinstance(self.module, nn.Linear):
            return weight.mT.unsqueeze(0)
        weight = weight.flatten(2).unflatten(0, (self.groups, -1))
        # transposed: (groups, inputs, outputs, taps); else (groups, outputs, inputs, taps)
        weight = weight.permute(0, 3, 1, 2) if self._transposed else weight.permute(0, 3, 2, 1)
        return weight.flatten(1, 2)

    def add(self, delta: Tensor | None, constant: Tensor | None) -> None:
        """Change the weight by ``(groups, features, outputs)`` and the mean output by ``(groups, outputs)``.

        :meth:`undo` takes all changes back.
        """
        if delta is not None:
            self._change(self.module.weight, self._as_weight(self.matrix(delta.dtype) + delta))
        if constant is not None and self.module.bias is not None:
            self._change(self.module.bias, self.module.bias.to(constant.dtype) + constant.flatten())
        elif constant is not None and self.norm is not None and self.norm.running_mean is not None:
            mean = self.norm.running_mean
            self._change(mean, mean.to(constant.dtype) - constant.flatten())

    def undo(self) -> None:
        """Bring back the weight, bias and mean from before the first :meth:`add`, to the bit."""
        for tensor, value in reversed(self._before):
            tensor.detach().copy_(value)
        self._before.clear()

    @property
    def changed(self) -> bool:
        """Whether there is something to :meth:`undo`."""
        return bool(self._before)

    @property
    def _transposed(self) -> bool:
        return isinstance(self.module, _ConvNd) and self.module.transposed

    def _change(self, tensor: Tensor, value: Tensor) -> None:
        self._before.append((tensor, tensor.detach().clone()))
        tensor.detach().copy_(value.view(tensor.shape))

    def _as_weight(self, matrix: Tensor) -> Tensor:
        if isinstance(self.module, nn.Linear):
            return matrix[0].mT
        shape = self.module.weight.shape
        matrix = matrix.unflatten(1, (shape[2:].numel(), -1))  # (groups, taps, inputs, outputs)
        matrix = matrix.permute(0, 2, 3, 1) if self._transposed else matrix.permute(0, 3, 2, 1)
        return matrix.reshape(shape)


def memory_of(tensor: Tensor) -> int:
    """A number that tensors share if they lie in the same memory."""
    return tensor.untyped_storage().data_ptr() or id(tensor)  # 0: none of its own, as of a pretended device


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Storages of parameters that several modules hold, with the names of those."""
    found: dict[int, dict[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(memory_of(parameter), {})[module] = f"{name}.{key}" if name else key
    return {memory: list(owners.values()) for memory, owners in found.items() if len(owners) > 1}
