"""A second device without hardware: tensors that say they are on ``meta`` and hold numbers all the same.

Whatever would fail on a real accelerator because tensors are on two devices fails here, and whatever would make
the host wait for it is counted. So a test on any machine finds both.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

OTHER = torch.device("meta")
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "_local_scalar_dense",
    aten.nonzero.default: "nonzero",
    aten.equal.default: "equal",
    aten.masked_select.default: "masked_select",
    aten.unique_dim.default: "unique",
    aten._unique2.default: "unique",
    aten.is_nonzero.default: "is_nonzero",
}
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# Where even numbers without dimensions have to be on the device.
STRICT = ("cat", "stack", "mm", "bmm", "addmm", "baddbmm", "index_select", "gather", "scatter", "convolution")


class Held(Tensor):
    """A tensor on the other device; ``held`` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        """Wrap ``held``."""
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=OTHER,
            requires_grad=False,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"Held({self.held!r})"

    def tolist(self) -> Any:
        """Copy to the CPU, as every device's tensor does."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, Counter())


class OtherDevice:
    """A context that makes tensors on the other device where it is asked for, and counts what waits for it.

    Attributes:
        waits: how often each operation made the host wait.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self._modes = (_Constructors(), _Operations(self.waits))

    def __enter__(self) -> OtherDevice:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.waits)


class _Constructors(TorchFunctionMode):
    """What makes tensors without asking a dispatch mode: ``torch.tensor``, and lists as indices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1]
            index = tuple(map(_as_index, index)) if isinstance(index, tuple) else _as_index(index)
            return func(args[0], index, *args[2:], **kwargs)
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device) != OTHER:
            return func(*args, **kwargs)
        return to_other(func(*args, **{**kwargs, "device": "cpu"}))


def _as_index(index: Any) -> Any:
    return torch.tensor(index) if isinstance(index, list) and index else index


def to_other(x: Tensor) -> Tensor:
    """``x`` on the other device; of a model's own parameters see :func:`move`."""
    return Held(x.detach().clone())


def move(model: nn.Module) -> nn.Module:
    """Move a model in place, as ``model.to(OTHER)`` would."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                key = id(parameter)
                moved.setdefault(key, nn.Parameter(to_other(parameter), parameter.requires_grad))
                module._parameters[name] = moved[key]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = to_other(buffer)
    return model


def numbers(x: Tensor) -> Tensor:
    """The numbers of a tensor on either device."""
    return x.held.detach() if isinstance(x, Held) else x.detach()


def _run(func: Any, args: tuple, kwargs: dict, waits: Counter[str]) -> Any:
    leaves = pytree.arg_tree_leaves(*args, **kwargs)
    held = [x for x in leaves if isinstance(x, Held)]
    assert all(isinstance(x, Held) for x in leaves if isinstance(x, Tensor) and x.is_meta), f"{func} lost numbers"
    target = kwargs.get("device")
    onto_other = target is not None and torch.device(target).type == OTHER.type
    if not held and not onto_other:
        return func(*args, **kwargs)

    moves = func in (aten._to_copy.default, aten.copy_.default)
    if held and not moves:
        _check_devices(func, args, kwargs, leaves)
    if held:
        _count(func, args, held, target, waits)
    leaves_cpu = pytree.tree_map_only(Held, lambda x: x.held, (args, dict(kwargs)))
    real_args, real_kwargs = leaves_cpu
    if "device" in real_kwargs and target is not None:
        real_kwargs["device"] = torch.device("cpu")
    out = func(*real_args, **real_kwargs)
    stays = onto_other if target is not None else True
    if func is aten.copy_.default:
        return args[0]
    if not stays:
        return out
    wrapped = pytree.tree_map_only(Tensor, Held, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if held else wrapped


def _check_devices(func: Any, args: tuple, kwargs: dict, leaves: list) -> None:
    strays = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Held)]
    name = func.overloadpacket.__name__.lstrip("_")
    if func in INDEXING and isinstance(args[0], Held):  # indices may be on the host
        strays = [x for x in strays if not any(x is i for i in args[1])]
    if not any(name.startswith(strict) for strict in STRICT):
        strays = [x for x in strays if x.dim() > 0]
    if strays:
        shapes = [(tuple(x.shape), str(x.device)) for x in leaves if isinstance(x, Tensor)]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {shapes}")


def _count(func: Any, args: tuple, held: list, target: Any, waits: Counter[str]) -> None:
    if func in WAITS:
        waits[WAITS[func]] += 1
    elif (func is aten._to_copy.default and target is not None and torch.device(target).type == "cpu") or (
        func is aten.copy_.default and not isinstance(args[0], Held)
    ):
        waits["to cpu"] += 1
    elif func in INDEXING and any(isinstance(x, Held) and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        waits["nonzero"] += 1
    elif func in (aten.repeat_interleave.Tensor, aten.bincount.default):
        waits[func.overloadpacket.__name__] += 1
