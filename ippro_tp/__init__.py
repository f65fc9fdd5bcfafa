"""Projective-offset importance (IPPRO, arXiv 2507.14171) for Torch-Pruning."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calibration.losses import FisherNoise, LogitNoise
    from .compensation.recovery import Recovery
    from .compensation.step import Compensation
    from .errors import (
        IPPROError,
        LatencyTableError,
        NotCalibratedError,
        ObservationError,
        StaleStatisticsError,
        StructureError,
        TargetError,
    )
    from .estimators.base import Estimator, register_estimator
    from .graph.attention import attention_heads, update_attention
    from .importance.pro import PROImportance
    from .importance.spasp import SpaSPImportance
    from .layers import register_activation, register_norm
    from .pruning.latency import LatencyTable
    from .pruning.prune import prune
    from .pruning.result import PruneResult
    from .pruning.saving import load_pruned, save_pruned

_HOMES = {
    ".calibration.losses": ("FisherNoise", "LogitNoise"),
    ".compensation.recovery": ("Recovery",),
    ".compensation.step": ("Compensation",),
    ".errors": (
        "IPPROError",
        "LatencyTableError",
        "NotCalibratedError",
        "ObservationError",
        "StaleStatisticsError",
        "StructureError",
        "TargetError",
    ),
    ".estimators.base": ("Estimator", "register_estimator"),
    ".graph.attention": ("attention_heads", "update_attention"),
    ".importance.pro": ("PROImportance",),
    ".importance.spasp": ("SpaSPImportance",),
    ".pruning.latency": ("LatencyTable",),
    ".layers": ("register_activation", "register_norm"),
    ".pruning.prune": ("prune",),
    ".pruning.result": ("PruneResult",),
    ".pruning.saving": ("load_pruned", "save_pruned"),
}
"""Modules that are imported when one of their names is asked for: the command line starts without torch."""

__version__ = "0.1.0"
__all__ = [
    "Compensation",
    "Estimator",
    "FisherNoise",
    "IPPROError",
    "LatencyTable",
    "LatencyTableError",
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
    "register_activation",
    "register_estimator",
    "register_norm",
    "save_pruned",
    "update_attention",
]


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(module, __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
