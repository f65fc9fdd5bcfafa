"""Accuracy of networks pruned by frozen scores, at a ratio or at a MACs target."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.harness.evaluate import accuracy, reestimate_batchnorm
from benchmarks.harness.prune import PruneConfig, Pruned, prune, size
from benchmarks.harness.scores import FrozenScores
from benchmarks.harness.search import Found, find_ratio
from benchmarks.models.checkpoints import fingerprint
from benchmarks.tasks import Batch, Task


@dataclass
class Accuracies:
    """Prunes and evaluates; networks that come out equal are evaluated once.

    Args:
        task: The unpruned network and its images.
        batch_size: Images per forward pass.
        test_images: A fixed random part of the test images; 0 for all.
        bn_images: Training images for BatchNorm re-estimation, the same for everything.
        device: Where networks run.
    """

    task: Task
    batch_size: int
    test_images: int
    bn_images: int
    device: str = "cpu"
    _known: dict[str, dict[str, float]] = field(default_factory=dict)
    _batches: list[Batch] | None = None
    _base: float | None = None

    def of(self, model: nn.Module) -> dict[str, float]:
        """Return top-1 accuracies as fractions: ``pruned`` as it is, ``bn`` after BatchNorm re-estimation."""
        key = fingerprint(model)
        if key not in self._known:
            copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
            pruned = self._accuracy(copied)
            reestimate_batchnorm(copied, self._bn_batches(), self.device)
            self._known[key] = {"pruned": pruned, "bn": self._accuracy(copied)}
        return self._known[key]

    def at_ratio(self, scores: FrozenScores, ratio: float) -> dict[str, float]:
        """Return MACs and accuracies with the same ``ratio`` of channels removed from each group."""
        pruned = self._prune(scores, ratio, "local")
        return {"macs_fraction": pruned.macs / self._base_macs()} | self.of(pruned.model)

    def at_macs(self, scores: FrozenScores, target: float) -> tuple[Found, dict[str, float]]:
        """Return what the global search found for the MACs ``target``, and the accuracies if it is a hit."""
        memo: dict[float, float] = {}
        found = find_ratio(lambda r: self._prune(scores, r, "global").macs / self._base_macs(), target, memo)
        return found, self.of(self._prune(scores, found.ratio, "global").model) if found.hit else {}

    def _prune(self, scores: FrozenScores, ratio: float, scope: str) -> Pruned:
        task = self.task
        return prune(task.model, task.example, task.ignored, scores, ratio, scope, PruneConfig())

    def _base_macs(self) -> float:
        if self._base is None:
            self._base = size(self.task.model, self.task.example)[0]
        return self._base

    def _bn_batches(self) -> list[Batch]:
        if self._batches is None:
            self._batches = self.task.calibration(0, self.bn_images, self.batch_size)
        return self._batches

    def _accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.task.evaluation("test", self.test_images, self.batch_size), self.device)
