"""Refitting a cut model front to back, and training it to predict what the uncut one does."""

from .recovery import Recovery, RecoveryReport
from .step import Compensation, CompensationReport

__all__ = ["Compensation", "CompensationReport", "Recovery", "RecoveryReport"]
