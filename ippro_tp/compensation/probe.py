"""What a few samples show of an uncut model: which layers can be refitted, and which sample each row belongs to.

Nothing is taken from names. Three samples are run, then run again with one of them replaced: rows that change
are that sample's. What each layer gives is compared with its weight times what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ObservationError
from .additions import Additions
from .borrowed import Borrowed
from .cutlayer import CutLayer
from .passes import PeakBytes, after_each, drawn_so_far, reproducibly
from .patches import Rows, choose, inputs_at, outputs_at, rows_of
from .samples import Samples

FEW = 3
CHECKED = 16
"""Output positions on which it is checked what a layer computes."""
CLOSE = 2e-3
"""Largest distance of a layer's output from its weight times what it reads, relative to the largest product."""


@dataclass(frozen=True)
class Layout:
    """Where samples lie among the rows that a layer reads in one of its calls.

    Attributes:
        axis: dimension of the rows (see :class:`Rows`) along which samples lie.
        rows: entries of that dimension per sample.
        in_turns: whether sample 0, 1, 2, ... take turns; otherwise each has its rows together.
        problem: why this cannot be told; empty if it can.
    """

    axis: int = 0
    rows: int = 1
    in_turns: bool = False
    problem: str = ""

    def samples(self, rows: Rows, count: int) -> Tensor:
        """``(rows,)`` int64: the sample of each row, out of ``count``."""
        at = rows.coordinate(self.axis)
        return at % count if self.in_turns else at // self.rows


@dataclass
class Facts:
    """What the few samples showed.

    Attributes:
        layouts: per layer, one for each call of it in a forward pass.
        unfit: per layer, why it cannot be refitted.
        bytes_per_sample: of all activations that live at the same time.
        outputs: per layer, number of output rows of all calls, and channels, per sample.
        added: layers whose output is read by nothing but an addition to another tensor of its shape.
        apart: whether samples can be run in any batches: each has its rows together in dimension 0 of every
            layer's input, and no random numbers are drawn.
    """

    layouts: dict[str, list[Layout]]
    unfit: dict[str, str]
    bytes_per_sample: float
    outputs: dict[str, tuple[float, int]]
    added: frozenset[str]
    apart: bool


