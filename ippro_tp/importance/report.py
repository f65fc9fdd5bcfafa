"""What ``PROImportance.report()`` returns: one row a group, readable as text and as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..records import GroupRecord


@dataclass(frozen=True)
class GroupReport:
    """How one group was scored.

    Attributes:
        root: root layer and side.
        channels: number of channels.
        producers: the layers that carry the score.
        sites: for each of them, the activation that is its sigma; ``None`` is the identity (the fallback).
        low, median, high: of the scores.
        ties: channels that share their score with another one.
        dead: channels with the lowest possible score: no sample's gradient moves them.
        notes: what deserves a look.
        cost: what the scores are divided by to be compared with other groups': a power of the share of the model's
            MACs (or parameters) that one channel costs.
        ranked_low, ranked_high: what is compared in a ranking over groups; ``None`` where it is not known.
    """

    root: str
    channels: int
    producers: tuple[str, ...]
    sites: Mapping[str, str | None]
    low: float
    median: float
    high: float
    ties: int
    dead: int
    notes: tuple[str, ...] = ()
    cost: float = 1.0
    ranked_low: float | None = None
    ranked_high: float | None = None

    @staticmethod
    def of(
        record: GroupRecord,
        scores: Tensor,
        sites: Mapping[str, str | None],
        unseen: tuple[str, ...],
        notes: tuple[str, ...] = (),
        ranked: Tensor | None = None,
        cost: float = 1.0,
    ) -> GroupReport:
        """Summarise ``(width,)`` scores of a record, and what a ranking makes of them."""
        alone = scores if record.tied is None else scores[record.tied.unique().to(scores.device)]
        _, counts = alone.unique(return_counts=True)
        found = [*notes, *(f"index map left out: {problem}" for problem in record.problems)]
        found += [f"never called: {name}" for name in unseen]
        found += [f"{record.units} units of positions that go together"] if record.tied is not None else []
        return GroupReport(
            root=record.key,
            channels=record.width,
            producers=tuple(sites),
            sites=sites,
            low=float(scores.min()),
            median=float(scores.median()),
            high=float(scores.max()),
            ties=int(counts[counts > 1].sum()),
            dead=int((scores == 0).sum()) if scores.min() >= 0 else int((scores <= -1).sum()),
            notes=tuple(found),
            cost=cost,
            ranked_low=None if ranked is None else float(ranked.min()),
            ranked_high=None if ranked is None else float(ranked.max()),
        )

    @property
    def fallback(self) -> bool:
        """Whether no layer of the group is followed by an activation."""
        return all(site is None for site in self.sites.values())


@dataclass(frozen=True)
class Report:
    """All groups of a model; ``print(report)`` shows a table.

    Attributes:
        groups: one row each.
        notes: what the calibration has to say: which output got which loss, what was not reached.
    """

    groups: tuple[GroupReport, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[GroupReport]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        ranked = any(g.ranked_low is not None for g in self.groups)
        header = f"{'group':40} {'ch':>5} {'low':>10} {'median':>10} {'high':>10} {'ties':>5} {'dead':>5}"
        header += f" {'cost':>7} {'ranked':>10} {'to':>10}" if ranked else ""
        lines = [header + "  sigma", "-" * (len(header) + 7)]
        for g in self.groups:
            named = ", ".join(f"{layer}: {site or 'identity'}" for layer, site in list(g.sites.items())[:3])
            more = f", +{len(g.sites) - 3} layers" if len(g.sites) > 3 else ""
            notes = f"  [{'; '.join(g.notes)}]" if g.notes else ""
            line = f"{g.root:40} {g.channels:5d} {g.low:10.3g} {g.median:10.3g} {g.high:10.3g}"
            line += f" {g.ties:5d} {g.dead:5d}"
            if ranked:
                ends = (
                    f"{'-' if end is None else format(end, '.3g'):>10}" for end in (g.ranked_low, g.ranked_high)
                )
                line += f" {g.cost:7.3g} {' '.join(ends)}"
            lines.append(f"{line}  {named}{more}{notes}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
