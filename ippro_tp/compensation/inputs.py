"""What compensation and recovery are calibrated with: inputs of the model, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..calibration.batches import as_call, batches_of
from ..calibration.guard import preserved
from ..calibration.processes import all_or_none, unsynchronised
from ..calibration.subject import eagerly, resolve
from ..errors import NEVER_CALLED, NotCalibratedError, ObservationError
from .passes import device_of
from .samples import Samples

T = TypeVar("T", bound="KeptInputs")


class KeptInputs:
    """Keeps a bounded, even choice of the inputs that a model is called with.

    Args:
        max_samples: inputs that are kept at most; of more, an even choice.

    Raises:
        ValueError: ``max_samples`` is below 2 or not finite.
    """

    needs_gradients = False
    _VERB: ClassVar[str]  # the call that needs the samples, for messages

    def __init__(self, max_samples: int) -> None:
        if not 2 <= max_samples < float("inf"):
            raise ValueError(f"max_samples={max_samples!r}; give a number >= 2")
        self.max_samples = int(max_samples)
        self._samples = Samples(self.max_samples)

    @contextmanager
    def observe(self: T, target: Any) -> Iterator[T]:
        """Keep inputs while your own loop calls the model, with or without gradients.

        Args:
            target: a ``torch_pruning`` pruner or ``DependencyGraph``, or the model.

        Raises:
            ObservationError: the model was not called, or its inputs cannot be joined.
            TypeError: ``target`` is none of the above.

        Under ``torch.distributed`` every rank has to enter; on exit all of them hold the samples of all.
        Starts anew; :meth:`merge` adds. An exception inside leaves the previous samples in place. The model is
        left as it was found, buffers included.
        """
        _, model = resolve(target)
        samples = Samples(self.max_samples)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            samples.add(args, kwargs)

        with all_or_none():
            with preserved(model), unsynchronised(target), eagerly():
                handle = model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
                try:
                    yield self
                finally:
                    handle.remove()
            if samples.count == 0:
                raise ObservationError(NEVER_CALLED)
        samples.settle()
        samples.gather()
        self._samples = samples

    def calibrate(
        self: T, target: Any, loader: Iterable[Any], max_samples: int | None = None, progress: bool = True
    ) -> T:
        """Keep inputs from ``loader``; no forward pass is needed.

        Args:
            target: as for :meth:`observe`.
            loader: iterable of ``(inputs, targets)`` batches or of inputs alone; ``inputs`` is a tensor, a tuple
                of positional or a dict of keyword arguments. They are moved to the model's device.
            max_samples: stop after so many samples.
            progress: show a progress bar if tqdm is installed.

        Raises:
            ValueError: the loader is empty.
            ObservationError: inputs cannot be joined: they differ in shape, or have no batch dimension.
        """
        _, model = resolve(target)
        device = device_of(model)
        samples = Samples(self.max_samples)
        with all_or_none():
            for inputs, _ in batches_of(loader, device, max_samples, progress, type(self).__name__):
                samples.add(*as_call(inputs))
        samples.settle()
        samples.gather()
        self._samples = samples
        return self

    def reset(self) -> None:
        """Forget all samples."""
        self._samples = Samples(self.max_samples)

    def merge(self, other: KeptInputs) -> None:
        """Take the samples of ``other`` as well.

        Raises:
            NotCalibratedError: ``other`` has none.
        """
        if other._samples.count == 0:
            raise NotCalibratedError("the other object holds no samples to merge: calibrate it first.")
        self._samples.merge(other._samples)

    def state_dict(self) -> dict[str, Any]:
        """The samples, as CPU tensors and plain types (``torch.load(..., weights_only=True)``).

        Raises:
            NotCalibratedError: there are none.
        """
        self._check_calibrated()
        return self._samples.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; samples are moved to the model's device when they are used.

        Raises:
            ValueError: the state is something else. The samples held before are then still there.
        """
        self._samples.load_state_dict(state)

    def _check_calibrated(self) -> None:
        if self._samples.count == 0:
            name = type(self).__name__
            raise NotCalibratedError(
                f"{name} has no samples yet. Before {name.lower()}.{self._VERB}, run\n"
                f"    {name.lower()}.calibrate(pruner, loader)\n"
                "or, around your own loop,\n"
                f"    with {name.lower()}.observe(pruner):\n"
                "        for images, _ in loader:\n"
                "            model(images)"
            )
