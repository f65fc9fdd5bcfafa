"""Seconds per image, as ``torch.utils.benchmark`` measures them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

ROUNDS = 5


def latencies(networks: dict[str, nn.Module], example: Tensor, seconds: float = 0.5) -> dict[str, dict[str, Any]]:
    """Return each network's median seconds of a forward pass over ``example``, and how they were measured.

    The networks take turns, so that a machine that is busy for a while is busy for all of them.

    Args:
        networks: Networks in eval mode, on the device of ``example``, by name.
        example: ``[N, C, H, W]``.
        seconds: Least time to measure each for.
    """
    threads = torch.get_num_threads()
    rounds: dict[str, list[Measurement]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, model in networks.items():
                model(example)
                timer = Timer("model(x)", globals={"model": model, "x": example}, num_threads=threads)
                rounds[name].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS))
    result = {}
    for name, measured in rounds.items():
        (whole,) = Measurement.merge(measured)
        result[name] = {
            "median_seconds": whole.median,
            "iqr_seconds": whole.iqr,
            "runs": sum(len(m.times) * m.number_per_run for m in measured),
            "threads": threads,
            "device": str(example.device),
            "shape": list(example.shape),
        }
    return result
