"""Watching what flows into layers: the forward-only counterpart of :mod:`tracing.observer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import NEVER_CALLED, ObservationError
from ..estimators.sums import Sums
from ..records import GroupRecord
from ..tracing.passes import samples_of_call

OnInput = Callable[[Sums, str, nn.Module, Tensor], None]


class InputObservation:
    """Calls ``on_input(sums, name, module, x)`` for the input of every consumer, in every forward pass.

    Gradients are not needed: forward passes may run under ``torch.no_grad()``. ``sums["samples"]`` counts the
    samples that were seen.

    Args:
        model: the model that is calibrated.
        groups: called with the arguments of the first forward pass; gives the groups.
        on_input: adds what it wants to ``sums``; runs under ``torch.no_grad()``.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        on_input: OnInput,
    ) -> None:
        self.sums = Sums()
        self.notes: tuple[str, ...] = ()
        self.records: tuple[GroupRecord, ...] = ()
        self._model, self._groups, self._on_input = model, groups, on_input
        self._handles: list[RemovableHandle] = []
        self._watching: bool | None = None  # None: not yet; False: the model is being traced
        self._live = False

    def __enter__(self) -> InputObservation:
        self._handles = [
            self._model.register_forward_pre_hook(self._start, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._stop, always_call=True),
        ]
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._live = False

    def finish(self) -> None:
        """Check that something was observed.

        Raises:
            ObservationError: the model was not called.
        """
        if "samples" not in self.sums:
            raise ObservationError(NEVER_CALLED)

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._watching is False:
            return
        if self._watching is None:
            self._watch(args, kwargs)
        batch = samples_of_call(args, kwargs)
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        self.sums.add("samples", torch.full((), float(batch), dtype=torch.float64, device=device))
        self._live = True

    def _stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._watching:
            self._live = False

    def _watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._watching = False
        modules = dict(self._model.named_modules())
        self.records = tuple(self._groups(args, kwargs))
        names = dict.fromkeys(c.name for record in self.records for c in record.consumers)
        for name in names:
            self._handles.append(modules[name].register_forward_pre_hook(self._hook(name)))
        self._watching = True

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._live and args and isinstance(args[0], Tensor):
                with torch.no_grad():
                    self._on_input(self.sums, name, module, args[0])

        return hook
