"""Numbers that forward passes keep: head counts, sizes of splits, widths. Which channels each one counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .axes import Axis, number_axis
from .labels import squeezed, varying

if TYPE_CHECKING:
    from .dependency import RepairedGraph

# Layers whose numbers Torch-Pruning's functions keep.
KEPT = (
    "torch.nn.modules.conv",
    "torch.nn.modules.linear",
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.sparse",
)


def proposals(graph: RepairedGraph, *, children: bool = False) -> list[Axis]:
    """Numbers of modules that equal the size of an axis of labelled channels inside the module's forward pass.

    Args:
        graph: of the model.
        children: look at the forward passes of the module's children as well.
    """
    found = []
    for name, module in graph.model.named_modules():
        if type(module).__module__.startswith(KEPT):
            continue
        numbers = list(_numbers(module))
        if not numbers:
            continue
        vectors = _vectors(graph, name, {value for _, _, value in numbers}, children)
        for leaf, entry, value in numbers:
            choices = vectors.get(value, [])
            if choices:
                found.append(number_axis(name, leaf, entry, choices[0], graph.layout))
    return found


def _numbers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """``(attribute, entry, value)`` of the ints above 1 that a module keeps."""
    own = isinstance(module, nn.LayerNorm) and module.elementwise_affine and len(module.normalized_shape) == 1
    for leaf, value in vars(module).items():
        if leaf.startswith("__") or leaf in ("_parameters", "_buffers", "_modules", "training") or own:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield leaf, None, value
        elif isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
            for entry, number in enumerate(value):
                if number > 1:
                    yield leaf, entry, number


def _vectors(graph: RepairedGraph, name: str, wanted: set[int], children: bool) -> dict[int, list[Tensor]]:
    """Vectors of labels, by length, that were seen in a module; those with channels that can go."""
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
        choices.sort(key=lambda v: -int((v > 0).sum()))
    return found
