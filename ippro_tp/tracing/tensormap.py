"""What is known of tensors, looked up by identity."""

from __future__ import annotations

import functools
import weakref
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class TensorMap(Generic[Value]):
    """Maps tensors to values, without keeping the tensors alive; a value goes when its tensor does.

    ``torch.utils.weak.WeakTensorKeyDictionary`` does the same. It takes several times as long, and a forward pass
    of a deep network asks more than a thousand times.

    Example:
        >>> import torch
        >>> x, known = torch.ones(2), TensorMap()
        >>> known[x] = "input"
        >>> known.get(x), known.get(x.clone()), x in known
        ('input', None, True)
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, x: Tensor) -> Value | None:
        """The value of ``x``, or ``None``."""
        entry = self._entries.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None

    def __setitem__(self, x: Tensor, value: Value) -> None:
        # Called with the dead reference, which pop takes for its default.
        self._entries[id(x)] = weakref.ref(x, functools.partial(self._entries.pop, id(x))), value

    def __contains__(self, x: Tensor) -> bool:
        return self.get(x) is not None

    def __len__(self) -> int:
        return len(self._entries)

    def discard(self, x: Tensor) -> None:
        """Forget ``x``, if it is known."""
        self._entries.pop(id(x), None)
