"""Projective-offset importance (IPPRO, arXiv 2507.14171) for Torch-Pruning."""

from .calibration.losses import FisherNoise, LogitNoise
from .compensation.recovery import Recovery
from .compensation.step import Compensation
from .errors import (
    IPPROError,
    NotCalibratedError,
    ObservationError,
    StaleStatisticsError,
    StructureError,
    TargetError,
)
from .graph.attention import attention_heads, update_attention
from .importance.pro import PROImportance
from .importance.spasp import SpaSPImportance
from .pruning.prune import prune
from .pruning.result import PruneResult
from .pruning.saving import load_pruned, save_pruned

__version__ = "0.1.0"
__all__ = [
    "Compensation",
    "FisherNoise",
    "IPPROError",
    "LogitNoise",
    "NotCalibratedError",
    "ObservationError",
    "PROImportance",
    "PruneResult",
    "Recovery",
    "SpaSPImportance",
    "StaleStatisticsError",
    "StructureError",
    "TargetError",
    "attention_heads",
    "load_pruned",
    "prune",
    "save_pruned",
    "update_attention",
]
