"""Layers of any class, known by what they do: their weight times their input is their output."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .labels import Facts, varying

if TYPE_CHECKING:
    from .provenance import Provenance


class MatrixPruner(tp.pruner.BasePruningFunc):  # type: ignore[misc]
    """Prunes a layer whose weight was found by following its channels, such as Hugging Face's ``Conv1D``.

    Args:
        leaf: name of the weight.
        out: its axis of output channels.
        into: its axis of input channels.
    """

    def __init__(self, leaf: str, out: int, into: int) -> None:
        super().__init__()
        self.leaf, self.out, self.into = leaf, out, into

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop output channels of the weight; the bias is an axis of its own."""
        return drop(layer, self.leaf, self.out, idxs)

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop input channels of the weight."""
        return drop(layer, self.leaf, self.into, idxs)

    def get_out_channels(self, layer: nn.Module) -> int:
        """Number of output channels now."""
        return int(getattr(layer, self.leaf).shape[self.out])

    def get_in_channels(self, layer: nn.Module) -> int:
        """Number of input channels now."""
        return int(getattr(layer, self.leaf).shape[self.into])


def drop(layer: nn.Module, leaf: str, axis: int, idxs: Sequence[int]) -> nn.Module:
    """Make a parameter or buffer of a module anew without ``idxs`` along ``axis``."""
    tensor = getattr(layer, leaf)
    keep = torch.ones(tensor.shape[axis], dtype=torch.bool)
    keep[list(idxs)] = False
    index = keep.nonzero().view(-1).to(tensor.device)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(tensor.detach().index_select(axis, index), tensor.requires_grad)
        if tensor.grad is not None:
            made.grad = tensor.grad.index_select(axis, index)
    else:
        made = tensor.index_select(axis, index)
    setattr(layer, leaf, made)
    return layer


def note_product(mode: Provenance, operand: Tensor, summed: int, kept: int) -> None:
    """Note that a matrix is multiplied, where it is a parameter of the module that is running, or a view of one.

    Args:
        mode: follows the channels.
        operand: ``(n, m)``.
        summed: its axis that is summed over.
        kept: its axis that the product has.
    """
    module = mode.module[-1]
    for name, parameter in mode.parameters.get(module, {}).items():
        if operand.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
            continue
        if (
            operand.numel() != parameter.numel()
            or parameter.dim() != 2
            or parameter.stride(0) == parameter.stride(1)
        ):
            continue
        strides = parameter.stride()
        if operand.stride(summed) in strides and operand.stride(kept) in strides:
            axes = strides.index(operand.stride(summed)), strides.index(operand.stride(kept))
            mode.facts.products.setdefault(module, set()).add((name, *axes))


def note_call(mode: Provenance, name: str, args: Any, out: Any) -> None:
    """After a module's forward pass: whether it is a layer, its channels along the last axes."""
    facts = mode.facts
    products = facts.products.pop(name, None)
    if products is None or len(products) != 1 or not args or not isinstance(out, Tensor):
        return
    leaf, into, made = next(iter(products))
    slot = f"{name}.{leaf}" if name else leaf
    sides = [(args[0], facts.slots.get((slot, into))), (out, facts.slots.get((slot, made)))]
    if all(labels is not None and _last_axis(mode, tensor, labels) for tensor, labels in sides):
        facts.matrices[name] = (leaf, made, into)


def _last_axis(mode: Provenance, tensor: Any, labels: Tensor) -> bool:
    """Whether the channels of a tensor's last axis are those of ``labels``, one by one."""
    if not isinstance(tensor, Tensor) or not tensor.dim() or tensor.shape[-1] != len(labels):
        return False
    wanted = mode.canonical(labels)
    if not bool(wanted.any()):  # they stay
        return True
    for plane in mode.planes(tensor):
        small = mode.canonical(plane)
        if varying(small) == (tensor.dim() - 1,) and torch.equal(small.reshape(-1), wanted.expand_as(labels)):
            return True
    return False


def matrix_of(facts: Facts, name: str) -> MatrixPruner | None:
    """The pruner of a module that is such a layer."""
    found = facts.matrices.get(name)
    return None if found is None else MatrixPruner(*found)


Number = tuple[str, int | None, int]
"""Attribute of a module, entry of a tuple or list, value."""


def counted(
    module: nn.Module, matrix: MatrixPruner, numbers: Sequence[Number]
) -> tuple[list[Number], list[Number]] | None:
    """Which numbers of a layer count its outputs, and which its inputs: a copy loses one, and has to run.

    Returns:
        ``None`` where that cannot be told.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = getattr(module, matrix.leaf)
        x = torch.randn(2, matrix.get_in_channels(module)).to(weight)
        try:
            whole = copy.deepcopy(module).eval()(x)
            outs, ins = (_counted(module, matrix, numbers, out, x, whole) for out in (True, False))
        except Exception:  # whatever a forward pass raises that wants something else than rows
            return None
    if outs is None or ins is None:
        return None
    widths = matrix.get_out_channels(module), matrix.get_in_channels(module)
    for number in numbers:  # kept and not used: told by its value, or by what has no number yet
        if number not in (*outs, *ins) and number[2] in widths:
            free = [side for side, width in zip((outs, ins), widths, strict=True) if width == number[2]]
            min(free, key=len).append(number)
    return outs, ins


def _counted(
    module: nn.Module, matrix: MatrixPruner, numbers: Sequence[Number], out: bool, x: Tensor, whole: Tensor
) -> list[Number] | None:
    width = (matrix.get_out_channels if out else matrix.get_in_channels)(module)
    wanted, given = (whole[..., 1:], x) if out else (_without_first(module, x), x[..., 1:])
    candidates = [number for number in numbers if number[2] == width]
    trials = [[], *([number] for number in candidates), candidates]
    for trial in trials:
        made = copy.deepcopy(module).eval()
        (matrix.prune_out_channels if out else matrix.prune_in_channels)(made, [0])
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if out and leaf != matrix.leaf and tensor is not None and tensor.shape == (width,):
                drop(made, leaf, 0, [0])
        for leaf, entry, _ in trial:
            lower(made, leaf, entry, 1)
        try:
            found = made(given)
        except Exception:  # whatever does not fit
            continue
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-3, atol=1e-5):
            return trial
    return None


def _without_first(module: nn.Module, x: Tensor) -> Tensor:
    made: Tensor = copy.deepcopy(module).eval()(torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:]], -1))
    return made


def lower(layer: nn.Module, leaf: str, entry: int | None, by: int) -> None:
    """Take ``by`` away from a number that a module keeps, or from an entry of a tuple or list of numbers."""
    value = getattr(layer, leaf)
    if entry is None:
        setattr(layer, leaf, value - by)
        return
    entries = list(value)
    entries[entry] -= by
    setattr(layer, leaf, entries if isinstance(value, list) else type(value)(entries))


def matrices_of(graph: Any) -> Mapping[nn.Module, MatrixPruner]:
    """Such layers of a dependency graph; none for those of Torch-Pruning, which does not look for them."""
    found: Mapping[nn.Module, MatrixPruner] = getattr(graph, "matrices", {})
    return found
