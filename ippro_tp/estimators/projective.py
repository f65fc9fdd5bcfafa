r"""The projective view of a filter: tensors in, tensors out; no modules, hooks or groups.

A filter :math:`F_i` (row of a weight, flattened, or :math:`(\gamma_i, \beta_i)` of a BatchNorm) becomes the
point :math:`[\lVert F_i\rVert : F_i]` of projective space (IPPRO, arXiv 2507.14171, Eq. 2). One step of
gradient descent moves the point; the angle it then makes with the origin :math:`[1:0:\dots:0]` is its score
(Eq. 3 and 4). All functions work row by row on any device and keep the dtype they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORE_LIMIT = 1e30
"""Scores are clamped to this magnitude: finite in float32, also after a sum over a wide layer."""


def embed(filters: Tensor) -> Tensor:
    r"""Place filters in projective space, Eq. 2: :math:`F \mapsto [\lVert F\rVert : F]`.

    Args:
        filters: ``(channels, n)``, one filter a row.

    Returns:
        ``(channels, n + 1)``. Every non-zero filter makes an angle of :math:`\pi/4` with the origin.

    Example:
        >>> embed(torch.tensor([[3.0, 4.0]]))
        tensor([[5., 3., 4.]])
    """
    return torch.cat([torch.linalg.vector_norm(filters, dim=1, keepdim=True), filters], dim=1)


def tan_angle(points: Tensor) -> Tensor:
    r"""Tangent of the angle between points and the origin :math:`[1:0:\dots:0]` of projective space.

    Args:
        points: ``(channels, n + 1)`` homogeneous coordinates.

    Returns:
        ``(channels,)``, non-negative; infinite for points at infinity.

    Example:
        >>> tan_angle(embed(torch.tensor([[3.0, 4.0]])))
        tensor([1.])
    """
    length: Tensor = torch.linalg.vector_norm(points[:, 1:], dim=1)
    return length / points[:, 0].abs()


def pro_score(filters: Tensor, grad: Tensor, offset: Tensor, step_size: float) -> Tensor:
    r"""Eq. 4 to the letter: :math:`\tan\theta' = \lVert F-\lambda\nabla\rVert / |\lVert F\rVert-\lambda d|`.

    The readable reference. It loses all digits for small steps in float32; :func:`pro_excess` does not and
    orders channels identically.

    Args:
        filters: ``(channels, n)``, one filter a row.
        grad: ``(channels, n)``, gradient of the loss with respect to the filters.
        offset: ``(channels,)``, gradient d of the loss with respect to the extra coordinate D.
        step_size: the step :math:`\lambda`.

    Returns:
        ``(channels,)`` scores; a low score is pruned first.

    Example:
        >>> pro_score(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.0]), 0.5)
        tensor([0.5000])
    """
    step = torch.cat([offset[:, None], grad], dim=1)
    return tan_angle(embed(filters) - step_size * step)


def pro_excess(norm: Tensor, dot: Tensor, grad_norm: Tensor, offset: Tensor, step_size: float) -> Tensor:
    r""":math:`\tan^2\theta' - 1` of Eq. 4, without the cancellation near 1.

    .. math:: \tan^2\theta' - 1 = \frac{2\lambda(\lVert F\rVert d - F\cdot\nabla) +
              \lambda^2(\lVert\nabla\rVert^2 - d^2)}{(\lVert F\rVert - \lambda d)^2}

    It orders channels exactly as Eq. 4 does, for every step. ``step_size=0`` gives the limit divided by
    :math:`2\lambda`, that is :math:`(\lVert F\rVert d - F\cdot\nabla)/\lVert F\rVert^2`. Dead filters
    (:math:`F = 0`) get the lowest value there is and are pruned first.

    Args:
        norm: ``(channels,)`` :math:`\lVert F\rVert`.
        dot: ``(channels,)`` :math:`F\cdot\nabla`.
        grad_norm: ``(channels,)`` :math:`\lVert\nabla\rVert`.
        offset: ``(channels,)`` d, the gradient with respect to the extra coordinate.
        step_size: :math:`\lambda \ge 0`.

    Returns:
        ``(channels,)``, finite, clamped to :data:`SCORE_LIMIT`.

    Example:
        >>> one = torch.ones(1)
        >>> pro_excess(5 * one, 25 * one, 5 * one, 0 * one, 0.5)
        tensor([-0.7500])
    """
    first = norm * offset - dot
    if step_size == 0:
        excess, lowest = first / norm.square(), -SCORE_LIMIT
    else:
        second = (grad_norm - offset) * (grad_norm + offset)
        numerator = step_size * (2 * first + step_size * second)
        excess, lowest = numerator / (norm - step_size * offset).square(), -1.0
    # 0/0 happens only where the point has come to rest in the origin or at infinity with the origin.
    excess = excess.nan_to_num(nan=lowest, posinf=SCORE_LIMIT, neginf=-SCORE_LIMIT)
    excess = excess.clamp(-SCORE_LIMIT, SCORE_LIMIT)
    return torch.where(norm == 0, torch.full_like(excess, lowest), excess)
