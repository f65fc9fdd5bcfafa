"""Operations that are alike, timed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .operations import Pool
from .surface import Stair, Surface, Widths, factors_of, knots_of, points_of, probes_of, stairs_of, step_of
from .timing import Clock, Job, Timed, interleaved
from .widths import Row, Varying

PROBED = 0.01
"""Operations that take this fraction of the whole are looked at for steps of a staircase."""


@dataclass(frozen=True)
class Anchor:
    """A model that was measured as a whole.

    Attributes:
        gone: units that each group has lost.
        seconds: of a forward pass, median.
        spread: half the interquartile range of that, as a fraction.
    """

    gone: Mapping[str, int]
    seconds: float
    spread: float


@dataclass(frozen=True, eq=False)
class Family:
    """Calls of one operator on the same sizes, which may follow different groups.

    Attributes:
        name: of the operator.
        surface: times over widths.
        steps: per width, what it loses at a time.
        rows: per call, per width, how many times with one unit of each group.
        stairs: widths that were measured below multiples of 16.
        scaled: it cannot be run alone at other widths: the time at full width, in proportion to them, stands in.
        anchors: fraction of the widths, and how much longer the operation then takes in the network, where other
            things lie in the caches, than alone.
    """

    name: str
    surface: Surface
    steps: tuple[int, ...]
    rows: tuple[tuple[Row, ...], ...]
    stairs: tuple[Stair, ...] = ()
    scaled: bool = False
    anchors: tuple[tuple[float, float], ...] = ()

    @property
    def calls(self) -> int:
        """How often a forward pass makes such a call."""
        return len(self.rows)

    def follows(self, group: str) -> bool:
        """Whether a width follows the group."""
        return any(group == key for rows in self.rows for row in rows for key, _ in row)

    def seconds(self, gone: Mapping[str, int]) -> float:
        """Of all calls, where the groups have lost so many units."""
        full = self.surface.full
        total = 0.0
        known: dict[Widths, float] = {}
        for rows in self.rows:
            widths = tuple(
                max(width - step * sum(count * gone.get(key, 0) for key, count in row), 1)
                for width, step, row in zip(full, self.steps, rows, strict=True)
            )
            if widths not in known:
                known[widths] = self._at(widths)
            total += known[widths]
        return total

    def _at(self, widths: Widths) -> float:
        share = _share(widths, self.surface.full)
        alone = self.surface.at(self.surface.full) * share if self.scaled else self.surface.at(widths)
        if not self.anchors:
            return alone
        (low, factor), (high, upper) = self.anchors[0], self.anchors[-1]
        if high > low:
            factor += (upper - factor) * min(max((share - low) / (high - low), 0.0), 1.0)
        return alone * factor

    def packed(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return {
            "name": self.name,
            "knots": self.surface.knots,
            "seconds": [[list(at), value] for at, value in self.surface.seconds.items()],
            "factors": [[[k, v] for k, v in by.items()] for by in self.surface.factors],
            "steps": self.steps,
            "stepped": self.surface.steps,
            "rows": self.rows,
            "stairs": self.stairs,
            "scaled": self.scaled,
            "anchors": self.anchors,
        }

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> Family:
        """What :meth:`packed` gave, through JSON."""
        surface = Surface(
            tuple(tuple(knots) for knots in packed["knots"]),
            {tuple(at): value for at, value in packed["seconds"]},
            tuple(dict(map(tuple, by)) for by in packed["factors"]),
            tuple(packed["stepped"]),
        )
        rows = tuple(tuple(tuple((key, count) for key, count in row) for row in call) for call in packed["rows"])
        stairs = tuple((below, share, saved) for below, share, saved in packed["stairs"])
        anchors = tuple((share, factor) for share, factor in packed["anchors"])
        return cls(packed["name"], surface, tuple(packed["steps"]), rows, stairs, packed["scaled"], anchors)


def measure_families(
    operations: Sequence[Varying],
    anchors: Sequence[tuple[Mapping[str, int], Timed]],
    pool: Pool,
    clock: Clock,
    seconds: float,
) -> tuple[Family, ...]:
    """Time all operations at several widths.

    Args:
        operations: of a forward pass.
        anchors: units that each group has lost, and times within a pass then: of the unpruned model first.
        pool: memory for arguments, on the device where operations run.
        clock: seconds.
        seconds: to be spent, about.
    """
    alike: dict[Any, list[int]] = {}
    for number, varying in enumerate(operations):
        op = varying.operation
        if op.computes:
            kind = (op.name, op.leaves, op.sizes, tuple(v.slots for v in varying.variables))
            alike.setdefault(kind, []).append(number)
    once = anchors[0][1].whole
    count = next((n for n, passes in ((6, 40), (5, 30), (4, 20)) if passes * 4 * once < seconds), 3)
    measured = []
    for numbers in alike.values():
        inside = [(gone, sum(timed.operations[n] for n in numbers)) for gone, timed in anchors]
        measured.append(_Measured([operations[n] for n in numbers], inside, pool, count))
    interleaved([job for one in measured for job in one.jobs.values()], clock, seconds * 0.7)
    probes = [job for one in measured if one.inside[0][1] >= PROBED * once for job in one.probe()]
    interleaved(probes, clock, seconds * 0.3)
    return tuple(one.family() for one in measured)


class _Measured:
    """A family on its way."""

    def __init__(
        self, calls: list[Varying], inside: list[tuple[Mapping[str, int], float]], pool: Pool, count: int
    ) -> None:
        self.calls, self.inside, self.pool = calls, inside, pool
        self.one = calls[0]
        self.full = tuple(v.full for v in self.one.variables)
        self.knots = tuple(knots_of(v.full, v.step, count) for v in self.one.variables)
        self.jobs = {at: self._job(at) for at in points_of(self.knots)}
        self.probes: list[dict[Widths, Job]] = []
        self.scaled = not self._runs()
        if self.scaled:
            self.knots = tuple((width,) for width in self.full)
            self.jobs = {self.full: self._job(self.full)}

    def _job(self, widths: Widths) -> Job:
        def prepare() -> Callable[[], Any]:
            args, kwargs = self.one.operation.arguments(self.one.sizes(widths), self.pool)
            return partial(self.one.operation.func, *args, **kwargs)

        return Job(prepare, together=self.pool.device.type != "cpu")

    def _runs(self) -> bool:
        """Whether it can be run alone at other widths."""
        for widths, job in self.jobs.items():
            try:
                job.prepare()()
            except Exception:
                if widths == self.full:
                    raise
                return False
        return True

    def probe(self) -> list[Job]:
        """Look for steps of a staircase along each width, at the full one of the others."""
        if self.scaled:
            return []
        for place, variable in enumerate(self.one.variables):
            self.probes.append({at: self._job(at) for at in probes_of(self.full, place, variable.step)})
        return [job for found in self.probes for job in found.values()]

    def family(self) -> Family:
        surface = Surface(self.knots, {at: job.median for at, job in self.jobs.items()})
        stairs: tuple[Stair, ...] = ()
        if any(self.probes):
            times = [{at: job.median for at, job in found.items()} for found in self.probes]
            found = [stairs_of(place, by_widths) for place, by_widths in enumerate(times)]
            stairs = tuple(stair for stairs in found for stair in stairs)
            surface = replace(surface, steps=tuple(map(step_of, found)))
            surface = replace(surface, factors=factors_of(surface, times))
        steps = tuple(v.step for v in self.one.variables)
        rows = tuple(tuple(v.row for v in call.variables) for call in self.calls)
        alone = Family(self.one.operation.name, surface, steps, rows, stairs, self.scaled)
        anchors = {}
        for gone, inside in self.inside:
            if predicted := alone.seconds(gone):
                shares = [_share(call.widths(gone), self.full) for call in self.calls]
                anchors[sum(shares) / len(shares)] = inside / predicted
        return replace(alone, anchors=tuple(sorted(anchors.items())))


def _share(widths: Widths, full: Widths) -> float:
    """The fraction of the widths that is left, on average."""
    return sum(width / whole for width, whole in zip(widths, full, strict=True)) / len(full) if full else 1.0
