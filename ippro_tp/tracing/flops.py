"""Multiply-accumulates of forward passes, by module: torch's FLOP counter with the operators it leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from ..layers import unfused


class MacCounter:
    """Counts on behalf of :func:`counting`.

    Attributes:
        by_layer: MACs by module name, each operation at the innermost module whose forward runs it.
        products: the part of them that are batched products of matrices, as in attention.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_layer: dict[str, int] = {}
        self.products: dict[str, int] = {}
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._counted = (0, 0)
        self._mode = FlopCounterMode(display=False, custom_mapping=_formulas())

    @property
    def total(self) -> int:
        """MACs of everything that ran so far."""
        return self._mode.get_total_flops() // 2

    @property
    def inside(self) -> str:
        """Name of the innermost module whose forward is running."""
        return self._running[-1] if self._running else ""

    def settle(self) -> int:
        """Credit what was counted since the last call to the module that runs, and return it."""
        counts = self._mode.flop_counts.get("Global", {})
        total, batched = (
            sum(counts.values()),
            sum(n for op, n in counts.items() if "attention" in str(op) or "bmm" in str(op)),
        )
        before, self._counted = self._counted, (total, batched)
        for found, fresh in ((self.by_layer, total - before[0]), (self.products, batched - before[1])):
            if fresh:
                found[self.inside] = found.get(self.inside, 0) + fresh // 2
        return (total - before[0]) // 2

    def _entered(self, module: nn.Module, args: object) -> None:
        self.settle()
        self._running.append(self._names.get(module, self.inside))

    def _left(self, module: nn.Module, args: object, output: object) -> None:
        self.settle()
        self._running.pop()


@contextmanager
def counting(model: nn.Module) -> Iterator[MacCounter]:
    """Count the MACs of what runs inside: matrix products, convolutions and attention, of any layer.

    Kernels that do several operations at once are taken apart where they would hide products (the inference path
    of ``nn.MultiheadAttention``, recurrent layers). Element-wise operations, norms and biases count nothing.

    Args:
        model: names the layers; nothing is written to it.
    """
    counter = MacCounter(model)
    with ExitStack() as stack:
        stack.enter_context(_taken_apart(any(isinstance(m, nn.RNNBase) for m in model.modules())))
        for handle in (
            register_module_forward_pre_hook(counter._entered),
            register_module_forward_hook(counter._left, always_call=True),
        ):
            stack.callback(handle.remove)
        stack.enter_context(counter._mode)
        yield counter
        counter.settle()


@contextmanager
def _taken_apart(recurrent: bool) -> Iterator[None]:
    """Run layers by operators that the counter knows."""
    with ExitStack() as stack:
        stack.enter_context(unfused())
        if recurrent:
            stack.enter_context(_without_mkldnn())
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    flags = torch.backends.mkldnn.flags(enabled=False)
    with warnings.catch_warnings():  # it warns of settings that are not touched
        warnings.simplefilter("ignore")
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _matrix_vector(*shapes: Any, **_: Any) -> int:
    return 2 * max(s.numel() for s in shapes if isinstance(s, torch.Size))


def _bilinear(left: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left[:-1].numel() * weight.numel()


_LEFT_OUT: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "mv": _matrix_vector,
    "addmv": _matrix_vector,
    "dot": _matrix_vector,
    "_trilinear": _bilinear,
}
"""Operators for which ``torch.utils.flop_counter`` has no formula in one of the supported versions."""


def _formulas() -> dict[Any, Callable[..., int]]:
    return {getattr(torch.ops.aten, n): fn for n, fn in _LEFT_OUT.items() if hasattr(torch.ops.aten, n)}
