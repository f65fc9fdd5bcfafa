"""Attributes of modules: written as JSON without loss, and compared whatever they hold."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))
_NUMBERS = (torch.dtype, torch.device, torch.memory_format)


class NotPlain(ValueError):  # no error of its own: the caller says which attribute
    """A value that cannot be written."""


def encode(value: Any, put: Callable[[Tensor], str]) -> Any:
    """``value`` as JSON: numbers, strings, None, and tuples, lists, dicts, dtypes, devices and tensors of them.

    Args:
        value: the value.
        put: takes a tensor away and gives the name under which it is found again.

    Raises:
        NotPlain: it holds something else.

    Example:
        >>> encode({"heads": (4, None)}, str)
        {'dict': [['heads', {'tuple': [4, None]}]]}
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if kind in (tuple, list, set):
        return {kind.__name__: [encode(v, put) for v in value]}
    if kind is dict:
        return {"dict": [[encode(k, put), encode(v, put)] for k, v in value.items()]}
    if isinstance(value, _NUMBERS):
        return {kind.__name__: str(value).removeprefix("torch.")}
    if kind is slice:
        return {"slice": [encode(v, put) for v in (value.start, value.stop, value.step)]}
    if kind is Tensor and not value.is_nested and value.layout == torch.strided:
        return {"tensor": put(value)}
    raise NotPlain(kind.__name__)


def decode(code: Any, take: Callable[[str], Tensor]) -> Any:
    """The value that :func:`encode` wrote.

    Raises:
        ValueError: it wrote no such thing.
    """
    if type(code) in _PLAIN:
        return code
    if not isinstance(code, dict) or len(code) != 1:
        raise ValueError(f"no value: {code!r}")
    ((kind, content),) = code.items()
    if kind in ("tuple", "list", "set"):
        made = {"tuple": tuple, "list": list, "set": set}[kind]
        return made(decode(v, take) for v in content)
    if kind == "dict":
        return {decode(k, take): decode(v, take) for k, v in content}
    if kind == "size":
        return torch.Size(content)
    if kind == "slice":
        return slice(*(decode(v, take) for v in content))
    if kind == "tensor":
        return take(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, str(content), None)
    if kind in ("dtype", "memory_format") and isinstance(found, _NUMBERS):
        return found
    raise ValueError(f"no value: {code!r}")


class Comparison:
    """Compares values of two models, in which modules and tensors are known by name.

    Args:
        one: a model.
        other: the model it is compared with.
    """

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        self._names = [{id(m): n for n, m in model.named_modules()} for model in (one, other)]
        for names, model in zip(self._names, (one, other), strict=True):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                names.setdefault(id(tensor), name)
        self._seen: dict[tuple[int, int], tuple[Any, Any]] = {}  # holds on to them: numbers must not be reused

    def difference(self, a: Any, b: Any) -> str:
        """Where ``a`` and ``b`` differ: ``".heads[0]"``, or ``"."`` for the whole; empty if they are the same."""
        mine, theirs = self._names[0].get(id(a)), self._names[1].get(id(b))
        if mine is not None or theirs is not None:
            return "" if mine == theirs else "."
        if a is b or (id(a), id(b)) in self._seen:
            return ""
        if type(a) is not type(b):
            return "."
        if isinstance(a, (*_PLAIN, *_NUMBERS, slice, type)):
            return "" if a == b or (a != a and b != b) else "."
        if isinstance(a, Tensor):
            return "" if same_tensor(a, b) else "."
        self._seen[id(a), id(b)] = (a, b)
        return self._inside(a, b)

    def _inside(self, a: Any, b: Any) -> str:
        if isinstance(a, Mapping):
            if list(a) != list(b) and set(a) != set(b):
                return "."
            return self._first({f"[{key!r}]": (a[key], b[key]) for key in a})
        if isinstance(a, (tuple, list)):
            if len(a) != len(b):
                return "."
            return self._first({f"[{i}]": pair for i, pair in enumerate(zip(a, b, strict=True))})
        if isinstance(a, (set, frozenset)):
            return "" if a == b or (any(map(callable, a)) and len(a) == len(b)) else "."
        if isinstance(a, functools.partial):
            return self.difference((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
        if isinstance(a, types.MethodType):
            return self.difference((a.__func__, a.__self__), (b.__func__, b.__self__))
        if isinstance(a, types.FunctionType):
            cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b)]
            return "." if a.__code__ != b.__code__ else self.difference(*cells)
        if hasattr(a, "tobytes"):
            return "" if a.tobytes() == b.tobytes() else "."
        if hasattr(a, "__dict__"):
            here, there = vars(a), vars(b)
            missing = sorted(here.keys() ^ there.keys())
            return f".{missing[0]}" if missing else self._first({f".{k}": (v, there[k]) for k, v in here.items()})
        return ""  # an opaque object of the same type

    def _first(self, pairs: Mapping[str, tuple[Any, Any]]) -> str:
        for at, (a, b) in pairs.items():
            found = self.difference(a, b)
            if found:
                return at + ("" if found == "." else found)
        return ""


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, wherever they live.

    Example:
        >>> same_tensor(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout != torch.strided or a.is_quantized:
        return bool(torch.equal(a.to_dense(), b.to_dense()))
    return bool(torch.equal(_bits(a), _bits(b)))


def _bits(x: Tensor) -> Tensor:
    x = x.detach().cpu().contiguous()
    return x.flatten().view(torch.uint8) if x.dim() or x.dtype != torch.bool else x.flatten()
