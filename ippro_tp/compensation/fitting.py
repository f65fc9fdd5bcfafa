"""The pass of the cut model in which each layer is refitted before it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ObservationError
from .additions import Additions, Branch
from .cutlayer import CutLayer, memory_of, shared_parameters
from .passes import drawn_so_far, read_by, reproducibly
from .patches import inputs_at, sum_at
from .recording import Recording
from .regression import mean_square, refit
from .reports import LayerReport
from .samples import even_choice

ZERO = 64
"""An error of so many times the rounding of a single value is none."""
LARGEST_ZERO = 0.03
"""And none of more than this part of the output: a half-precision layer that lost inputs is not unchanged."""
GROUPS = 64
"""Of twice as many groups or more, an even choice of so many decides which ridge is best, if any."""


class FittingPass:
    """Forward passes of the cut model in which each layer is refitted before it runs.

    A layer whose output is added to another tensor is refitted where that happens, so that the *sum* comes out as
    before: it makes up for errors of the residual stream as well.

    A layer that is called several times is refitted at each call to all calls so far, and once more the whole
    pass is made with it held as it came out, so that the layers in between fit what they read in the end.

    Args:
        recording: of the model before the cut.
        layers: those that may be refitted, of the cut model.
        cut: modules that were cut.
        ridge: see :func:`ippro_tp.compensation.regression.refit`.

    Attributes:
        mixed: a layer before the first cut that gives other values than before; empty if there is none.
    """

    def __init__(
        self, recording: Recording, layers: Sequence[CutLayer], cut: Sequence[nn.Module], ridge: float | None
    ) -> None:
        self._recording, self._layers, self._cut, self._ridge = recording, layers, cut, ridge
        self._reports: dict[str, LayerReport] = {}
        self._shared = shared_parameters(recording.model)
        self._calls: dict[str, int] = {}
        self._held: set[str] = set()
        self._gathered: dict[str, list[tuple[Tensor, Tensor, Tensor, int]]] = {}
        self._waiting: dict[str, Tensor] = {}  # what layers read whose output is yet to be added
        self._reached = False  # a module that was cut has run
        self.mixed = ""

    def run(self) -> list[LayerReport]:
        """Refit all layers that the pass reaches."""
        self._once()
        often = [name for name, layouts in self._recording.facts.layouts.items() if len(layouts) > 1]
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
                self._skip(layer, self._recording.problem(layer.name) or "the model's forward does not call it")
        return [r for r in self._reports.values() if r.removed or r.skipped or r.lost > 0]

    def _layer(self, name: str) -> CutLayer:
        return next(layer for layer in self._layers if layer.name == name)

    def _once(self) -> None:
        self._calls.clear()
        self._gathered.clear()
        self._waiting.clear()
        self._reached = False
        added = [layer for layer in self._layers if layer.name in self._recording.facts.added]
        handles = [x.module.register_forward_pre_hook(self._before(x), with_kwargs=True) for x in self._layers]
        handles += [module.register_forward_pre_hook(self._mark) for module in self._cut]
        try:
            with reproducibly(self._recording.model), Additions(added, self._meet):
                self._recording.call(self._recording.fitting)
        except Mixed as found:
            self.mixed = str(found)
        finally:
            for handle in handles:
                handle.remove()
        for layer in self._layers:
            if layer.name in self._waiting:
                self._leave(layer, "its output is not added to what it was added to before the cut")

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
                self._leave(layer, reason)
            elif layer.name in self._recording.facts.added:
                self._waiting[layer.name] = x
            else:
                self._refit(layer, x, number)

        return hook

    def _meet(self, branch: Branch, value: Tensor, other: Tensor) -> Tensor | None:
        layer = branch.layer
        x = self._waiting.pop(layer.name, None)
        if x is None:
            return None
        self._refit(layer, x, 0, branch, [branch.as_given(value), branch.as_given(other)])
        return self._again(branch, x, value) if layer.changed else None

    def _again(self, branch: Branch, x: Tensor, value: Tensor) -> Tensor:
        """What a refitted layer gives for ``x``, written over ``value``, which it gave before."""
        size = len(x) if branch.dims[0] else -(-len(x) * self._recording.batch // len(self._recording.fitting))
        for read, out in zip(x.split(size), value.split(size), strict=True):
            out.copy_(branch.apply(branch.layer.module.forward(read)))
        return value

    def _leave(self, layer: CutLayer, reason: str) -> None:
        layer.undo()
        self._held.add(layer.name)
        self._skip(layer, reason)

    def _reason(self, layer: CutLayer, x: Tensor, number: int) -> str:
        problem = self._recording.problem(layer.name)
        if problem:
            return problem
        wanted = self._recording.wanted.get((layer.name, number))
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

    def _refit(
        self, layer: CutLayer, x: Tensor, number: int, branch: Branch | None = None, terms: Sequence[Tensor] = ()
    ) -> None:
        """Refit to one more call; or, at an addition, so that the ``terms`` have the sum they had."""
        several = len(self._recording.facts.layouts[layer.name]) > 1
        if several:
            layer.undo()  # all calls are fitted from what Torch-Pruning left
        sampled = layer.groups >= 2 * GROUPS and not several and self._ridge is None
        some = even_choice(layer.groups, GROUPS) if sampled else None
        read, y, error, even = self._rows(layer, x, number, branch, terms, some)
        if several:
            parts = self._gathered.setdefault(layer.name, [])
            parts.append((read, y, error, even))
            read, y, error, even = _joined(parts)
        kept, removed = layer.inputs, layer.all_inputs - layer.inputs
        power = mean_square(y)
        none = min(ZERO * _rounding(layer.module.weight), LARGEST_ZERO) ** 2 * power
        if y.shape[1] == 0:
            self._skip(layer, "all that it reads or gave holds NaN or inf")
        elif mean_square(error) <= none:
            self._reports[layer.name] = LayerReport(layer.name, kept, removed, 0.0, 0.0)
        elif not self._reached and not removed:
            raise Mixed(layer.name)
        else:
            margin = 1 / len(self._recording.fitting)
            affine = layer.constant != ""
            update = refit(read, error, even, affine, self._ridge, margin)
            if some is not None and not math.isnan(update.ridge):
                read, y, error, even = self._rows(layer, x, number, branch, terms)
                power = mean_square(y)
                update = refit(read, error, even, affine, update.ridge).unless_worse()
            per = 1.0 if branch is None else _grouped(branch.divisors().unsqueeze(0), layer.groups).double()
            layer.add(
                None if update.delta is None else update.delta / per,
                None if update.constant is None else (update.constant.unsqueeze(1) / per).squeeze(1),
            )
            share = 1 / power if power > 0 else 0.0
            constant = layer.constant if update.constant is not None else ""
            self._reports[layer.name] = LayerReport(
                layer.name, kept, removed, update.before * share, update.after * share, update.ridge, constant
            )

    def _rows(
        self,
        layer: CutLayer,
        x: Tensor,
        number: int,
        branch: Branch | None,
        terms: Sequence[Tensor],
        some: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """What a layer reads, what it is to give, and what it gives less than that: ``(groups, rows, ...)`` each.

        ``some``: of these groups only. Also the number of rows, the first ones, that belong to even samples.
        """
        wanted = self._recording.wanted[layer.name, number]
        dtype = torch.promote_types(layer.module.weight.dtype, torch.float32)
        groups = slice(None) if some is None else some
        outputs = layer.outputs.view(layer.groups, -1)[groups]
        read = inputs_at(layer.module, x, wanted.rows, some).to(dtype)
        y = _grouped(wanted.values[:, outputs.flatten().to(x.device)].to(dtype), len(outputs))
        if branch is None:
            given = read @ layer.matrix(dtype)[groups]
            if layer.module.bias is not None:
                given += layer.module.bias.to(dtype).view(layer.groups, 1, -1)[groups]
        else:
            given = _grouped(sum_at(layer.module, terms, wanted.rows, dtype), layer.groups)[groups]
        return _finite(read, y, y - given, wanted.even)


class Mixed(ObservationError):
    """A layer before the first cut gives other values than before; the message is its name."""


def _grouped(values: Tensor, groups: int) -> Tensor:
    """``(rows, channels)`` as ``(groups, rows, channels of a group)``."""
    found: Tensor = values.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()
    return found


def _finite(read: Tensor, y: Tensor, error: Tensor, even: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The rows without NaN and inf."""
    if bool(torch.isfinite(read.sum() + y.sum() + error.sum())):
        return read, y, error, even
    good = torch.stack([x.isfinite().all(-1).all(0) for x in (read, y, error)]).all(0)
    return read[:, good], y[:, good], error[:, good], int(good[:even].sum())


def _joined(parts: list[tuple[Tensor, Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows of several calls, those of even samples first."""
    count = sum(even for *_, even in parts)
    halves = [(r[:, :even], y[:, :even], e[:, :even]) for r, y, e, even in parts]
    halves += [(r[:, even:], y[:, even:], e[:, even:]) for r, y, e, even in parts]
    read, y, error = (torch.cat(each, 1) for each in zip(*halves, strict=True))
    return read, y, error, count


def _rounding(weight: Tensor) -> float:
    """Of a product with ``weight``, relative."""
    short = weight.device.type == "cuda" and weight.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return 1e-3 if short else torch.finfo(weight.dtype).eps
