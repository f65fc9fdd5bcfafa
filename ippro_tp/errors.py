"""Every error that users may see; messages name the cause and the fix."""

from __future__ import annotations

NEVER_CALLED = (
    "the model was never called inside observe(). Call the model that the pruner was built on (for DDP, prune and "
    "observe ddp.module)."
)


class IPPROError(RuntimeError):
    """Base class of all errors raised by this package.

    Example:
        >>> from ippro_tp import PROImportance
        >>> try:
        ...     PROImportance().report()
        ... except IPPROError as error:
        ...     print(type(error).__name__)
        NotCalibratedError
    """


class NotCalibratedError(IPPROError):
    """Scores were asked for before any statistics were gathered.

    Example:
        >>> from ippro_tp import PROImportance
        >>> PROImportance().state_dict()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ippro_tp.errors.NotCalibratedError: PROImportance has no statistics yet. Before pruner.step(), run
        ...
    """


class StaleStatisticsError(IPPROError):
    """The model was pruned after the statistics were gathered, or is a different model.

    Example:
        >>> import torch, torch_pruning as tp
        >>> from ippro_tp import PROImportance
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> imp = PROImportance()
        >>> pruner = tp.pruner.BasePruner(model, torch.randn(1, 4), importance=imp, pruning_ratio=0.5,
        ...     iterative_steps=2, ignored_layers=[model[2]])
        >>> _ = imp.calibrate(pruner, [torch.randn(8, 4)], progress=False)
        >>> pruner.step()
        >>> try:
        ...     pruner.step()
        ... except StaleStatisticsError as error:
        ...     print(str(error)[-45:])
         since. Calibrate again before the next step.
    """


class ObservationError(IPPROError):
    """A forward or backward pass inside ``observe`` or ``calibrate`` cannot be used.

    Example:
        >>> import torch
        >>> from ippro_tp import PROImportance
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with PROImportance().observe(model), torch.no_grad():  # doctest: +ELLIPSIS
        ...     model(torch.randn(8, 4))
        Traceback (most recent call last):
        ...
        ippro_tp.errors.ObservationError: the forward pass runs under torch.no_grad() ...
    """


class ScoreError(IPPROError):
    """An importance does not return one finite number per channel."""


class StructureError(IPPROError):
    """A model cannot be traced, or does not run after pruning."""


class TargetError(IPPROError, ValueError):
    """A target cannot be met.

    Attributes:
        nearest: the nearest value that can be met, in the unit of the target.
    """

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest


class LatencyTableError(IPPROError, ValueError):
    """A latency table was measured on a different machine or model, or under different conditions."""
