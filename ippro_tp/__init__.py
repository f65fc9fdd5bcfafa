"""Projective-offset importance (IPPRO, arXiv 2507.14171) for Torch-Pruning."""

from .errors import IPPROError, NotCalibratedError, ObservationError, StaleStatisticsError
from .importance import PROImportance
from .losses import LogitNoise, SoftenedLabels

__version__ = "0.1.0"
__all__ = [
    "IPPROError",
    "LogitNoise",
    "NotCalibratedError",
    "ObservationError",
    "PROImportance",
    "SoftenedLabels",
    "StaleStatisticsError",
]
