"""Measuring which rows of every tapped tensor belong to which sample, by running a model on a few samples.

Two samples are run, and run again with the first replaced: the rows of a tensor that change are that sample's
(:mod:`tracing.rows`), whatever functions the model calls. Where too little of it comes through (dead activations,
closed gates), noise is added further down to the rows that are known to be that sample's. Random numbers are the
same in all runs, layers without parts (BatchNorm, dropout) are in eval mode, and the model is left as it was.
Where nothing changes (a table of positions, learned queries) the gradients say whose the rows are: those of all
samples' outputs reach a table, those of one sample's its own copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..records import Pass
from .arguments import Arrangement, Call, arrangements
from .recording import Key, Recording
from .rewinding import untouched
from .rows import Rows, infer, shared

FEW = 2
LOUD = 2.0, 1e2, 1e4
"""Noise, in root mean squares of a tensor, that is tried one after another until it comes through what follows."""


class Layouts:
    """What is known of the rows of every tapped tensor, for each form of the samples.

    Args:
        model: the model; called as the user's loop calls it.
        record: a context that makes calls of the model note tapped tensors in a :class:`Recording`; it gives the
            pass.
    """

    def __init__(self, model: nn.Module, record: Callable[[Recording, int], AbstractContextManager[Pass]]) -> None:
        self._model, self._record = model, record
        self._known: dict[tuple[object, ...], Mapping[Key, Rows]] = {}
        self._now: Mapping[Key, Rows] = {}
        self._same_form = self._first = True
        self.mixed: dict[str, str] = {}
        """Layers whose rows cannot be given to samples, and why."""
        self.samples = 1
        self.reads: Mapping[str, tuple[str, ...]] | None = None
        """Whose channels layers read in a pass of two samples, where the first call had but one; else ``None``."""

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure what the rows of a call will need to be known; call at the start of each forward pass."""
        found = arrangements(args, kwargs)
        self.samples = found[0].samples
        self._now, self._same_form = {}, True
        if self._first and self.samples == 1:
            self.reads = self._reads_of_two(found)
        self._first = False
        if self.samples == 1 or self.mixed:
            return
        for each in found:
            if each.form in self._known:
                self._now, self.samples = self._known[each.form], each.samples
                return
        simple = next(iter(self._known.values()), None)
        if simple and all(rows.outer == 1 for rows in simple.values()):  # batch-major, whatever the size of images
            self._now, self._same_form = simple, False
            return
        best, self.samples = self._measure(found)
        form = next(each.form for each in found if each.samples == self.samples)
        self._known[form] = self._now = best
        self.mixed = {key[1]: rows.why for key, rows in best.items() if rows.kind == "mixed"}

    def outer(self, key: Key, count: int) -> int | None:
        """How samples lie in the ``count`` rows of a tensor: see :func:`~.extension.sample_sums`.

        ``None`` where all samples share them; 0 where they belong to no single one, which :attr:`mixed` then says.
        """
        if self.samples == 1:
            return 1
        if self.mixed:
            return 0
        rows = self._now.get(key)
        if rows is None:
            self.mixed[key[1]] = "it is called in another order than for two samples"
            return 0
        if not rows.fits(count, self.samples, self._same_form):
            before = f"{rows.count} for {rows.samples}"
            self.mixed[key[1]] = f"it sees {count} rows for {self.samples} samples, but {before}"
            return 0
        return rows.outer if rows.kind == "samples" else None

    def is_table(self, key: Key) -> bool:
        """Whether all samples share a tensor, which is not to be read off its own shape."""
        rows = self._now.get(key)
        return rows is not None and rows.kind == "shared" and not self.mixed

    def _reads_of_two(self, found: list[Arrangement]) -> Mapping[str, tuple[str, ...]] | None:
        """Whose channels each layer reads: of one sample, an axis of samples and channels looks like channels."""
        with untouched(self._model) as again:
            for each in found:
                again()
                args, kwargs = each.doubled()
                try:
                    with self._record(Recording(), 2) as current:
                        self._model(*args, **kwargs)
                except Exception:  # a number of samples that the model does not take
                    continue
                return current.read_layers
        return None

    def _measure(self, found: list[Arrangement]) -> tuple[Mapping[Key, Rows], int]:
        """The rows of all tensors for the first arrangement that has none mixed, else for the likeliest."""
        first: Mapping[Key, Rows] | None = None
        error: Exception | None = None
        for each, few in [(a, FEW) for a in found] + [(found[0], found[0].samples)]:
            if first is not None and few != FEW:
                break
            if each.samples < 2:
                continue
            try:
                rows = self._try(each, few)
            except Exception as failed:  # a number of samples that the model does not take
                error = error or failed
                continue
            if all(one.kind != "mixed" for one in rows.values()):
                return rows, each.samples
            first = first if first is not None else rows
        if first is None:
            why = f"the model does not run on a part of the batch ({type(error).__name__}: {str(error)[:200]})"
            return {("model", "the model", 0): Rows("mixed", why=why)}, found[0].samples
        return first, found[0].samples

    def _try(self, arrangement: Arrangement, samples: int) -> dict[Key, Rows]:
        fixed = [*self._model.parameters(), *self._model.buffers()]
        with untouched(self._model) as again:

            def run(call: Call, recording: Recording) -> Recording:
                again()
                with self._record(recording, samples):
                    recording.outputs = list(_floating(self._model(*call[0], **call[1])))
                return recording

            def replaced(sample: int, shaken: Mapping[Key, Rows], loud: float) -> Recording:
                call = arrangement.replaced(samples, sample)
                inputs = [x for x in tree_leaves(call) if isinstance(x, Tensor)]
                return run(call, Recording(frozenset(), shaken, sample, loud, [*fixed, *inputs]))

            base = run(arrangement.first(samples), Recording())
            last, noise = replaced(0, {}, 0), 0.0
            rows, unclear = _compare(base, last, samples)
            rows |= _mixed_outputs(base.outputs, last.outputs, samples)
            shaken: dict[Key, Rows] = {}
            for loud in LOUD if all(one.kind != "mixed" for one in rows.values()) else ():
                known: dict[Key, Rows] = {}
                while unclear and known != (known := _shakeable(rows)):
                    try:
                        last = replaced(0, known, loud)
                    except Exception:  # the model does not take any number
                        break
                    shaken, noise = known, loud
                    found, _ = _compare(base, last, samples)
                    rows |= {key: one for key, one in found.items() if key in unclear}
                    unclear -= found.keys()
            for key in unclear:
                mark = base.marks[key]
                rows[key] = _weakly(mark, last.marks.get(key, mark), samples) or shared(len(mark), samples)
            unclear = {key for key in unclear if rows[key].kind == "shared"}
            if unclear:
                changed = [_changes(base.outputs, each.outputs) for each in (last, replaced(1, shaken, noise))]
                graph = run(arrangement.first(samples), Recording(frozenset(unclear)))
                tables = {k: shared(x.numel() // x.shape[a], samples) for k, (x, a) in graph.kept.items()}
                rows |= tables | _by_gradients(graph, changed, samples)
        return rows


def _mixed_outputs(before: list[Tensor], after: list[Tensor], samples: int) -> dict[Key, Rows]:
    """Outputs that depend on several samples each, although no layer's do: of differences between samples, say.

    Sums over the batch, which are scalars, do not count: losses add up.
    """
    found: dict[Key, Rows] = {}
    for number, (one, other) in enumerate(zip(before, after, strict=False)):
        if one.shape == other.shape and one.dim() and one.numel() % samples == 0:
            rows = infer({0: differ(one.detach().float().flatten(), other.detach().float().flatten())}, samples)
            if rows is not None and rows.kind == "mixed":
                found["model", "the model's output", number] = rows
    return found


def _shakeable(rows: Mapping[Key, Rows]) -> dict[Key, Rows]:
    return {key: one for key, one in rows.items() if key[0] == "outputs" and one.kind == "samples"}


def _compare(base: Recording, other: Recording, samples: int) -> tuple[dict[Key, Rows], set[Key]]:
    """The rows of all tensors, of which the first sample was replaced; and those that do not change clearly."""
    rows: dict[Key, Rows] = {}
    unclear: set[Key] = set()
    for key, mark in base.marks.items():
        now = other.marks.get(key)
        if now is None or now.shape != mark.shape:
            why = "the number of its rows depends on what is in them"
            rows[key] = Rows("mixed", count=len(mark), samples=samples, why=why)
            continue
        found = infer({0: differ(mark, now)}, samples)
        if found is None:
            unclear.add(key)
        else:
            rows[key] = found
    return rows, unclear


def _weakly(before: Tensor, after: Tensor, samples: int) -> Rows | None:
    """Rows that change by no more than rounding, beside a large constant part: to the bit, where that is clear."""
    found = infer({0: ~((before == after) | (before.isnan() & after.isnan()))}, samples)
    return found if found is not None and found.kind == "samples" else None


def differ(before: Tensor, after: Tensor) -> Tensor:
    """Which entries differ by more than a device's own irregularities: both ``(rows,)``, the result bool."""
    scale = before.abs().max() if len(before) else before.sum()
    close = (before - after).abs() <= 1e-5 * scale
    if bool(scale.isfinite()):
        return ~close
    scale = before.nan_to_num(0, 0, 0).abs().max()
    close = (before - after).abs() <= 1e-5 * scale
    return ~(close | (before == after) | (before.isnan() & after.isnan()))


def _changes(before: list[Tensor], after: list[Tensor]) -> list[Tensor | None]:
    """Which entries of the outputs differ; ``None`` for those of another shape."""
    if len(before) != len(after):
        return [None] * len(before)
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(before, after, strict=True)]
    masks = [differ(a.flatten(), b.flatten()).view(a.shape) if a.shape == b.shape else None for a, b in pairs]
    if any(mask is None or mask.any() for mask in masks):
        return masks
    return [a != b for a, b in pairs]  # weak beside a large constant part: to the bit


def _by_gradients(run: Recording, changed: list[list[Tensor | None]], samples: int) -> dict[Key, Rows]:
    """The rows of the kept tensors, by which of them the outputs of one sample depend on."""
    keys = [key for key, (x, _) in run.kept.items() if x.requires_grad]
    reached: dict[Key, dict[int, Tensor]] = {key: {} for key in keys}
    for sample, masks in enumerate(changed):
        total: Tensor | None = None
        for output, mask in zip(run.outputs, masks, strict=False):
            if mask is None or mask.shape != output.shape or not output.requires_grad:
                continue
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(output.shape, generator=generator).to(output.device)
            part = (output.float() * weights * mask).sum()
            total = part if total is None else total + part
        if total is None or not keys:
            return {}
        grads = torch.autograd.grad(
            total, [run.kept[key][0] for key in keys], retain_graph=True, allow_unused=True
        )
        for key, grad in zip(keys, grads, strict=True):
            x, axis = run.kept[key]
            grad = torch.zeros_like(x) if grad is None else grad
            reached[key][sample] = grad.ne(0).any(axis).flatten()
    found = {key: infer(masks, samples) for key, masks in reached.items()}
    return {key: rows for key, rows in found.items() if rows is not None and rows.kind == "samples"}


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _floating(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _floating(each)
