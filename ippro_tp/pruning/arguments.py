"""Arguments of ``prune()``, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..compensation.step import Compensation
from .measure import Unit


def one_target(targets: Mapping[str, float | None]) -> tuple[Unit, float]:
    """The one target that is given, and its unit.

    Raises:
        ValueError: there is none, there are several, or it is no fraction.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one target of {', '.join(targets)}; got {', '.join(given) or 'none'}")
    ((unit, value),) = given.items()
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{unit}={value!r}; give a fraction between 0 and 1")
    return unit, value  # type: ignore[return-value]


def check(
    scope: str, steps: int, round_to: int | None, max_pruning_ratio: float, unit: Unit, target: float
) -> None:
    """Refuse values that mean nothing, or that contradict each other.

    Raises:
        ValueError: the message names the argument.
    """
    if scope not in ("global", "local"):
        raise ValueError(f"scope={scope!r}; choose 'global' or 'local'")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}; give a positive integer")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 0):
        raise ValueError(f"round_to={round_to!r}; give a positive integer or None")
    if not 0 < max_pruning_ratio <= 1:
        raise ValueError(f"max_pruning_ratio={max_pruning_ratio!r}; give a fraction above 0, 1 at most")
    if unit == "ratio" and target > max_pruning_ratio:
        raise ValueError(f"ratio={target:g} is above max_pruning_ratio={max_pruning_ratio:g}")


def check_tools(importance: Any, compensation: Any) -> None:
    """Refuse an importance or a compensation that is none.

    Raises:
        TypeError: the message names the argument.
    """
    if isinstance(importance, type):
        raise TypeError(f"importance={importance.__name__} is a class: give an instance, {importance.__name__}()")
    if importance is not None and not callable(importance):
        raise TypeError(
            f"importance={importance!r}; give an importance of Torch-Pruning or of this package, or None"
        )
    if not isinstance(compensation, (bool, Compensation)):
        raise TypeError(f"compensation={compensation!r}; give True, False or a Compensation()")


def names_of(model: nn.Module, layers: Sequence[nn.Module | str]) -> tuple[str, ...]:
    """Names of the given modules of ``model``.

    Raises:
        ValueError: one is no module of it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for layer in layers:
        if isinstance(layer, str):
            model.get_submodule(layer)
            found.append(layer)
        elif id(layer) in names:
            found.append(names[id(layer)])
        else:
            raise ValueError(f"ignored_layers: {type(layer).__name__} is not a module of the model")
    return tuple(found)
