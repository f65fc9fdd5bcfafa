"""What one forward pass and its backward passes give, and how many samples it is called with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ObservationError
from ..records import Site


def is_images(value: Any) -> bool:
    """Whether ``value`` is a list (or tuple) of samples, each a tensor of three dimensions.

    Images of torchvision's detectors, that is; inputs of several samples each, ``[x, y]`` with ``(N, L, C)``, have
    the same form unless something tells them apart: channels that are not 1, 3 or 4, and all alike.
    """
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if not all(isinstance(v, Tensor) and v.dim() == 3 for v in value):
        return False
    first = {v.shape[0] for v in value}
    return isinstance(value, list) or (len(first) == 1 and first <= {1, 3, 4})


def batch_size(value: Any) -> int | None:
    """Size of dimension 0 of the first tensor in (nested) arguments; the length of a list of images."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    if isinstance(value, Mapping):
        value = list(value.values())
        return next((n for v in value if (n := batch_size(v)) is not None), None)
    if isinstance(value, (list, tuple)):
        if is_images(value):
            return len(value)
        return next((n for v in value if (n := batch_size(v)) is not None), None)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return batch_size([getattr(value, field.name) for field in dataclasses.fields(value)])
    return None


def samples_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Number of samples that a model is called with.

    Raises:
        ObservationError: no argument has a batch dimension, or the batch is empty.
    """
    found = [batch_size(value) for value in (*args, *kwargs.values())]
    batch = next((n for n in found if n is not None), None)
    if batch is None:
        raise ObservationError("the model was called without a tensor that has a batch dimension.")
    if batch == 0:
        raise ObservationError("the model was called with an empty batch: skip batches without samples.")
    return batch


def common(one: Mapping[str, tuple[str, ...]], other: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The layers whose channels each reader reads in one pass and in another."""
    return {reader: tuple(n for n in names if n in other.get(reader, ())) for reader, names in one.items()}


def difference(first: tuple[Site, ...], now: tuple[Site, ...]) -> str:
    """How the activations of two forward passes differ, in words."""
    names = [site.name for site in first], [site.name for site in now]
    at = next((i for i, (a, b) in enumerate(zip(first, now, strict=False)) if a != b), min(map(len, names)))
    was, is_ = (n[at] if at < len(n) else "nothing" for n in names)
    return (
        f"the model's activations changed between two forward passes: call {at} was {was}, now it is {is_}. "
        "Calibrate in one mode (model.eval()) and without branches that depend on the data or on chance."
    )
