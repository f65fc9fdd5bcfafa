"""LatencyTable: the time of each operation of a model at the widths that pruning can reach, on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import LatencyTableError
from ...records import GroupRecord
from ..structure import Forward, Structure, Transform, forward, read_structure
from . import timing
from .identity import check, identity, machine
from .measuring import Anchor, Family, measure_families
from .operations import Pool
from .surface import step_of
from .timing import Clock, timed_in_place
from .widths import Gauge, cut_copy, cuts_to_measure, device_of, reach

VERSION = 1


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of a model's operations as functions of their widths, on one machine, for one input size.

    Created by :meth:`measure`. With ``cost=table`` an importance ranks channels by loss per second saved.

    Attributes:
        families: sets of identical operations, with their times.
        gauges: by group, where its width can be read off a model.
        anchors: models that were measured as a whole: the unpruned one, one at half its widths, and one that is
            pruned unevenly, to check predictions.
        identity: the conditions of the measurement.
    """

    families: tuple[Family, ...]
    gauges: Mapping[str, Gauge]
    anchors: tuple[Anchor, ...]
    identity: Mapping[str, Any]

    # -- measuring ---------------------------------------------------------------------------------------------

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        example_inputs: Any,
        *,
        forward_fn: Forward | None = None,
        output_transform: Transform | None = None,
        structure: Structure | None = None,
        compile: bool = False,
        seconds: float = 40.0,
        timer: Clock | None = None,
    ) -> LatencyTable:
        """Time each kind of operation of ``model`` at several widths, and the model as a whole.

        Operations are run one by one, interleaved, with torch's current number of threads and under the current
        autocast state. The model is not changed.

        Args:
            model: on the device, with the dtype and memory format in which it will run.
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, of the batch
                size whose latency matters.
            forward_fn: ``(model, inputs) -> outputs``, if ``model(inputs)`` is not how the model is called.
            output_transform: selects the outputs that matter, for tracing.
            structure: what can be pruned of the model, if it was read before.
            compile: measure the whole model under ``torch.compile``. Operations are measured eagerly; the speed-up
                of compilation is assumed to be the same for all of them.
            seconds: approximate time to spend; if it is short, fewer widths and repetitions are measured.
            timer: returns the time in seconds; ``None``: the wall clock, after waiting for the accelerator.

        Raises:
            StructureError: the model cannot be traced or pruned.
        """
        clock = timing.wall_clock if timer is None else timer
        if structure is None:
            structure = read_structure(
                model, example_inputs, forward_fn=forward_fn, output_transform=output_transform
            )
        reached = reach(structure, example_inputs, forward_fn)
        cuts = cuts_to_measure({key: gauge.units for key, gauge in reached.gauges.items()})

        def calls(gone: Mapping[str, int]) -> tuple[Callable[[], Any], Callable[[], Any]]:
            subject = cut_copy(structure, gone)
            compiled: Any = torch.compile(subject, dynamic=False) if compile else subject
            return (
                lambda: forward(compiled, example_inputs, forward_fn),
                lambda: forward(subject, example_inputs, forward_fn),
            )

        with torch.inference_mode():
            timed = timed_in_place([calls(gone) for gone in cuts], clock, seconds / 4)
            pool = Pool(device_of(model), sum(p.numel() * p.element_size() for p in model.parameters()))
            found = list(zip(cuts, timed, strict=True))
            families = measure_families(reached.operations, found[:2], pool, clock, seconds * 3 / 4)
        anchors = tuple(Anchor(gone, one.whole, one.spread) for gone, one in found)
        return cls(families, dict(reached.gauges), anchors, identity(model, example_inputs, compile))

    # -- predicting --------------------------------------------------------------------------------------------

    @property
    def whole(self) -> float:
        """Measured seconds of a forward pass of the unpruned model."""
        return self.anchors[0].seconds

    @property
    def error(self) -> float:
        """How far the sum over all operations is off the measured whole, as a fraction of that."""
        return self._sum({}) / self.whole - 1

    @property
    def held_out_error(self) -> float:
        """How far the prediction for an unevenly cut model is off what was measured, as a fraction of that."""
        uneven = self.anchors[2]
        return self.seconds(uneven.gone) / uneven.seconds - 1

    def seconds(self, gone: Mapping[str, int]) -> float:
        """Predicted seconds of a forward pass.

        The sum over all operations, brought to what was measured of the whole at full and at half widths: what
        goes on between operations, or is saved by compilation, is in none of them.

        Args:
            gone: units that each group has lost since the table was measured; others have lost none.
        """
        total = self._sum(gone)
        full, half = self._calibration
        if full[0] <= half[0] or full[1] <= half[1]:  # nothing to be pruned, or noise
            return total * full[1] / full[0]
        slope = (full[1] - half[1]) / (full[0] - half[0])
        return max(full[1] - slope * (full[0] - total), 0.1 * total * full[1] / full[0])

    @cached_property
    def _calibration(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """``(sum over operations, measured whole)`` at full and at half widths."""
        full, half = self.anchors[:2]
        return (self._sum(full.gone), full.seconds), (self._sum(half.gone), half.seconds)

    def predict(self, model: nn.Module) -> float:
        """Predict the seconds of a forward pass of ``model``, a pruned version of the measured model.

        Raises:
            LatencyTableError: ``model`` was not pruned from the measured model.
        """
        return self.seconds(self.gone(model))

    def gone(self, model: nn.Module) -> dict[str, int]:
        """Units that each group of ``model`` has lost since the table was measured.

        Raises:
            LatencyTableError: the model is another one.
        """
        try:
            gone = {key: gauge.gone(model) for key, gauge in self.gauges.items()}
        except (AttributeError, IndexError) as error:
            raise LatencyTableError(f"the latency table is of another model: {error}") from error
        if any(not 0 <= count < self.gauges[key].units for key, count in gone.items()):
            raise LatencyTableError("the latency table is of another model: layers are wider than they were.")
        return gone

    def _sum(self, gone: Mapping[str, int]) -> float:
        return sum(family.seconds(gone) for family in self.families)

    # -- what a channel costs ----------------------------------------------------------------------------------

    def cost(self, record: GroupRecord, model: nn.Module) -> float:
        """Seconds that go away with one channel of a group, at the widths that ``model`` has now.

        Over the next quarter of the group's channels, for single ones may save nothing.

        Raises:
            LatencyTableError: the group, or the model, is none of those that were measured.
        """
        key = self._key_of(record)
        gone = self.gone(model)
        gauge = self.gauges[key]
        left = gauge.units - gone[key]
        ahead = min(max(left // 4, min(self.round_to or 1, left - 1), 1), max(left - 1, 1))
        touched = [family for family in self.families if family.follows(key)]

        def total(units: int) -> float:
            at = {**gone, key: gone[key] + units}
            return sum(family.seconds(at) for family in touched)

        now = total(0)
        saved = max((now - total(ahead)) / ahead, 0.01 * now / left, 1e-12)  # a flat stretch is not for free
        return saved * gauge.units / gauge.width

    __call__ = cost

    def _key_of(self, record: GroupRecord) -> str:
        """The measured group with the same layers: its root may be another one."""
        if record.key in self.gauges:
            return record.key
        names = {layer.name for layer in record.producers}
        best = max(self.gauges, key=lambda key: len(names & set(self.gauges[key].layers)), default="")
        if not best or not names & set(self.gauges[best].layers):
            raise LatencyTableError(
                f"the group {record.key!r} was not measured: measure the table on the model that is pruned."
            )
        return best

    @property
    def round_to(self) -> int | None:
        """Width of the steps in which times fall, if they do: a multiple of it is never slower than one less.

        ``None`` where single channels save time.
        """
        stairs = [
            (below, share * weight, saved * weight)
            for family in self.families
            for weight in [family.calls * family.surface.at(family.surface.full)]
            for below, share, saved in family.stairs
        ]
        step = step_of(stairs)
        return step if step > 1 else None

    def __deepcopy__(self, memo: object) -> LatencyTable:
        return self  # nothing in it changes

    # -- saving ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON, with the conditions under which it was measured."""
        path = Path(path)
        state = {
            "version": VERSION,
            "identity": dict(self.identity),
            "anchors": [asdict(anchor) for anchor in self.anchors],
            "gauges": {key: asdict(gauge) for key, gauge in self.gauges.items()},
            "families": [family.packed() for family in self.families],
        }
        path.write_text(json.dumps(state, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, override: bool = False) -> LatencyTable:
        """Read a table that :meth:`save` wrote.

        Args:
            path: the file.
            override: accept a table that was measured on another device, with another number of threads or
                another version of torch.

        Raises:
            LatencyTableError: the table was measured under other conditions, or the file is not a table.
        """
        try:
            state = json.loads(Path(path).read_text())
            if state["version"] != VERSION:
                raise LatencyTableError(f"{path}: made by another version of this package; measure a new table.")
            table = cls(
                tuple(Family.unpacked(packed) for packed in state["families"]),
                {
                    key: Gauge(**{**gauge, "layers": tuple(gauge["layers"])})
                    for key, gauge in state["gauges"].items()
                },
                tuple(Anchor(**anchor) for anchor in state["anchors"]),
                state["identity"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LatencyTableError(f"{path} is not a latency table of this version ({error!r}).") from error
        if not override:
            device = torch.device(str(table.identity["device"]).split(":")[0])
            if device.type == "cuda" and not torch.cuda.is_available():
                device = torch.device("cpu")
            check(dict(table.identity), machine(device))
        return table

    def check(self, model: nn.Module, example_inputs: Any) -> None:
        """Make sure that the table holds for ``model``, here, with such inputs.

        Raises:
            LatencyTableError: it was measured under other conditions, or on another model.
        """
        check(dict(self.identity), identity(model, example_inputs, bool(self.identity["compile"])))
        self.gone(model)

    def __str__(self) -> str:
        times = ", ".join(f"{key} {value}" for key, value in self.identity.items())
        return (
            f"latency table of {len(self.families)} kinds of operations: a forward pass takes "
            f"{self.whole * 1e3:.3g} ms (spread {self.anchors[0].spread:.1%}), the sum over operations is off by "
            f"{self.error:+.1%}, a prediction for another model by {self.held_out_error:+.1%}; {times}"
        )
