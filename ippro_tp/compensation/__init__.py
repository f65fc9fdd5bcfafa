"""Refitting a cut model front to back."""

from .step import Compensation, CompensationReport

__all__ = ["Compensation", "CompensationReport"]
