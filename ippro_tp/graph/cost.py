r"""What a channel costs: the MACs or parameters that go away with it.

Dividing scores by the cost is the Lagrangian of "least loss increase for the compute saved". With a quadratic
model of the loss the increase goes as :math:`E\,t^2`, so that :math:`E\,t^2 / c` or, for a score that goes as
:math:`E|t|`, :math:`E|t| / \sqrt c` is ranked. The cost is one number for each group: it changes how layers
compare in a global ranking and nothing within a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn

from ..records import GroupRecord, Layer, Work

Unit = Literal["macs", "params"]
CostFn = Callable[[GroupRecord, nn.Module], float]
"""``(record, model) -> cost of one channel of the group``, for example a measured latency."""


def group_cost(record: GroupRecord, model: nn.Module, work: Work, unit: Unit = "macs") -> float:
    """Cost of one channel of a group (of all channels that go with it), over all layers that hold it.

    A layer's MACs are the same for each of its output channels, and for each of its input channels; products of
    activations shrink with each channel of their operands.

    Args:
        record: the group.
        model: the model that its layer names refer to; it is read for parameters only.
        work: MACs of its layers.
        unit: ``"macs"`` or ``"params"``.

    Returns:
        MACs of the pass that ``work`` tells of, or parameters, for one position of the group, tied ones as one.
        Zero where no layer of the group runs anything that is counted.
    """

    def share(layer: Layer, is_output: bool) -> float:
        module = model.get_submodule(layer.name)
        if unit == "params":
            return _parameters(module, layer.channels, is_output)
        macs = work.layers.get(layer.name, 0) * (2 if _both_sides(module) else 1)
        return (macs + (work.products.get(layer.name, 0.0) if is_output else 0.0)) / layer.channels

    def total(layers: Iterable[Layer], is_output: bool) -> float:
        return sum(len(layer.index) * share(layer, is_output) for layer in layers)

    read = total((*record.consumers, *record.others), False)
    return (total(record.producers, True) + read) / record.units


def _parameters(module: nn.Module, channels: int, is_output: bool) -> float:
    """Parameters of one output or input channel; biases and norms have output channels only."""
    matrices = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    vectors = sum(p.numel() for p in module.parameters() if p.dim() == 1)
    if not is_output:
        return matrices / channels
    return (matrices * (2 if _both_sides(module) else 1) + vectors) / channels


def _both_sides(module: nn.Module) -> bool:
    """Whether input and output channels of a dense layer go together: its weights shrink along both sides."""
    return isinstance(module, nn.MultiheadAttention)
