"""Numbers that forward passes keep: head counts, sizes of splits, widths. Which channels each one counts."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .axes import Axis, TensorPruner, number_axis
from .labels import squeezed, varying
from .matrices import counted

if TYPE_CHECKING:
    from .dependency import RepairedGraph

# Layers whose numbers Torch-Pruning's functions keep.
KEPT = (
    "torch.nn.modules.conv",
    "torch.nn.modules.linear",
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.sparse",
)

Numbers = Callable[[nn.Module], Mapping[str, str]]
_REGISTERED: dict[str, Numbers] = {}


def register_numbers(*classes: str) -> Callable[[Numbers], Numbers]:
    """Say which channels the numbers of a class count, where measuring them would be ambiguous.

    Args:
        classes: qualified names, such as ``"timm.models.vision_transformer.VisionTransformer"``.

    Returns:
        A decorator for a function that takes a module and returns, by attribute, the axis: the name of a layer
        below the module and ``.out`` or ``.in``.

    Example:
        >>> @register_numbers("my_package.Mixer")
        ... def _(module):
        ...     return {"hidden_size": "proj.out"}
    """

    def register(made: Numbers) -> Numbers:
        _REGISTERED.update(dict.fromkeys(classes, made))
        return made

    return register


@register_numbers("torchvision.models.vision_transformer.VisionTransformer")
def _torchvision_vit(module: nn.Module) -> Mapping[str, str]:
    return {"hidden_dim": "conv_proj.out"}


def _places(module: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """``(attribute, layer, whether its output channels are meant)`` of the numbers that somebody registered."""
    seen: set[str] = set()
    for kind in type(module).__mro__:
        made = _REGISTERED.get(f"{kind.__module__}.{kind.__qualname__}")
        for leaf, place in (made(module) if made is not None else {}).items():
            if leaf not in seen:
                seen.add(leaf)
                layer, _, side = place.rpartition(".")
                yield leaf, layer, side == "out"


def _registered(graph: RepairedGraph, name: str, module: nn.Module) -> dict[str, Axis]:
    """Numbers of a module that somebody registered."""
    found: dict[str, Axis] = {}
    for leaf, layer, out in _places(module):
        owner = f"{name}.{layer}" if name else layer
        sides = [a for a in graph.axes if a.owner == owner and a.is_output == out]
        if sides:
            found[leaf] = number_axis(name, leaf, None, sides[0].labels, graph.layout)
    return found


def set_registered(model: nn.Module) -> None:
    """Set registered numbers to the widths that layers have now, however they were pruned."""
    for module in model.modules():
        for leaf, layer, out in _places(module):
            width = _width(module.get_submodule(layer), out)
            if width is not None and getattr(module, leaf, None) != width:
                setattr(module, leaf, width)


def _width(layer: nn.Module, out: bool) -> int | None:
    names = ("out_channels", "out_features") if out else ("in_channels", "in_features")
    return next((value for n in names if isinstance(value := getattr(layer, n, None), int)), None)


def proposals(graph: RepairedGraph, *, children: bool = False, of: Tensor | None = None) -> list[Axis]:
    """Numbers of modules that equal the size of an axis of labelled channels inside the module's forward pass.

    Args:
        graph: of the model.
        children: look at the forward passes of the module's children as well.
        of: classes whose channels a number counts, if it could count these or as many others.
    """
    found: list[Axis] = []
    pruned: dict[str, list[Axis]] = {}
    for axis in graph.axes:
        if type(axis.pruner) is not TensorPruner:
            pruned.setdefault(axis.owner, []).append(axis)
    for name, module in graph.model.named_modules():
        if type(module).__module__.startswith(KEPT):
            continue
        registered = _registered(graph, name, module)
        found += registered.values()
        known = set(registered)
        if (sides := _of_matrix(graph, name, module)) is not None:
            found += sides
            continue
        if name in pruned:
            known |= _lowered(module, pruned[name])
        numbers = [number for number in _numbers(module) if number[0] not in known]
        if not numbers:
            continue
        vectors = _vectors(graph, name, {value for _, _, value in numbers}, children, of)
        for leaf, entry, value in numbers:
            choices = vectors.get(value, [])
            if choices:
                found.append(number_axis(name, leaf, entry, choices[0], graph.layout))
    return found


def _of_matrix(graph: RepairedGraph, name: str, module: nn.Module) -> list[Axis] | None:
    """Numbers of a layer that was recognised by what it does; ``None`` for others, and where it cannot be told."""
    matrix = graph.matrices.get(module)
    sides = None if matrix is None else counted(module, matrix, list(_numbers(module)))
    if matrix is None or sides is None:
        return None
    slot = f"{name}.{matrix.leaf}" if name else matrix.leaf
    return [
        number_axis(name, leaf, entry, graph.facts.slots[slot, axis], graph.layout)
        for numbers, axis in zip(sides, (matrix.out, matrix.into), strict=True)
        for leaf, entry, _ in numbers
    ]


def _lowered(module: nn.Module, axes: Sequence[Axis]) -> set[str]:
    """Numbers of a layer that the functions which prune it lower already, as a cut of a copy shows."""
    made = copy.copy(module)
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    before = {(leaf, entry): value for leaf, entry, value in _numbers(module)}
    for axis in axes:
        gone = axis.classes == axis.classes[0]  # what goes with the first, unless it stays
        index = gone.nonzero().view(-1) if bool(axis.classes[0]) and not bool(gone.all()) else torch.zeros(1)
        with contextlib.suppress(IndexError, RuntimeError, ValueError):  # parts of grouped layers
            axis.pruner.pruning_dim = -1
            axis.handler(made, index.long().tolist())
    after = {(leaf, entry): value for leaf, entry, value in _numbers(made)}
    return {place[0] for place, value in before.items() if after.get(place) != value}


def ties(graph: RepairedGraph, groups: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Vectors of as many channels of two groups that a module sees: all of a layer's, or as many as a number says.

    Args:
        graph: of the model.
        groups: classes by key; others are not looked at.

    Returns:
        Pairs of ``(n,)`` labels.
    """
    owner = torch.zeros(len(graph.layout.classes), dtype=torch.long)
    for number, classes in enumerate(groups.values(), 1):
        owner[classes] = number
    wanted = {len(a.labels) for a in graph.axes if a.is_root and f"{a.owner}.out" in groups}
    found: dict[bytes, tuple[Tensor, Tensor]] = {}
    modules = dict(graph.model.named_modules())
    for name in graph.facts.seen:
        sizes = wanted | {value for _, _, value in _numbers(modules[name])}
        for choices in _vectors(graph, name, sizes, False, None).values():
            firsts: dict[int, Tensor] = {}
            for vector in choices:
                groups_of = owner[vector]
                if bool((groups_of > 0).all()) and bool((groups_of == groups_of[0]).all()):
                    firsts.setdefault(int(groups_of[0]), vector)
            vectors = list(firsts.values())
            for one, other in itertools.pairwise(vectors):
                found.setdefault(torch.cat([one, other]).numpy().tobytes(), (one, other))
    return list(found.values())