def probe(model: nn.Module, layers: Sequence[CutLayer], samples: Samples, device: torch.device) -> Facts:
    """Find out what :class:`Facts` holds.

    Raises:
        ObservationError: the model gives other values when the same is run again under the same random state.
    """
    few = min(FEW, samples.count)
    usual = torch.arange(few) * (samples.count // few)
    unfit = {layer.name: layer.unfit for layer in layers if layer.unfit}
    first = _run(model, layers, samples, usual, device, unfit)
    counted = PeakBytes()
    again = _run(model, layers, samples, usual, device, counted=counted)
    _check_repeatable(first.read, again.read)
    added = again.added
    del again
    changed: list[dict[str, list[Tensor] | None]] = []
    for number in range(1, few):
        other = usual.clone()
        other[number] = (usual[number] + 1) % samples.count if samples.count > few else usual[number - 1]
        now = _run(model, layers, samples, other, device)
        changed.append({name: _changed(xs, now.read.get(name, [])) for name, xs in first.read.items()})
    layouts = {}
    for layer in layers:
        calls = first.read.get(layer.name, [])
        masks = [c.get(layer.name, []) for c in changed]  # a layer may lend its weight and not be called
        if any(m is None for m in masks):
            unfit.setdefault(
                layer.name, "its calls and their sizes depend on the values that the model is called with"
            )
        else:
            per_call = zip(*masks, strict=True) if masks else (() for _ in calls)
            shapes = [_lead(layer.module, x) for x in calls]
            layouts[layer.name] = [_layout(s, m, few) for s, m in zip(shapes, per_call, strict=True)]
    together = [x for per_layer in layouts.values() for x in per_layer if x.problem or x.axis or x.in_turns]
    apart = not first.drew and not together and len(layouts) == len(layers)
    added = {name for name in added - set(unfit) if [x.problem for x in layouts.get(name, ())] == [""]}
    return Facts(layouts, unfit, counted.peak / few, first.outputs_per(few), frozenset(added), apart)


class _Seen:
    """What one small pass showed: per layer and call, its input, and the size of its output."""

    def __init__(self) -> None:
        self.drew = False
        self.added: set[str] = set()
        self.read: dict[str, list[Tensor]] = {}
        self.sizes: dict[str, tuple[int, int]] = {}

    def outputs_per(self, few: int) -> dict[str, tuple[float, int]]:
        return {name: (rows / few, channels) for name, (rows, channels) in self.sizes.items()}


def _run(
    model: nn.Module,
    layers: Sequence[CutLayer],
    samples: Samples,
    index: Tensor,
    device: torch.device,
    unfit: dict[str, str] | None = None,
    counted: PeakBytes | None = None,
) -> _Seen:
    seen = _Seen()

    def see(layer: CutLayer, x: Tensor, y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if counted is not None:
            counted.counting = False  # what is kept here is none of the model's
        seen.read.setdefault(layer.name, []).append(x.detach().clone())
        if counted is not None:
            counted.counting = True
        if unfit is None or layer.name in unfit:
            return
        problem = _problem(layer, x, y, args, kwargs)
        if problem:
            unfit[layer.name] = problem
        else:
            rows, channels = rows_of(layer.module, y), layer.outputs.numel()
            before = seen.sizes.get(layer.name, (0, 0))[0]
            seen.sizes[layer.name] = (before + torch.Size(rows).numel(), channels)

    watch = Borrowed(model, layers)
    args, kwargs = samples.arguments(index, device)
    with reproducibly(model), after_each(layers, see):
        before = drawn_so_far(device)
        if unfit is None:
            with counted or nullcontext(), Additions(layers) as additions:
                additions.returned(model(*args, **kwargs))
            seen.added = additions.added
        else:
            with watch.inside(), watch:
                model(*args, **kwargs)
            for name, reason in watch.found.items():
                unfit.setdefault(name, reason)
        seen.drew = drawn_so_far(device) != before
    return seen


def _problem(layer: CutLayer, x: Tensor, y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a layer cannot be refitted, from one of its calls; empty if it can."""
    if not isinstance(y, Tensor) or x.is_nested or not x.is_floating_point():
        return "it reads or gives something else than a plain tensor"
    if isinstance(layer.module, _ConvNd) and x.dim() != len(layer.module.kernel_size) + 2:
        return "its input has no batch dimension"
    other = "it computes something else than its weight times what it reads (standardisation of the weight, say)"
    if not _is_product(layer, x, y):
        return other
    if layer.plain:
        return ""
    weight: Tensor = layer.module.weight
    held = weight.detach().clone()
    try:  # the weight enters as it is, not only as it happens to be now
        weight.detach().mul_(1 + 0.5 * torch.linspace(-1, 1, weight.numel(), device=weight.device).view_as(weight))
        return "" if _is_product(layer, x, layer.module.forward(*args, **kwargs)) else other
    finally:
        weight.detach().copy_(held)


def _is_product(layer: CutLayer, x: Tensor, y: Tensor) -> bool:
    module = layer.module
    channels = module.out_channels if isinstance(module, _ConvNd) else module.out_features
    channel_axis = 1 if isinstance(module, _ConvNd) else -1
    if y.dim() != x.dim() or y.shape[channel_axis] != channels or y.numel() == 0:
        return False
    shape = rows_of(module, y)
    rows = Rows(shape, choose(torch.Size(shape).numel(), CHECKED))
    kind = torch.promote_types(module.weight.dtype, torch.float32)
    read, weight = inputs_at(module, x, rows).to(kind), layer.matrix(kind)
    bias = read.new_zeros(()) if module.bias is None else module.bias.to(kind)
    wanted = (read @ weight).transpose(0, 1).flatten(1) + bias
    size = read.norm(dim=2, keepdim=True) * weight.norm(dim=1, keepdim=True)  # no product is larger
    size = size.transpose(0, 1).flatten(1) + bias.abs()
    rest = (outputs_at(module, y, rows).to(kind) - wanted).abs()
    close = max(CLOSE, 8 * torch.finfo(y.dtype).eps)
    good = size.isfinite()
    return bool((rest[good] <= close * size[good].amax()).all()) if bool(good.any()) else True


def _check_repeatable(first: Mapping[str, list[Tensor]], again: Mapping[str, list[Tensor]]) -> None:
    for name, calls in first.items():
        changed = _changed(calls, again.get(name, []))
        if changed is None or any(bool(mask.any()) for mask in changed):
            raise ObservationError(
                f"layer {name!r} reads other values when the same samples are run again: the model draws random "
                "numbers from elsewhere than torch's own generator, or keeps something between its "
                "calls. Nothing has "
                "been cut. Make its forward repeatable, or prune without Compensation."
            )


def _changed(before: list[Tensor], now: list[Tensor]) -> list[Tensor] | None:
    """Per call, which entries differ beyond rounding; ``None``: calls or sizes do."""
    if [x.shape for x in before] != [x.shape for x in now]:
        return None
    masks = []
    for a, b in zip(before, now, strict=True):
        if a.is_floating_point():
            eps = torch.finfo(a.dtype).eps
            largest = torch.where(a.isfinite(), a, 0).abs().amax() if a.numel() else 0
            masks.append(~(((a - b).abs() <= 64 * eps * largest) | (a == b) | (a.isnan() & b.isnan())))
        else:
            masks.append(a != b)
    return masks


def _lead(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Dimensions of an input along which samples may lie."""
    return (x.shape[0],) if isinstance(module, _ConvNd) else tuple(x.shape[:-1])


def _layout(lead: tuple[int, ...], changed: Sequence[Tensor], few: int) -> Layout:
    """The layout in which the entries changed for sample 1, 2, ... are those of that sample only."""
    masks = [mask.flatten(len(lead)).any(-1) if mask.dim() > len(lead) else mask for mask in changed]
    for axis, size in enumerate(lead):
        if size == 0 or size % few:
            continue
        at = torch.arange(size)
        for in_turns in (False, True):
            owner = at % few if in_turns else at // (size // few)
            along = [mask.movedim(axis, 0).reshape(size, -1).any(1).cpu() for mask in masks]
            if all(bool((owner[hit] == number).all()) for number, hit in enumerate(along, 1)):
                return Layout(axis, size // few, in_turns)
    return Layout(problem="its rows do not belong to one sample each")
