"""Losses that need no labels: what ``calibrate`` differentiates when the user names no loss.

Each is a callable ``(outputs, targets) -> scalar`` that averages over the batch and ignores ``targets``. Random
numbers come from a private CPU generator, one draw a sample in order, so a calibration set gives the same
numbers however it is cut into batches, and no global random stream is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ObservationError


def main_output(outputs: Any) -> Tensor:
    """The tensor to differentiate: the output itself, ``.logits``, ``["out"]``, or the first one inside.

    Raises:
        ObservationError: there is no floating-point tensor in the output.

    Example:
        >>> main_output({"out": torch.zeros(1, 2), "aux": torch.ones(1, 2)})
        tensor([[0., 0.]])
    """
    found = _first_tensor(outputs)
    if found is None:
        raise ObservationError(
            f"the model returned {type(outputs).__name__}, in which no floating-point tensor was found. Pass "
            "loss_fn=(outputs, targets) -> scalar."
        )
    return found


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        ordered = [value[k] for k in ("logits", "out") if k in value] + list(value.values())
        return next((t for v in ordered if (t := _first_tensor(v)) is not None), None)
    if hasattr(value, "logits"):
        return _first_tensor(value.logits)
    if isinstance(value, (list, tuple)):
        return next((t for v in value if (t := _first_tensor(v)) is not None), None)
    return None


class FisherNoise:
    r"""The output dotted with noise whose covariance is the Fisher information of the softened prediction.

    With logits z and p = softmax(z / temperature), the noise is
    :math:`e = \sqrt p \odot \xi - p\,(\sqrt p \cdot \xi)`, :math:`\xi` standard normal, so that
    :math:`E\,e e^T = \mathrm{diag}(p) - p p^T`. But for a constant factor, its gradients have the second moments
    of those of a cross-entropy with labels drawn from p, at a lower variance. They do not vanish where the labels
    are fitted: they say how the prediction reacts to a change, not whether the label likes it.

    Args:
        temperature: the higher, the more classes take part.
        seed: seed of the private generator.

    Example:
        >>> FisherNoise()(torch.randn(4, 10), None).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 4.0, seed: int = 0) -> None:
        self.temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Sum over a sample's positions, mean over the batch.

        Classes are dimension 1 of the output, or the last one of a three-dimensional output (tokens).
        """
        z = main_output(outputs).float()
        if z.dim() < 2 or z.shape[1] < 2:
            raise ObservationError(
                f"an output of shape {tuple(z.shape)} holds no class scores. Pass "
                "loss_fn=(outputs, targets) -> scalar, or loss_fn=LogitNoise()."
            )
        axis = 2 if z.dim() == 3 else 1
        with torch.no_grad():
            p = (z / self.temperature).softmax(axis)
            noise = p.sqrt() * _normal(z, self._generator)
            noise -= p * noise.sum(axis, keepdim=True)
        return (z * noise).sum() / z.shape[0]


class LogitNoise:
    """The output dotted with Gaussian noise: works for every output, also without classes.

    The mean square of its gradients is the squared Jacobian norm of the output.

    Args:
        seed: seed of the private generator.

    Example:
        >>> LogitNoise()(torch.ones(4, 10), None).shape
        torch.Size([])
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Mean over the batch of the dot product of each sample's output with its own noise."""
        z = main_output(outputs).float()
        return (z * _normal(z, self._generator)).sum() / z.shape[0]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape of ``like``: unlike randn's, the same however a batch is cut."""
    u = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return (torch.erfinv((2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12)) * 2**0.5).to(like.device, like.dtype)


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    """Cross-entropy with the labels, averaged over the batch: the loss of the paper.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6931)
    """
    if not isinstance(targets, Tensor):
        raise ObservationError(
            "this estimator's own loss is the cross-entropy with the labels, but the batches hold none. Give "
            "(inputs, labels) batches, or pass loss_fn=(outputs, targets) -> scalar."
        )
    return F.cross_entropy(main_output(outputs), targets)
