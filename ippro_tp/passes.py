"""What one forward pass and its backward passes give, and how many samples it is called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .errors import ObservationError
from .flow import Label


@dataclass(frozen=True)
class Site:
    """An activation call, or the identity at a producer's output, that stands for sigma of some layers.

    Attributes:
        name: ``"relu #3"`` (third tapped activation of the forward pass), or the producer's name.
        label: which channels of which layers lie along which axis of its input.
    """

    name: str
    label: Label


@dataclass(eq=False)
class Pass:
    """What one forward pass and its backward passes gave.

    Attributes:
        batch: number of samples.
        loss_scale: what the loss is multiplied by before the backward pass; sums are divided by it.
        outputs: per producer, ``(batch, channels)`` sums of g*y at its output.
        activations: per site name, ``(batch, size of the channel axis)`` sums of g*x at the activation.
        inputs: per reader, ``(2, batch, channels)`` sums of g*x and of g at its input.
        reads: per reader, sum of its input x for each channel, and the number of values that were summed.
        read_layers: per reader, the layers whose channels its input carries.
        sites: the activation calls in order.
        norm_of: producer -> channel norm that its output runs into before the next layer.
        closed: already counted.
    """

    batch: int
    loss_scale: float = 1.0
    outputs: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    read_layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    norm_of: dict[str, str] = field(default_factory=dict)
    closed: bool = False

    @property
    def signature(self) -> tuple[object, ...]:
        """What has to be the same in every forward pass."""
        return tuple(self.sites), tuple(sorted(self.norm_of.items()))


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
