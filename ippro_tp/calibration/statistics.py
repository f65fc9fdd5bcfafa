"""What a criterion keeps of a calibration: statistics of groups, saved, merged and found again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import NotCalibratedError, StaleStatisticsError
from ..estimators.sums import Sums
from ..graph.groups import check_widths, group_key, index_tensor, is_unchanged, read_group
from ..records import GroupRecord
from .identity import different, weights_of
from .packing import match, pack_record, unpack_record

Known = weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Tensor]]]
"""Models, and the weights they had by name."""


class Statistics:
    """Sums over a calibration set, the groups they are of, and the models whose groups these are."""

    def __init__(self) -> None:
        self._sums: Sums | None = None
        self._records: dict[str, GroupRecord] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._known = Known()  # the models that the statistics are of, and their weights
        self._fingerprint: dict[str, Tensor] = {}
        self._cache: dict[str, Any] = {}
        self._notes: tuple[str, ...] = ()  # what the report has to say about the calibration

    def reset(self) -> None:
        """Forget all statistics."""
        self._sums, self._records, self._cache, self._notes = None, {}, {}, ()
        self._model, self._known, self._fingerprint = None, Known(), {}

    def merge(self, other: Statistics) -> None:
        """Add the statistics of another object that was calibrated on other data with the same model and settings.

        Raises:
            NotCalibratedError: ``other`` holds no statistics.
            ValueError: settings or groups differ.
        """
        if other._sums is None:
            raise NotCalibratedError("the other object holds no statistics to merge: calibrate it first.")
        if type(other) is not type(self) or other._settings() != self._settings():
            raise ValueError(f"settings differ: {self._settings()} and {other._settings()}")
        if self._sums is None:
            self.load_state_dict(other.state_dict())
            return
        if {k: r.width for k, r in self._records.items()} != {k: r.width for k, r in other._records.items()}:
            raise ValueError("the two were calibrated on models with different groups or widths.")
        if (layer := different(self._fingerprint, other._fingerprint)) is not None:
            raise ValueError(f"the two were calibrated on different models: the weights of {layer!r} differ.")
        self._sums.merge(other._sums)
        self._cache = {}

    def state_dict(self) -> dict[str, Any]:
        """Statistics and groups as plain types and CPU tensors, fit for ``torch.load(..., weights_only=True)``.

        Raises:
            NotCalibratedError: there is nothing to save.
        """
        if self._sums is None:
            raise NotCalibratedError(self._how_to_calibrate())
        return {
            "settings": self._settings(),
            "sums": self._sums.state_dict(),
            "groups": [pack_record(record) for record in self._records.values()],
            "extra": self._extra_state(),
            "fingerprint": dict(self._fingerprint),
            "notes": list(self._notes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, here or in another process.

        Raises:
            ValueError: the state was made with other settings or by another version, or is not such a state. The
                previous statistics are then kept.
        """
        loaded = copy.copy(self)
        try:
            if state["settings"] != self._settings():
                raise ValueError(
                    f"the state was made with {state['settings']}, this object has {self._settings()}. Make it "
                    "with the same settings."
                )
            loaded.reset()
            loaded._sums = Sums({name: value.clone() for name, value in state["sums"].items()})
            records = [unpack_record(packed) for packed in state["groups"]]
            loaded._records = {record.key: record for record in records}
            loaded._load_extra_state(state["extra"])
            loaded._fingerprint = dict(state["fingerprint"])
            loaded._notes = tuple(state.get("notes", ()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is not a state_dict() of a {type(self).__name__} of this version ({error!r}): "
                "calibrate again."
            ) from error
        self.__dict__.update(loaded.__dict__)

    def _settings(self) -> dict[str, Any]:
        """What must be equal for statistics to be added up: plain types only."""
        return {"class": type(self).__name__}

    def _extra_state(self) -> Any:
        return None

    def _load_extra_state(self, extra: Any) -> None:
        return None

    # -- finding a group again ---------------------------------------------------------------------------------

    def _lookup(self, group: Any) -> tuple[GroupRecord, Tensor] | None:
        """The record that ``group`` belongs to and the position in it of each of the group's channels.

        Returns:
            ``None`` where the group has no producer, or Torch-Pruning's index map of it is impossible.

        Raises:
            NotCalibratedError, StaleStatisticsError: the statistics do not cover the group.
        """
        known = self._records.get(group_key(group))
        current = known if known is not None and is_unchanged(known, group) else read_group(group)
        if not current.producers:
            return None
        if self._sums is None:
            raise NotCalibratedError(self._how_to_calibrate())
        record = self._records.get(current.key) or self._record_holding(current)
        if record is None:
            raise NotCalibratedError(
                f"group {current.key!r} was not part of the calibration: its layers were ignored by the pruner, "
                "or the graph is another one. Calibrate with the pruner (or graph) that asks for scores."
            )
        if record.problems:  # Torch-Pruning would cut other channels than it says
            return None
        check_widths(record, current)
        self._check_weights(group._DG.model, current)
        same_root = record.key == group_key(group)
        positions = index_tensor(group[0][1]) if same_root else match(record, current)
        if positions.numel() and int(positions.max()) >= record.width:
            raise StaleStatisticsError(
                f"group {current.key!r} asks for channel {int(positions.max())} of {record.width}: the model has "
                "changed since calibration. Calibrate again."
            )
        return record, positions

    def _record_holding(self, current: GroupRecord) -> GroupRecord | None:
        names = {layer.name for layer in current.producers}
        for record in self._records.values():
            if names <= {layer.name for layer in record.producers}:
                return record
        return None

    def _replaced(self, model: nn.Module, records: Iterable[GroupRecord]) -> str | None:
        """A layer whose weight is another one than at calibration: pruning replaces weights."""
        now, then = weights_of(model, records), self._known.get(model, {})
        return next((n for n, w in now.items() if n in then and then[n]() is not w), None)

    def _check_weights(self, model: nn.Module, current: GroupRecord) -> None:
        self._know(model)
        if (changed := self._replaced(model, [current])) is not None:
            raise StaleStatisticsError(
                f"the weight of {changed!r} was replaced since calibration: the model has been pruned. Calibrate "
                "again before the next step. In a loop of your own over groups, score all groups first, then "
                "prune."
            )

    def _know(self, model: nn.Module) -> None:
        """Take ``model`` for the one that was calibrated, if it is that, or a copy with the same weights."""
        if model in self._known:
            return
        weights = weights_of(model, self._records.values())
        if (other := different(self._fingerprint, weights)) is not None:
            raise StaleStatisticsError(
                f"the weights of {other!r} are not those of calibration: the model is another one, or was trained "
                "or pruned since. Calibrate an importance for each model."
            )
        self._known[model] = {name: weakref.ref(weight) for name, weight in weights.items()}

    def _how_to_calibrate(self) -> str:
        return (
            f"{type(self).__name__} has no statistics yet. Before pruner.step(), run\n"
            "    importance.calibrate(pruner, loader)\n"
            "or, around your own loop,\n"
            "    with importance.observe(pruner):\n"
            "        for images, labels in loader:\n"
            "            loss_fn(model(images), labels).backward()"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Object identities mean nothing in another process or in a copy, and scores are worked out again.
        state = {name: value for name, value in self.__dict__.items() if name != "_known"}
        return state | {"_model": None, "_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._known = Known()
