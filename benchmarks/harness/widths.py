"""Widths by measurement: how far each group is pruned, judged by what the pruned network predicts.

Within a group scores tell which channels go first. How many go of each group follows from comparing scores between
groups, and there first-order scores are least sure: what the removal of many channels costs together is not what
they cost one by one. So the scores of each group get a factor, and the factors are searched for: prune a copy to
the target, re-estimate BatchNorm on some calibration images, and compare its prediction on the others with the
unpruned network's. No labels, no training, and the same for every criterion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness.evaluate import reestimate_batchnorm
from benchmarks.tasks.base import Batch

TEMPERATURE = 2.0
"""Of the predictions that are compared: networks are all but certain of images they were trained on."""


def minimise(
    value: Callable[[Tensor], float], dimensions: int, tries: int, seed: int, step: float = 0.25
) -> Tensor:
    """Return the best of ``tries`` points found by a (1+1) evolution strategy that starts at zero.

    Each try moves two in five of the coordinates by normal steps, which grow after a success and shrink after a
    failure.

    Args:
        value: What is minimised, of points ``[dimensions]`` in float64; ``inf`` for points that cannot be used.
        dimensions: Number of coordinates.
        tries: Evaluations besides that of the start.
        seed: Of a private generator.
        step: First standard deviation of a step.
    """
    generator = torch.Generator().manual_seed(seed)
    best = torch.zeros(dimensions, dtype=torch.float64)
    lowest = value(best)
    for _ in range(tries):
        moved = torch.rand(dimensions, generator=generator) < 0.4
        move = step * torch.randn(dimensions, generator=generator, dtype=torch.float64) * moved
        found = value(best + move)
        if found < lowest:
            best, lowest, step = best + move, found, min(1.3 * step, 0.6)
        else:
            step = max(0.95 * step, 0.08)
    return best


@dataclass
class Prediction:
    """The unpruned network's prediction on some images, and how far a pruned network's is from it.

    Args:
        model: The unpruned network.
        batches: Calibration images: BatchNorm is re-estimated on the first half, predictions are compared on the
            second.
        device: Where networks run.
    """

    model: nn.Module
    batches: list[Batch]
    device: str

    def __post_init__(self) -> None:
        half = (len(self.batches) + 1) // 2
        self._estimation, self._compared = self.batches[:half], self.batches[half:] or self.batches
        self._log_p = self._log_probabilities(self.model)

    def distance(self, pruned: nn.Module) -> float:
        """Return the mean divergence (nats) of the softened prediction of ``pruned``, BatchNorm re-estimated.

        ``inf`` where it is not finite. BatchNorm statistics of ``pruned`` are overwritten.
        """
        reestimate_batchnorm(pruned, self._estimation, self.device)
        divergence = (self._log_p.exp() * (self._log_p - self._log_probabilities(pruned))).sum(1).mean().item()
        return divergence if math.isfinite(divergence) else math.inf

    def _log_probabilities(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model(images.to(self.device)).cpu() for images, _ in self._compared])
        return (logits / TEMPERATURE).log_softmax(1)
