"""Statistics are named sums: they add up over batches, runs and processes, and scores are functions of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import gather, several


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
        checks = [value.isfinite().all() for value in self._values.values()]
        return bool(torch.stack([check.cpu() for check in checks]).all()) if checks else True

    def all_reduce(self) -> None:
        """Add up over all processes of ``torch.distributed``, once; afterwards every rank holds the same sums.

        A sum that some ranks do not hold counts as zero there.

        Raises:
            RuntimeError: a sum has different shapes or dtypes on different ranks: they observed different models.
        """
        if not several():
            return
        forms: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for theirs in gather({name: (value.shape, value.dtype) for name, value in self._values.items()}):
            for name, form in theirs.items():
                if forms.setdefault(name, form) != form:
                    raise RuntimeError(
                        f"the processes gathered different statistics: {name!r} is {_form(forms[name])} on one "
                        f"and {_form(form)} on another. Calibrate the same model on every rank."
                    )
        device = next((value.device for value in self._values.values()), torch.device("cpu"))
        for dtype in sorted({dtype for _, dtype in forms.values()}, key=str):
            names = sorted(name for name, form in forms.items() if form[1] == dtype)
            parts = [
                self._values[name]
                if name in self._values
                else torch.zeros(forms[name][0], dtype=dtype, device=device)
                for name in names
            ]
            flat = torch.cat([part.reshape(-1).to(device) for part in parts])
            dist.all_reduce(flat)
            for name, part, total in zip(names, parts, flat.split([p.numel() for p in parts]), strict=True):
                self._values[name] = total.view(part.shape).to(part.device)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the sums on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._values.items()}


def _form(form: tuple[torch.Size, torch.dtype]) -> str:
    return f"{tuple(form[0])} {str(form[1]).removeprefix('torch.')}"
