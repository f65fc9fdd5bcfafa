"""Sizes of a model: what a target is told in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..calibration.guard import evaluating
from .counter import Counts, count
from .latency import timing
from .structure import Forward, forward

Unit = Literal["macs", "params", "latency", "ratio"]
ROUNDS = 5


@dataclass(frozen=True)
class Meter:
    """Measures models on one input.

    Args:
        example_inputs: what the models are called with, on their device.
        forward_fn: ``(model, example_inputs) -> outputs``.
    """

    example_inputs: Any
    forward_fn: Forward | None = None

    def counts(self, model: nn.Module) -> Counts:
        """MACs and parameters."""
        return count(model, self.example_inputs, self.forward_fn)

    def latency(self, model: nn.Module, whole: nn.Module, seconds: float = 1.5) -> float:
        """Time of a forward pass of ``model``, as a fraction of that of ``whole``: medians.

        The two take turns, so that a machine that is busy for a while is busy for both.

        Args:
            model: the pruned model.
            whole: the unpruned one, on the same device.
            seconds: least time to measure each for.
        """
        from torch.utils.benchmark import Timer  # late: it looks for compilers, and may warn

        times: dict[int, list[float]] = {0: [], 1: []}
        with evaluating(model), evaluating(whole), torch.inference_mode():
            for _ in range(ROUNDS):
                for number, each in enumerate((model, whole)):
                    forward(each, self.example_inputs, self.forward_fn)
                    timer = Timer(
                        "forward(model, inputs, forward_fn)",
                        globals={
                            "forward": forward,
                            "model": each,
                            "inputs": self.example_inputs,
                            "forward_fn": self.forward_fn,
                        },
                        num_threads=torch.get_num_threads(),
                        timer=timing.wall_clock,
                    )
                    times[number].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS).median)
        after, before = (sorted(values)[ROUNDS // 2] for values in times.values())
        return after / before
