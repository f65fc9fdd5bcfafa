"""Refitting the layers of a cut model front to back, in one pass over all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ObservationError
from .cutlayer import CutLayer, memory_of, shared_parameters
from .passes import after_each, device_of, drawn_so_far, output_error, read_by, reproducibly
from .patches import Rows, choose, inputs_at, outputs_at, rows_of
from .probe import Facts, Layout, probe
from .regression import mean_square, refit
from .samples import Samples, even_choice

ROWS, PER_FEATURE = 2048, 48
"""A layer with f features is fitted to PER_FEATURE * f output positions, at least ROWS, ..."""
WORK, FEWEST, MOST = 1 << 32, 2048, 16384
"""... and at most WORK / f^2, or FEWEST where that is less, and never more than MOST."""
HELD_OUT, MOST_HELD_OUT = 1 / 10, 64
"""Of the samples, this part, at most that many, are kept from the fit and judge the whole."""
MATRICES = 6
"""Matrices of features squared that a regression holds at a time."""
BATCH, LEAST_BATCH, BATCH_BYTES = 64, 8, 40 << 20
"""Samples per forward pass before the cut, where any number gives the same: as many as fit into a cache."""
ZERO = 64
"""An error of so many times the rounding of a single value is none."""
LARGEST_ZERO = 0.03
"""And none of more than this part of the output: a half-precision layer that lost inputs is not unchanged."""


@dataclass(frozen=True)
class LayerReport:
    """What :meth:`Compensation.step` did to one layer.

    Attributes:
        name: dotted module name; projections of ``nn.MultiheadAttention`` are ``q_proj``, ``k_proj``, ``v_proj``.
        kept, removed: numbers of input channels; none may be removed: a layer whose inputs changed because of
            cuts before it is refitted as well.
        lost: error of its output on held-out samples, as a share of the output's power, after the layers before it
            were compensated and before it is.
        left: the same after it is; NaN where nothing could be held out.
        ridge: the ridge used, as a multiple of the features' mean variance; inf where only the mean was made up
            for, NaN where the layer was left as it is.
        constant: where the mean went: ``"bias"``, ``"norm"`` (the BatchNorm that follows) or ``""``.
        skipped: why the layer was left as Torch-Pruning left it; empty if it was not.
    """

    name: str
    kept: int
    removed: int
    lost: float = float("nan")
    left: float = float("nan")
    ridge: float = float("nan")
    constant: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        head = f"{self.name}: {self.removed} of {self.kept + self.removed} inputs removed"
        if self.skipped:
            return f"{head}; not compensated: {self.skipped}"
        how = "left as it is" if math.isnan(self.ridge) else f"ridge {self.ridge:.0e}"
        if math.isnan(self.left):
            return f"{head}; output error {self.lost:.2%}, too few samples to hold some out ({how})"
        return f"{head}; output error {self.lost:.2%} -> {self.left:.2%} ({how})"


@dataclass(frozen=True)
class Outcome:
    """What a refit came to.

    Attributes:
        rows: one report per layer that reads other values than before the cut, in forward order.
        before: error of the model's outputs on held-out samples as cut, see :func:`output_error`; NaN if unknown.
        after: the same after the refit.
        reverted: why all layers were left as they were cut after all; empty if they were not.
    """

    rows: tuple[LayerReport, ...]
    before: float = float("nan")
    after: float = float("nan")
    reverted: str = ""


@dataclass(frozen=True)
class _Wanted:
    """What a layer gave in one of its calls in the uncut model, at some positions; those of even samples first."""

    rows: Rows
    even: int
    values: Tensor
    read: torch.Size
    drawn: bytes


class _Recorded:
    """Gathers a :class:`_Wanted` over the batches of the pass before the cut.

    Args:
        layout: where samples lie among the rows of the call.
        some: output positions to keep, over all batches.
        count: number of samples, over all batches.
        drawn: see :func:`drawn_so_far`.
    """

    def __init__(self, layout: Layout, some: int, count: int, drawn: bytes) -> None:
        self._layout, self._some, self._count, self._drawn = layout, some, count, drawn
        self._parts: list[tuple[Tensor, int, Tensor]] = []
        self._shapes: list[tuple[tuple[int, ...], torch.Size]] = []

    def add(self, module: nn.Module, x: Tensor, y: Tensor, first: int, samples: int) -> None:
        """Keep some outputs ``y`` of a batch of so many ``samples``, from number ``first`` on."""
        shape = rows_of(module, y)
        self._shapes.append((shape, x.shape))
        if shape[self._layout.axis] != self._layout.rows * samples:
            return
        each = math.prod(shape) // samples
        index = choose(each * self._count, self._some)
        index = index[(index >= first * each) & (index < (first + samples) * each)] - first * each
        even = (self._layout.samples(Rows(shape, index), samples) + first) % 2 == 0
        index = torch.cat([index[even], index[~even]])
        values = outputs_at(module, y, Rows(shape, index.to(y.device)))
        self._parts.append((index + first * each, int(even.sum()), values))

    def joined(self) -> _Wanted | None:
        """All batches together; ``None`` where they do not fit together."""
        shapes = {(shape[1:], read[1:]) for shape, read in self._shapes}
        if len(self._parts) < len(self._shapes) or len(shapes) > 1:
            return None
        shape = (sum(s[0] for s, _ in self._shapes), *self._shapes[0][0][1:])
        read = torch.Size([sum(r[0] for _, r in self._shapes), *self._shapes[0][1][1:]])
        index = [i[:even] for i, even, _ in self._parts] + [i[even:] for i, even, _ in self._parts]
        values = [v[:even] for _, even, v in self._parts] + [v[even:] for _, even, v in self._parts]
        device = values[0].device
        rows = Rows(shape, torch.cat(index).to(device))
        return _Wanted(rows, sum(even for _, even, _ in self._parts), torch.cat(values), read, self._drawn)


class Refit:
    """Two passes over the same samples: one before the cut, one after it, in which layers are refitted.

    Args:
        model: the model, uncut.
        layers: those that may be refitted.
        samples: finite ones.
        ridge: see :func:`ippro_tp.compensation.regression.refit`.
        memory: bytes that activations and kept outputs may take at a time.

    Raises:
        ObservationError: the model does not repeat what it did.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[CutLayer], samples: Samples, ridge: float | None, memory: int
    ) -> None:
        self._model, self._layers, self._ridge = model, layers, ridge
        self._device = device_of(model)
        self._facts = probe(model, layers, samples, self._device)
        self._shapes = _shapes(model)
        budget = _Budget.of(layers, self._facts, samples.count, memory)
        self._rows = budget.rows
        chosen = even_choice(samples.count, budget.samples)
        held = min(MOST_HELD_OUT, int(len(chosen) * HELD_OUT))
        if held:
            out = even_choice(len(chosen), held)
            inside = torch.ones(len(chosen), dtype=torch.bool).index_fill_(0, out, False)
            self._judging, chosen = chosen[out], chosen[inside]
        else:
            self._judging = chosen
        self._fitting, self._samples = chosen, samples
        self._wanted: dict[tuple[str, int], _Wanted] = {}
        self._outputs = self._record()

    def run(self, layers: Sequence[CutLayer]) -> Outcome:
        """Refit the layers of the cut model, and judge the whole.

        Args:
            layers: as given at first, of the cut model.
        """
        before = output_error(self._judge(), self._outputs)
        cut = [m for m, shapes in self._shapes.items() if _own_shapes(m) != shapes]
        done = _Pass(self, layers, cut)
        rows = done.run()
        if done.mixed:
            reason = (
                f"layer {done.mixed!r} gives other values than before although nothing before it "
                f"was cut: the model "
                "does not repeat what it did"
            )
            return self._revert(layers, rows, before, float("nan"), reason)
        after = output_error(self._judge(), self._outputs)
        if before is None or after is None:
            return Outcome(tuple(rows))
        if not after <= before and any(layer.changed for layer in layers):
            return self._revert(
                layers, rows, before, after, "the model's outputs on held-out samples became worse"
            )
        return Outcome(tuple(rows), before, after)

    def _revert(
        self, layers: Sequence[CutLayer], rows: list[LayerReport], before: float | None, after: float, reason: str
    ) -> Outcome:
        for layer in layers:
            layer.undo()
        left = tuple(
            row if row.skipped else LayerReport(row.name, row.kept, row.removed, skipped=f"taken back: {reason}")
            for row in rows
        )
        return Outcome(left, float("nan") if before is None else before, after, reason)

    def _call(self, index: Tensor) -> Any:
        args, kwargs = self._samples.arguments(index, self._device)
        return self._model(*args, **kwargs)

    def _judge(self) -> Any:
        with reproducibly(self._model):
            return self._call(self._judging)

    def _record(self) -> Any:
        """Keep what layers give before the cut; return the outputs by which the whole is judged."""
        found: dict[tuple[str, int], _Recorded] = {}
        calls: dict[str, int] = {}
        total = len(self._fitting)
        first, batch = 0, self._fitting

        def see(layer: CutLayer, x: Tensor, y: Any, args: Any, kwargs: Any) -> None:
            number = calls.get(layer.name, 0)
            calls[layer.name] = number + 1
            layouts = self._facts.layouts.get(layer.name, ())
            if layer.name in self._facts.unfit or number >= len(layouts) or layouts[number].problem:
                return
            some = math.ceil(self._rows[layer.name] / len(layouts))
            key = layer.name, number
            if key not in found:
                found[key] = _Recorded(layouts[number], some, total, drawn_so_far(self._device))
            found[key].add(layer.module, x, y, first, len(batch))

        with reproducibly(self._model), after_each(self._layers, see):
            for batch in self._fitting.split(self._batch()):
                calls.clear()
                self._call(batch)
                first += len(batch)
        self._wanted = {key: wanted for key, parts in found.items() if (wanted := parts.joined()) is not None}
        return self._judge()

    def _batch(self) -> int:
        if not self._facts.apart:
            return len(self._fitting)
        return max(LEAST_BATCH, min(BATCH, int(BATCH_BYTES / max(1.0, self._facts.bytes_per_sample))))

    def problem(self, name: str) -> str:
        """Why a layer cannot be refitted, whatever comes; empty if it can."""
        facts = self._facts
        if name in facts.unfit:
            return facts.unfit[name]
        layouts = facts.layouts.get(name, [])
        if not layouts:
            return "the model's forward does not call it"
        found = next((layout.problem for layout in layouts if layout.problem), "")
        if not found and any((name, number) not in self._wanted for number in range(len(layouts))):
            found = "its input differs in size between calls"
        return found


