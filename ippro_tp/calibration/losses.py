"""Losses that need no labels: what ``calibrate`` differentiates if no loss is given.

Each is a callable ``(outputs, targets) -> scalar`` that averages over the batch and ignores ``targets``. Random
numbers come from a private CPU generator, one draw per sample in order, so they do not depend on how the
calibration set is split into batches, and the global random state is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ObservationError
from .outputs import Verdict, class_axis, float_outputs, layer_axis, target_of


def main_output(outputs: Any) -> Tensor:
    """The main output tensor: the output itself, ``.logits``, ``["out"]``, or the first tensor inside.

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
    r"""The output times noise whose covariance is the Fisher information of the softened prediction.

    With logits z and p = softmax(z / temperature), the noise is
    :math:`e = \sqrt p \odot \xi - p\,(\sqrt p \cdot \xi)`, :math:`\xi` standard normal, so that
    :math:`E\,e e^T = \mathrm{diag}(p) - p p^T`. Up to a constant factor, its gradients have the second moments of
    those of a cross-entropy with labels drawn from p, at lower variance. They do not vanish where the network fits
    its labels: they measure how sensitive the prediction is, whatever the label.

    Args:
        temperature: higher values let more classes contribute.
        seed: seed of the private generator.
        dim: the dimension of the output that holds the classes. ``None``: dimension 1; for three dimensions,
            tokens ``(N, L, C)`` or sequences ``(N, C, L)``, it is inferred from the layer that made the output.

    Example:
        >>> FisherNoise()(torch.randn(4, 10), None).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 4.0, seed: int = 0, dim: int | None = None) -> None:
        self.temperature, self.dim = temperature, dim
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Sum over a sample's positions, mean over the batch.

        Raises:
            ObservationError: the output has no such dimension, or it cannot be inferred.
        """
        made = main_output(outputs)
        axis = self._axis(made)
        z = made.float()
        return (z * self.noise(z, axis)).sum() / z.shape[0]

    @torch.no_grad()
    def noise(self, z: Tensor, axis: int) -> Tensor:
        """The next noise for an output with classes along ``axis``."""
        p = (z / self.temperature).softmax(axis)
        noise = p.sqrt() * _normal(z, self._generator)
        noise -= p * noise.sum(axis, keepdim=True)
        return noise

    def _axis(self, z: Tensor) -> int:
        axis = self.dim
        if axis is None:
            axis = layer_axis(z) if z.dim() == 3 else 1
        if axis is None:
            raise ObservationError(
                f"classes may lie along dimension 1 or 2 of an output of shape {tuple(z.shape)}. Say which: "
                "loss_fn=FisherNoise(dim=1), or dim=2."
            )
        if not -z.dim() <= axis < z.dim() or axis % z.dim() == 0 or z.shape[axis] < 2:
            raise ObservationError(
                f"an output of shape {tuple(z.shape)} holds no class scores along dimension {axis}. Pass "
                "loss_fn=(outputs, targets) -> scalar, or loss_fn=LogitNoise()."
            )
        return axis % z.dim()


class LogitNoise:
    """The output times Gaussian noise, for outputs of any kind.

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
        return (z * self.noise(z)).sum() / z.shape[0]

    @torch.no_grad()
    def noise(self, z: Tensor) -> Tensor:
        """The next noise for an output."""
        return _normal(z, self._generator)


class DefaultLoss:
    r"""Noise on every floating-point output of a model, chosen by its kind.

    Class scores get :class:`FisherNoise`, everything else :class:`LogitNoise`, which covers all directions.
    :func:`~.outputs.class_axis` decides which is which at the first batch. A single output is used as it is. With
    several, each is normalised so that neither large maps nor large values dominate: white noise is divided by the
    standard deviation of the first batch's values, and both kinds by the square root of the number of values
    (white) or positions (Fisher) per sample.

    Args:
        seed: seed of the private generators.

    Attributes:
        notes: after the first call: which output gets which noise, and why.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._parts: dict[str, _Part] = {}
        self.notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Which output gets what, in few words."""
        return ", ".join(f"{name}: {part.kind}" for name, part in self._parts.items())

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Sum over the outputs, mean over the batch.

        Raises:
            ObservationError: there is no floating-point tensor in the outputs.
        """
        found = float_outputs(outputs)
        found = {name: z for name, z in found.items() if z.requires_grad} or found
        if not found:
            main_output(outputs)  # says so
        batch = next(iter(found.values())).shape[:1].numel()
        losses = []
        for name, z in found.items():
            if name not in self._parts:
                self._parts[name] = self._part(name, z, targets, len(found) == 1)
                self.notes += (self._parts[name].note,)
            losses.append(self._parts[name].dot(z))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() / batch

    def _part(self, name: str, z: Tensor, targets: Any, alone: bool) -> _Part:
        verdict = class_axis(z, name, alone, target_of(name, 1 if alone else 2, targets))
        weight = torch.ones((), device=z.device)
        if not alone:
            values = z[:1].numel() if z.dim() else 1
            if verdict.axis is None:
                spread = z.detach().float().std(correction=0)
                spread = torch.where(spread.isfinite() & (spread > 0), spread, torch.ones_like(spread))
                weight = 1 / (spread * max(values, 1) ** 0.5)
            else:
                weight = weight / max(values // z.shape[verdict.axis], 1) ** 0.5
        return _Part(name, z.shape, verdict, weight, self._seed + 7919 * len(self._parts))


class _Part:
    """The noise on one output."""

    def __init__(self, name: str, shape: torch.Size, verdict: Verdict, weight: Tensor, seed: int) -> None:
        self._verdict, self._weight = verdict, weight
        self._fisher, self._white = FisherNoise(seed=seed), LogitNoise(seed)
        self.kind = "Fisher noise" if verdict.axis is not None else "white noise"
        sizes = ", ".join(["N", *map(str, shape[1:])])
        along = "" if verdict.axis is None else f" along dimension {verdict.axis}"
        self.note = f"{name} ({sizes}) gets {self.kind}{along}: {verdict.why}"

    def dot(self, z: Tensor) -> Tensor:
        """The sum of the output times noise, weighted."""
        z = z.float()
        axis = self._verdict.axis
        noise = self._white.noise(z) if axis is None else self._fisher.noise(z, axis)
        return (z * noise).sum() * self._weight


def notes_of(loss_fn: Any) -> tuple[str, ...]:
    """What a loss has to tell about how it was used."""
    return tuple(getattr(loss_fn, "notes", ()))


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
