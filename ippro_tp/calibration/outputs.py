"""What a model returns: all floating-point tensors in it, and which of them are class scores, by evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = 255
"""The label that segmentation data sets give to pixels that do not count; negative ones are taken for such too."""


@dataclass(frozen=True)
class Verdict:
    """Whether an output holds class scores.

    Attributes:
        axis: along which the classes lie; ``None`` if it does not, or if that cannot be told.
        why: the evidence, in words.
    """

    axis: int | None
    why: str


def float_outputs(outputs: Any) -> dict[str, Tensor]:
    """All floating-point tensors in nested tuples, lists, dicts, dataclasses and objects, by where they are.

    Numbers without a dimension (losses that the model computes itself) count only if there is nothing else.

    Example:
        >>> list(float_outputs({"out": torch.zeros(1, 2), "aux": [torch.ones(1, 2), torch.ones(1, 3)]}))
        ["['out']", "['aux'][0]", "['aux'][1]"]
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, tensor in _walk(outputs, "", set()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[path or "output"] = tensor
    sized = {path: tensor for path, tensor in found.items() if tensor.dim() > 0}
    return sized or found


def _walk(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
        return
    if id(value) in above:
        return
    above = above | {id(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}[{key!r}]", above)
    elif isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", None)
        for number, item in enumerate(value):
            yield from _walk(item, f"{path}.{names[number]}" if names else f"{path}[{number}]", above)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), f"{path}.{field.name}", above)
    elif hasattr(value, "logits"):
        yield from _walk(value.logits, f"{path}.logits", above)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
        for name, item in vars(value).items():
            yield from _walk(item, f"{path}.{name}", above)


def target_of(name: str, count: int, targets: Any) -> Any:
    """The targets that go with one of ``count`` outputs: all of them, or the ones of the same place or name."""
    if isinstance(targets, Tensor):
        return targets
    for path, value in _targets(targets, ""):
        if path == name and count > 1:
            return value
    only = [value for _, value in _targets(targets, "")]
    return only[0] if len(only) == 1 else None


def _targets(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _targets(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _targets(item, f"{path}[{number}]")


def class_axis(z: Tensor, name: str, alone: bool, target: Any) -> Verdict:
    """Whether ``z`` holds class scores, and along which axis.

    Labels decide where there are any: integers of the shape of ``z`` without the classes, none of them larger than
    the classes allow, or probabilities. Without labels a name that ends in ``logits`` does, and so does, for
    the only output of a model, the shape ``(N, C)`` with two or more numbers, unless they were squashed (sigmoid,
    tanh, softmax) or scaled to length one. All else is taken for something that has no classes.

    Args:
        z: an output, first dimension the samples.
        name: where it is in what the model returns.
        alone: whether it is the only one.
        target: what the loader gives for it, if anything.
    """
    if z.dim() < 2:
        return Verdict(None, "a number a sample")
    if isinstance(target, Tensor):
        return _by_labels(z, target)
    if name.rstrip("']").endswith("logits"):
        axis = 1 if z.dim() == 2 else layer_axis(z)
        if axis is not None and z.shape[axis] > 1:
            return Verdict(axis, f"it is called {name.lstrip('.')}")
    if not (alone and z.dim() == 2 and z.shape[1] > 1):
        return Verdict(None, "no labels say that it holds class scores")
    if _squashed(z):
        return Verdict(None, "squashed or normalised values are not class scores")
    return Verdict(1, "taken for class scores by its shape; if it holds none, give loss_fn=LogitNoise()")


def _by_labels(z: Tensor, target: Tensor) -> Verdict:
    if target.is_floating_point():
        if target.shape == z.shape and z.dim() == 2 and z.shape[1] > 1:
            sums = target.sum(1)
            if bool((target >= 0).all() and ((sums - 1).abs() < 1e-3).all()):
                return Verdict(1, "the targets are probabilities of classes")
        return Verdict(None, "the targets are not class labels")
    shape = tuple(target.shape)
    axes = [
        axis
        for axis in range(1, z.dim())
        if z.shape[axis] > 1
        and shape in (z.shape[:axis] + z.shape[axis + 1 :], (*z.shape[:axis], 1, *z.shape[axis + 1 :]))
    ]
    if not axes and z.dim() >= 4 and len(shape) == z.dim() - 1 and shape[0] == z.shape[0] and z.shape[1] > 1:
        axes = [1]  # a map of labels at another resolution
    axes = [axis for axis in axes if _fit(target, z.shape[axis])]
    if len(axes) > 1 and (made := layer_axis(z)) in axes:
        return Verdict(made, "the labels fit, and the last layer's channels lie there")
    if len(axes) > 1:
        return Verdict(None, f"the labels fit classes along axes {axes}: say which, loss_fn=FisherNoise(dim=...)")
    return Verdict(axes[0], "the labels fit") if axes else Verdict(None, "the targets are not class labels of it")


def _fit(labels: Tensor, classes: int) -> bool:
    return bool(((labels < classes) | (labels == IGNORED)).all() and ((labels >= 0) & (labels < classes)).any())


def layer_axis(z: Tensor) -> int | None:
    """Where the channels of the layer that made ``z`` lie; ``None`` where it cannot be told.

    Convolutions put them into dimension 1 and linear layers into the last one; reshaping, bias, scaling and
    resizing afterwards keep them there. A transposition does not, and ends the search.
    """
    node = z.grad_fn
    for _ in range(16):
        kind = "" if node is None else node.name()
        if "Convolution" in kind:
            return 1
        if kind.startswith(("AddmmBackward", "MmBackward", "BmmBackward", "LinearBackward")):
            return z.dim() - 1
        keeps = ("Add", "Sub", "Mul", "Div", "Upsample", "Clone", "ToCopy", "_Root", "View", "UnsafeView", "Alias")
        shaped = kind.startswith(("View", "UnsafeView"))
        if node is None or not kind.startswith(keeps) or (shaped and z.dim() != 3):
            return None
        inputs = [following for following, _ in node.next_functions if following is not None]
        node = inputs[0] if inputs else None
    return None


def _squashed(z: Tensor) -> bool:
    """Whether the values of ``z`` were squashed, or its rows scaled to length one."""
    kind = "" if z.grad_fn is None else z.grad_fn.name()
    if kind.startswith(("Sigmoid", "Tanh", "Softmax")):
        return True
    lengths = z.detach().float().norm(dim=1)
    return kind.startswith("Div") and bool(((lengths - 1).abs() < 1e-3).all())
