"""What a task trains for and is judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration.losses import main_output
from .evaluate import Batch, accuracy

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Classification:
    """One class per image."""

    metric: str = "top-1 accuracy"

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(main_output(outputs).float(), targets)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
        """Top-1 accuracy as a fraction."""
        return accuracy(model, batches, device)


@dataclass(frozen=True)
class Segmentation:
    """One class per pixel; pixels of ``ignored`` count nowhere."""

    classes: int
    ignored: int
    metric: str = "mean intersection over union"

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Cross-entropy over pixels, plus half of the auxiliary head's."""
        main = self._pixels(main_output(outputs), targets)
        aux = outputs.get("aux") if isinstance(outputs, dict) else None
        return main if aux is None else main + 0.5 * self._pixels(aux, targets)

    def _pixels(self, logits: Tensor, targets: Tensor) -> Tensor:
        known = (targets != self.ignored).sum().clamp(min=1)
        summed = F.cross_entropy(logits.float(), targets, ignore_index=self.ignored, reduction="sum")
        return summed / known

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
        """Mean IoU as a fraction, over the classes that occur in truth or prediction."""
        model.eval()
        confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        with torch.inference_mode():
            for images, truth in batches:
                predicted = main_output(model(images.to(device))).argmax(1).cpu()
                confusion += self.confusion(truth, predicted)
        return mean_iou(confusion)

    def confusion(self, truth: Tensor, predicted: Tensor) -> Tensor:
        """Return ``[classes, classes]`` counts of pixels, rows the truth."""
        known = truth != self.ignored
        pairs = truth[known] * self.classes + predicted[known]
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)


def mean_iou(confusion: Tensor) -> float:
    """Return the mean over classes that occur of intersection over union."""
    hits = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    occurs = union > 0
    return float((hits[occurs] / union[occurs]).mean()) if occurs.any() else 0.0


def divergence(outputs: Any, teacher: Any) -> Tensor:
    """Return the KL divergence of the softened predictions from the teacher's, times the squared temperature."""
    own, other = (main_output(x).float() / TEMPERATURE for x in (outputs, teacher))
    pointwise = F.kl_div(own.log_softmax(1), other.log_softmax(1), reduction="none", log_target=True)
    return pointwise.sum(1).mean() * TEMPERATURE**2
