"""What one forward pass and its backward passes give, and how many samples it is called with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ObservationError
from ..records import Site


def batch_size(value: Any) -> int | None:
    """Size of dimension 0 of the first tensor in (nested) arguments; the length of a list of images."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if (
            len(value) > 0
            and isinstance(value, list)
            and all(isinstance(v, Tensor) and v.dim() == 3 for v in value)
        ):
            return len(value)
        return next((n for v in value if (n := batch_size(v)) is not None), None)
    return None


def samples_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Number of samples that a model is called with.

    Raises:
        ObservationError: no argument has a batch dimension.
    """
    batch = batch_size((args, kwargs))
    if not batch:
        raise ObservationError("the model was called without a tensor that has a batch dimension.")
    return batch


def difference(first: tuple[Site, ...], now: tuple[Site, ...]) -> str:
    """How the activations of two forward passes differ, in words."""
    names = [site.name for site in first], [site.name for site in now]
    at = next((i for i, (a, b) in enumerate(zip(first, now, strict=False)) if a != b), min(map(len, names)))
    was, is_ = (n[at] if at < len(n) else "nothing" for n in names)
    return (
        f"the model's activations changed between two forward passes: call {at} was {was}, now it is {is_}. "
        "Calibrate in one mode (model.eval()) and without branches that depend on the data or on chance."
    )
