"""Layers whose weight or bias the model uses outside of them, found while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .cutlayer import CutLayer, memory_of, shared_parameters


class Borrowed(TorchFunctionMode):
    """Notes layers whose weight or bias is used by a call outside of them."""

    def __init__(self, model: nn.Module, layers: Sequence[CutLayer]) -> None:
        super().__init__()
        several = shared_parameters(model)  # of those, others decide
        self.found: dict[str, str] = {}
        self._layers = layers
        self._running: list[str] = []
        self._owners = {
            id(tensor): layer.name
            for layer in layers
            for tensor in layer.module._parameters.values()
            if tensor is not None and memory_of(tensor) not in several
        }

    def inside(self) -> Running:
        """Follow which layer is running."""
        return Running(self._layers, self._running)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, (Tensor, tuple, list)) and not getattr(func, "__name__", "").startswith(
            ("new_", "__set")
        ):
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    name = self._owners.get(id(tensor)) if isinstance(tensor, Tensor) else None
                    if name is not None and name not in self._running and _holds_floats(out):
                        self.found[name] = "its weight or bias is used outside of it as well"
        return out


class Running:
    """Keeps ``running`` the names of the layers whose forward is under way."""

    def __init__(self, layers: Sequence[CutLayer], running: list[str]) -> None:
        self._layers, self._running = layers, running
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for layer in self._layers:
            name = layer.name
            self._handles += [
                layer.module.register_forward_pre_hook(lambda *_, n=name: self._running.append(n)),
                layer.module.register_forward_hook(lambda *_: self._running.pop() and None),
            ]

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()


def _holds_floats(out: Any) -> bool:
    values = out if isinstance(out, (tuple, list)) else (out,)
    return any(isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in values)
