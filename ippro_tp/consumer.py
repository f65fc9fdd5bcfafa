"""One layer whose input channels are pruned: which are left, and its weight seen as groups, channels and taps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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


class UnfitError(Exception):
    """A layer cannot be compensated; the message is the reason."""


@dataclass(frozen=True)
class Plan:
    """The weight before pruning, restricted to the outputs that are left.

    Attributes:
        weight: ``(groups, outputs, channels, taps)`` float64.
        kept: ``(groups, k)`` channels that are left, within their group.
        removed: ``(groups, r)`` the others.
    """

    weight: Tensor
    kept: Tensor
    removed: Tensor


class Consumer:
    """Keeps track of a Conv or Linear layer while Torch-Pruning cuts it.

    Args:
        name: dotted module name.
        module: the layer, not yet pruned.
        norm: the BatchNorm that alone reads its output, if there is one.
    """

    def __init__(self, name: str, module: nn.Linear | _ConvNd, norm: _BatchNorm | None) -> None:
        self.name, self.module, self._norm = name, module, norm
        self._weight: Tensor = module.weight  # Torch-Pruning makes new Parameters: this one stays as it is
        transposed = isinstance(module, _ConvNd) and module.transposed
        self._groups: int = module.groups if isinstance(module, _ConvNd) else 1
        self._in_axis, self._out_axis = (0, 1) if transposed else (1, 0)
        across = self._weight.shape[1] * self._groups
        self._channels = self._weight.shape[0] if transposed else across
        self.inputs = list(range(self._channels))
        self.outputs = list(range(across if transposed else self._weight.shape[0]))
        self._parametrized = parametrize.is_parametrized(module) or hasattr(module, "weight_g")

    @property
    def removed_inputs(self) -> int:
        """Number of input channels (columns of a Linear layer) that are gone."""
        return self._channels - len(self.inputs)

    @property
    def constant(self) -> str:
        """Where a change of the mean output can go: ``"bias"``, ``"norm"`` or, if nowhere, ``""``."""
        return "bias" if self.module.bias is not None else "norm" if self._norm is not None else ""

    def remove(self, idxs: Iterable[int], out: bool) -> None:
        """Note that the channels ``idxs``, in present numbering, are about to be cut."""
        gone = set(idxs)
        if out:
            self.outputs = [c for i, c in enumerate(self.outputs) if i not in gone]
        else:
            self.inputs = [c for i, c in enumerate(self.inputs) if i not in gone]

    def plan(self, span: int) -> Plan:
        """The weight and channels to solve for, after the cut.

        Args:
            span: columns per channel of a Linear layer that reads flattened maps.

        Raises:
            UnfitError: the layer cannot be compensated.
        """
        weight: Tensor = self.module.weight
        if self._parametrized:
            raise UnfitError("its weight is parametrized")
        if type(self.module).forward not in PLAIN_FORWARDS:
            raise UnfitError(
                "its class has a forward of its own, which may change the weight (standardisation, say)"
            )
        if self._groups > 1 and (self._in_axis == 0 or self._groups != self.module.groups):
            raise UnfitError("grouped and transposed, or its groups changed")
        full = self._weight.detach()
        if self._in_axis == 0:
            full = full.transpose(0, 1)
        device = full.device
        outputs = torch.tensor(self.outputs, device=device)
        full = full[outputs].double().reshape(len(self.outputs), full.shape[1], -1)
        inputs = torch.tensor(self.inputs)
        if span > 1:
            runs = inputs.view(-1, span) if inputs.numel() % span == 0 else inputs.new_zeros(0, span)
            if runs.shape[0] == 0 or not torch.equal(runs, runs[:, :1] // span * span + torch.arange(span)):
                raise UnfitError("single columns of a flattened channel were removed")
            inputs = runs[:, 0] // span
            full = full.view(full.shape[0], -1, span)
        per_group = full.shape[1]
        counts = torch.bincount(inputs // per_group, minlength=self._groups)
        width = self._total_outputs // self._groups
        produced = torch.bincount(torch.tensor(self.outputs) // width, minlength=self._groups)
        if not bool((counts == counts[0]).all()) or not bool((produced == produced[0]).all()):
            raise UnfitError("its groups lost different numbers of channels")
        kept = (inputs % per_group).view(self._groups, -1)
        mask = torch.ones(self._groups, per_group, dtype=torch.bool)
        mask.scatter_(1, kept, False)
        removed = mask.nonzero()[:, 1].view(self._groups, -1)
        expected: tuple[int, ...] = (len(self.outputs), kept.shape[1] * span, *self._weight.shape[2:])
        if self._in_axis == 0:
            expected = (expected[1], expected[0], *expected[2:])
        if tuple(weight.shape) != expected:
            raise UnfitError(f"its weight is {tuple(weight.shape)} where {expected} was expected")
        return Plan(full.unflatten(0, (self._groups, -1)), kept.to(device), removed.to(device))

    @property
    def _total_outputs(self) -> int:
        return self._weight.shape[self._out_axis] * (self._groups if self._in_axis == 0 else 1)

    def write(self, weight: Tensor, shift: Tensor | None) -> None:
        """Put the folded weight in place.

        Args:
            weight: ``(groups, outputs, kept, taps)``.
            shift: ``(groups, outputs)`` by how much the mean output fell; ``None``: leave it.
        """
        target: Tensor = self.module.weight
        flat = weight.flatten(0, 1)
        if self._in_axis == 0:
            flat = flat.transpose(0, 1)
        target.copy_(flat.reshape(target.shape))
        if shift is None:
            return
        if self.module.bias is not None:
            self.module.bias.add_(shift.flatten())
        elif self._norm is not None and self._norm.running_mean is not None:
            self._norm.running_mean.sub_(shift.flatten())


def norm_after(graph: Any, module: nn.Module) -> _BatchNorm | None:
    """The BatchNorm that is the only reader of ``module``'s output and reads nothing else."""
    node = graph.module2node.get(module)
    if node is None or len(node.outputs) != 1:
        return None
    after = node.outputs[0]
    found = after.module
    return found if isinstance(found, _BatchNorm) and len(after.inputs) == 1 else None
