"""Every error a user can meet, each worded as cause and fix."""

from __future__ import annotations


class IPPROError(RuntimeError):
    """Base class of all errors raised by this package."""


class NotCalibratedError(IPPROError):
    """Scores were asked for before any statistics were gathered."""


class StaleStatisticsError(IPPROError):
    """The model was pruned, or is another one, since the statistics were gathered."""


class ObservationError(IPPROError):
    """A forward or backward pass inside ``observe`` cannot be used."""
