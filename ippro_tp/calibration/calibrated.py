"""The calibration interface that all criteria of this package share: observe, calibrate, merge, save."""

from __future__ import annotations

import abc
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..errors import NotCalibratedError, ObservationError, StaleStatisticsError
from ..estimators.sums import Sums
from ..graph.groups import check_widths, group_key, index_tensor, is_unchanged, read_group, records_of
from ..records import GroupRecord
from .batches import batches_of, called, whole_number
from .guard import preserved
from .identity import different, fingerprint, weights_of
from .losses import notes_of
from .packing import match, pack_record, unpack_record
from .processes import all_or_none, all_reduce, gather, several, unsynchronised
from .subject import check_layers, eagerly, resolve, trace

Self = TypeVar("Self", bound="Calibrated")
LossFn = Callable[[Any, Any], Tensor]
_Known = weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Tensor]]]


class Observation(Protocol):
    """What watches the model while a user's loop runs."""

    sums: Sums
    notes: tuple[str, ...]
    """What the report should say, complete after :meth:`finish`."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: Any) -> None: ...
    def finish(self) -> None:
        """Called after a loop without errors, with all hooks gone."""


class Calibrated(abc.ABC):
    """Base of criteria whose scores are functions of sums gathered over a calibration set.

    Every ``observe`` and ``calibrate`` replaces the previous statistics; use :meth:`merge` to combine
    calibrations. An exception leaves the previous statistics in place.
    """

    needs_gradients = True

    def __new__(cls: type[Self], *args: Any, **_: Any) -> Self:
        """Make one; a pruner that was given the class calls it with a group."""
        if args and hasattr(args[0], "_DG"):
            raise TypeError(f"the pruner was given the class {cls.__name__}: give an instance, {cls.__name__}().")
        return super().__new__(cls)

    def __init__(self) -> None:
        self._sums: Sums | None = None
        self._records: dict[str, GroupRecord] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._known = _Known()  # the models that the statistics are of, and their weights
        self._fingerprint: dict[str, Tensor] = {}
        self._cache: dict[str, Any] = {}
        self._notes: tuple[str, ...] = ()  # what the report has to say about the calibration

    # -- to be filled in by a criterion ------------------------------------------------------------------------

    @abc.abstractmethod
    def _observation(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        **options: Any,
    ) -> Observation:
        """Make the object that watches ``model``; ``groups`` gives the records at the first call."""

    @abc.abstractmethod
    def _commit(self, observation: Any) -> None:
        """Take over what a criterion keeps besides sums."""

    @abc.abstractmethod
    def _default_loss(self) -> LossFn:
        """The loss of ``calibrate`` when the user gives none."""

    # -- calibration -------------------------------------------------------------------------------------------

    @contextmanager
    def observe(self: Self, target: Any, **options: Any) -> Iterator[Self]:
        """Watch the model while your own loop runs.

        Args:
            target: a ``torch_pruning`` pruner or ``DependencyGraph``, or a model, whose groups are then traced
                from the first batch. A DistributedDataParallel wrapper stands for its ``.module``.
            **options: of the criterion; see its class docstring.

        Yields:
            This object.

        Raises:
            ObservationError: the passes of the loop cannot be used; the message says what to change.
            TypeError: ``target`` is none of the above.
            RuntimeError: the ranks observed different models.

        On exit, even after an exception, hooks, ``.grad``, buffers, ``requires_grad`` and train/eval flags of the
        model are restored. An optimizer step inside has no effect: there are no gradients.

        Under ``torch.distributed`` every rank has to enter. On exit the statistics are summed over the ranks; if
        one of them failed, all raise and keep their previous statistics.
        """
        graph, model = resolve(target)
        if self.needs_gradients and torch.is_inference_mode_enabled():
            raise ObservationError(
                "torch.inference_mode() is on, in which no gradient can flow. Calibrate outside of it: the model "
                "is left as it is in any case."
            )
        records: dict[str, GroupRecord] = {}

        def groups(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[GroupRecord]:
            for record in records_of(target if graph is not None else trace(model, args, kwargs)):
                records[record.key] = record
            check_layers(model, records.values())
            return records.values()

        with all_or_none():
            with preserved(model), unsynchronised(target), eagerly():
                observation = self._observation(model, groups, **options)
                with observation:
                    yield self
            observation.finish()
            if not observation.sums.all_finite():
                raise ObservationError(
                    "the statistics hold NaN or inf: a loss or an activation was not finite during calibration. "
                    "Check the loss and the inputs; under fp16 autocast use bf16, or a GradScaler that "
                    "observe(..., loss_scale=scaler) is told of."
                )
        _check_same_groups(records)
        all_reduce(observation.sums)
        self._commit(observation)
        if several():  # what the first batch showed may differ between ranks; scores must not
            self._load_extra_state(gather(self._extra_state())[0])
        self._sums = observation.sums
        self._notes = observation.notes
        self._records = records
        self._cache = {}
        self._asked_by(target)
        self._model = weakref.ref(model)
        weights = weights_of(model, records.values())
        self._known = _Known({model: {name: weakref.ref(weight) for name, weight in weights.items()}})
        self._fingerprint = fingerprint(weights)

    def calibrate(
        self: Self,
        target: Any,
        loader: Iterable[Any],
        loss_fn: LossFn | None = None,
        max_samples: int | None = None,
        progress: bool = True,
        passes: int = 1,
        **options: Any,
    ) -> Self:
        """Run the calibration loop: ``observe`` in one call, with the model in eval mode.

        Args:
            target: as for :meth:`observe`.
            loader: iterable of ``(inputs, targets)`` batches, or of inputs alone where no targets are needed.
                ``inputs`` is a tensor, a tuple of positional arguments or a dict of keyword arguments; tensors
                are moved to the model's device.
            loss_fn: ``(outputs, targets) -> scalar``, averaged over the batch; ``None``: the criterion's own loss.
            max_samples: stop after this many samples; the last batch is truncated.
            progress: show a progress bar if tqdm is installed.
            passes: number of passes over the loader. A loss that draws noise, such as ``PROImportance``'s own,
                draws it anew in each: five passes over 200 images rank better than one.
            **options: passed on to :meth:`observe`.

        Returns:
            This object.

        Raises:
            ValueError: the loader is empty, or ``loss_fn`` does not return a scalar tensor; ``passes`` is less
                than one, or greater than one for an iterator.
            ObservationError: see :meth:`observe`.
        """
        passes = whole_number("passes", passes, "of passes over the loader")
        if passes > 1 and iter(loader) is loader:
            raise ValueError(f"passes={passes}: an iterator can be read only once; give a loader")
        _, model = resolve(target)
        loss_fn = loss_fn or self._default_loss()
        with self.observe(target, **options):
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            model.eval()
            title = type(self).__name__
            for _ in range(passes):
                for inputs, targets in batches_of(
                    loader, device, max_samples, progress, title, lambda: getattr(loss_fn, "summary", "")
                ):
                    self._run(model, inputs, targets, loss_fn)
        self._notes += tuple(f"loss: {note}" for note in notes_of(loss_fn))
        return self

    def _run(self, model: nn.Module, inputs: Any, targets: Any, loss_fn: LossFn) -> None:
        """Forward, and backward where the criterion needs it."""
        if not self.needs_gradients:
            with torch.no_grad():
                called(model, inputs)
            return
        with torch.enable_grad():
            loss = loss_fn(called(model, inputs), targets)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn returned {what}; it must return one number, the mean over the batch.")
            if not loss.requires_grad:
                raise ObservationError(
                    "the loss does not depend on the model's activations: it was detached, or the model ran "
                    "under torch.no_grad(). Pass a loss_fn that uses outputs with gradients; for a model that "
                    "gives them in training mode with targets only, as detectors do, use observe() and a loop "
                    "of your own."
                )
            loss.backward()

    # -- what is kept ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all statistics."""
        self._sums, self._records, self._cache, self._notes = None, {}, {}, ()
        self._model, self._known, self._fingerprint = None, _Known(), {}

    def merge(self, other: Calibrated) -> None:
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

    def _asked_by(self, target: Any) -> None:
        """Note the pruner that was calibrated: its steps will ask for scores."""
        return

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
        # Object identities mean nothing in another process or in a copy.
        return {name: value for name, value in self.__dict__.items() if name != "_known"} | {"_model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._known = _Known()


def _check_same_groups(records: Mapping[str, GroupRecord]) -> None:
    """Raise ObservationError on every rank unless all of them calibrated the same groups."""
    everyones = gather({key: record.width for key, record in records.items()})
    odd = next((rank for rank, widths in enumerate(everyones) if widths != everyones[0]), None)
    if odd is not None:
        raise ObservationError(
            f"rank {odd} calibrated other groups or widths than rank 0. Give every rank the same model and pruner."
        )
