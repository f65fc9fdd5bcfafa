"""What a calibration shows besides sums, and its form in ``state_dict()``: plain types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..records import Label, Site, Span, Wiring, Work


@dataclass(frozen=True)
class Observed:
    """What forward passes and the pruner showed of a model.

    Attributes:
        wiring: what follows what.
        work: MACs of its layers; ``None`` if they could not be counted.
        unscored: groups that cannot be scored, and why.
        units: for groups whose channels do not go one by one, the unit of each, as the pruner that was calibrated
            has it.
        globally: whether that pruner ranks groups against each other.
        options: that the statistics were gathered for, see ``Options.of_statistics``.
    """

    wiring: Wiring = field(default_factory=Wiring)
    work: Work | None = None
    unscored: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, Tensor] = field(default_factory=dict)
    globally: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def pack(self) -> dict[str, Any]:
        """As plain types and tensors."""
        sites = [
            {
                "name": site.name,
                "axis": site.label.axis,
                "spans": [[s.layer, s.start, s.count, s.at, s.repeat] for s in site.label.spans],
            }
            for site in self.wiring.sites
        ]
        work = self.work
        return {
            "sites": sites,
            "norm_of": dict(self.wiring.norm_of),
            **self.wiring.names,
            "unscored": dict(self.unscored),
            "units": dict(self.units),
            "globally": self.globally,
            "options": dict(self.options),
            "work": work and {"total": work.total, "layers": dict(work.layers), "products": dict(work.products)},
        }

    @staticmethod
    def unpack(packed: Mapping[str, Any]) -> Observed:
        """What :meth:`pack` was made of."""
        sites = tuple(
            Site(site["name"], Label(site["axis"], tuple(Span(*span) for span in site["spans"])))
            for site in packed["sites"]
        )
        seen, centered = frozenset(packed["seen"]), frozenset(packed["centered"])
        wiring = Wiring(sites, dict(packed["norm_of"]), seen, centered)
        work = None if packed["work"] is None else Work(**packed["work"])
        return Observed(
            wiring,
            work,
            dict(packed["unscored"]),
            dict(packed["units"]),
            bool(packed["globally"]),
            dict(packed["options"]),
        )
