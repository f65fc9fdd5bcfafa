"""What of a model can be pruned: groups of coupled channels, their units, and the groups that are left whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..calibration.batches import as_call
from ..errors import StructureError
from ..graph.groups import read_group
from ..records import GroupRecord

ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM)
OUTPUT = "its channels are the model's output"
Forward = Callable[[nn.Module, Any], Any]
Transform = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Prunable:
    """A group of channels that can lose some.

    Attributes:
        group: of Torch-Pruning, over all channels of its root.
        record: the same as index tensors.
        unit: ``(width,)`` int64, the unit that each position goes with: positions of one unit go together.
        units: how many there are.
        heads: of the attention whose queries, keys and values these are; 0 if there is none.
        attended: channels of all heads together.
    """

    group: Any
    record: GroupRecord
    unit: Tensor
    units: int
    heads: int = 0
    attended: int = 0


@dataclass(frozen=True, eq=False)
class Structure:
    """A traced model: what an importance is calibrated with, and what is cut.

    Attributes:
        graph: the dependency graph; its name for importances, which take a pruner, is ``DG``.
        groups: by key, in Torch-Pruning's order.
        left_whole: reason by key, for groups that keep all of their channels.
        left_records: those groups as index tensors.
        global_pruning: whether scores of different groups are compared.
        ignored_layers: roots of the groups that are left whole, and layers that the user protects.
    """

    graph: Any
    groups: Mapping[str, Prunable]
    left_whole: Mapping[str, str]
    left_records: Mapping[str, GroupRecord]
    global_pruning: bool = True
    ignored_layers: list[nn.Module] = field(default_factory=list)
    root_module_types: tuple[Any, ...] = ROOTS

    @property
    def DG(self) -> Any:  # Torch-Pruning's name
        """The dependency graph."""
        return self.graph

    @property
    def group_records(self) -> tuple[GroupRecord, ...]:
        """Of the groups that can be pruned."""
        return tuple(prunable.record for prunable in self.groups.values())

    @property
    def model(self) -> nn.Module:
        """The traced model."""
        model: nn.Module = self.graph.model
        return model


def forward(model: nn.Module, inputs: Any, forward_fn: Forward | None = None) -> Any:
    """Call ``model`` with a tensor, a tuple of positional or a dict of keyword arguments."""
    if forward_fn is not None:
        return forward_fn(model, inputs)
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and outputs of Hugging Face models."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors_in(inner)


def read_structure(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Forward | None = None,
    output_transform: Transform | None = None,
    ignored: Iterable[nn.Module] = (),
    global_pruning: bool = True,
) -> Structure:
    """Trace ``model`` and find what can be pruned.

    Args:
        model: on whose modules the structure will act; left as it is found.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        forward_fn: ``(model, example_inputs) -> outputs``, instead of a plain call.
        output_transform: picks the outputs that matter.
        ignored: layers, or modules all of whose layers, keep their output channels.
        global_pruning: see :class:`Structure`.

    Raises:
        StructureError: the model cannot be traced.
    """
    protected = {layer for module in ignored for layer in module.modules()}
    last: list[Any] = []

    def outputs_of(outputs: Any) -> list[Tensor]:
        outputs = outputs if output_transform is None else output_transform(outputs)
        found = [t for t in tensors_in(outputs) if t.grad_fn is not None]
        last.extend(t.grad_fn for t in found)
        return found

    with _traceable(model):
        try:
            graph = tp.DependencyGraph().build_dependency(
                model,
                example_inputs,
                forward_fn=lambda m, inputs: forward(m, inputs, forward_fn),
                output_transform=outputs_of,
                verbose=False,
            )
        except Exception as error:
            raise StructureError(f"the model cannot be traced: {type(error).__name__}: {error}") from error
    if not last:
        raise StructureError(
            "no output of the model depends on its parameters: nothing can be traced. Pass output_transform=, "
            "which picks tensors out of the model's output."
        )
    made = {n for n in graph.module2node.values() if n.grad_fn in last or isinstance(n.module, tp.ops._OutputOp)}
    groups: dict[str, Prunable] = {}
    left_whole: dict[str, str] = {}
    left_records: dict[str, GroupRecord] = {}
    roots = []
    for group in graph.get_all_groups(ignored_layers=[], root_module_types=list(ROOTS)):
        record = read_group(group)
        if not record.producers:
            continue
        unit = units_of(graph, group, record)
        prunable = Prunable(group, record, unit, int(unit.max()) + 1, *_attention_of(graph, group))
        reason = _reason(prunable, made, protected, graph)
        if reason:
            left_whole[record.key], left_records[record.key] = reason, record
            roots.append(group[0].dep.target.module)
        else:
            groups[record.key] = prunable
    return Structure(graph, groups, left_whole, left_records, global_pruning, [*roots, *protected])


def _reason(prunable: Prunable, made: set[Any], protected: set[nn.Module], graph: Any) -> str:
    """Why a group keeps all of its channels; empty if it need not."""
    for dep, idxs in prunable.group:
        if not idxs or not graph.is_out_channel_pruning_fn(dep.handler):
            continue
        if dep.target in made:
            return OUTPUT
        if dep.target.module in protected:
            return "named in ignored_layers"
    if prunable.record.problems:
        return f"Torch-Pruning's index map is impossible ({prunable.record.problems[0]})"
    return "its channels only go all together" if prunable.units < 2 else ""


# -- units -----------------------------------------------------------------------------------------------------


def units_of(graph: Any, group: Any, record: GroupRecord) -> Tensor:
    """``(width,)`` int64: which positions of a full group can only be removed together, numbered from 0.

    Those are positions that Torch-Pruning ties; the same position in each part of a grouped convolution or
    GroupNorm; the same dimension of each head of an attention.
    """
    roots = list(group[0][1])
    position = {root: at for at, root in enumerate(roots)}
    label = torch.arange(len(roots))
    constraints = [] if record.tied is None else [(label, record.tied)]
    for item in group:
        dep, idxs = item
        out = graph.is_out_channel_pruning_fn(dep.handler)
        parts, width = _parts(graph, dep.target, out)
        if parts < 2 or not idxs:
            continue
        pairs = [(position[r], i) for i, r in zip(idxs, item.root_idxs, strict=True) if r in position]
        at = torch.tensor([a for a, _ in pairs])
        constraints.append((at, torch.tensor([i for _, i in pairs]) % (width // parts)))
    return joined(len(roots), constraints)


def joined(width: int, constraints: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The finest partition of ``width`` positions in which each constraint's equal classes are together.

    Args:
        width: number of positions.
        constraints: ``(positions, class of each)`` pairs.

    Example:
        >>> joined(6, [(torch.arange(6), torch.arange(6) % 3), (torch.tensor([0, 1]), torch.tensor([7, 7]))])
        tensor([0, 0, 1, 0, 0, 1])
    """
    label = torch.arange(width)
    constraints = list(constraints)
    while constraints:
        before = label.clone()
        for at, kind in constraints:
            lowest = torch.full((int(kind.max()) + 1,), width).scatter_reduce(0, kind, label[at], "amin")
            label = label.scatter_reduce(0, at, lowest[kind], "amin")
            label = label[label]
        if torch.equal(label, before):
            break
    numbered: Tensor = torch.unique(label, return_inverse=True)[1]
    return numbered


