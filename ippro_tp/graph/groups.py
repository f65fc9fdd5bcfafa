"""Reading Torch-Pruning's groups: which layers share channels, as index tensors. The only walk over a group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning._helpers import _HybridIndex as HybridIndex

from ..errors import StaleStatisticsError
from ..layers import NOT_PRODUCERS, is_writer
from ..records import GroupRecord, Layer
from .matrices import matrices_of


class Graph(Protocol):
    """What is used of ``torch_pruning.DependencyGraph``."""

    model: nn.Module
    _module2name: dict[nn.Module, str]

    def get_all_groups(self, ignored_layers: list[nn.Module], root_module_types: Any) -> Iterator[Any]:
        """All groups, full width."""

    def is_out_channel_pruning_fn(self, fn: Any) -> bool:
        """Whether a handler prunes output channels (also true of element-wise layers)."""

    def is_in_channel_pruning_fn(self, fn: Any) -> bool:
        """Whether a handler prunes input channels (also true of element-wise layers)."""

    def get_out_channels(self, module: nn.Module) -> int | None:
        """Number of output channels now."""

    def get_in_channels(self, module: nn.Module) -> int | None:
        """Number of input channels now."""


def group_key(group: Any) -> str:
    """Name the root of a group, for example ``"conv1.out"``."""
    graph: Graph = group._DG
    dep = group[0][0]
    side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"
    name = graph._module2name.get(dep.target.module)
    if name is None:  # an operation; its name is costly, for it describes the module
        name = str(dep.target.name)
    return f"{name}.{side}"


def index_tensor(idxs: list[int]) -> Tensor:
    """``idxs`` as int64; most are a run of numbers, which need not be converted one by one.

    Example:
        >>> index_tensor([3, 4, 5]), index_tensor([2, 6])
        (tensor([3, 4, 5]), tensor([2, 6]))
    """
    if idxs and idxs == list(range(idxs[0], idxs[0] + len(idxs))):
        return torch.arange(idxs[0], idxs[0] + len(idxs))
    return torch.tensor(idxs, dtype=torch.long)


def _positions(roots: list[int | None], root_idxs: list[int]) -> tuple[Tensor | None, Tensor]:
    """Where each entry of ``roots`` stands in ``root_idxs``: ``(kept entries or None for all, positions)``."""
    if roots == root_idxs:
        return None, torch.arange(len(roots))
    root = index_tensor([-1 if r is None else r for r in roots])
    lookup = torch.full((max(root_idxs, default=0) + 1,), -1, dtype=torch.long)
    lookup[index_tensor(root_idxs)] = torch.arange(len(root_idxs))
    inside = (root >= 0) & (root < lookup.numel())
    position = torch.where(inside, lookup[root.clamp(0, lookup.numel() - 1)], -1)
    kept = (position >= 0).nonzero().view(-1)
    return kept, position[kept]


def _members(group: Any) -> tuple[str, ...]:
    names: dict[nn.Module, str] = group._DG._module2name
    return tuple([names.get(item[0].target.module, "") for item in group])


def is_unchanged(record: GroupRecord, group: Any) -> bool:
    """Whether ``group`` has the root, the layers and the widths of ``record``; its indices are not looked at.

    A partial group may lack some layers, and is then called changed.
    """
    if record.key != group_key(group) or record.members != _members(group):
        return False
    graph: Graph = group._DG
    return all(graph.get_out_channels(graph.model.get_submodule(p.name)) == p.channels for p in record.producers)


def _tied(group: Any) -> Tensor | None:
    """Which positions Torch-Pruning removes together, although its full group lists them one by one.

    Where positions meet (the halves of a gated linear unit in a product) an item lists the index of the first
    comer only, or several times; removing one position removes the others all the same. So the edges are walked
    once more, and positions that reach the same index of the same layer are united. Groups whose items all list
    every position, at an index of its own, are not walked: nothing has met.
    """
    if (unit := getattr(group, "unit", None)) is not None:  # a group of ours knows
        first_of = torch.full((int(unit.max()) + 1,), len(unit)).scatter_reduce(
            0, unit, torch.arange(len(unit)), "amin"
        )
        tied = first_of[unit]
        return None if torch.equal(tied, torch.arange(len(tied))) else tied
    root_idxs = list(group[0][1])
    everything = set(root_idxs)
    listed = [item for item in group if getattr(item, "root_idxs", None) and None not in item.root_idxs]
    if not any(
        item.root_idxs != root_idxs
        and (not everything.issubset(item.root_idxs) or len(set(item.idxs)) < len(item.idxs))
        for item in listed
    ):
        return None
    reached = {
        (item.dep.target, item.dep.handler): list(map(HybridIndex, item.idxs, item.root_idxs)) for item in listed
    }
    first = {root: root for root in root_idxs}

    def find(root: int) -> int:
        while first[root] != root:
            first[root] = root = first[first[root]]
        return root

    def unite(known: dict[int, int], indices: list[Any]) -> None:
        for idx, root in indices:
            if root in first and known.get(idx, root) in first:
                one, other = find(root), find(known.get(idx, root))
                first[max(one, other)] = min(one, other)

    roots_at = {key: dict(indices) for key, indices in reached.items()}
    for (node, handler), indices in reached.items():
        unite(roots_at[node, handler], indices)
        for dep in node.dependencies:
            there = roots_at.get((dep.target, dep.handler))
            if there is None or not dep.is_triggered_by(handler):
                continue
            mapped = indices
            for mapping in dep.index_mapping:
                mapped = mapping(mapped) if mapping is not None else mapped
            unite(there, mapped)
    position = {root: at for at, root in enumerate(root_idxs)}
    tied = torch.tensor([position[find(root)] for root in root_idxs])
    return None if torch.equal(tied, torch.arange(len(tied))) else tied


def read_group(group: Any) -> GroupRecord:
    """Turn a ``torch_pruning`` group, full or partial, into index tensors.

    Args:
        group: a ``tp.dependency.Group``; it is not modified.

    Returns:
        The record. ``index`` and ``root`` live on the CPU.
    """
    graph: Graph = group._DG
    matrices = matrices_of(graph)
    root_idxs = list(group[0][1])
    producers: dict[str, Layer] = {}
    consumers: dict[str, Layer] = {}
    others: dict[str, Layer] = {}
    problems: list[str] = []
    for item in group:
        dep, idxs = item
        module = dep.target.module
        roots = getattr(item, "root_idxs", None)
        if not isinstance(module, nn.Module) or module not in graph._module2name or not idxs or not roots:
            continue
        out = graph.is_out_channel_pruning_fn(dep.handler)
        elementwise = out and graph.is_in_channel_pruning_fn(dep.handler)
        produces = out and not isinstance(module, NOT_PRODUCERS) and (not elementwise or is_writer(module))
        inputs = not out and graph.is_in_channel_pruning_fn(dep.handler)  # else a number that a module keeps
        consumes = inputs and (isinstance(module, (_ConvNd, nn.Linear)) or module in matrices)
        reads = inputs and not consumes and not isinstance(module, NOT_PRODUCERS)
        if not produces and not consumes and not reads:
            continue
        name = graph._module2name[module]
        channels = (graph.get_out_channels if out else graph.get_in_channels)(module)
        if channels is None or max(idxs) >= channels:
            problems.append(f"{name}: index {max(idxs)} of {channels} channels")
            continue
        kept, position = _positions(roots, root_idxs)
        index = index_tensor(idxs) if kept is None else index_tensor(idxs)[kept]
        side = producers if produces else consumers if consumes else others
        side.setdefault(name, Layer(name, index, position, channels))
    return GroupRecord(
        group_key(group),
        len(root_idxs),
        tuple(producers.values()),
        tuple(consumers.values()),
        tuple(problems),
        _members(group),
        _tied(group) if not problems else None,  # where indices cannot be right, nor can what they meet
        tuple(others.values()),
    )


def graph_of(target: Any) -> Graph | None:
    """The dependency graph of a pruner, or the graph itself; ``None`` for anything else."""
    graph = getattr(target, "DG", target)
    return graph if isinstance(graph, tp.DependencyGraph) else None


def groups_of(target: Any) -> Iterator[Any]:
    """All groups that a pruner's ``step()`` will score, rooted as it will root them.

    Args:
        target: a ``torch_pruning`` pruner or ``DependencyGraph``.

    Yields:
        Full groups. With ``num_heads`` an attention group is rooted at the layer after it, as TP does.
    """
    graph = graph_of(target)
    if graph is None:
        raise TypeError(f"expected a torch_pruning pruner or DependencyGraph, got {type(target).__name__}")
    ignored = list(getattr(target, "ignored_layers", []))
    types = getattr(target, "root_module_types", [tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM])
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=types):
        if hasattr(target, "_is_atten_group") and target._is_atten_group(group)[0]:
            group = target._downstream_node_as_root_if_attention(group)
            if group is None:
                continue
        yield group


_READ: WeakKeyDictionary[Any, tuple[Any, tuple[GroupRecord, ...]]] = WeakKeyDictionary()
"""By pruner or graph: what the groups depended on when they were read, and their records."""


def records_of(target: Any) -> tuple[GroupRecord, ...]:
    """Records of :func:`groups_of`, read anew only if the model or what the target ignores has changed.

    Torch-Pruning's search for groups takes longer than calibration in networks that split and concatenate.
    What knows its own records already has them as ``group_records``.
    """
    known = getattr(target, "group_records", None)
    if known is not None:
        return tuple(known)
    graph = graph_of(target)
    if graph is None:
        return tuple(map(read_group, groups_of(target)))
    state = (
        tuple((name, id(p), p.shape) for name, p in graph.model.named_parameters()),
        tuple(map(id, getattr(target, "ignored_layers", ()))),
        tuple(getattr(target, "root_module_types", ())),
        tuple((id(layer), heads) for layer, heads in getattr(target, "num_heads", {}).items()),
    )
    if target not in _READ or _READ[target][0] != state:
        _READ[target] = state, tuple(map(read_group, groups_of(target)))
    return _READ[target][1]


def check_widths(record: GroupRecord, current: GroupRecord) -> None:
    """Make sure that the layers of ``record`` still have the channels they had.

    Args:
        record: the group as it was when statistics were gathered.
        current: the group as it is now.

    Raises:
        StaleStatisticsError: a layer was pruned or replaced in between.
    """
    then = {layer.name: layer.channels for layer in record.producers}
    for layer in current.producers:
        if layer.name not in then:
            raise StaleStatisticsError(
                f"group {current.key!r} now holds {layer.name!r}, which was not in it during calibration: the "
                "model has changed. Calibrate again."
            )
        if then[layer.name] != layer.channels:
            raise StaleStatisticsError(
                f"{layer.name!r} has {layer.channels} channels but had {then[layer.name]} during calibration: "
                "the model has been pruned since. Calibrate again before the next step."
            )
