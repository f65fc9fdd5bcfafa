"""Measuring which rows of every tapped tensor belong to which sample, by running a model on a few samples.

Two samples are run, and run again with the first replaced: the rows of a tensor that change are that sample's
(:mod:`tracing.rows`), whatever functions the model calls. Random numbers are the same in all runs, layers without
parts (BatchNorm, dropout) are in eval mode, and the model is left as it was. Where nothing changes (a table of
positions, learned queries) the gradients say whose the rows are: those of all samples' outputs reach a table,
those of one sample's its own copy.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Arrangement, Call, arrangements
from .rows import Rows, infer, shared

Key = tuple[str, str, int]
"""Kind of tap, name of the layer or activation, how many like it came before in the forward pass."""

FEW = 2


class Recording:
    """What one run saw: of each tapped tensor a number for each row, and the tensors if asked for.

    Args:
        keep: keys of tensors that are kept, in order to ask for their gradients.
    """

    def __init__(self, keep: frozenset[Key] = frozenset()) -> None:
        self.marks: dict[Key, Tensor] = {}
        self.kept: dict[Key, tuple[Tensor, int]] = {}
        self.outputs: list[Tensor] = []
        self._keep = keep
        self._weights: dict[tuple[int, torch.device], Tensor] = {}

    def is_table(self, key: Key) -> bool:
        """Whether a tensor may be shared by all samples."""
        return key in self._keep

    def add(self, key: Key, x: Tensor, axis: int) -> None:
        """Note a tensor with channels along ``axis``."""
        if key in self._keep or (self._keep and key[0] == "tables"):
            self.kept[key] = x, axis
        size = (x.shape[axis], x.device)
        if size not in self._weights:  # no two channels weigh the same: what adds up to one does not cancel
            generator = torch.Generator().manual_seed(0)
            self._weights[size] = (0.5 + torch.rand(size[0], generator=generator)).to(x.device)
        with torch.no_grad():
            self.marks[key] = _weighted(x.detach().float(), self._weights[size], axis).flatten()


class Layouts:
    """What is known of the rows of every tapped tensor, for each form of the samples.

    Args:
        model: the model; called as the user's loop calls it.
        record: a context that makes calls of the model note tapped tensors in a :class:`Recording`.
    """

    def __init__(self, model: nn.Module, record: Callable[[Recording, int], Any]) -> None:
        self._model, self._record = model, record
        self._known: dict[tuple[object, ...], Mapping[Key, Rows]] = {}
        self._now: Mapping[Key, Rows] = {}
        self._same_form = True
        self.mixed: dict[str, str] = {}
        """Layers whose rows cannot be given to samples, and why."""
        self.samples = 1

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure what the rows of a call will need to be known; call at the start of each forward pass."""
        found = arrangements(args, kwargs)
        self.samples = found[0].samples
        self._now, self._same_form = {}, True
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
        with untouched(self._model) as again:

            def run(call: Call, keep: frozenset[Key] = frozenset()) -> Recording:
                again()
                recording = Recording(keep)
                with self._record(recording, samples):
                    recording.outputs = list(_floating(self._model(*call[0], **call[1])))
                return recording

            base, other = run(arrangement.first(samples)), run(arrangement.replaced(samples, 0))
            rows: dict[Key, Rows] = {}
            unclear: set[Key] = set()
            for key, mark in base.marks.items():
                now = other.marks.get(key)
                if now is None or now.shape != mark.shape:
                    why = "the number of its rows depends on what is in them"
                    rows[key] = Rows("mixed", count=len(mark), samples=samples, why=why)
                    continue
                found = infer({0: differ(mark, now)}, samples) or _weakly(mark, now, samples)
                if found is None:
                    unclear.add(key)
                rows[key] = found if found is not None else shared(len(mark), samples)
            if unclear:
                last = run(arrangement.replaced(samples, 1))
                changed = [_changes(base.outputs, each.outputs) for each in (other, last)]
                graph = run(arrangement.first(samples), frozenset(unclear))
                tables = {k: shared(x.numel() // x.shape[a], samples) for k, (x, a) in graph.kept.items()}
                rows |= tables | _by_gradients(graph, changed, samples)
        return rows


def _weakly(before: Tensor, after: Tensor, samples: int) -> Rows | None:
    """Rows that change by no more than rounding, beside a large constant part: to the bit, where that is clear."""
    found = infer({0: ~((before == after) | (before.isnan() & after.isnan()))}, samples)
    return found if found is not None and found.kind == "samples" else None


def _weighted(x: Tensor, weights: Tensor, axis: int) -> Tensor:
    """The sum of ``x`` times ``weights`` along an axis."""
    if axis == x.dim() - 1:
        return x @ weights
    if axis == 1 and x.is_contiguous():
        return weights @ x.flatten(2)
    shape = [1] * x.dim()
    shape[axis] = -1
    return (x * weights.view(shape)).sum(axis)


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


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Run a model without a trace, layers without parts in eval mode.

    Attributes (train/eval flags among them), buffers and the random streams of PyTorch, Python and NumPy are as
    before on exit.

    Yields:
        A function that rewinds all of them, so that the next run is like the first one.
    """
    modules = list(model.modules())
    attributes = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    numpy = sys.modules.get("numpy.random")
    python_state, numpy_state = random.getstate(), numpy.get_state() if numpy else None
    with torch.random.fork_rng(devices):
        cpu_state = torch.get_rng_state()
        device_states = [torch.cuda.get_rng_state(i) for i in devices]

        def restore() -> None:
            for module, values, own in attributes:
                module.__dict__.clear()
                module.__dict__.update(values)
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, value, version in buffers:
                    if buffer._version != version:
                        buffer.copy_(value)
            random.setstate(python_state)
            if numpy is not None:
                numpy.set_state(numpy_state)

        def again() -> None:
            restore()
            torch.set_rng_state(cpu_state)
            for index, state in zip(devices, device_states, strict=True):
                torch.cuda.set_rng_state(state, index)
            for module in modules:
                if module.training and not module._modules:
                    module.training = False

        try:
            yield again
        finally:
            restore()
