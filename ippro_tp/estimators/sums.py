"""Statistics are named sums: they add up over batches, runs and processes, and scores are functions of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Sums(Mapping[str, Tensor]):
    """Named running sums, kept on the device they are made on, in float32 or wider.

    Example:
        >>> a, b = Sums(), Sums()
        >>> a.add("x", torch.ones(2)); b.add("x", torch.ones(2)); a.merge(b)
        >>> a["x"]
        tensor([2., 2.])
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self._values: dict[str, Tensor] = dict(values or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._values[name] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, name: str, value: Tensor) -> None:
        """Add ``value`` to the sum called ``name``; the first value is kept as a private copy."""
        wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        if name in self._values:
            self._values[name] += wide
        else:
            self._values[name] = wide.clone() if wide is value else wide

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Add all sums of ``other``."""
        for name, value in other.items():
            self.add(name, value.to(self._values[name].device) if name in self._values else value)

    def all_finite(self) -> bool:
        """Whether no sum holds NaN or inf. Waits for the device once."""
        checks: dict[torch.device, list[Tensor]] = {}
        for value in self._values.values():
            checks.setdefault(value.device, []).append(value.isfinite().all())
        return all(bool(torch.stack(each).all()) for each in checks.values())

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the sums on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._values.items()}