class _Pass:
    """Forward passes of the cut model; before a layer runs, it is refitted.

    A layer that is called several times is refitted at each call to all calls so far, and once more the whole
    pass is made with it held as it came out, so that the layers in between fit what they read in the end.
    """

    def __init__(self, owner: Refit, layers: Sequence[CutLayer], cut: Sequence[nn.Module]) -> None:
        self._owner, self._layers, self._cut = owner, layers, cut
        self._reports: dict[str, LayerReport] = {}
        self._shared = shared_parameters(owner._model)
        self._calls: dict[str, int] = {}
        self._held: set[str] = set()
        self._gathered: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
        self._reached = False  # a module that was cut has run
        self.mixed = ""

    def run(self) -> list[LayerReport]:
        """Refit all layers that the pass reaches."""
        self._once()
        often = [name for name, layouts in self._owner._facts.layouts.items() if len(layouts) > 1]
        often = [name for name in often if name in self._reports and self._layer(name).changed]
        if often and not self.mixed:
            first = list(self._reports).index(often[0])
            self._held = {*often, *list(self._reports)[:first]}
            for layer in self._layers:
                if layer.name not in self._held:
                    layer.undo()
            self._once()
        for layer in self._layers:
            if layer.name not in self._reports and layer.inputs < layer.all_inputs:
                self._skip(layer, self._owner.problem(layer.name) or "the model's forward does not call it")
        return [r for r in self._reports.values() if r.removed or r.skipped or r.lost > 0]

    def _layer(self, name: str) -> CutLayer:
        return next(layer for layer in self._layers if layer.name == name)

    def _once(self) -> None:
        self._calls.clear()
        self._gathered.clear()
        self._reached = False
        handles = [x.module.register_forward_pre_hook(self._before(x), with_kwargs=True) for x in self._layers]
        handles += [module.register_forward_pre_hook(self._mark) for module in self._cut]
        try:
            with reproducibly(self._owner._model):
                self._owner._call(self._owner._fitting)
        except _Mixed as found:
            self.mixed = str(found)
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self, module: nn.Module, args: Any) -> None:
        self._reached = True

    def _before(self, layer: CutLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = self._calls.get(layer.name, 0)
            self._calls[layer.name] = number + 1
            x = read_by(args, kwargs)
            if layer.name in self._held or x is None:
                return
            reason = self._reason(layer, x, number)
            if reason:
                layer.undo()
                self._held.add(layer.name)
                self._skip(layer, reason)
            else:
                self._refit(layer, x, number)

        return hook

    def _reason(self, layer: CutLayer, x: Tensor, number: int) -> str:
        problem = self._owner.problem(layer.name)
        if problem:
            return problem
        wanted = self._owner._wanted.get((layer.name, number))
        if wanted is None:
            return "it is called more often than before the cut"
        channel = x.dim() - 1 if isinstance(layer.module, nn.Linear) else 1
        if [n for d, n in enumerate(x.shape) if d != channel] != [
            n for d, n in enumerate(wanted.read) if d != channel
        ]:
            return "it reads another number of rows than before the cut"
        if drawn_so_far(x.device) != wanted.drawn:
            return "the model draws random numbers before it, and others since the cut"
        others = [*self._shared.get(memory_of(layer.module.weight), ())]
        if layer.module.bias is not None:
            others += self._shared.get(memory_of(layer.module.bias), ())
        if others:
            return f"its weight or bias is shared: {', '.join(dict.fromkeys(others))}"
        return ""

    def _skip(self, layer: CutLayer, reason: str) -> None:
        removed = layer.all_inputs - layer.inputs
        self._reports[layer.name] = LayerReport(layer.name, layer.inputs, removed, skipped=reason)

    def _refit(self, layer: CutLayer, x: Tensor, number: int) -> None:
        wanted = self._owner._wanted[layer.name, number]
        several = len(self._owner._facts.layouts[layer.name]) > 1
        if several:
            layer.undo()  # all calls are fitted from what Torch-Pruning left
        dtype = torch.promote_types(layer.module.weight.dtype, torch.float32)
        read = inputs_at(layer.module, x, wanted.rows).to(dtype)
        y = wanted.values[:, layer.outputs.to(x.device)].to(dtype).unflatten(1, (layer.groups, -1)).transpose(0, 1)
        read, y, even = _finite(read, y, wanted.even)
        if several:
            parts = self._gathered.setdefault(layer.name, [])
            parts.append((read, y, even))
            read, y, even = _joined(parts)
        error = y - read @ layer.matrix(dtype)
        if layer.module.bias is not None:
            error -= layer.module.bias.to(dtype).view(layer.groups, 1, -1)
        kept, removed = layer.inputs, layer.all_inputs - layer.inputs
        power = mean_square(y)
        none = min(ZERO * _rounding(layer.module.weight), LARGEST_ZERO) ** 2 * power
        if y.shape[1] == 0:
            self._skip(layer, "all that it reads or gave holds NaN or inf")
        elif mean_square(error) <= none:
            self._reports[layer.name] = LayerReport(layer.name, kept, removed, 0.0, 0.0)
        elif not self._reached and not removed:
            raise _Mixed(layer.name)
        else:
            margin = 1 / len(self._owner._fitting)
            update = refit(read, error, even, layer.constant != "", self._owner._ridge, margin)
            layer.add(update.delta, update.constant)
            share = 1 / power if power > 0 else 0.0
            constant = layer.constant if update.constant is not None else ""
            self._reports[layer.name] = LayerReport(
                layer.name, kept, removed, update.before * share, update.after * share, update.ridge, constant
            )


class _Mixed(ObservationError):
    """A layer before the first cut gives other values than before; the message is its name."""


def _finite(read: Tensor, y: Tensor, even: int) -> tuple[Tensor, Tensor, int]:
    """The rows without NaN and inf."""
    if bool(torch.isfinite(read.sum() + y.sum())):
        return read, y, even
    good = read.isfinite().all(-1).all(0) & y.isfinite().all(-1).all(0)
    return read[:, good], y[:, good], int(good[:even].sum())


def _joined(parts: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, int]:
    """Rows of several calls, those of even samples first."""
    read = [r[:, :even] for r, _, even in parts] + [r[:, even:] for r, _, even in parts]
    y = [v[:, :even] for _, v, even in parts] + [v[:, even:] for _, v, even in parts]
    return torch.cat(read, 1), torch.cat(y, 1), sum(even for _, _, even in parts)


def _rounding(weight: Tensor) -> float:
    """Of a product with ``weight``, relative."""
    short = weight.device.type == "cuda" and weight.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return 1e-3 if short else torch.finfo(weight.dtype).eps


@dataclass(frozen=True)
class _Budget:
    """What a step keeps and works on, so that it fits into ``memory`` bytes.

    Attributes:
        rows: per layer, output positions that it is fitted to.
        samples: how many there is room for.
    """

    rows: dict[str, int]
    samples: int

    @classmethod
    def of(cls, layers: Sequence[CutLayer], facts: Facts, count: int, memory: int) -> _Budget:
        """A quarter for kept outputs, a quarter for the rows of one regression, the rest for activations."""
        rows, kept, work = {}, 0.0, 0
        for layer in layers:
            each, channels = facts.outputs.get(layer.name, (0.0, 0))
            size = layer.module.weight.element_size()
            most = min(MOST, max(FEWEST, WORK // layer.features**2))
            wanted = max(ROWS, min(most, PER_FEATURE * layer.features))
            read = layer.features * layer.groups * 4 * size + layer.taps * 32 + channels * (5 * size + 16)
            rows[layer.name] = max(2, min(wanted, memory // 4 // read))
            work = max(work, rows[layer.name] * read + MATRICES * 8 * layer.groups * layer.features**2)
            kept += min(rows[layer.name], count * each) * channels * size
        share = min(1.0, memory / 4 / max(1.0, kept))
        rows = {name: max(2, int(number * share)) for name, number in rows.items()}
        room = max(memory / 4, memory - kept * share - work)
        return cls(rows, min(count, max(2, int(room / max(1.0, facts.bytes_per_sample)))))


def _shapes(model: nn.Module) -> dict[nn.Module, dict[str, torch.Size | None]]:
    return {module: _own_shapes(module) for module in model.modules()}


def _own_shapes(module: nn.Module) -> dict[str, torch.Size | None]:
    tensors = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else tensor.shape for name, tensor in tensors.items()}
