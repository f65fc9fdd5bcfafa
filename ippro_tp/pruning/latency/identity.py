"""Under which conditions times were measured: they hold for no others."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import LatencyTableError
from ..structure import tensors_in
from .widths import device_of

WAY_OUT = "Measure a new table, or load this one with override=True if you know that its times hold here."


def machine(device: torch.device) -> dict[str, Any]:
    """What of the identity the process knows without a model."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(), "torch": torch.__version__}


def identity(model: nn.Module, inputs: Any, compiled: bool) -> dict[str, Any]:
    """Device, threads, version, types, memory format and sizes of inputs."""
    tensors = list(tensors_in(inputs))
    last = any(t.dim() == 4 and _is_channels_last(t) for t in (*tensors, *model.parameters()))
    autocast = device_of(model).type if torch.is_autocast_enabled(device_of(model).type) else None
    return {
        **machine(device_of(model)),
        "dtype": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "autocast": None if autocast is None else str(torch.get_autocast_dtype(autocast)),
        "inputs": [list(t.shape) for t in tensors],
        "channels_last": last,
        "compile": compiled,
    }


def check(stored: dict[str, Any], here: dict[str, Any]) -> None:
    """Compare what both tell.

    Raises:
        LatencyTableError: they differ.
    """
    differ = [
        f"{key} {stored.get(key)!r}, here {value!r}" for key, value in here.items() if stored.get(key) != value
    ]
    if differ:
        raise LatencyTableError(f"the latency table was measured elsewhere: {'; '.join(differ)}. {WAY_OUT}")


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
