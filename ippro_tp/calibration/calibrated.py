"""The calibration that all criteria of this package share: observe and calibrate."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ObservationError
from ..estimators.sums import Sums
from ..graph.groups import records_of
from ..records import GroupRecord
from .batches import batches_of, called, whole_number
from .guard import preserved
from .identity import fingerprint, weights_of
from .losses import notes_of
from .processes import all_or_none, all_reduce, gather, several, unsynchronised
from .statistics import Known, Statistics
from .subject import check_layers, eagerly, resolve, trace

Self = TypeVar("Self", bound="Calibrated")
LossFn = Callable[[Any, Any], Tensor]


class Observation(Protocol):
    """What watches the model while a user's loop runs."""

    sums: Sums
    notes: tuple[str, ...]
    """What the report should say, complete after :meth:`finish`."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: Any) -> None: ...
    def finish(self) -> None:
        """Called after a loop without errors, with all hooks gone."""


class Calibrated(Statistics, abc.ABC):
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
        self._known = Known({model: {name: weakref.ref(weight) for name, weight in weights.items()}})
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

    def _expect(self, compensated: bool) -> None:
        """Settle options that depend on what comes after pruning, before calibration."""
        return

    def _asked_by(self, target: Any) -> None:
        """Note the pruner that was calibrated: its steps will ask for scores."""
        return


def _check_same_groups(records: Mapping[str, GroupRecord]) -> None:
    """Raise ObservationError on every rank unless all of them calibrated the same groups."""
    everyones = gather({key: record.width for key, record in records.items()})
    odd = next((rank for rank, widths in enumerate(everyones) if widths != everyones[0]), None)
    if odd is not None:
        raise ObservationError(
            f"rank {odd} calibrated other groups or widths than rank 0. Give every rank the same model and pruner."
        )
