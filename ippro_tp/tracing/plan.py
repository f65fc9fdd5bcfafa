"""What is tapped, and what is known of a model from one forward pass to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..layers import is_channel_norm
from .norms import NormScales
from .trial import Trials


@dataclass
class Plan:
    """What is tapped, the same in every pass.

    Attributes:
        activations: tap activation calls as well (the extension layer of the paper).
        through_norms: keep the tap at a layer although a channel norm follows it.
        untapped: producers whose sums nobody needs, once that is known.
        unread: readers whose sums nobody needs.
        owners: weight -> its layer, for uses of weights that go past their layer.
        reads_of: layer whose weight read channels -> the layers they are of.
        scales: of BatchNorm layers in eval mode.
        trials: what functions do to channels.
    """

    activations: bool = False
    through_norms: bool = False
    untapped: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    owners: dict[Tensor, str] = field(default_factory=dict)
    reads_of: dict[str, set[str]] = field(default_factory=dict)
    scales: NormScales = field(default_factory=NormScales)
    trials: Trials = field(default_factory=Trials)


def channel_axis(module: nn.Module, output: Tensor) -> int:
    """Convolutions and channel norms: 1. Everything else (Linear, Embedding, attention): the last axis."""
    channels_second = isinstance(module, nn.modules.conv._ConvNd) or is_channel_norm(module)
    return 1 if channels_second else output.dim() - 1
