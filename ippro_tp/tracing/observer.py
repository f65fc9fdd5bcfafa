"""Watching the forward and backward passes of a model: places taps, and hands over what they give.

Nothing is written to the model. While an :class:`Observer` is entered, forward hooks tell which producer is
running, and a ``TorchFunctionMode`` sees every call (:mod:`tracing.forward`). Before the first forward pass a few
of its samples are run through the model to measure which rows are whose (:mod:`tracing.probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..errors import ObservationError
from ..layers import forget_caches
from ..records import Pass, Site
from .extension import require_grad
from .flow import ChannelFlow
from .forward import Forward
from .passes import common, difference, samples_of_call
from .plan import Plan
from .probe import Layouts
from .recording import Recording
from .taps import Recorder, Taps

Names = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Iterable[str], Iterable[str]]]


class Observer(TorchFunctionMode):
    """Context in which forward and backward passes of ``model`` are turned into :class:`Pass` objects.

    Args:
        model: the module whose ``forward`` is called by the user's loop.
        find: ``(args, kwargs) ->`` names of the modules whose outputs are tapped, and of those whose inputs are;
            called once, with the arguments of the first forward pass.
        on_passes: receives the passes whose backward passes are through, one or more at a time.
        plan: what is tapped.
        unneeded: after the first forward pass: producers and readers of which no sums are wanted after all.
        loss_scale: asked at the start of each forward pass.

    Attributes:
        sites, norm_of, seen, crossed: see :class:`~ippro_tp.records.Wiring`; ``crossed`` are layers whose channels
            met along different axes.
        reached: names of producers, activations and readers that a gradient has arrived at.
        passes: forward passes so far.
    """

    def __init__(
        self,
        model: nn.Module,
        find: Names,
        on_passes: Callable[[list[Pass]], None],
        plan: Plan | None = None,
        unneeded: Callable[[Pass], tuple[set[str], set[str]]] = lambda first: (set(), set()),
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__()
        self._model, self._find, self._find_unneeded = model, find, unneeded
        self._on_passes, self._loss_scale = on_passes, loss_scale
        self._plan = plan if plan is not None else Plan()
        self._handles: list[RemovableHandle] = []
        self._ready = False  # what is tapped is known
        self._busy = False  # the model is being traced or measured
        self._now: Forward | None = None
        self._dirty: list[Pass] = []
        self._called: set[str] = set()
        self._layouts = Layouts(model, self._recording)
        self.sites: tuple[Site, ...] = ()
        self.norm_of: dict[str, str] = {}
        self.seen: set[str] = set()
        self.crossed: set[frozenset[str]] = set()
        self.reached: set[str] = set()
        self.passes = 0

    # -- context ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Observer:
        self._handles = [
            self._model.register_forward_pre_hook(self._start, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._stop, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._now = None

    @property
    def borrowed(self) -> dict[str, set[str]]:
        """Layers that are never called but whose weights were used, and the layers whose channels these read.

        Torch-Pruning finds layers by their calls: it does not see such a use, ``F.linear(x, self.qkv.weight)``.
        """
        return {name: layers for name, layers in self._plan.reads_of.items() if name not in self._called}

    @property
    def batch(self) -> int:
        """Number of samples of the forward pass that is running; 0 between forward passes."""
        return self._layouts.samples if self._now is not None and not self._busy else 0

    @property
    def running(self) -> Pass | None:
        """The forward pass that is running."""
        return self._now.current if self._now is not None and not self._busy else None

    @property
    def mixed(self) -> dict[str, str]:
        """Layers whose rows cannot be given to single samples, and why: the batch is then the unit."""
        return self._layouts.mixed

    @property
    def unfollowed(self) -> set[str]:
        """Functions through which channels were not followed, although their names promise it."""
        return self._plan.trials.contradicted

    def flush(self) -> None:
        """Hand over every pass that has received gradients. Called between forward passes and at the end."""
        done, self._dirty = self._dirty, []
        for each in done:
            each.closed = True
        if done:
            self._on_passes(done)

    # -- the model -------------------------------------------------------------------------------------------

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._busy:
            return
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
        samples_of_call(args, kwargs)
        for inner in self._model.modules():  # what a pass left there cannot be differentiated again
            forget_caches(inner)
        self._busy = True
        try:
            if not self._ready:
                self._watch(args, kwargs)
            self._layouts.prepare(args, kwargs)
        finally:
            self._busy = False
        current = Pass(1 if self.mixed else self._layouts.samples, self._loss_scale())
        places = Taps(current, self._layouts, self._note)
        self._now = Forward(current, self._plan, places, ChannelFlow(self._plan.trials), self.passes == 0)

    def _stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._busy:
            return
        now, self._now = self._now, None
        if now is None or output is None:
            return
        current = now.current
        if self.mixed:
            current.batch = 1
        if self.passes == 0:
            if self._layouts.reads is not None:
                current.read_layers = common(current.read_layers, self._layouts.reads)
            self.sites, self.norm_of = tuple(current.sites), dict(current.norm_of)
            producers, readers = self._find_unneeded(current)
            # A norm or an activation stands for producers without a tap, in each pass.
            self._plan.untapped = (now.seen - set(now.taps)) | producers
            self._plan.unread = readers
            for unneeded, placed in ((producers, now.taps), (readers, now.reader_taps)):
                for tap in (tap for name in unneeded for tap in placed.get(name, ())):
                    if tap is not None:
                        tap.close()
        elif (self.sites, self.norm_of) != (tuple(current.sites), current.norm_of):
            raise ObservationError(difference(self.sites, tuple(current.sites)))
        self.seen |= now.seen
        self.crossed |= now.flow.crossed
        self.passes += 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See every call of a torch function; only calls within the model's forward are looked at."""
        if self._now is None:
            return func(*args, **(kwargs or {}))
        return self._now.call(func, args, kwargs or {})

    @contextmanager
    def _recording(self, recording: Recording, samples: int) -> Iterator[Pass]:
        """Calls of the model inside note in ``recording`` what would be tapped."""
        current = Pass(samples)
        self._now = Forward(current, self._plan, Recorder(recording), ChannelFlow(self._plan.trials), False)
        try:
            yield current
        finally:
            self._now = None

    def _note(self, current: Pass, name: str) -> None:
        """A gradient arrives."""
        self.reached.add(name)
        if not any(current is dirty for dirty in self._dirty):
            self._dirty.append(current)

    # -- layers ----------------------------------------------------------------------------------------------

    def _watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        modules = dict(self._model.named_modules())
        producers, readers = (list(names) for names in self._find(args, kwargs))
        for name in producers:
            self._handles += [
                modules[name].register_forward_pre_hook(self._enter_layer(name)),
                modules[name].register_forward_hook(self._leave_layer(name)),
            ]
        for name, module in modules.items():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                self._plan.owners[module.weight] = name
                self._handles.append(module.register_forward_pre_hook(self._note_call(name)))
        if readers:  # what depthwise convolutions read is asked for as well
            depthwise = {name for name, module in modules.items() if _is_depthwise(module)}
            for name in sorted({*readers} | depthwise):
                hook = self._enter_reader(name, name in readers)
                self._handles.append(modules[name].register_forward_pre_hook(hook))
        self._ready = True

    def _note_call(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._called.add(name)

        return hook

    def _enter_layer(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._now is not None:
                self._now.enter_layer(name, module)

        return hook

    def _leave_layer(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._now is not None:
                return self._now.leave_layer(name, module, args, output)
            if self._ready and torch.is_grad_enabled():
                # Gradient checkpointing runs the layer again in the backward pass, and has to find the same graph.
                return _replace_first(output, require_grad)
            return None

        return _unseen(hook)

    def _enter_reader(self, name: str, tap: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            x = args[0] if args else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or not torch.is_grad_enabled():
                return None
            if self._now is None:  # gradient checkpointing runs the layer again
                tapped = tap and name not in self._plan.unread
                return (require_grad(x).view_as(x), *args[1:]) if tapped and self._ready else None
            branch = self._now.enter_reader(name, module, x, tap)
            return None if branch is None else (branch, *args[1:])

        return _unseen(hook)


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