def _parts(graph: Any, node: Any, out: bool) -> tuple[int, int]:
    """Into how many equal parts an item's channels fall that have to stay equal, and the number of channels."""
    module = node.module
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads, module.embed_dim
    if module not in graph._module2name:
        return _heads(node)
    if isinstance(module, nn.Parameter):
        return 1, 1
    if isinstance(module, _ConvNd) and module.groups == module.out_channels == module.in_channels:
        return 1, 1
    pruner = graph.get_pruner_of_module(module)
    parts = pruner.get_out_channel_groups(module) if out else pruner.get_in_channel_groups(module)
    return (parts, (pruner.get_out_channels if out else pruner.get_in_channels)(module)) if parts > 1 else (1, 1)


def _heads(node: Any) -> tuple[int, int]:
    """Heads, and channels of all of them, of an operation that is an attention; ``(1, 1)`` of others."""
    query = getattr(node.grad_fn, "_saved_query", None)
    if not isinstance(query, Tensor) or query.dim() != 4:
        return 1, 1
    return query.shape[1], query.shape[1] * query.shape[3]


def _attention_of(graph: Any, group: Any) -> tuple[int, int]:
    found = [_heads(dep.target) for dep, idxs in group if idxs and dep.target.module not in graph._module2name]
    return max(found, default=(0, 0))


# -- tracing leaves a model as it was --------------------------------------------------------------------------


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Gradients for all parameters inside; modes, flags and attributes of modules as before afterwards.

    Models cache tensors of a forward pass as attributes (LeViT its attention biases); with the graph of a trace
    they can neither be copied nor pruned.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    kept = [(module, _plain_attributes(module)) for module in model.modules()]
    try:
        for p, _ in flags:
            if p.is_floating_point():
                p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, attributes in kept:
            _restore(module, attributes)
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)


_OWN = frozenset(vars(nn.Module()))


def _plain_attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module keeps besides parameters, buffers and submodules: the object, and a copy of containers."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in vars(module).items()
        if name not in _OWN
    }


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in vars(module) if name not in _OWN and name not in attributes]:
        delattr(module, name)
    for name, (value, content) in attributes.items():
        if isinstance(value, (dict, set)):
            value.clear()
            value.update(content)
        elif isinstance(value, list):
            value[:] = content
        if vars(module).get(name) is not value:
            setattr(module, name, value)
