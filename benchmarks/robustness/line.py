"""A line of the robustness table: a network, its inputs, and what the checks may assume about them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Build = Callable[[], nn.Module]
Batch = Callable[[int, torch.Generator], Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """One kind of network or call.

    Attributes:
        name: unique, short; ``--only`` takes it.
        kind: what it stands for, in a few words.
        build: makes the network; called under a fixed seed.
        batch: ``(samples, generator)`` -> inputs: a tensor, a tuple of positional or a dict of keyword arguments,
            or a list of images, which is one argument.
        keep: dotted names of the layers that are not pruned, ``*`` for any part of a name.
        plant: dotted name of the layer that gets a dead, a duplicated and a constant channel; its channels belong
            to no other layer.
        norm: dotted name of the BatchNorm that alone reads it.
        padded: what reads the planted channels pads with zeros, so that a constant is not one at the border.
        outputs: turns what the model returns into tensors whose first dimension are samples.
        refuse: the samples of a batch depend on each other: only a refusal is right.
        draws: draws random numbers in eval mode, so that no pass over one sample repeats those of a batch.
        samples: for calibration, and as many fresh ones.
    """

    name: str
    kind: str
    build: Build
    batch: Batch
    keep: tuple[str, ...] = ()
    plant: str | None = None
    norm: str | None = None
    padded: bool = False
    outputs: Callable[[Any], Any] = lambda outputs: outputs
    refuse: bool = False
    draws: bool = False
    samples: int = 32

    def model(self) -> nn.Module:
        """The network in eval mode, every number in it random, with the planted channels."""
        torch.manual_seed(0)
        model = self.build().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, _BatchNorm) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.2, generator=generator)
                    module.running_var.uniform_(0.7, 1.4, generator=generator)
            for parameter in model.parameters():
                if parameter.dim() == 1 and parameter.is_floating_point() and parameter.is_leaf:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
                elif (
                    parameter.dim() > 1
                    and self.plant is None
                    and parameter.dtype in (torch.float32, torch.float64)
                ):
                    make_unique(parameter)
            if self.plant is not None:
                self._plant(model)
        return model

    def inputs(self, samples: int, seed: int = 0) -> Any:
        """Inputs of so many samples."""
        return self.batch(samples, torch.Generator().manual_seed(100 + seed))

    def kept(self, model: nn.Module) -> list[nn.Module]:
        """The layers that are not pruned."""
        names = dict(model.named_modules())
        missing = [name for name in self.keep if "*" not in name and name not in names]
        assert not missing, f"{self.name}: no layer {missing}"
        return [m for n, m in names.items() if n and any(fnmatch.fnmatchcase(n, pattern) for pattern in self.keep)]

    def _plant(self, model: nn.Module) -> None:
        layer = model.get_submodule(self.plant or "")
        rows = (
            layer.weight.transpose(0, 1) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else layer.weight
        )
        norm = model.get_submodule(self.norm) if self.norm else None
        last = norm if norm is not None else layer
        for name in ("weight", "bias", "running_mean", "running_var"):
            for module in (layer, norm):
                value = rows if module is layer and name == "weight" else getattr(module, name, None)
                if value is not None:
                    value[DOUBLE[1]] = value[DOUBLE[0]]
        for channel, constant in ((DEAD, 0.0), (CONSTANT, 1.0)):
            (norm.weight if norm is not None else rows)[channel] = 0
            if last.bias is not None:
                last.bias[channel] = constant


def make_unique(parameter: Tensor) -> None:
    """Nudge numbers that are equal, so that a row or column of a weight can be told from its numbers."""
    flat = parameter.detach().flatten()
    for _ in range(20):
        ordered, order = flat.sort()
        equal = order[1:][ordered[1:] == ordered[:-1]]
        if not len(equal):
            break
        flat[equal] += 1e-5 * torch.rand(len(equal), generator=torch.Generator().manual_seed(0)).to(flat)
    parameter.copy_(flat.view_as(parameter))


DEAD, DOUBLE, CONSTANT = 0, (1, 2), 3
"""Channels of the planted layer."""


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model on what a line's ``batch`` gave."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def picked(inputs: Any, first: int, last: int) -> Any:
    """Samples ``first`` to ``last`` of a batch."""
    if isinstance(inputs, Mapping):
        return {key: picked(value, first, last) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(picked(value, first, last) for value in inputs)
    return inputs[first:last]  # a tensor, or a list of images


def count(inputs: Any) -> int:
    """Number of samples."""
    while not isinstance(inputs, (Tensor, list)):
        inputs = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    return len(inputs)


def leaves(outputs: Any) -> Iterator[Tensor]:
    """Floating-point and complex tensors in whatever a model returns, in order."""
    if isinstance(outputs, Tensor):
        if outputs.is_complex():
            yield torch.view_as_real(outputs)
        elif outputs.is_floating_point():
            yield outputs
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping):
        yield from leaves([getattr(outputs, field.name) for field in dataclasses.fields(outputs)])
    elif isinstance(outputs, Mapping):
        yield from leaves(list(outputs.values()))
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from leaves(value)


class Probe:
    """The outputs dotted with noise that belongs to the sample, wherever in which batch it stands.

    Each output counts at its own scale. The sum over the samples, divided by their number.

    Args:
        line: tells which outputs count.
        outputs: what the model returns for some samples, for the scales.
    """

    def __init__(self, line: Line, outputs: Any) -> None:
        self._line = line
        norms = [float(t.detach().float().norm()) / max(len(t), 1) ** 0.5 for t in leaves(line.outputs(outputs))]
        self._scales = [1 / max(norm, 1e-6) for norm in norms]

    def __call__(self, outputs: Any, first: int) -> Tensor:
        """Loss of a batch whose first sample has the number ``first``."""
        found = list(leaves(self._line.outputs(outputs)))
        total = torch.zeros(())
        for number, (tensor, scale) in enumerate(zip(found, self._scales, strict=True)):
            for at, one in enumerate(tensor):
                generator = torch.Generator().manual_seed(10_000 * number + first + at)
                total = total + scale * (one.float() * torch.randn(one.shape, generator=generator)).sum()
        return total / len(found[0])


def flat(outputs: Any) -> Tensor:
    """All outputs of each sample in one row, ``(samples, values)``."""
    return torch.cat([tensor.detach().float().flatten(1) for tensor in leaves(outputs)], 1)
