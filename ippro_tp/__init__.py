"""Projective-offset importance (IPPRO, arXiv 2507.14171) for Torch-Pruning."""

from .attention import attention_heads, update_attention
from .compensation import Compensation
from .errors import IPPROError, NotCalibratedError, ObservationError, StaleStatisticsError
from .importance import PROImportance
from .losses import FisherNoise, LogitNoise
from .saving import load_pruned, save_pruned
from .spasp import SpaSPImportance

__version__ = "0.1.0"
__all__ = [
    "Compensation",
    "FisherNoise",
    "IPPROError",
    "LogitNoise",
    "NotCalibratedError",
    "ObservationError",
    "PROImportance",
    "SpaSPImportance",
    "StaleStatisticsError",
    "attention_heads",
    "load_pruned",
    "save_pruned",
    "update_attention",
]
