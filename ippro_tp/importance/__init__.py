"""What a pruner is given: PROImportance, SpaSPImportance, their report."""

from .pro import PROImportance
from .spasp import SpaSPImportance

__all__ = ["PROImportance", "SpaSPImportance"]
