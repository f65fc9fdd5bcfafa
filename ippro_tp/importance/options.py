"""The options of PROImportance: what may be chosen, what goes together, what the statistics depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

from ..estimators.base import registered_estimators
from ..graph.cost import CostFn

EstimatorName = Literal["expected", "paper"]
Reduction = Literal["joint", "mean", "sum", "max", "prod", "first"]
FilterKind = Literal["conv", "norm"]
Reference = Literal["auto", "origin", "mean"]
Cost = Literal["auto", "macs", "params"]
Depletion = Literal["auto", "coupled", "log"]
Power = Literal[1, 2]
LossReduction = Literal["mean", "sum"]
Normalizer = Callable[[Tensor], Tensor]

REFITTED_EXPONENT = 0.6
"""Power of the cost, for ``power=1``, if the network is refitted: better than the 0.5 of the quadratic model, or
as good, on all networks tried (``benchmarks/results/research_compensation.md``)."""
ONLY_OF = {"expected": ("power", "reference", "seed"), "paper": ("step_size", "target")}
"""Options of one estimator only. One that was registered draws labels as ``"expected"`` does: it has a seed."""


@dataclass(frozen=True)
class Options:
    """Options as given; where only one estimator has an option, ``None`` is its default.

    Raises:
        ValueError: an option is not known, or does not go with another, or with the estimator.
    """

    estimator: EstimatorName | str = "expected"
    step_size: float | None = None
    group_reduction: Reduction = "joint"
    normalizer: str | Normalizer | None = None
    target: FilterKind | None = None
    power: Power | None = None
    cost: Cost | CostFn | None = "auto"
    cost_exponent: float | None = None
    seed: int | None = None
    reference: Reference | None = None
    depletion: Depletion | None = "auto"
    compensated: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("estimator", self.estimator, (*get_args(EstimatorName), *registered_estimators())),
            ("group_reduction", self.group_reduction, get_args(Reduction)),
            ("target", self.target, (*get_args(FilterKind), None)),
            ("power", self.power, (*get_args(Power), None)),
            ("reference", self.reference, (*get_args(Reference), None)),
            ("cost", None if callable(self.cost) else self.cost, (*get_args(Cost), None)),
            ("depletion", self.depletion, (*get_args(Depletion), None)),
            ("compensated", self.compensated, ("auto", True, False)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}; choose one of {', '.join(map(repr, known))}")
        if self.step_size is not None and not self.step_size >= 0:
            raise ValueError(f"step_size={self.step_size!r}; it must not be negative")
        if self.reference == "mean" and (self.estimator, self.group_reduction) != ("expected", "joint"):
            raise ValueError(
                'reference="mean" goes with estimator="expected" and group_reduction="joint": what a channel does '
                "is told from the layers that read it, not from single producers"
            )
        if self.depletion in ("log", "coupled") and self.estimator != "expected":
            raise ValueError(
                f'depletion="{self.depletion}" goes with estimator="expected": the scores of Eq. 4 have a sign'
            )
        if self.depletion == "coupled" and self.group_reduction != "joint":
            raise ValueError('depletion="coupled" goes with group_reduction="joint"')
        if self.compensated is True and not self.may_be_compensated:
            raise ValueError(
                'compensated=True goes with estimator="expected", group_reduction="joint" and depletion="auto": '
                "it replaces how the channels of a group count together"
            )
        own = ONLY_OF.get(self.estimator, ("seed",))
        for other, names in ONLY_OF.items():
            for name in names:
                if name not in own and (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f'{name}={value!r} is an option of estimator="{other}", not of "{self.estimator}"'
                    )

    @property
    def in_force(self) -> dict[str, Any]:
        """All options, defaults filled in."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        power = self.power or 1
        defaults = {"step_size": 0.01, "target": "conv", "power": power, "seed": 0, "reference": "auto"}
        defaults["cost_exponent"] = power * (REFITTED_EXPONENT if self.refitted else 0.5)
        return {name: defaults.get(name) if value is None else value for name, value in given.items()}

    @property
    def may_be_compensated(self) -> bool:
        """Whether the other options leave open how the channels of a group count together."""
        joint = (self.estimator, self.group_reduction) == ("expected", "joint")
        return joint and self.depletion in ("auto", "coupled")

    @property
    def refitted(self) -> bool:
        """Whether calibration gathers how channels predict each other."""
        return self.compensated is True

    @property
    def couples(self) -> bool:
        """Whether calibration gathers how the offsets of channels go together."""
        return self.may_be_compensated and not self.refitted

    def ranked(self, globally: bool) -> Options:
        """These options with ``"auto"`` decided for cost and depletion.

        Args:
            globally: whether groups are ranked against each other.
        """
        auto = globally and self.estimator == "expected"
        cost, depletion = self.cost, self.depletion
        if depletion == "auto":
            how: Depletion = "coupled" if self.may_be_compensated else "log"
            depletion = how if self.refitted or (auto and cost is not None) else None
        if cost == "auto":
            cost = "macs" if auto else None
        return replace(self, cost=cost, depletion=depletion)

    @property
    def of_statistics(self) -> dict[str, Any]:
        """The options that decide what calibration gathers, in plain types."""
        found: dict[str, Any] = {"estimator": self.estimator}
        values = self.in_force
        if self.estimator == "paper":
            return {**found, "target": values["target"]}
        if self.estimator != "expected":
            return found
        found |= {"power": values["power"], "joint": self.group_reduction == "joint"}
        found |= {"coupled": True} if self.couples else {}
        found |= {"compensated": True} if self.refitted else {}
        return {**found, "reference": values["reference"]} if found["joint"] else found

    def __str__(self) -> str:
        """What differs from the defaults, as in a call."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}
        return ", ".join(
            f"{name}={getattr(value, '__name__', value)!s}" if callable(value) else f"{name}={value!r}"
            for name, value in shown.items()
        )


class Option:
    """An attribute that reads and sets one of an object's ``_options``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else instance._options.in_force[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance._choose(**{self._name: value})
