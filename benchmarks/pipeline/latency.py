"""Seconds per image, as ``torch.utils.benchmark`` measures them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer


def latency(model: nn.Module, example: Tensor, seconds: float = 0.5) -> dict:
    """Return the median seconds of a forward pass over ``example``, and how they were measured.

    Args:
        model: A network in eval mode, on the device of ``example``.
        example: ``[N, C, H, W]``.
        seconds: Least time to measure for.
    """
    with torch.inference_mode():
        model(example)
        timer = Timer("model(x)", globals={"model": model, "x": example}, num_threads=torch.get_num_threads())
        measured = timer.blocked_autorange(min_run_time=seconds)
    return {
        "median_seconds": measured.median,
        "iqr_seconds": measured.iqr,
        "runs": len(measured.times) * measured.number_per_run,
        "threads": torch.get_num_threads(),
        "device": str(example.device),
        "shape": list(example.shape),
    }
