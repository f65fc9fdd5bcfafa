"""Where the samples lie in what a model is called with, and smaller calls with some of them replaced.

How a call holds its samples cannot be told from the call alone: a list of two tensors is two images, or two
inputs of several samples. So :func:`arrangements` gives all that is possible, the likeliest first, and a
measurement (:mod:`tracing.probe`) says which is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .passes import batch_size, is_images

Call = tuple[tuple[Any, ...], dict[str, Any]]
Kind = Literal["images", "all", "first"]


@dataclasses.dataclass(frozen=True, eq=False)
class Arrangement:
    """One way in which a call may hold its samples.

    Attributes:
        call: positional and keyword arguments.
        samples: number of samples.
        kind: ``"images"``: entries of lists. ``"all"``: dimension 0 of every tensor that has as many entries.
            ``"first"``: dimension 0 of the first tensor only.
    """

    call: Call
    samples: int
    kind: Kind

    @property
    def form(self) -> tuple[object, ...]:
        """What two calls have in common whose samples have the same size, and go the same way."""
        found: list[object] = [self.kind]

        def note(value: Tensor) -> Tensor:
            found.append((value.shape[1:], value.dtype))
            return value

        def note_list(values: Any) -> Any:
            found.append(frozenset(v.shape if isinstance(v, Tensor) else type(v) for v in values))
            return values

        def note_other(value: Any) -> Any:
            found.append(value.shape if isinstance(value, Tensor) else value if _plain(value) else type(value))
            return value

        self._changed(note, note_list, note_other)
        return tuple(found)

    def first(self, samples: int) -> Call:
        """The call with the first ``samples`` samples only."""
        return self._changed(lambda x: x[:samples], lambda values: values[:samples])

    def doubled(self) -> Call:
        """The call with each sample twice."""
        return self._changed(lambda x: torch.cat((x, x)), lambda values: _like(values, [*values, *values]))

    def replaced(self, samples: int, sample: int) -> Call:
        """:meth:`first`, with another sample in the place of one.

        What is floating-point in the first tensor is disturbed, which works for images of any size; the rest is
        taken from another sample of the call.
        """
        donor = samples + sample if samples + sample < self.samples else (sample + 1) % self.samples
        generator = torch.Generator().manual_seed(sample)
        disturbed = False

        def other(x: Tensor, own: Tensor) -> Tensor:
            nonlocal disturbed
            if not disturbed and own.is_floating_point():
                disturbed = True
                return _disturbed(own, generator)
            if x.shape != own.shape:
                return own
            return _rolled(own) if not disturbed and torch.equal(x, own) else x

        def in_tensor(x: Tensor) -> Tensor:
            out = x[:samples].detach().clone()
            out[sample] = other(x[donor].detach(), out[sample].clone())
            return out

        def in_list(values: Any) -> Any:
            new = list(values[:samples])
            new[sample] = _paired(values[donor], values[sample], other)
            return _like(values, new)

        return self._changed(in_tensor, in_list)

    def _changed(
        self,
        tensor: Callable[[Tensor], Tensor],
        images: Callable[[Any], Any],
        rest: Callable[[Any], Any] = lambda value: value,
    ) -> Call:
        met = False

        def walk(value: Any) -> Any:
            nonlocal met
            if isinstance(value, Tensor):
                if value.dim() and value.shape[0] == self.samples and not (met and self.kind == "first"):
                    met = True
                    return tensor(value)
                return rest(value)
            holds_samples = self.kind == "images" and isinstance(value, (list, tuple))
            if (
                holds_samples
                and len(value) == self.samples
                and all(isinstance(v, (Tensor, Mapping)) for v in value)
            ):
                return images(value)
            if isinstance(value, dict):
                return _with_items(value, {key: walk(v) for key, v in value.items()})
            if isinstance(value, (list, tuple)):
                return _like(value, [walk(v) for v in value])
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                fields = [f.name for f in dataclasses.fields(value) if f.init]
                return dataclasses.replace(value, **{name: walk(getattr(value, name)) for name in fields})
            return rest(value)

        args, kwargs = self.call
        return tuple(walk(value) for value in args), {key: walk(value) for key, value in kwargs.items()}


def arrangements(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Arrangement]:
    """How a call may hold its samples, the likeliest first; none if no tensor has a batch dimension."""
    call, tensors, images = (args, kwargs), [], []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, Mapping):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            if is_images(value):
                images.append(len(value))
            for each in value:
                visit(each)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name))

    for value in (*args, *kwargs.values()):
        visit(value)
    found: list[Arrangement] = []
    if images:
        found.append(Arrangement(call, images[0], "images"))
    batch = next((x.shape[0] for x in tensors if x.dim()), 0)
    if batch:
        found.append(Arrangement(call, batch, "all"))
        if sum(bool(x.dim()) and x.shape[0] == batch for x in tensors) > 1:
            found.append(Arrangement(call, batch, "first"))
    expected = next((n for value in (*args, *kwargs.values()) if (n := batch_size(value)) is not None), None)
    return sorted(found, key=lambda each: each.samples != expected)


def _disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` with noise of half its own spread added."""
    x = x.detach()
    spread = x.float().std() if x.numel() > 1 else x.float().abs().sum()
    spread = torch.where((spread > 0) & spread.isfinite(), spread, torch.ones_like(spread))
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x.float() + 0.5 * spread * noise).to(x.dtype)


def _rolled(x: Tensor) -> Tensor:
    """The entries of ``x`` in another order."""
    return x.flatten().roll(1).view_as(x) if x.numel() > 1 else x


def _paired(donor: Any, own: Any, other: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A sample of a list replaced: an image, or what belongs to it by name."""
    if isinstance(own, Tensor):
        return other(donor, own)
    return donor  # boxes, labels and masks of one image go together


def _like(value: Any, items: list[Any]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(items)
    return type(value)(items)


def _with_items(value: dict[Any, Any], items: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return items
    try:
        return type(value)(items)
    except TypeError:  # a default factory, say
        return items


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
