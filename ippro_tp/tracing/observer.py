"""Watching forward and backward passes: places taps at producers and activations, and reads what they give.

Nothing is written to the model. While an :class:`Observer` is entered, forward hooks tell which producer is
running, and a ``TorchFunctionMode`` sees every call: it follows channels (:mod:`tracing.flow`), finds the
activation after each producer, and keeps a copy of a tapped tensor just before an in-place call overwrites it,
unless what is needed of it can be told from what autograd keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..errors import ObservationError
from ..layers import CHANNEL_NORMS
from ..records import Label, Pass, Site, Span
from .extension import Tap, Term, require_grad, storage_of
from .flow import ACTIVATIONS, ChannelFlow
from .norms import NormScales
from .passes import difference, samples_of_call
from .sampleaxis import SampleAxis
from .tensormap import TensorMap

_NORM_CALLS = {"batch_norm", "instance_norm", "group_norm"}
_MASKS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "threshold", "threshold_"}
"""Activations that either leave a value as it is or let no gradient through."""
_READS = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_PRODUCTS = {"mul", "mul_", "__imul__", "multiply", "multiply_"}
_SUMS = {"add", "add_", "__iadd__"}
_SCALINGS = {*_PRODUCTS, *_SUMS, "div", "div_", "__itruediv__", "true_divide", "divide"}
_TAKES_INPLACE = ACTIVATIONS | {"dropout", "dropout2d"}
_INPLACE_DUNDERS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__setitem__"}


def _channel_axis(module: nn.Module, output: Tensor) -> int:
    """Convolutions and channel norms: 1. Everything else (Linear, Embedding, attention): the last axis."""
    channels_second = isinstance(module, (nn.modules.conv._ConvNd, *CHANNEL_NORMS))
    return 1 if channels_second else output.dim() - 1


class Observer(TorchFunctionMode):
    """Context in which forward and backward passes of ``model`` are turned into :class:`Pass` objects.

    Args:
        model: the module whose ``forward`` is called by the user's loop.
        producers: ``(args, kwargs) -> names`` of the modules whose outputs are tapped; called once, with the
            arguments of the first forward pass.
        activations: tap activation calls as well (the extension layer of the paper).
        readers: names of modules whose inputs are tapped, asked for after ``producers``.
        unneeded: after the first forward pass: producers and readers of which no sums are wanted after all.
        through_norms: keep the tap at a layer although a channel norm follows it.
        on_passes: receives the passes whose backward passes are through, one or more at a time.
        loss_scale: asked at the start of each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        producers: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[str]],
        on_passes: Callable[[list[Pass]], None],
        activations: bool = False,
        through_norms: bool = False,
        loss_scale: Callable[[], float] = lambda: 1.0,
        readers: Callable[[], Iterable[str]] = tuple,
        unneeded: Callable[[Pass], tuple[set[str], set[str]]] = lambda first: (set(), set()),
    ) -> None:
        super().__init__()
        self._find_readers, self._find_unneeded = readers, unneeded
        self._model = model
        self._find_producers = producers
        self._watching: bool | None = None  # None: not yet; False: looking for the producers
        self._on_passes, self._loss_scale = on_passes, loss_scale
        self._tap_activations = activations
        self._through_norms = through_norms
        self._handles: list[RemovableHandle] = []
        self._norms: list[str | None] = []
        self._pass: Pass | None = None
        self._flow, self._samples = ChannelFlow(), SampleAxis()
        self._open: set[str] = set()  # layers whose sigma has not been met yet in this forward pass
        self._taps: dict[str, list[Tap]] = {}
        self._reader_taps: dict[str, list[Tap]] = {}
        self._by_storage: dict[int, list[weakref.ref[Tap]]] = {}
        self._fresh: tuple[weakref.ref[Tensor], Tap] | None = None  # tap of the tensor that nobody has read yet
        self._made_of: TensorMap[tuple[int, tuple[Term, ...]]] = TensorMap()  # its version, what it is a sum of
        self._gates: TensorMap[tuple[int, Tap | None]] = TensorMap()  # what came of an activation: site, tap
        self._dirty: list[Pass] = []
        self._signature: tuple[object, ...] | None = None
        self.sites: tuple[Site, ...] = ()
        self.norm_of: dict[str, str] = {}
        self.seen: set[str] = set()
        self.crossed: set[frozenset[str]] = set()
        self._norm_scales = NormScales()
        self._owners: dict[Tensor, str] = {}  # weight -> its layer
        self._called: set[str] = set()
        self._reads_of: dict[str, set[str]] = {}  # layer whose weight read channels -> the layers they are of
        self._untapped: set[str] = set()  # producers whose sums nobody needs, once that is known
        self._unread: set[str] = set()  # readers whose sums nobody needs
        self.passes = 0

    # -- context ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Observer:
        self._handles = [
            self._model.register_forward_pre_hook(self._start, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._stop, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def _watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._watching = False
        modules = dict(self._model.named_modules())
        for name in self._find_producers(args, kwargs):
            self._handles += [
                modules[name].register_forward_pre_hook(self._enter_layer(name, modules[name])),
                modules[name].register_forward_hook(self._leave_layer(name)),
            ]
        for name, module in modules.items():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                self._owners[module.weight] = name
                self._handles.append(module.register_forward_pre_hook(self._note_call(name)))
        readers = set(self._find_readers())
        if readers:  # what depthwise convolutions read is asked for as well
            depthwise = {name for name, module in modules.items() if _is_depthwise(module)}
            for name in sorted(readers | depthwise):
                tap = name in readers
                self._handles.append(modules[name].register_forward_pre_hook(self._enter_reader(name, tap)))
        self._watching = True

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._end_forward()

    def _note_call(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._called.add(name)

        return hook

    @property
    def borrowed(self) -> dict[str, set[str]]:
        """Layers that are never called but whose weights were used, and the layers whose channels these read.

        Torch-Pruning finds layers by their calls: it does not see such a use, ``F.linear(x, self.qkv.weight)``.
        """
        return {name: layers for name, layers in self._reads_of.items() if name not in self._called}

    @property
    def batch(self) -> int:
        """Number of samples of the forward pass that is running; 0 between forward passes."""
        return self._pass.batch if self._pass is not None else 0

    def flush(self) -> None:
        """Hand over every pass that has received gradients. Called between forward passes and at the end."""
        done, self._dirty = self._dirty, []
        for each in done:
            each.closed = True
        if done:
            self._on_passes(done)

    # -- forward ---------------------------------------------------------------------------------------------

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._watching is False:
            return  # the model is being traced
        self.flush()
        if torch.compiler.is_compiling():
            raise ObservationError(
                "the model is compiled, so its layers cannot be watched. Calibrate the original model "
                "(model._orig_mod) and compile the pruned one."
            )
        if not torch.is_grad_enabled():
            raise ObservationError(
                "the forward pass runs under torch.no_grad() or torch.inference_mode(), so no gradient can "
                "flow. Call the model with gradients enabled inside observe()."
            )
        batch = samples_of_call(args, kwargs)
        if self._watching is None:
            self._watch(args, kwargs)
        self._pass = Pass(batch, self._loss_scale())
        self._flow, self._samples = ChannelFlow(), SampleAxis()
        self._samples.start((args, kwargs))

    def _stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current, taps, reader_taps = self._pass, self._taps, self._reader_taps
        self._end_forward()
        if current is None or output is None:
            return
        if self._signature is None:
            self._signature = current.signature
            self.sites, self.norm_of = tuple(current.sites), dict(current.norm_of)
            producers, self._unread = self._find_unneeded(current)
            # A norm or an activation stands for producers without a tap, in each pass.
            self._untapped = (self.seen - set(taps)) | producers
            for unneeded, placed in ((producers, taps), (self._unread, reader_taps)):
                for tap in (tap for name in unneeded for tap in placed.get(name, ())):
                    tap.close()
        elif self._signature != current.signature:
            raise ObservationError(difference(self.sites, tuple(current.sites)))
        self.crossed |= self._flow.crossed
        self.passes += 1

    def _end_forward(self) -> None:
        self._pass = None
        self._norms = []
        self._open = set()
        self._taps = {}
        self._reader_taps = {}
        self._by_storage = {}
        self._fresh = None
        self._made_of = TensorMap()
        self._gates = TensorMap()

    def _enter_layer(self, name: str, module: nn.Module) -> Callable[..., None]:
        is_norm = isinstance(module, CHANNEL_NORMS)

        def hook(module: nn.Module, args: Any) -> None:
            if self._pass is not None:
                self._norms.append(name if is_norm else None)

        return hook

    def _enter_reader(self, name: str, tap: bool) -> Callable[..., Any]:
        """Note whose channels a layer reads and, to tap it, give it a branch of its own of its input."""

        def hook(module: nn.Module, args: Any) -> Any:
            x = args[0] if args else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or not torch.is_grad_enabled():
                return None
            tapped = tap and name not in self._unread
            if self._pass is None:  # gradient checkpointing runs the layer again
                return (require_grad(x).view_as(x), *args[1:]) if tapped and self._watching else None
            if not tapped and self._unread:  # whose channels it reads was noted in the first pass
                return None
            label = self._flow[x]
            if label is not None:
                layers = dict.fromkeys(span.layer for span in label.spans)
                self._pass.read_layers[name] = (*self._pass.read_layers.get(name, ()), *layers)
            if not tapped:
                return None
            branch = require_grad(x).view_as(x)
            self._flow.set(branch, label)
            self._samples.copy(x, branch)
            axis = _channel_axis(module, branch)
            rest = [i for i in range(branch.dim()) if i != axis]
            total = branch.detach().sum(rest, dtype=torch.promote_types(branch.dtype, torch.float32))
            total = total.double() if x.device.type != "mps" else total
            rows = torch.full_like(total[0], branch.numel() // branch.shape[axis])
            before = self._pass.reads.get(name)
            self._pass.reads[name] = (total, rows) if before is None else (before[0] + total, before[1] + rows)
            sink = self._sink(self._pass.inputs, name, self._pass)
            samples = self._samples.of(x, self._pass.batch)
            found = Tap((Term(branch),), branch, axis, self._pass.batch, sink, name, True, samples=samples)
            self._reader_taps.setdefault(name, []).append(found)
            self._register(found)
            return (branch, *args[1:])

        return _unseen(hook)

    def _leave_layer(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._pass is None and self._watching and torch.is_grad_enabled():
                # Gradient checkpointing runs the layer again in the backward pass, and has to find the same graph.
                return _replace_first(output, require_grad)
            if self._pass is None or not self._norms:
                return None
            pending = self._norms.pop()
            if isinstance(module, CHANNEL_NORMS) and pending is None:
                return None  # tapped at its functional call already
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, Tensor) or not first.is_floating_point():
                return None
            if not torch.is_grad_enabled():
                raise ObservationError(
                    f"{name!r} runs under torch.no_grad() within the forward pass. If that is gradient "
                    "checkpointing, use use_reentrant=False; otherwise enable gradients."
                )
            if isinstance(module, CHANNEL_NORMS):
                return self._norm_output(name, args[0], first)
            tapped = require_grad(first)
            axis = _channel_axis(module, tapped)
            self._samples.copy(first, tapped)
            self._flow.set(tapped, Label(axis, (Span(name, 0, tapped.shape[axis]),)))
            self._tap_output(name, tapped, axis, table=isinstance(module, nn.Embedding))
            return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

        return _unseen(hook)

    def _norm_output(self, name: str, x: Any, y: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tap the output of a channel norm; it stands for the layers whose channels run into it."""
        assert self._pass is not None
        y = require_grad(y)
        label = self._flow[x]
        before = label.spans if label is not None else ()
        for span in before:
            self._pass.norm_of.setdefault(span.layer, name)
            if not self._through_norms:
                self._close(span.layer)
        spans = (*before, Span(name, 0, y.shape[1]))
        self._flow.set(y, Label(1, spans))
        if affine is not None:
            self._made_of[y] = y._version, (Term(x, affine),)
        self._tap_output(name, y, 1)
        return y

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

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See every call of a torch function; only calls within the model's forward are looked at."""
        kwargs = kwargs or {}
        if self._pass is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        inplace = _is_inplace(name, args, kwargs)
        if name in ACTIVATIONS and isinstance(x, Tensor) and self._flow[x] is not None:
            return self._activation(name, inplace, x, func, args, kwargs)
        if self.passes == 0 and name in _READS and (label := self._flow[x]) is not None:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if (owner := self._owners.get(weight)) is not None:
                self._reads_of.setdefault(owner, set()).update(span.layer for span in label.spans)
        fresh, self._fresh = self._fresh, None
        gated = self._gated(name, args) if name in _SCALINGS else None
        if inplace and isinstance(x, Tensor):
            self._save_from_overwriting(x)
            if gated is not None and gated[1] is x:
                gated = gated[0], x.detach().clone()
        summed = self._summed(inplace, args, kwargs) if self._tap_activations and name in _SUMS else ()
        out = func(*args, **kwargs)
        if not isinstance(out, (Tensor, tuple, list)) or isinstance(out, torch.Size):
            self._fresh = fresh  # a shape, a flag or a number, as most calls give: no gradient will come back
            return out
        self._samples.follow(name, args, kwargs, out)
        if summed and isinstance(out, Tensor):
            self._made_of[out] = out._version, summed
        if gated is not None:
            out = self._follow_gate(*gated, out)
        if name in _NORM_CALLS and self._norms and self._norms[-1] is not None:
            layer, self._norms[-1] = self._norms[-1], None
            return self._norm_output(layer, x, out, self._norm_scales.of(layer, func, args, kwargs))
        self._flow.propagate(func, args, kwargs, out)
        return out

    def _activation(
        self, name: str, inplace: bool, x: Tensor, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """An activation whose input carries channels: for these layers it is sigma."""
        assert self._pass is not None
        label = self._flow[x]
        assert label is not None
        spans = tuple(span for span in label.spans if span.layer in self._open)
        extended = bool(spans) and self._tap_activations
        source = self._fresh[1] if self._fresh is not None and self._fresh[0]() is x else None
        self._fresh = None
        masked = inplace and name in _MASKS and not self._tap_activations
        terms = self._terms(x) if extended else ()
        if inplace:
            if extended:
                for span in spans:
                    self._close(span.layer)
                terms = tuple(term.apart_from(storage_of(x)) for term in terms)
            self._save_from_overwriting(x, but=source if masked else None)
        out: Tensor = func(*args, **kwargs)
        self._samples.copy(x, out)
        if masked and source is not None:
            source.accept_overwriting()
        self._flow.set(out, label)
        if not spans or out.shape != x.shape:
            if (gate := self._gates.get(x)) is not None:
                self._gates[out] = gate  # Mish: tanh of softplus
            return out
        self._open -= {span.layer for span in spans}
        number = len(self._pass.sites)
        site = Site(f"{name.rstrip('_')} #{number}", Label(label.axis, spans))
        self._pass.sites.append(site)
        tap = None
        if extended:
            for span in spans:
                self._close(span.layer)
            out, tap = self._extend(site, terms, out)
        self._gates[out] = number, tap
        return out

    def _extend(self, site: Site, terms: tuple[Term, ...], out: Tensor) -> tuple[Tensor, Tap]:
        """Tap ``out``, which is sigma of the sum of ``terms``."""
        assert self._pass is not None
        sink = self._sink(self._pass.activations, site.name, self._pass)
        samples = self._samples.of(out, self._pass.batch)
        out = require_grad(out)
        tap = Tap(terms, out, site.label.axis, self._pass.batch, sink, site.name, samples=samples)
        self._register(tap)
        return out, tap

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
            if other.shape == gate.shape and self._flow[other] == self._flow[gate] is not None:
                return found, other
        return None

    def _follow_gate(self, gate: tuple[int, Tap | None], value: Tensor | None, out: Any) -> Any:
        """Move the site of an activation to the product with its own argument; hand it on where it is scaled."""
        number, tap = gate
        if value is None:
            self._gates[out] = gate
            return out
        assert self._pass is not None
        site = self._pass.sites[number]
        self._pass.sites[number] = site = Site(f"x * {site.name}", site.label)
        if tap is not None:
            tap.close()
            label = self._flow[value]
            out, _ = self._extend(site, (Term(value),), out)
            self._flow.set(out, label)
        return out

    # -- taps ------------------------------------------------------------------------------------------------

    def _tap_output(self, name: str, y: Tensor, axis: int, table: bool = False) -> None:
        assert self._pass is not None
        self.seen.add(name)
        self._open.add(name)
        if name in self._untapped:
            return
        sink = self._sink(self._pass.outputs, name, self._pass)
        samples = self._samples.of(y, self._pass.batch, table)
        tap = Tap(self._terms(y), y, axis, self._pass.batch, sink, name, samples=samples)
        self._taps.setdefault(name, []).append(tap)
        self._register(tap)
        self._fresh = weakref.ref(y), tap

    def _register(self, tap: Tap) -> None:
        for term in tap.terms:
            self._by_storage.setdefault(term.storage, []).append(weakref.ref(tap))

    def _close(self, name: str) -> None:
        for tap in self._taps.pop(name, []):
            tap.close()

    def _save_from_overwriting(self, x: Tensor, but: Tap | None = None) -> None:
        here = storage_of(x)
        for ref in self._by_storage.pop(here, []):
            tap = ref()
            if tap is not None and tap is but:
                self._by_storage.setdefault(here, []).append(ref)
            elif tap is not None:
                tap.copy_values(here)

    def _sink(self, store: dict[str, Tensor], name: str, owner: Pass) -> Callable[[Tensor], None]:
        def sink(sums: Tensor) -> None:
            if owner.closed:
                raise ObservationError(
                    "a backward pass arrived after its forward pass had been counted. Run all backward passes "
                    "of a batch before the next forward pass."
                )
            if not any(owner is dirty for dirty in self._dirty):
                self._dirty.append(owner)
            sums = sums if owner.loss_scale == 1 else sums / owner.loss_scale
            store[name] = store[name] + sums if name in store else sums

        return sink


def _unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, whose own calls are not the model's: they need not pass through the mode, which takes time."""

    def unseen(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return hook(*args)

    return unseen


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    return module.groups == module.in_channels == module.out_channels


def _replace_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``output`` with its (first) tensor changed, where that can require grad."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return output
    return (change(first), *output[1:]) if isinstance(output, tuple) else change(first)


def _is_inplace(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _INPLACE_DUNDERS or (name.endswith("_") and not name.endswith("__")):
        return True
    if kwargs.get("inplace"):
        return True
    return name in _TAKES_INPLACE and any(a is True for a in args[1:])