def _numbers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """``(attribute, entry, value)`` of the ints above 1 that a module keeps."""
    for leaf, value in vars(module).items():
        if leaf.startswith("__") or leaf in ("_parameters", "_buffers", "_modules", "training"):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield leaf, None, value
        elif isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
            for entry, number in enumerate(value):
                if number > 1:
                    yield leaf, entry, number


def _vectors(
    graph: RepairedGraph, name: str, wanted: set[int], children: bool, of: Tensor | None
) -> dict[int, list[Tensor]]:
    """Vectors of labels, by length, that were seen in a module; those with channels that can go, ``of`` first."""
    layout = graph.layout
    prefix = f"{name}." if name else ""
    names = (
        [name]
        if not children
        else [
            name,
            *(n for n in graph.facts.seen if n.startswith(prefix) and "." not in n[len(prefix) :] and n != name),
        ]
    )
    found: dict[int, list[Tensor]] = {}
    known: set[bytes] = set()
    for seen in names:
        for plane in graph.facts.seen.get(seen, ()):
            if not any(size in wanted for size in plane.shape):
                continue
            small = squeezed(layout.of(plane))
            axes = varying(small)
            if len(axes) != 1 or small.shape[axes[0]] not in wanted:
                continue
            vector = small.reshape(-1)
            key = vector.numpy().tobytes()
            if key not in known:
                known.add(key)
                found.setdefault(len(vector), []).append(vector)
    for choices in found.values():
        choices.sort(key=lambda v: (of is not None and not bool(torch.isin(v, of).any()), -int((v > 0).sum())))
    return found
