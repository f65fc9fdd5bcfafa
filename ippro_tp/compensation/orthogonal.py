"""Muon: momentum with orthogonalised steps for weights, Adam for the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
BETAS = (0.9, 0.99)
LENGTH = 0.3
"""Root mean square of a weight's step at a learning rate of one; Adam's steps have 0.2 to 0.4."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration of Jordan et al. 2024, steepest at zero."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for weights with several inputs and outputs, Adam for the rest; no weight decay.

    The momentum of a weight, as a matrix of a row per output channel, is replaced by the nearest matrix of
    orthonormal rows or columns, so that all directions are learnt at the same pace; its length is Adam's (Liu et
    al. 2025). `torch.optim.Muon` takes matrices only, and is younger than the oldest torch that is supported.

    Args:
        params: parameters, all trained at the same rate.
        lr: learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all parameters that have gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    several = p.dim() > 1 and min(p.shape[:2]) > 1  # not so for biases and depthwise convolutions
                    direction = self._orthogonal(p, p.grad) if several else self._adam(p, p.grad)
                    p.sub_(direction, alpha=group["lr"])

    def _orthogonal(self, p: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum: Tensor = state["momentum"]
        momentum.mul_(MOMENTUM).add_(gradient)
        rows = (gradient + MOMENTUM * momentum).flatten(1)
        step: Tensor = orthogonalised(rows) * (LENGTH * max(rows.shape) ** 0.5)
        return step.view_as(p)

    def _adam(self, p: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        mean: Tensor = state["mean"]
        square: Tensor = state["square"]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        bias = [1 - float(b ** state["step"]) for b in BETAS]
        return mean / bias[0] / ((square / bias[1]).sqrt() + 1e-8)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The orthogonal factor of a matrix (m, n), roughly: its singular values become 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / wide.norm().clamp(min=torch.finfo(wide.dtype).tiny)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
