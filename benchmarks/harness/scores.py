"""Importance scores, computed once on the unpruned network and frozen.

A criterion is evaluated once per calibration seed. The resulting scores serve every MACs target, both scopes
and all tries of the search for the right ratio, each on its own copy of the network: groups are found again
by the name of their root layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor

from benchmarks.errors import UsageError
from ippro_tp import PROImportance
from ippro_tp.estimators.coupling import Coupling
from ippro_tp.estimators.ranking import COUPLING, Ranked, rank
from ippro_tp.graph.groups import groups_of, read_group
from ippro_tp.graph.units import units_of

GroupKey = tuple[str, bool]
"""Name of a group's root layer, and whether the root prunes its outputs."""


def group_key(group) -> GroupKey:
    """Return the name of the root layer of ``group`` and whether the group prunes that layer's outputs."""
    root = group[0].dep
    graph = group._DG
    return graph._module2name[root.target.module], graph.is_out_channel_pruning_fn(root.handler)


def prunable_groups(pruner) -> Iterator:
    """Yield the groups that ``pruner`` would rank, rooted as it roots them, each over all channels of its root."""
    yield from groups_of(pruner)


def kappa_of(depletion: str) -> float | None:
    """Return how much of the covariance a kind of depletion counts: 0 for ``log``, None for ``none``.

    Raises:
        UsageError: There is no such kind.
    """
    if depletion in ("none", "log", "coupled"):
        return {"none": None, "log": 0.0, "coupled": COUPLING}[depletion]
    try:
        kappa = float(depletion.removeprefix("coupled"))
    except ValueError:
        kappa = -1.0
    if not depletion.startswith("coupled") or not 0 <= kappa <= 1:
        raise UsageError(
            f"--depletion {depletion!r} is not known: none, log, coupled, or coupled0.5 with a number from 0 to 1"
        )
    return kappa


@dataclass(frozen=True)
class FrozenScores(tp.importance.Importance):
    """An importance that returns recorded scores.

    Args:
        scores: For each group one score per channel of its root, higher = keep; None where the criterion has none.
        source: Name of the criterion, for messages.
        live: The importance itself, where locally its scores depend on how many channels will go: it has
            ``bind(pruner)`` and is asked anew at every ratio.
        units: For each group whose channels do not go one by one, the unit of each channel.
        couplings: For each group how its channels go together, where the criterion knows.
    """

    scores: dict[GroupKey, Tensor | None]
    source: str = "criterion"
    live: Any = None
    units: dict[GroupKey, Tensor] = field(default_factory=dict)
    couplings: dict[GroupKey, Coupling] = field(default_factory=dict)

    def __call__(self, group, **kwargs) -> Tensor | None:
        """Return the recorded scores of ``group``."""
        key = group_key(group)
        if key not in self.scores:
            raise LookupError(
                f"{self.source}: no scores for the group of {key[0]!r}; was it frozen on another network?"
            )
        scores = self.scores[key]
        if scores is not None and len(scores) != len(group[0].idxs):
            raise LookupError(
                f"{self.source}: {len(scores)} scores for {len(group[0].idxs)} channels of {key[0]!r}; "
                "frozen scores rank full groups of the unpruned network only"
            )
        return scores

    def ranked(
        self,
        degree: float,
        depletion: str = "none",
        costs: dict[GroupKey, float] | None = None,
        exponent: float | None = None,
    ) -> FrozenScores:
        """Return what a ranking over all groups compares, as ``estimators.ranking`` has it.

        Args:
            degree: 1 if the scores behave like ``|t|``, 2 if like ``t^2``.
            depletion: ``"none"``, ``"log"``, ``"coupled"``, or ``"coupled0.5"`` with another kappa.
            costs: Of a channel of each group; None for no cost term.
            exponent: Of the costs; by default that of the quadratic model of the loss, ``degree / 2``.

        Raises:
            ArithmeticError: A score is negative, or how channels go together is not known.
        """
        kappa = kappa_of(depletion)
        ranked = {key: scores for key, scores in self.scores.items() if scores is not None}
        mean = sum(costs.values()) / len(costs) if costs else 1.0
        for key, scores in ranked.items():
            if kappa is not None and bool((scores < 0).any()):
                raise ArithmeticError(
                    f"{self.source}: scores of {key[0]!r} are negative: depletion is not for them"
                )
            if kappa and key not in self.couplings and bool(scores.any()):
                raise ArithmeticError(f"{self.source}: how the channels of {key[0]!r} go together is not known")
        groups = [
            Ranked(scores, self.units.get(key), self.couplings.get(key), costs[key] / mean if costs else 1.0)
            for key, scores in ranked.items()
        ]
        compared = rank(groups, degree=degree, kappa=kappa, cost_exponent=exponent)
        scores = self.scores | dict(zip(ranked, compared, strict=True))
        return replace(self, scores=scores, live=None)

    def for_scope(self, scope: str) -> Any:
        """Return what a pruner of that scope should ask: this object, or the importance it was made from."""
        return self.live if scope == "local" and self.live is not None else self

    @property
    def scored(self) -> frozenset[GroupKey]:
        """The groups that have scores at all."""
        return frozenset(key for key, scores in self.scores.items() if scores is not None)


def freeze(importance: Callable, pruner, source: str = "criterion") -> FrozenScores:
    """Evaluate ``importance`` on every group of ``pruner`` and check what came out.

    Raises:
        ArithmeticError: A score is not finite, or there are fewer or more scores than channels.
    """
    scores: dict[GroupKey, Tensor | None] = {}
    units: dict[GroupKey, Tensor] = {}
    couplings: dict[GroupKey, Coupling] = {}
    for group in prunable_groups(pruner):
        key, channels = group_key(group), len(group[0].idxs)
        with torch.no_grad():
            result = importance(group)
        if result is not None:
            result = result.detach().float().cpu().clone()
            if result.shape != (channels,):
                raise ArithmeticError(
                    f"{source}: shape {tuple(result.shape)} for {channels} channels of {key[0]!r}"
                )
            if not result.isfinite().all():
                bad = int((~result.isfinite()).sum())
                raise ArithmeticError(f"{source}: {bad} of {channels} scores of {key[0]!r} are not finite")
        scores[key] = result
        together = units_of(pruner, pruner.DG, read_group(group))
        if together is not None:
            units[key] = together
        if isinstance(importance, PROImportance) and (known := importance.coupling(group)) is not None:
            couplings[key] = known
    return FrozenScores(scores, source, importance if hasattr(importance, "bind") else None, units, couplings)
