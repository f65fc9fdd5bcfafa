"""What the rooms hand to each other: groups and labels of channels as index tensors, what one pass gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's part in a group.

    Attributes:
        name: dotted module name.
        index: ``(k,)`` int64, channels of this layer that belong to the group.
        root: ``(k,)`` int64, the position in the group (0..width-1) of each of them.
        channels: the layer's number of channels on that side when the group was read.
    """

    name: str
    index: Tensor
    root: Tensor
    channels: int

    @property
    def aligned(self) -> bool:
        """Whether channel i of the layer is position i of the group, so that no indexing is needed."""
        return self.index.numel() == self.channels and bool(
            torch.equal(self.index, self.root) and torch.equal(self.index, torch.arange(self.channels))
        )


@dataclass(frozen=True, eq=False)
class GroupRecord:
    """One dependency group, by names and index tensors.

    Attributes:
        key: root layer and side, for example ``"layer1.0.conv1.out"``.
        width: number of positions, ``len(group[0].idxs)``.
        producers: layers whose output channels belong to the group (Conv, Linear, channel norms, ...).
        consumers: Conv and Linear layers whose input channels belong to it.
        problems: index maps of Torch-Pruning that cannot be right and were left out, in words.
        members: name of each item's layer in the group's order, ``""`` for operations; empty if not known.
        tied: ``(width,)`` int64, the first of the positions that only go together with each one, as the halves of
            a gated linear unit do; ``None`` where every position can go alone.
        others: layers of other kinds that read its channels, as a user's own do: their cost is all that is known.
    """

    key: str
    width: int
    producers: tuple[Layer, ...]
    consumers: tuple[Layer, ...]
    problems: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    tied: Tensor | None = None
    others: tuple[Layer, ...] = ()

    @cached_property
    def joined(self) -> GroupRecord:
        """The record in which the layers of tied positions all stand at the first of them."""
        if self.tied is None:
            return self
        tied = self.tied

        def at_first(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
            return tuple(replace(layer, root=tied[layer.root]) for layer in layers)

        return replace(
            self,
            producers=at_first(self.producers),
            consumers=at_first(self.consumers),
            others=at_first(self.others),
        )

    @cached_property
    def units(self) -> int:
        """How many of the positions can go one by one."""
        return self.width if self.tied is None else len(self.tied.unique())


@dataclass(frozen=True)
class Span:
    """A run of a layer's channels along an axis: channel ``start + j // repeat`` sits at ``at + j``.

    Attributes:
        layer: name of the producer.
        start: first channel of the layer.
        count: number of channels.
        at: first position on the tensor's axis.
        repeat: positions a channel (more than 1 after a flatten).
    """

    layer: str
    start: int
    count: int
    at: int = 0
    repeat: int = 1

    def positions(self) -> Tensor:
        """``(count * repeat,)`` positions on the axis."""
        return torch.arange(self.at, self.at + self.count * self.repeat)

    def channels(self) -> Tensor:
        """``(count * repeat,)`` the channel at each position."""
        return torch.arange(self.start, self.start + self.count).repeat_interleave(self.repeat)


@dataclass(frozen=True)
class Label:
    """What lies along ``axis`` (non-negative) of a tensor."""

    axis: int
    spans: tuple[Span, ...]

    def narrowed(self, start: int, length: int) -> Label | None:
        """The label of ``x.narrow(axis, start, length)``."""
        spans = []
        for span in self.spans:
            first = max(0, -(-(start - span.at) // span.repeat))
            last = min(span.count, (start + length - span.at) // span.repeat)
            if last > first:
                at = span.at + first * span.repeat - start
                spans.append(replace(span, start=span.start + first, count=last - first, at=at))
        return Label(self.axis, tuple(spans)) if spans else None


@dataclass(frozen=True)
class Site:
    """An activation call, or the identity at a producer's output, that stands for sigma of some layers.

    Attributes:
        name: ``"relu #3"`` (third tapped activation of the forward pass), or the producer's name.
        label: which channels of which layers lie along which axis of its input.
    """

    name: str
    label: Label


@dataclass(eq=False)
class Pass:
    """What one forward pass and its backward passes gave.

    Attributes:
        batch: number of samples.
        loss_scale: what the loss is multiplied by before the backward pass; sums are divided by it.
        outputs: per producer, ``(batch, channels)`` sums of g*y at its output.
        activations: per site name, ``(batch, size of the channel axis)`` sums of g*x at the activation.
        inputs: per reader, ``(2, batch, channels)`` sums of g*x and of g at its input.
        reads: per reader, sum of its input x for each channel, and the number of values that were summed.
        read_layers: per reader, the layers whose channels its input carries.
        rows: per sampled reader and call, ``(rows, channels)`` of its input at a few positions of each sample.
        sites: the activation calls in order.
        norm_of: producer -> channel norm that its output runs into before the next layer.
        closed: already counted.
    """

    batch: int
    loss_scale: float = 1.0
    outputs: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    read_layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    norm_of: dict[str, str] = field(default_factory=dict)
    closed: bool = False

    @property
    def signature(self) -> tuple[object, ...]:
        """What has to be the same in every forward pass."""
        return tuple(self.sites), tuple(sorted(self.norm_of.items()))


@dataclass(frozen=True)
class Wiring:
    """What the forward passes showed about the model.

    Attributes:
        sites: activation calls that stand for sigma, in order.
        norm_of: layer -> the channel norm its output runs into.
        seen: producers that were called.
        centered: groups that were measured where they are read.
    """

    sites: tuple[Site, ...] = ()
    norm_of: Mapping[str, str] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()
    centered: frozenset[str] = frozenset()

    @property
    def names(self) -> dict[str, list[str]]:
        """``seen`` and ``centered`` as sorted lists."""
        return {"seen": sorted(self.seen), "centered": sorted(self.centered)}

    @cached_property
    def _sites_of(self) -> dict[str, list[tuple[Site, Span]]]:
        found: dict[str, list[tuple[Site, Span]]] = {}
        for site in self.sites:
            for span in site.label.spans:
                found.setdefault(span.layer, []).append((site, span))
        return found

    def sites_of(self, layer: str) -> Sequence[tuple[Site, Span]]:
        """Activation calls that follow ``layer``, in order, and where its channels stand in each."""
        return self._sites_of.get(layer, ())

    def site_of(self, layer: str) -> str | None:
        """Name of the activation that follows ``layer``; ``None`` means the identity at its output."""
        return next((site.name for site, _ in self.sites_of(layer)), None)


@dataclass(frozen=True)
class Work:
    """MACs of one forward pass, by what they go away with.

    Attributes:
        total: of the model.
        layers: of each layer's own calls.
        products: of products of activations (attention), for each layer whose output channels they go over: they
            shrink with each of these channels.
    """

    total: int = 0
    layers: Mapping[str, int] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)
