"""The maths of published methods that are compared: our implementations, on tensors alone.

CHIP: Sui et al., "CHIP: CHannel Independence-based Pruning for Compact Neural Networks", NeurIPS 2021.
VBP: Berisha et al., "Variance-Based Pruning for Accelerating and Compressing Trained Networks", ICCV 2025.
Folding: Wang et al., "Forget the Data and Fine-Tuning! Just Fold the Network to Compress", ICLR 2025.
GRAIL: Tang et al., "GRAIL: Post-hoc Compensation by Linear Reconstruction for Compressed Networks", CPAL 2026.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

AT_ONCE = 1 << 24
"""Elements of the matrices whose eigenvalues are found together."""


def channel_independence(maps: Tensor) -> Tensor:
    """CHIP's importance: how much the nuclear norm of an image's feature maps falls when one map is zeroed.

    Args:
        maps: ``(images, channels, positions)``.

    Returns:
        ``(channels,)`` float64, means over the images.
    """
    total = maps.new_zeros(maps.shape[1], dtype=torch.float64)
    for a in maps.double():
        channels, positions = a.shape
        removed = torch.eye(channels, dtype=torch.bool, device=a.device)
        gram = a @ a.T if channels <= positions else a.T @ a
        lot = max(1, AT_ONCE // gram.numel())
        for part in torch.arange(channels, device=a.device).split(lot):
            if channels <= positions:
                left = gram.masked_fill(removed[part, :, None] | removed[part, None, :], 0.0)
            else:
                left = gram - a[part, :, None] * a[part, None, :]
            total[part] -= _root_trace(left)
        total += _root_trace(gram)
    return total / len(maps)


def _root_trace(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)


@dataclass
class Moments:
    """Sums over samples and positions of what a layer reads.

    Args:
        channels: Number of input channels.
        products: Whether products of channels are summed as well, which GRAIL needs, or squares alone.
    """

    channels: int
    products: bool = False

    def __post_init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros(self.channels, dtype=torch.float64)
        self._second = torch.zeros((self.channels,) * (1 + self.products), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add ``(samples, channels, positions)``."""
        rows = x.detach().movedim(1, 0).flatten(1).double().cpu()
        self.count += rows.shape[1]
        self._sum += rows.sum(1)
        self._second += rows @ rows.T if self.products else rows.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """``(channels,)``."""
        return self._sum / self.count

    @property
    def variance(self) -> Tensor:
        """``(channels,)``."""
        square = self._second.diagonal() if self.products else self._second
        return (square / self.count - self.mean.square()).clamp(min=0)

    @property
    def gram(self) -> Tensor:
        """``(channels, channels)``: mean products, not centred."""
        return self._second / self.count


def ridge_map(gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """GRAIL's map from the kept channels to all of them, by ridge regression.

    Args:
        gram: ``(channels, channels)``, second moments about zero.
        kept: ``(some,)`` int64.
        ridge: A multiple of the mean second moment of the kept channels.

    Returns:
        ``(channels, some)``: multiplied from the right to the weight of the layer that reads them.
    """
    own = gram[kept][:, kept]
    penalty = ridge * own.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.solve(own + penalty * torch.eye(len(kept), dtype=own.dtype), gram[kept]).T


def clusters(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """K-means labels ``(channels,)`` int64 of the rows ``(channels, features)``: each of ``count`` occurs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters: see below
        found = KMeans(count, n_init=10, random_state=seed).fit(rows.double().cpu().numpy())
    labels = torch.from_numpy(found.labels_).long()
    for empty in sorted(set(range(count)) - set(labels.tolist())):  # where rows are equal
        labels[(labels == labels.mode().values).nonzero()[0]] = empty
    return labels


def merged(values: Tensor, labels: Tensor, count: int, average: bool) -> Tensor:
    """Means or sums of ``(channels, ...)`` over the members of each cluster: ``(count, ...)``."""
    how = "mean" if average else "sum"
    index = labels.view(-1, *(1,) * (values.dim() - 1)).expand_as(values)
    return values.new_zeros(count, *values.shape[1:]).scatter_reduce(0, index, values, how, include_self=False)
