"""Corrected versions of three of Torch-Pruning's criteria, so that no arm wins by another's defect."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tasks.base import Batch

HESSIAN_SAMPLES = 256
"""Per-sample gradients cost one backward pass each; this many of the calibration images are used."""

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def accumulate_gradients(model: nn.Module, batches: list[Batch]) -> None:
    """Sum the gradients of the mean cross-entropy of each batch into ``.grad``, as TP's documentation has it."""
    device = next(model.parameters()).device
    model.zero_grad()
    for images, labels in batches:
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()


def samples(batches: list[Batch], count: int, size: int) -> Iterator[Batch]:
    """Yield the first ``count`` images of ``batches`` in batches of ``size``."""
    images, labels = (torch.cat(part)[:count] for part in zip(*batches, strict=True))
    yield from zip(images.split(size), labels.split(size), strict=True)


class AccumulatedHessian(tp.importance.HessianImportance):
    """TP's group Fisher ``sum w^2 E[g_n^2]`` with the expectation over *all* samples.

    The defect: ``GroupHessianImportance.accumulate_grad`` asks for the parameter's *name* in a dictionary
    that is keyed by the *parameter*, finds nothing and overwrites, so that only the last sample ever counts.
    """

    def accumulate_grad(self, model: nn.Module) -> None:
        """Add the squared gradients that ``model`` holds now; call it once per sample."""
        for param in model.parameters():
            if param.grad is not None:
                squared = param.grad.detach().square()
                self._accu_grad[param] = self._accu_grad[param] + squared if param in self._accu_grad else squared
                self._counter[param] = self._counter.get(param, 0) + 1


def per_sample_hessian(
    importance: tp.importance.HessianImportance, model: nn.Module, batches: list[Batch]
) -> None:
    """Feed ``importance`` one backward pass per image; the gradients of the last one stay in ``.grad``.

    A forward pass of one image gives the same gradients in eval mode as TP's documented per-sample loop over
    a retained batch graph, without walking the graph of the whole batch for each image.
    """
    device = next(model.parameters()).device
    importance.zero_grad()
    for images, labels in samples(batches, HESSIAN_SAMPLES, 1):
        model.zero_grad()
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        importance.accumulate_grad(model)


class GateTaylor(tp.importance.Importance):
    """First-order Taylor on the gates: ``| sum of gamma dgamma + beta dbeta |`` over the group's BatchNorms.

    The defect: ``GroupTaylorImportance`` means to count BatchNorm but tests for
    ``prune_groupnorm_out_channels``, so that no BatchNorm ever enters; and it adds absolute values per
    weight, although removing a channel moves all its weights at once. Multiplying a BatchNorm's output by a
    gate that goes from 1 to 0 changes the loss by the sum above to first order. Producers without BatchNorm
    add ``w . dw + b . db``, which is the same derivative. Scores of different groups share one scale: no
    normalisation. The gradients come from ``.grad``.
    """

    @torch.no_grad()
    def __call__(self, group, **kwargs) -> Tensor | None:
        """Return one non-negative score per root channel."""
        score, found = torch.zeros(len(group[0].idxs)), False
        for item in group:
            module, node = item.dep.target.module, item.dep.target
            if not group._DG.is_out_channel_pruning_fn(item.dep.handler) or None in item.root_idxs:
                continue
            normed = any(isinstance(after.module, BATCH_NORM) and after.module.affine for after in node.outputs)
            producer = isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and not normed
            if producer or (isinstance(module, BATCH_NORM) and module.affine):
                score.index_add_(0, torch.tensor(item.root_idxs), gate_derivative(module)[item.idxs].cpu())
                found = True
        return score.abs() if found else None


def gate_derivative(module: nn.Module) -> Tensor:
    """Return dL/dgate for a gate on each output channel of ``module``: weights dot gradients, bias included."""
    weight, grad = module.weight.detach(), module.weight.grad
    if getattr(module, "transposed", False):
        weight, grad = weight.transpose(0, 1), grad.transpose(0, 1)
    derivative = (weight * grad).flatten(1).sum(1) if weight.ndim > 1 else weight * grad
    return derivative if module.bias is None else derivative + module.bias.detach() * module.bias.grad


class SignedFPGM(tp.importance.Importance):
    """Geometric-median distances of the signed filters, mean over the layers, divided by the group's mean.

    The defect: ``FPGMImportance`` takes the distances of ``abs(w) ** p`` instead of ``w``, so that a filter
    and its negative count as equal. It also fails on the inputs of grouped convolutions.
    """

    @torch.no_grad()
    def __call__(self, group, **kwargs) -> Tensor | None:
        """Return the mean over layers of each channel's summed Euclidean distance to the others."""
        channels, layers = len(group[0].idxs), []
        for item in group:
            module, is_output = item.dep.target.module, group._DG.is_out_channel_pruning_fn(item.dep.handler)
            if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or None in item.root_idxs:
                continue
            rows = channel_rows(module, is_output)
            if rows is None:
                continue
            rows = rows[item.idxs]
            distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1).cpu()
            layers.append(torch.zeros(channels).index_add_(0, torch.tensor(item.root_idxs), distance))
        if not layers:
            return None
        score = torch.stack(layers).mean(0)
        return score / score.mean() if score.mean() > 0 else score


def channel_rows(module: nn.Module, is_output: bool) -> Tensor | None:
    """Return the weights of each output or input channel as rows; None for the inputs of grouped convolutions."""
    weight = module.weight.detach()
    if not is_output and getattr(module, "groups", 1) > 1:
        return None
    outputs_first = not getattr(module, "transposed", False)
    return (weight if outputs_first == is_output else weight.transpose(0, 1)).flatten(1)
