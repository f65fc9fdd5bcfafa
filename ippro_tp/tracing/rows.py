"""Which rows of a tensor belong to which sample: told from what changes when a sample is replaced.

The *rows* of a tensor are its entries but for the axis of the channels, in row-major order: the pixels of all
images, the tokens of all sentences. Samples lie in them like the middle of three factors, ``(outer, samples,
inner)``: batch-major ``(N, ...)`` has ``outer = 1``; time-major ``(T, N, ...)`` and views joined along the batch
have as many outer blocks as there are time steps or views. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How samples lie in the rows of a tensor, as measured with a small batch.

    Attributes:
        kind: ``"samples"``: row r belongs to sample ``r // inner % samples``. ``"shared"``: all samples share
            every row, as in a table of positions. ``"mixed"``: neither; ``why`` says what was seen.
        outer: the number of blocks in which all samples appear, for ``"samples"``.
        count: rows of the tensor that was measured.
        samples: samples of the batch that was measured.
        why: for ``"mixed"``.
    """

    kind: Literal["samples", "shared", "mixed"]
    outer: int = 1
    count: int = 0
    samples: int = 1
    why: str = ""

    def fits(self, count: int, samples: int, same_form: bool = True) -> bool:
        """Whether ``count`` rows of ``samples`` samples can lie as these do.

        Args:
            count: rows of the tensor now.
            samples: samples of the batch now.
            same_form: the samples have the size of those that were measured, so that each brings as many rows.

        Example:
            >>> views = Rows("samples", outer=2, count=4, samples=2)
            >>> views.fits(16, 8), views.fits(15, 8)
            (True, False)
        """
        if self.kind != "samples":
            return self.kind == "shared"
        if same_form or self.outer > 1:
            return count * self.samples == self.count * samples
        return count % samples == 0

    def of_sample(self, sample: int) -> Tensor:
        """``(count,)`` bool: the rows of one sample, where samples have rows of their own.

        Example:
            >>> Rows("samples", outer=2, count=4, samples=2).of_sample(0)
            tensor([ True, False,  True, False])
        """
        inner = self.count // (self.outer * self.samples)
        return torch.arange(self.count) // inner % self.samples == sample


def infer(changed: Mapping[int, Tensor], samples: int) -> Rows | None:
    """How samples lie in rows, given which rows change with which sample.

    Rows that do not change (behind a dead ReLU, of padding) say nothing; those that do must agree. Where several
    layouts agree, which takes rows that hardly any sample changes, the one with the fewest blocks is taken.

    Args:
        changed: for one sample or several, ``(rows,)`` bool.
        samples: size of the batch.

    Returns:
        ``None`` if no row changes with any sample.

    Example:
        >>> first = torch.tensor([True, False, True, False])
        >>> infer({0: first, 1: ~first}, 2)
        Rows(kind='samples', outer=2, count=4, samples=2, why='')
    """
    masks = {sample: mask.cpu() for sample, mask in changed.items()}
    first, *others = masks.values()
    count = len(first)
    if not any(mask.any() for mask in masks.values()):
        return None
    overlap = bool((torch.stack([first, *others]).sum(0) > 1).any()) if others else count > 1 and bool(first.all())
    if overlap:
        return Rows("mixed", count=count, samples=samples, why="its values depend on several samples of the batch")
    if count % samples:
        return Rows("mixed", count=count, samples=samples, why=f"it sees {count} rows for {samples} samples")
    for inner in _divisors(count // samples):
        blocks = {sample: mask.view(-1, samples, inner) for sample, mask in masks.items()}
        if all(not _outside(block, sample) for sample, block in blocks.items()):
            return Rows("samples", count // (samples * inner), count, samples)
    return Rows("mixed", count=count, samples=samples, why="its rows follow no order of the samples")


def shared(count: int, samples: int) -> Rows:
    """Rows that belong to no sample in particular."""
    return Rows("shared", count=count, samples=samples)


def _outside(block: Tensor, sample: int) -> bool:
    """Whether any row of ``(outer, samples, inner)`` is set that is not the sample's."""
    return bool(block[:, :sample].any() or block[:, sample + 1 :].any())


def _divisors(number: int) -> list[int]:
    """All divisors, largest first."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)}, reverse=True)
