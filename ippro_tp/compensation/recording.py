"""What layers of the uncut model give at chosen output positions, and how many fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .additions import Additions, Branch
from .cutlayer import CutLayer
from .passes import after_each, device_of, drawn_so_far, reproducibly
from .patches import Rows, choose, rows_of, sum_at
from .probe import Facts, Layout, probe
from .samples import Samples, even_choice

ROWS, GROUPED_ROWS, PER_FEATURE = 2048, 512, 24
"""A layer with f features is fitted to PER_FEATURE * f positions, at least ROWS, with groups GROUPED_ROWS, ..."""
WORK, FEWEST, MOST = 1 << 32, 2048, 16384
"""... and at most WORK / f^2, or FEWEST where that is less, and never more than MOST."""
MATRICES = 6
"""Matrices of features squared that a regression holds at a time."""
HELD_OUT, MOST_HELD_OUT = 1 / 10, 64
"""Of the samples, this part, at most that many, are kept from the fit and judge the whole; ..."""
ENOUGH = 4
"""... of so many or more, at least one."""
BATCH, LEAST_BATCH, BATCH_BYTES = 64, 8, 40 << 20
"""Samples per forward pass before the cut, where any number gives the same: as many as fit into a cache."""


@dataclass(frozen=True)
class Wanted:
    """What a layer gave in one of its calls in the uncut model, at some positions; those of even samples first.

    Where its output is added to another tensor (:mod:`.additions`), ``values`` are those of the sum.
    """

    rows: Rows
    even: int
    values: Tensor
    read: torch.Size
    drawn: bytes


class Recorded:
    """Gathers a :class:`Wanted` over the batches of the pass before the cut.

    Args:
        layout: where samples lie among the rows of the call.
        some: output positions to keep, over all batches.
        count: number of samples, over all batches.
        drawn: see :func:`drawn_so_far`.
    """

    def __init__(self, layout: Layout, some: int, count: int, drawn: bytes) -> None:
        self._layout, self._some, self._count, self._drawn = layout, some, count, drawn
        self._chosen: Tensor | None = None
        self._parts: list[tuple[Tensor, int, Tensor]] = []
        self._shapes: list[tuple[tuple[int, ...], torch.Size]] = []

    def add(self, module: nn.Module, read: torch.Size, given: Sequence[Tensor], first: int, samples: int) -> None:
        """Keep some values of a batch.

        Args:
            module: the layer.
            read: shape of its input.
            given: tensors of the layout of its output; their sum is kept.
            first: number of the first sample of the batch.
            samples: how many there are.
        """
        shape = rows_of(module, given[0])
        self._shapes.append((shape, read))
        if shape[self._layout.axis] != self._layout.rows * samples:
            return
        each = math.prod(shape) // samples
        if self._chosen is None:
            self._chosen = choose(each * self._count, self._some)
        begin, end = torch.searchsorted(self._chosen, torch.tensor([first, first + samples]) * each).tolist()
        index = self._chosen[begin:end] - first * each
        even = (self._layout.samples(Rows(shape, index), samples) + first) % 2 == 0
        index = torch.cat([index[even], index[~even]])
        rows = Rows(shape, index.to(given[0].device))
        values = sum_at(module, given, rows, given[0].dtype)
        self._parts.append((index + first * each, int(even.sum()), values))

    def joined(self) -> Wanted | None:
        """All batches together; ``None`` where they do not fit together."""
        shapes = {(shape[1:], read[1:]) for shape, read in self._shapes}
        if not self._parts or len(self._parts) < len(self._shapes) or len(shapes) > 1:
            return None
        shape = (sum(s[0] for s, _ in self._shapes), *self._shapes[0][0][1:])
        read = torch.Size([sum(r[0] for _, r in self._shapes), *self._shapes[0][1][1:]])
        index = [i[:even] for i, even, _ in self._parts] + [i[even:] for i, even, _ in self._parts]
        values = [v[:even] for _, even, v in self._parts] + [v[even:] for _, even, v in self._parts]
        device = values[0].device
        rows = Rows(shape, torch.cat(index).to(device))
        return Wanted(rows, sum(even for _, even, _ in self._parts), torch.cat(values), read, self._drawn)


@dataclass(frozen=True)
class Budget:
    """What a step keeps and works on, so that it fits into ``memory`` bytes.

    Attributes:
        rows: per layer, output positions that it is fitted to.
        samples: how many there is room for.
    """

    rows: dict[str, int]
    samples: int

    @classmethod
    def of(cls, layers: Sequence[CutLayer], facts: Facts, count: int, memory: int) -> Budget:
        """A quarter for kept outputs, a quarter for the rows of one regression, the rest for activations."""
        rows, kept, work = {}, 0.0, 0
        for layer in layers:
            each, channels = facts.outputs.get(layer.name, (0.0, 0))
            size = layer.module.weight.element_size()
            most = min(MOST, max(FEWEST, WORK // layer.features**2))
            least = ROWS if layer.groups == 1 else GROUPED_ROWS
            wanted = min(most, max(least, PER_FEATURE * layer.features))
            read = layer.features * layer.groups * 4 * size + layer.taps * 32 + channels * (5 * size + 16)
            rows[layer.name] = max(2, min(wanted, memory // 4 // read))
            work = max(work, rows[layer.name] * read + MATRICES * 8 * layer.groups * layer.features**2)
            kept += min(rows[layer.name], count * each) * channels * size
        share = min(1.0, memory / 4 / max(1.0, kept))
        rows = {name: max(2, int(number * share)) for name, number in rows.items()}
        room = max(memory / 4, memory - kept * share - work)
        return cls(rows, min(count, max(2, int(room / max(1.0, facts.bytes_per_sample)))))


class Recording:
    """Runs a model before it is cut, and keeps what its layers are to give afterwards.

    Args:
        model: the model, uncut.
        layers: those that may be refitted.
        samples: finite ones.
        memory: bytes that activations and kept outputs may take at a time.

    Attributes:
        model: as given.
        facts: what a few samples showed.
        fitting: ``(samples,)`` int64, those that layers are fitted to.
        wanted: what a layer gave in each of its calls.
        outputs: what the model gave for the other samples, by which the whole is judged.

    Raises:
        ObservationError: the model does not repeat what it did.
    """

    def __init__(self, model: nn.Module, layers: Sequence[CutLayer], samples: Samples, memory: int) -> None:
        self.model, self._layers, self._samples = model, layers, samples
        self._device = device_of(model)
        self.facts = probe(model, layers, samples, self._device)
        budget = Budget.of(layers, self.facts, samples.count, memory)
        self._rows = budget.rows
        chosen = even_choice(samples.count, budget.samples)
        held = min(MOST_HELD_OUT, max(int(len(chosen) * HELD_OUT), int(len(chosen) >= ENOUGH)))
        self._judging = chosen
        if held:
            out = even_choice(len(chosen), held)
            inside = torch.ones(len(chosen), dtype=torch.bool).index_fill_(0, out, False)
            self._judging, chosen = chosen[out], chosen[inside]
        self.fitting = chosen
        self.wanted: dict[tuple[str, int], Wanted] = {}
        self._record()
        self.outputs = self.judge()

    def call(self, index: Tensor) -> Any:
        """What the model gives for some samples."""
        args, kwargs = self._samples.arguments(index, self._device)
        return self.model(*args, **kwargs)

    def judge(self) -> Any:
        """What the model gives for the samples that no layer is fitted to."""
        with reproducibly(self.model):
            return self.call(self._judging)

    def problem(self, name: str) -> str:
        """Why a layer cannot be refitted, whatever comes; empty if it can."""
        if name in self.facts.unfit:
            return self.facts.unfit[name]
        layouts = self.facts.layouts.get(name, [])
        if not layouts:
            return "the model's forward does not call it"
        found = next((layout.problem for layout in layouts if layout.problem), "")
        if not found and any((name, number) not in self.wanted for number in range(len(layouts))):
            found = "its input differs in size between calls"
        return found

    def _record(self) -> None:
        found: dict[tuple[str, int], Recorded] = {}
        calls: dict[str, int] = {}
        read: dict[str, torch.Size] = {}
        first, batch = 0, self.fitting

        def see(layer: CutLayer, x: Tensor, y: Any, args: Any, kwargs: Any) -> None:
            number = calls.get(layer.name, 0)
            calls[layer.name] = number + 1
            layouts = self.facts.layouts.get(layer.name, ())
            if layer.name in self.facts.unfit or number >= len(layouts) or layouts[number].problem:
                return
            some = math.ceil(self._rows[layer.name] / len(layouts))
            key = layer.name, number
            if key not in found:
                found[key] = Recorded(layouts[number], some, len(self.fitting), drawn_so_far(self._device))
            if layer.name in self.facts.added:
                read[layer.name] = x.shape
            else:
                found[key].add(layer.module, x.shape, [y], first, len(batch))

        def meet(branch: Branch, value: Tensor, other: Tensor) -> None:
            name, module = branch.layer.name, branch.layer.module
            if name in read:
                terms = [branch.as_given(value), branch.as_given(other)]
                found[name, 0].add(module, read.pop(name), terms, first, len(batch))

        added = [layer for layer in self._layers if layer.name in self.facts.added]
        with reproducibly(self.model), after_each(self._layers, see), Additions(added, meet):
            for batch in self.fitting.split(self.batch):
                calls.clear()
                self.call(batch)
                first += len(batch)
        self.wanted = {key: wanted for key, parts in found.items() if (wanted := parts.joined()) is not None}

    @property
    def batch(self) -> int:
        """Samples that are best run at a time."""
        if not self.facts.apart:
            return len(self.fitting)
        return max(LEAST_BATCH, min(BATCH, int(BATCH_BYTES / max(1.0, self.facts.bytes_per_sample))))
