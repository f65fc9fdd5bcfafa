"""Pruners with dictionaries of their own, scores sample by sample, errors of outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ippro_tp import PROImportance


def pruner_of(
    model: nn.Module, example: Any, importance: Any, ignored: Iterable[nn.Module], **options: Any
) -> Any:
    fresh: dict[str, Any] = {
        "in_channel_groups": {},
        "out_channel_groups": {},
        "num_heads": {},
        "channel_groups": {},
    }
    options = {"pruning_ratio": 0.5, **fresh, **options}
    return tp.pruner.BasePruner(model, example, importance, ignored_layers=list(ignored), **options)


def group_of(pruner: Any, layer: nn.Module) -> Any:
    """The group whose outputs are those of ``layer``."""
    return next(g for g in pruner.DG.get_all_groups(pruner.ignored_layers) if g[0].dep.target.module is layer)


def offsets(model: nn.Module, layer: nn.Module, losses: Iterable[Tensor]) -> Tensor:
    """Mean over samples of abs(F.grad) of a layer without a norm after it, by autograd on its parameters."""
    total = torch.zeros(len(layer.weight))
    number = 0
    for loss in losses:
        model.zero_grad()
        loss.backward()
        t = (layer.weight * layer.weight.grad).flatten(1).sum(1)
        total += (t if layer.bias is None else t + layer.bias * layer.bias.grad).detach().abs()
        number += 1
    model.zero_grad(set_to_none=True)
    return total / number


def noise_loss(count: int, shape: tuple[int, ...]) -> Callable[[Tensor, int], Tensor]:
    """``(outputs, number of the first sample)`` -> outputs dotted with noise of each sample's own, mean."""
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))
    return lambda y, first: (y * noise[first : first + len(y)]).sum() / len(y)


def plain(**options: Any) -> PROImportance:
    """One that gives the mean of abs(F.grad) and nothing else."""
    return PROImportance(reference="origin", cost=None, depletion=None, **options)


def widths(model: nn.Module) -> dict[str, int]:
    return {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


@torch.no_grad()
def error(found: Tensor, wanted: Tensor) -> float:
    """Squared error in shares of the variance of the wanted outputs."""
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@contextmanager
def told():
    """The messages of all warnings, as one list of strings, filled when the block ends."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


def explains(error: BaseException, *words: str) -> None:
    """The message holds one of the words."""
    assert any(word in str(error).lower() for word in words), error
