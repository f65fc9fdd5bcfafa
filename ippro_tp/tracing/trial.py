"""Trying a function on numbers of our own: where do channels of its argument come out?

What a function does to channels depends on its other arguments, not on the values of the tensors. So it is called
again on constant tensors of the same shapes, and then with a few channels disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..records import Label, Span

SHARE = 0.5
"""Of what a disturbed channel changes, so much at least has to be where the channel is said to be. Normalisations
over channels, which spread a little of each, pass; whatever mixes or moves channels does not."""
EXACT = 0.9
"""The same where nothing but the trial speaks for it: then no two channels may have changed places either."""


class Trials:
    """What was found out about functions, each tried once for each kind of call."""

    def __init__(self) -> None:
        self._known: dict[object, Any] = {}
        self.contradicted: set[str] = set()
        """Functions that do to channels something else than their names and shapes make believe."""

    def holds(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Sequence[tuple[Tensor, Label]],
        out: Sequence[tuple[int, Label]],
    ) -> bool:
        """Whether channels of the arguments come out where labels say.

        Args:
            func: the function.
            args: of the call.
            kwargs: of the call.
            given: arguments with labels.
            out: which of the tensors that it returns carry which label.
        """
        name = getattr(func, "__name__", "")
        key = (name, _form((args, kwargs)), tuple((_place(x, args, kwargs), lab) for x, lab in given), tuple(out))
        if key not in self._known:
            self._known[key] = all(_agrees(func, args, kwargs, x, label, out) for x, label in given)
            if not self._known[key]:
                self.contradicted.add(name)
        return bool(self._known[key])

    def axis(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: tuple[Tensor, Label],
        out: Tensor,
    ) -> int | None:
        """The axis of the result ``out`` along which the channels of an argument lie as they did, if any."""
        x, label = given
        key = ("axis", getattr(func, "__name__", ""), _form((args, kwargs)), _place(x, args, kwargs), label.axis)
        if key not in self._known:
            self._known[key] = _found_axis(func, args, kwargs, x, label.axis, out)
        found: int | None = self._known[key]
        return found


def _agrees(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    label: Label,
    out: Sequence[tuple[int, Label]],
) -> bool:
    named = {span.layer for _, claimed in out for span in claimed.spans}
    spans = [span for span in _ends(label.spans) if span.layer in named]  # of the others nothing is said
    chosen = [(span, span.start + some) for span in spans for some in _some(span.count)]
    places = [span.positions()[torch.isin(span.channels(), channels)] for span, channels in chosen]
    for (span, channels), changes in zip(
        chosen, _changes(func, args, kwargs, x, label.axis, places), strict=False
    ):
        if changes is None:
            return False
        inside, total = 0.0, 0.0
        for number, claimed in out:
            energies = _along(changes[number], claimed.axis).cpu()
            total += float(energies.sum())
            for other in claimed.spans:
                if other.layer == span.layer:
                    inside += float(energies[other.positions()[torch.isin(other.channels(), channels)]].sum())
        if inside < SHARE * total:
            return False
    return True


def _ends(spans: tuple[Span, ...]) -> list[Span]:
    """The first and the last span, of those that are at different places."""
    return [spans[0]] if spans[-1].at == spans[0].at else [spans[0], spans[-1]]


def _found_axis(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int, out: Tensor
) -> int | None:
    size = x.shape[axis]
    candidates = {a for a in range(out.dim()) if out.shape[a] == size and size > 1}
    numbers = torch.arange(size)
    bits = [numbers[(numbers >> bit) % 2 == 1] for bit in range((size - 1).bit_length())]
    tried = [*_some(size), *bits] if candidates else []
    for number, changes in enumerate(_changes(func, args, kwargs, x, axis, tried)):
        some, share = tried[number], EXACT if number > 0 else SHARE
        if changes is None or len(changes) != 1 or not changes[0].sum() > 0:
            return None
        (change,) = changes
        least = share * float(change.sum())
        candidates = {a for a in candidates if float(_along(change, a).cpu()[some].sum()) >= least}
        if not candidates:
            return None
    return candidates.pop() if len(candidates) == 1 else None


def _some(count: int) -> list[Tensor]:
    """A choice of a sixth of ``count`` channels: few, so that mixing all of them shows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(count, generator=generator)[: max(1, count // 6)]]


def _changes(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    axis: int,
    places: Sequence[Tensor],
) -> Iterator[list[Tensor] | None]:
    """For each of some choices of channels of ``x``: squared changes of what is returned as they are disturbed.

    ``None`` where the function cannot be called with other numbers, for whatever reason.
    """
    if not places:
        return
    try:
        before = _outputs(func, args, kwargs, x, axis, None)
        for at in places:
            after = _outputs(func, args, kwargs, x, axis, at)
            alike = [a.shape for a in before] == [b.shape for b in after]
            yield (
                [(b - a).square().nan_to_num(0, 0, 0) for a, b in zip(before, after, strict=True)]
                if alike
                else None
            )
    except Exception:
        yield None


@torch.no_grad()
def _outputs(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    axis: int,
    at: Tensor | None,
) -> list[Tensor]:
    """What a function makes of constant tensors, of which ``x`` is disturbed at some places of an axis."""
    made: dict[int, Tensor] = {}

    def constant(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                return value
            if id(value) not in made:
                # Between 0 and 1, which activations let through.
                made[id(value)] = torch.full(value.shape, 0.5, device=value.device)
                if value is x and at is not None:
                    made[id(value)].index_fill_(axis, at.to(value.device), 0.6)
            return made[id(value)]
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return type(value)(map(constant, value))
        return value

    on_gpu = [x.device.index or 0] if x.device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu):
        torch.default_generator.manual_seed(0)
        for index in on_gpu:
            torch.cuda.default_generators[index].manual_seed(0)
        out = func(*map(constant, args), **{name: constant(value) for name, value in kwargs.items()})
    parts = out if isinstance(out, (list, tuple)) else (out,)
    return [part.float() for part in parts if isinstance(part, Tensor)]


def _along(change: Tensor, axis: int) -> Tensor:
    return change.sum([i for i in range(change.dim()) if i != axis]) if change.dim() > 1 else change


def _place(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Which of the tensors in a call ``x`` is."""
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)

    visit((args, list(kwargs.values())))
    return next((i for i, each in enumerate(found) if each is x), -1)


def _form(value: Any) -> object:
    """What of a call says what it does: numbers and shapes but for the values of tensors."""
    if isinstance(value, Tensor):
        return value.dim(), value.shape[1:], value.is_floating_point()
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((key, _form(each)) for key, each in value.items())
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    return value if isinstance(value, (int, float, str, bool, torch.dtype, type(None))) else type(value)
