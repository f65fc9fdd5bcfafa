"""One forward pass as it goes on: whose channels run where, which activation is whose, and what is tapped.

Nothing outlives the pass but what its :class:`~ippro_tp.records.Pass` keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ObservationError
from ..layers import is_activation, is_channel_norm
from ..records import Label, Pass, Site, Span
from .claims import is_inplace
from .extension import Tap, Term, require_grad, storage_of
from .flow import ChannelFlow
from .plan import Plan, channel_axis
from .taps import Places
from .tensormap import TensorMap

_NORM_CALLS = {"batch_norm", "instance_norm", "group_norm"}
_MASKS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "threshold", "threshold_"}
"""Activations that either leave a value as it is or let no gradient through."""
READS = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_PRODUCTS = {"mul", "mul_", "__imul__", "multiply", "multiply_"}
_SUMS = {"add", "add_", "__iadd__"}
_SCALINGS = {*_PRODUCTS, *_SUMS, "div", "div_", "__itruediv__", "true_divide", "divide"}
_BROADCASTING = {*_SCALINGS, "sub", "sub_", "__isub__", "subtract", "__add__", "__radd__", "__mul__", "__rmul__"}
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "to",
    "contiguous", "__getitem__", "narrow",
}  # fmt: skip


class Forward:
    """A forward pass that is running.

    Args:
        current: what it gives.
        plan: what is tapped.
        places: what tapping does.
        first: note uses of weights.
    """

    def __init__(self, current: Pass, plan: Plan, places: Places, flow: ChannelFlow, first: bool) -> None:
        self.current, self.flow = current, flow
        self.taps: dict[str, list[Tap | None]] = {}
        self.reader_taps: dict[str, list[Tap | None]] = {}
        self.seen: set[str] = set()
        self._plan, self._places, self._first = plan, places, first
        self._norms: list[str | None] = []
        self._open: set[str] = set()  # layers whose sigma has not been met yet
        self._fresh: tuple[weakref.ref[Tensor], Tap | None] | None = None  # of the tensor nobody has read yet
        self._made_of: TensorMap[tuple[int, tuple[Term, ...]]] = TensorMap()  # its version, what it is a sum of
        self._tables: TensorMap[tuple[str, Tensor, int]] = TensorMap()  # layer, the same untapped, its version
        self._gates: TensorMap[tuple[int, Tap | None]] = TensorMap()  # what came of an activation: site, tap

    # -- layers ----------------------------------------------------------------------------------------------

    def enter_layer(self, name: str, module: nn.Module) -> None:
        """A producer is called."""
        self._norms.append(name if is_channel_norm(module) else None)

    def leave_layer(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        """A producer has given its output; returns what takes its place, or ``None``."""
        if not self._norms:
            return None
        pending = self._norms.pop()
        is_norm = is_channel_norm(module)
        if is_norm and pending is None:
            return None  # tapped at its functional call already
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return None
        if not torch.is_grad_enabled():
            raise ObservationError(
                f"{name!r} runs under torch.no_grad() within the forward pass. If that is gradient "
                "checkpointing, use use_reentrant=False; otherwise enable gradients."
            )
        if is_norm:
            return self._norm_output(name, args[0], first)
        source = tapped = require_grad(first)
        axis = channel_axis(module, tapped)
        if name not in self._plan.untapped and self._places.is_table(name):
            tapped = source.view_as(source)  # what goes past the tap, and is tapped sample by sample
            self._tables[tapped] = name, source, source._version
        self.flow.set(tapped, Label(axis, (Span(name, 0, tapped.shape[axis]),)))
        self._tap_output(name, tapped, axis)
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

    def enter_reader(self, name: str, module: nn.Module, x: Tensor, tap: bool) -> Tensor | None:
        """Note whose channels a layer reads and, to tap it, give it a branch of its own of its input."""
        plan = self._plan
        tapped = tap and name not in plan.unread
        if not tapped and plan.unread:  # whose channels it reads was noted in the first pass
            return None
        label = self.flow[x]
        if label is not None:
            layers = dict.fromkeys(span.layer for span in label.spans)
            self.current.read_layers[name] = (*self.current.read_layers.get(name, ()), *layers)
        if not tapped:
            return None
        branch = require_grad(x).view_as(x)
        self.flow.set(branch, label)
        axis = channel_axis(module, branch)
        found = self._places.place("inputs", name, (Term(branch),), branch, axis)
        self.reader_taps.setdefault(name, []).append(found)
        return branch

    def _norm_output(self, name: str, x: Any, y: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tap the output of a channel norm; it stands for the layers whose channels run into it."""
        y = require_grad(y)
        label = self.flow[x]
        before = label.spans if label is not None else ()
        for span in before:
            self.current.norm_of.setdefault(span.layer, name)
            if not self._plan.through_norms:
                self._close(span.layer)
        spans = (*before, Span(name, 0, y.shape[1]))
        self.flow.set(y, Label(1, spans))
        if affine is not None:
            self._made_of[y] = y._version, (Term(x, affine),)
        self._tap_output(name, y, 1)
        return y

    def _tap_output(self, name: str, y: Tensor, axis: int) -> None:
        self.seen.add(name)
        self._open.add(name)
        if name in self._plan.untapped:
            return
        tap = self._places.place("outputs", name, self._terms(y), y, axis)
        self.taps.setdefault(name, []).append(tap)
        self._fresh = weakref.ref(y), tap

    def _close(self, name: str) -> None:
        for tap in self.taps.pop(name, []):
            if tap is not None:
                tap.close()

    # -- calls -----------------------------------------------------------------------------------------------

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of a torch function, and note what it does."""
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        inplace = is_inplace(name, args, kwargs)
        if is_activation(name) and isinstance(x, Tensor) and self.flow[x] is not None:
            return self._activation(name, inplace, x, func, args, kwargs)
        if self._first and name in READS and (label := self.flow[x]) is not None:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if (owner := self._plan.owners.get(weight)) is not None:
                self._plan.reads_of.setdefault(owner, set()).update(span.layer for span in label.spans)
        fresh, self._fresh = self._fresh, None
        if len(self._tables) and name in _BROADCASTING and len(args) == 2 and not kwargs:
            args = self._spread(args)
        gated = self._gated(name, args) if name in _SCALINGS else None
        if inplace and isinstance(x, Tensor):
            self._places.before_overwriting(x)
            if gated is not None and gated[1] is x:
                gated = gated[0], x.detach().clone()
        summed = self._summed(inplace, args, kwargs) if self._plan.activations and name in _SUMS else ()
        out = func(*args, **kwargs)
        if not isinstance(out, (Tensor, tuple, list)) or isinstance(out, torch.Size):
            self._fresh = fresh  # a shape, a flag or a number, as most calls give: no gradient will come back
            return out
        if summed and isinstance(out, Tensor):
            self._made_of[out] = out._version, summed
        if gated is not None:
            out = self._follow_gate(*gated, out)
        if name in _NORM_CALLS and self._norms and self._norms[-1] is not None:
            layer, self._norms[-1] = self._norms[-1], None
            return self._norm_output(layer, x, out, self._plan.scales.of(layer, func, args, kwargs))
        self.flow.propagate(func, args, kwargs, out)
        table = self._tables.get(x) if len(self._tables) and name in _VIEWS and isinstance(x, Tensor) else None
        if table is not None and isinstance(out, Tensor):
            self._tables[out] = table[0], func(table[1], *args[1:], **kwargs), table[2]
        return out

    def _spread(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Where a table meets a tensor of the samples: each of them gets a copy of its own, and a tap on it.

        What flows back through them is told apart by sample; at the table it would be one sum.
        """
        for number, (x, other) in enumerate((args, args[::-1])):
            table = self._tables.get(x) if isinstance(x, Tensor) and isinstance(other, Tensor) else None
            label = self.flow[x]
            if table is None or label is None or other in self._tables or table[1]._version != table[2]:
                continue
            if x.shape == other.shape or torch.broadcast_shapes(x.shape, other.shape) != other.shape:
                continue
            name, source, _ = table
            copies = source.expand(other.shape)
            axis = label.axis + other.dim() - x.dim()
            self.flow.set(copies, Label(axis, label.spans))
            tap = self._places.place("tables", name, (Term(copies),), copies, axis)
            self.taps.setdefault(name, []).append(tap)
            return (copies, other) if number == 0 else (other, copies)
        return args

    def _terms(self, x: Tensor) -> tuple[Term, ...]:
        """What ``x`` is the sum of, as far as autograd keeps it anyway; else ``x`` itself."""
        made = self._made_of.get(x)
        return made[1] if made is not None and made[0] == x._version else (Term(x),)

    def _summed(self, inplace: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Term, ...]:
        """The terms of a sum of two tensors, of which autograd keeps one at least; none if they will be gone."""
        if kwargs or len(args) != 2 or not all(isinstance(x, Tensor) for x in args):
            return ()
        if args[0].shape != args[1].shape or args[0].dtype != args[1].dtype:
            return ()
        terms = self._terms(args[0]) + self._terms(args[1])
        kept = len(terms) == 2 and any(term.affine is not None for term in terms)
        gone = inplace and any(term.storage == storage_of(args[0]) for term in terms)
        return terms if kept and not gone else ()

    def _activation(
        self, name: str, inplace: bool, x: Tensor, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """An activation whose input carries channels: for these layers it is sigma."""
        label = self.flow[x]
        assert label is not None
        spans = tuple(span for span in label.spans if span.layer in self._open)
        extended = bool(spans) and self._plan.activations
        source = self._fresh[1] if self._fresh is not None and self._fresh[0]() is x else None
        self._fresh = None
        masked = inplace and name in _MASKS and not self._plan.activations
        terms = self._terms(x) if extended else ()
        if inplace:
            if extended:
                for span in spans:
                    self._close(span.layer)
                terms = self._places.apart_from(x, terms)
            self._places.before_overwriting(x, but=source if masked else None)
        out: Tensor = func(*args, **kwargs)
        if masked and source is not None:
            source.accept_overwriting()
        self.flow.set(out, label)
        if not spans or out.shape != x.shape:
            if (gate := self._gates.get(x)) is not None:
                self._gates[out] = gate  # Mish: tanh of softplus
            return out
        self._open -= {span.layer for span in spans}
        number = len(self.current.sites)
        site = Site(f"{name.rstrip('_')} #{number}", Label(label.axis, spans))
        self.current.sites.append(site)
        tap = None
        if extended:
            for span in spans:
                self._close(span.layer)
            out, tap = self._extend(site, terms, out)
        self._gates[out] = number, tap
        return out

    def _extend(self, site: Site, terms: tuple[Term, ...], out: Tensor) -> tuple[Tensor, Tap | None]:
        """Tap ``out``, which is sigma of the sum of ``terms``."""
        out = require_grad(out)
        return out, self._places.place("activations", site.name, terms, out, site.label.axis)

    def _gated(self, name: str, args: tuple[Any, ...]) -> tuple[tuple[int, Tap | None], Tensor | None] | None:
        """The activation that a product, or a scaling, has for a factor, and the other factor.

        The other factor has to carry the same channels, position by position: ``x * sigmoid(v * x)`` is one
        activation, as in Swish or EvoNorm written out; the gate of a squeeze-and-excitation block, which is
        broadcast, or made by other layers, is none.
        """
        if len(args) != 2:
            return None
        for gate, other in ((args[0], args[1]), (args[1], args[0])):
            found = self._gates.get(gate) if isinstance(gate, Tensor) else None
            if found is None:
                continue
            if isinstance(other, (int, float)):
                return found, None
            if name not in _PRODUCTS or not isinstance(other, Tensor) or other in self._gates:
                continue
            if other.shape == gate.shape and self.flow[other] == self.flow[gate] is not None:
                return found, other
        return None

    def _follow_gate(self, gate: tuple[int, Tap | None], value: Tensor | None, out: Any) -> Any:
        """Move the site of an activation to the product with its own argument; hand it on where it is scaled."""
        number, tap = gate
        if value is None:
            self._gates[out] = gate
            return out
        site = self.current.sites[number]
        self.current.sites[number] = site = Site(f"x * {site.name}", site.label)
        if self._plan.activations:
            if tap is not None:
                tap.close()
            label = self.flow[value]
            out, _ = self._extend(site, (Term(value),), out)
            self.flow.set(out, label)
        return out
