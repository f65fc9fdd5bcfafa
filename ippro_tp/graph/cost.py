r"""What a channel costs: the MACs or parameters that go away with it.

Dividing scores by the cost is the Lagrangian of "least loss increase for the compute saved". With a quadratic
model of the loss the increase goes as :math:`E\,t^2`, so that :math:`E\,t^2 / c` or, for a score that goes as
:math:`E|t|`, :math:`E|t| / \sqrt c` is ranked. The cost is one number for each group: it changes how layers
compare in a global ranking and nothing within a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers import CHANNEL_NORMS
from ..records import GroupRecord, Layer

UNITS = ("macs", "params")
CostFn = Callable[[GroupRecord, nn.Module], float]
"""``(record, model) -> cost of one channel of the group``, for example a measured latency."""


def output_positions(module: nn.Module, output: Tensor, batch: int) -> int:
    """Number of positions (pixels, tokens) of a layer's output for one sample, over all of its windows.

    Args:
        module: the layer; convolutions and channel norms have channels in dimension 1, other layers last.
        output: its output; samples, and windows or tokens, may lie in any dimension but that of the channels.
        batch: number of samples.

    Example:
        >>> import torch
        >>> output_positions(nn.Linear(4, 8), torch.zeros(2, 5, 8), 2)
        5
    """
    second = isinstance(module, (nn.modules.conv._ConvNd, *CHANNEL_NORMS))
    return max(1, output.numel() // (output.shape[1 if second else -1] * batch))


def watch_positions(
    model: nn.Module, names: Iterable[str], positions: dict[str, int], batch: Callable[[], int]
) -> list[RemovableHandle]:
    """Fill ``positions`` from calls for ``batch()`` samples, if any; several calls of a layer add up."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            samples = batch()  # mostly 0, so asked first: calls on tensors are what takes time
            output = output[0] if isinstance(output, tuple) and output else output
            if samples and isinstance(output, Tensor) and output.numel():
                positions[name] = positions.get(name, 0) + output_positions(module, output, samples)

        return hook

    return [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in dict.fromkeys(names)]


def channel_cost(module: nn.Module, is_output: bool, positions: int, unit: str) -> float:
    """MACs or parameters of one output (or input) channel of a layer, as Torch-Pruning's counter counts them.

    Args:
        module: Conv (any kind), Linear, channel norm or ``nn.MultiheadAttention``, whose inputs and outputs are
            pruned together and are counted as outputs; other layers cost nothing.
        is_output: count an output channel (a filter) or an input channel.
        positions: of the layer's output, see :func:`output_positions`.
        unit: ``"macs"`` or ``"params"``.

    Example:
        >>> channel_cost(nn.Conv2d(3, 8, 3, bias=False), True, 100, "macs")
        2700.0
    """
    if isinstance(module, CHANNEL_NORMS):
        affine = getattr(module, "weight", None) is not None
        return float((1 + affine) * positions if unit == "macs" else 2 * affine)
    if isinstance(module, nn.MultiheadAttention):
        if not is_output:
            return 0.0
        weights = 8 * module.embed_dim + 4 * (module.in_proj_bias is not None)  # both sides of four projections
        return float(positions * (weights + 1 + 2 * positions) if unit == "macs" else weights)
    if isinstance(module, nn.Linear):
        weights = module.in_features if is_output else module.out_features
    elif isinstance(module, nn.modules.conv._ConvNd):
        kernel = module.weight[0, 0].numel()
        if module.groups == module.in_channels == module.out_channels:
            weights = kernel if is_output else 0
        else:
            weights = kernel * (module.in_channels if is_output else module.out_channels) // module.groups
    else:
        return 0.0
    weights += int(is_output and module.bias is not None)
    return float(weights * positions if unit == "macs" else weights)


def group_cost(record: GroupRecord, model: nn.Module, positions: Mapping[str, int], unit: str = "macs") -> float:
    """Cost of one channel of a group (of all channels that go with it): over all its producers and consumers.

    Args:
        record: the group.
        model: the model that its layer names refer to.
        positions: per layer; layers that were never called are not counted.
        unit: ``"macs"`` or ``"params"``.

    Returns:
        MACs (or parameters) for one position of the group, tied ones as one.
    """

    def total(layers: Iterable[Layer], is_output: bool) -> float:
        return sum(
            len(layer.index)
            * channel_cost(model.get_submodule(layer.name), is_output, positions[layer.name], unit)
            for layer in layers
            if layer.name in positions
        )

    return (total(record.producers, True) + total(record.consumers, False)) / record.units
