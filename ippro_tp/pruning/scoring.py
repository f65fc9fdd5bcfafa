"""Scores of units: any importance of Torch-Pruning, calibrated as it needs, asked once for each group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calibration.batches import batches_of
from ..calibration.calibrated import Calibrated
from ..calibration.guard import evaluating
from ..calibration.losses import LogitNoise, cross_entropy
from ..errors import ScoreError
from ..estimators.ranking import unit_scores
from .pricing import Pricing
from .structure import Forward, Structure, Transform, forward, tensors_in

Importance = Callable[[Any], "Tensor | None"]
LossFn = Callable[[Any, Any], Tensor]


class Scorer:
    """Calibrates a copy of an importance on a model and asks it for scores.

    Args:
        importance: of Torch-Pruning, or of this package; it is not changed.
        loader: iterable of ``(inputs, targets)`` or inputs.
        loss_fn: ``(outputs, targets) -> scalar``; ``None``: the importance's own or, for those that read
            ``.grad``, the cross-entropy where targets are class numbers, the outputs dotted with noise elsewhere.
        forward_fn: ``(model, inputs) -> outputs``.
        output_transform: of the outputs, before the loss.
        seed: of the noise.
        progress: show progress bars.
        pricing: makes scores comparable over groups.
        example_inputs: for the pricing.
        compensated: whether the model is refitted after pruning, for importances that ask.
    """

    def __init__(
        self,
        importance: Importance,
        loader: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        forward_fn: Forward | None = None,
        output_transform: Transform | None = None,
        seed: int = 0,
        progress: bool = True,
        pricing: Pricing | None = None,
        example_inputs: Any = None,
        compensated: bool = False,
    ) -> None:
        self._given, self._loader, self._loss_fn = importance, loader, loss_fn
        self._forward_fn, self._output_transform = forward_fn, output_transform
        self._seed, self._progress = seed, progress
        self._pricing, self._example_inputs, self._compensated = pricing, example_inputs, compensated

    def scores(self, structure: Structure) -> tuple[dict[str, Tensor], dict[str, str]]:
        """One score per unit of each group, and why groups have none.

        Raises:
            ScoreError: what the importance returns has another length, or is not finite.
        """
        importance: Any = copy.deepcopy(self._given)
        if isinstance(importance, Calibrated):
            importance._expect(compensated=self._compensated)
            self._calibrate(importance, structure)
            return self._ask(importance, structure)
        if hasattr(importance, "accumulate_grad"):
            return self._with_gradients(importance, structure)
        try:
            scores, unscored = self._ask(importance, structure)
        except ScoreError:
            raise
        except Exception:  # what reads .grad fails in its own way where there is none
            return self._with_gradients(importance, structure)
        return (scores, unscored) if scores else self._with_gradients(importance, structure)

    def _calibrate(self, importance: Calibrated, structure: Structure) -> None:
        if self._forward_fn is None and self._output_transform is None:
            importance.calibrate(structure, self._loader, self._loss_fn, progress=self._progress)
            return
        loss_fn = self._loss_fn or importance._default_loss()
        with importance.observe(structure), torch.set_grad_enabled(importance.needs_gradients):
            structure.model.eval()
            for inputs, targets in self._batches(structure.model, type(importance).__name__):
                outputs = self._outputs(structure.model, inputs)
                if importance.needs_gradients:
                    loss_fn(outputs, targets).backward()

    def _with_gradients(self, importance: Any, structure: Structure) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Scores of an importance that reads ``.grad``: accumulated over batches, or sample by sample."""
        model = structure.model
        flags = [(p, p.requires_grad) for p in model.parameters()]
        noise = LogitNoise(seed=self._seed)
        one_by_one = hasattr(importance, "accumulate_grad")
        try:
            for p, _ in flags:
                p.requires_grad_(p.is_floating_point() or p.is_complex())
                p.grad = None
            with evaluating(model), torch.enable_grad():
                for inputs, targets in self._batches(model, type(importance).__name__):
                    for part in _samples(inputs, targets) if one_by_one else [(inputs, targets)]:
                        if one_by_one:
                            model.zero_grad()
                        self._loss(self._outputs(model, part[0]), part[1], noise).backward()
                        if one_by_one:
                            importance.accumulate_grad(model)
            for p, _ in flags:  # a parameter that the loss does not reach has no say
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            return self._ask(importance, structure)
        finally:
            for p, flag in flags:
                p.grad = None
                p.requires_grad_(flag)

    def _loss(self, outputs: Any, targets: Any, noise: LogitNoise) -> Tensor:
        if self._loss_fn is not None:
            return self._loss_fn(outputs, targets)
        classes = isinstance(targets, Tensor) and not targets.is_floating_point()
        return cross_entropy(outputs, targets) if classes else noise(outputs, targets)

    def _outputs(self, model: nn.Module, inputs: Any) -> Any:
        outputs = forward(model, inputs, self._forward_fn)
        return outputs if self._output_transform is None else self._output_transform(outputs)

    def _batches(self, model: nn.Module, title: str) -> Iterable[tuple[Any, Any]]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return batches_of(self._loader, device, None, self._progress, title)

    @torch.no_grad()
    def _ask(self, importance: Any, structure: Structure) -> tuple[dict[str, Tensor], dict[str, str]]:
        name = type(importance).__name__
        scores: dict[str, Tensor] = {}
        unscored: dict[str, str] = {}
        reasons = getattr(importance, "unscored", {})
        for key, prunable in structure.groups.items():
            given = importance(prunable.group)
            if given is None:
                unscored[key] = f"{name} gives no score: {reasons.get(key, 'it says no more')}"
                continue
            values = given.detach().double().cpu()
            if values.shape != (prunable.record.width,):
                raise ScoreError(
                    f"{name} returned the shape {tuple(values.shape)} for the {prunable.record.width} channels of "
                    f"{key!r}"
                )
            if not values.isfinite().all():
                raise ScoreError(f"{name} returned scores for {key!r} that are not finite")
            scores[key] = values
        if self._pricing is not None and scores:
            scores = self._pricing.apply(scores, structure, self._example_inputs)
        return {key: unit_scores(values, structure.groups[key].unit) for key, values in scores.items()}, unscored


def _samples(inputs: Any, targets: Any) -> Iterable[tuple[Any, Any]]:
    """A batch as batches of one."""
    count = next(t.shape[0] for t in tensors_in(inputs) if t.dim())
    for number in range(count):
        yield _sample(inputs, number), _sample(targets, number)


def _sample(value: Any, number: int) -> Any:
    def one(tensor: Tensor) -> Tensor:
        return tensor[number : number + 1] if tensor.dim() else tensor

    return tree_map_only(Tensor, one, value)
