"""Running a model over kept samples so that every pass does the same, and watching its layers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..calibration.guard import evaluating
from ..layers import unfused
from .cutlayer import CutLayer

See = Callable[[CutLayer, Tensor, Any, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def reproducibly(model: nn.Module) -> Iterator[None]:
    """Eval mode, the same random numbers each time, and every layer run as a layer.

    torch's random streams go on outside as if nothing had been drawn. The fused kernels of transformer layers,
    which call none of their layers and pass nested tensors on, are off.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(unfused())
        torch.manual_seed(0)
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters live."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def drawn_so_far(device: torch.device) -> bytes:
    """Random state of torch: equal in two passes that have drawn the same so far."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return bytes(state.numpy())


@contextmanager
def after_each(layers: Sequence[CutLayer], see: See) -> Iterator[None]:
    """Call ``see(layer, input, output, args, kwargs)`` after each call of a layer with a tensor."""

    def hook_for(layer: CutLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = read_by(args, kwargs)
            if x is not None:
                see(layer, x, y, args, kwargs)

        return hook

    handles = [x.module.register_forward_hook(hook_for(x), with_kwargs=True) for x in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_by(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that a layer is called with."""
    x = args[0] if args else kwargs.get("input")
    return x if isinstance(x, Tensor) else None


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside that live at the same time.

    Attributes:
        peak: the most there were.
        counting: whether tensors made now are counted.

    Example:
        >>> with PeakBytes() as counted:
        ...     _ = torch.zeros(4, 8) + 1
        >>> counted.peak
        256
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self.counting = True
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.counting:
            return out
        given = {x.untyped_storage() for x in pytree.tree_leaves((args, kwargs)) if _is_dense(x)}
        for x in pytree.tree_leaves(out):
            storage = x.untyped_storage() if _is_dense(x) else None
            if storage is None or storage in self._known or storage in given:
                continue
            size = storage.nbytes()
            self._known[storage] = size
            self._now += size
            weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, size: int) -> None:
        self._now -= size


def _is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested


def output_error(found: Any, wanted: Any) -> float | None:
    """Distance of a model's outputs from others, as a share of their variance; each tensor counts alike.

    Args:
        found: outputs: tensors in nested tuples, lists, dicts or objects.
        wanted: outputs of the same model before it was cut.

    Returns:
        ``inf`` where values became NaN or inf, ``None`` where no two tensors can be compared.
    """
    shares = []
    for a, b in zip(_tensors(found), _tensors(wanted), strict=False):
        if a.shape != b.shape or not b.is_floating_point() or not a.is_floating_point():
            continue
        good = b.isfinite()
        b = torch.where(good, b, 0).double()
        a = torch.where(good, a, 0).double()
        spread = b - b.mean(0, keepdim=True) if b.dim() and len(b) > 1 else b
        scale = float(spread.square().sum()) or float(b.square().sum())
        if scale > 0:
            shares.append(float((a - b).square().sum()) / scale)
    if not shares:
        return None
    return math.inf if any(x != x for x in shares) else sum(shares) / len(shares)


def _tensors(outputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            found += [x for x in pytree.tree_leaves(dict(vars(leaf))) if isinstance(x, Tensor)]
    return found
