"""The taps of one forward pass: where they are, what overwrites what they read, and where their sums go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import ObservationError
from ..records import Pass
from .extension import Tap, Term, storage_of
from .probe import Layouts
from .recording import Key, Recording

Kind = Literal["outputs", "activations", "inputs", "tables"]


class Places(Protocol):
    """What is done where a forward pass meets a producer, an activation or a reader."""

    def place(self, kind: Kind, name: str, terms: tuple[Term, ...], y: Tensor, axis: int) -> Tap | None:
        """Tap ``y``, which is made of ``terms`` and has channels along ``axis``."""

    def is_table(self, name: str) -> bool:
        """Whether all samples share the output that the layer ``name`` gives next."""

    def before_overwriting(self, x: Tensor, but: Tap | None = None) -> None:
        """An in-place operation is about to change ``x``, which the tap ``but`` can do with."""

    def apart_from(self, x: Tensor, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """``terms``, fit to be read after ``x`` has been overwritten."""


class Taps:
    """Real taps, whose sums go to a :class:`Pass`.

    Args:
        current: the pass.
        layouts: how samples lie in the rows of what is tapped.
        reached: told of the pass when a gradient arrives, and of the name it arrives at.
    """

    def __init__(self, current: Pass, layouts: Layouts, reached: Callable[[Pass, str], None]) -> None:
        self._pass, self._layouts, self._reached = current, layouts, reached
        self._by_storage: dict[int, list[weakref.ref[Tap]]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def place(self, kind: Kind, name: str, terms: tuple[Term, ...], y: Tensor, axis: int) -> Tap:
        """Tap ``y``."""
        outer = self._layouts.outer(_key(self._counts, kind, name), y.numel() // max(y.shape[axis], 1))
        batch = self._layouts.samples if outer != 0 else 1
        sink = self._sink(getattr(self._pass, "outputs" if kind == "tables" else kind), name)
        tap = Tap(terms, y, axis, batch, sink, name, gradients=kind == "inputs", outer=1 if outer == 0 else outer)
        for term in tap.terms:
            self._by_storage.setdefault(term.storage, []).append(weakref.ref(tap))
        if kind == "inputs":
            self._add_up(name, y, axis)
        return tap

    def is_table(self, name: str) -> bool:
        """Whether all samples share the next output."""
        return self._layouts.is_table(("outputs", name, self._counts.get(("outputs", name), 0)))

    def _add_up(self, name: str, x: Tensor, axis: int) -> None:
        """Add what a reader reads of each channel to what it has read in this pass."""
        rest = [i for i in range(x.dim()) if i != axis]
        total = x.detach().sum(rest, dtype=torch.promote_types(x.dtype, torch.float32))
        total = total.double() if x.device.type != "mps" else total
        rows = torch.full_like(total[0], x.numel() // x.shape[axis])
        before = self._pass.reads.get(name)
        self._pass.reads[name] = (total, rows) if before is None else (before[0] + total, before[1] + rows)

    def before_overwriting(self, x: Tensor, but: Tap | None = None) -> None:
        """Let all taps but one keep copies of what they read in the memory of ``x``."""
        here = storage_of(x)
        for ref in self._by_storage.pop(here, []):
            tap = ref()
            if tap is not None and tap is but:
                self._by_storage.setdefault(here, []).append(ref)
            elif tap is not None:
                tap.copy_values(here)

    def apart_from(self, x: Tensor, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """``terms``, with copies of what lives in the memory of ``x``."""
        return tuple(term.apart_from(storage_of(x)) for term in terms)

    def _sink(self, store: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
        owner, reached = self._pass, self._reached

        def sink(sums: Tensor) -> None:
            if owner.closed:
                raise ObservationError(
                    "a backward pass arrived after its forward pass had been counted. Run all backward passes "
                    "of a batch before the next forward pass."
                )
            reached(owner, name)
            if sums.shape[-2] != owner.batch:  # the batch turned out to be the unit
                sums = sums.sum(-2, keepdim=True)
            sums = sums if owner.loss_scale == 1 else sums / owner.loss_scale
            store[name] = store[name] + sums if name in store else sums

        return sink


class Recorder:
    """Notes what would be tapped in a :class:`Recording`."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._counts: dict[tuple[str, str], int] = {}

    def place(self, kind: Kind, name: str, terms: tuple[Term, ...], y: Tensor, axis: int) -> None:
        """Note ``y``."""
        with torch._C.DisableTorchFunction():
            self._recording.add(_key(self._counts, kind, name), y, axis)

    def is_table(self, name: str) -> bool:
        """Whether all samples may share the next output."""
        return self._recording.is_table(("outputs", name, self._counts.get(("outputs", name), 0)))

    def before_overwriting(self, x: Tensor, but: Tap | None = None) -> None:
        """Nothing is read later."""

    def apart_from(self, x: Tensor, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Nothing is read later."""
        return terms


def _key(counts: dict[tuple[str, str], int], kind: str, name: str) -> Key:
    number = counts.get((kind, name), 0)
    counts[kind, name] = number + 1
    return kind, name, number
