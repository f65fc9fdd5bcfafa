"""A dependency graph of Torch-Pruning whose groups follow where each channel goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.node import Node

from ..errors import IPPROError
from .axes import Axis, axes_of
from .labels import Classes, Facts
from .layout import Layout, decide
from .matrices import MatrixPruner
from .onepass import ForwardFn, fresh_copy, run
from .repaired import RepairedGroup

ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM)


class GraphError(IPPROError):
    """A model cannot be traced, or channels were asked for that cannot be pruned."""


@dataclass(eq=False)
class _Settings:
    inputs: Any
    forward_fn: ForwardFn | None = None
    output_transform: Callable[[Any], Any] | None = None
    ignored: tuple[str, ...] = ()
    keep: dict[str, str] = field(default_factory=dict)


class RepairedGraph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's graph, with groups made of which channel goes where.

    Groups are Torch-Pruning's: its importances and ``group.prune()`` work on them. Their items are layers with
    Torch-Pruning's own pruning functions, and bare parameters, buffers and numbers of modules (head counts, split
    sizes) with functions of :mod:`.axes`.

    Attributes:
        left_whole: by key of a group (``"conv1.out"``), why it keeps all of its channels.
        facts: what the forward pass showed.
        matrices: layers of classes that Torch-Pruning does not know, with what prunes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_whole: dict[str, str] = {}
        self.facts = Facts()
        self.matrices: dict[nn.Module, MatrixPruner] = {}

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: ForwardFn | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        ignored_layers: Iterable[nn.Module] | None = None,
        **_: Any,
    ) -> RepairedGraph:
        """Run a copy of ``model`` once; see :func:`build_graph`."""
        self.model, self.verbose = model, False
        self._module2name = {module: name for name, module in model.named_modules()}
        self._param_to_name = {p: name for name, p in model.named_parameters()}
        self.unwrapped_parameters: list[Any] = []
        self.ignored_params: list[nn.Parameter] = []
        ignored = tuple(self._module2name[m] for m in ignored_layers or () if m in self._module2name)
        self._settings = _Settings(example_inputs, forward_fn, output_transform, ignored)
        try:
            run(
                fresh_copy(model),
                example_inputs,
                self.facts,
                forward_fn=forward_fn,
                output_transform=output_transform,
            )
        except Exception as error:
            raise GraphError(
                f"the model does not run on its example input: {type(error).__name__}: {error}"
            ) from error
        self._tied = _shared_tensors(model)
        self.decide()
        return self

    def decide(self) -> None:
        """Choose anew what can go, after :attr:`_settings` or numbers have changed."""
        facts, settings = self.facts, self._settings
        keep = []
        for (name, axis), slots in facts.slots.items():
            owner = name.rpartition(".")[0]
            ignored = any(owner == i or owner.startswith(f"{i}.") or not i for i in settings.ignored)
            if ignored and self._is_out(name, axis):
                keep.append((slots, "named in ignored_layers"))
        self.layout: Layout = decide(facts, keep=keep)
        self.axes: list[Axis] = axes_of(self.model, facts, self.layout)
        found = {a.owner: a.pruner for a in self.axes if isinstance(a.pruner, MatrixPruner)}
        self.matrices = {self.model.get_submodule(owner): pruner for owner, pruner in found.items()}
        self._nodes: dict[str, Node] = {}
        self.module2node = {self.model.get_submodule(a.owner): self._node(a) for a in self.axes}
        for name, readers in facts.readers.items():
            node = self._nodes.get(name)
            if node is not None:
                node.outputs = [
                    self._nodes[r] if r in self._nodes else Node(nn.Identity(), None, "") for r in readers
                ]
                for after in node.outputs:
                    after.inputs.append(node)
        self._find_groups()

    def tie(self, classes: Classes, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Let channels go together besides those that the pass showed.

        Args:
            classes: what the pass showed.
            pairs: ``(n,)`` labels each.
        """
        self.facts.classes = classes.copy()
        for one, other in pairs:
            self.facts.classes.union(one, other)
        self.decide()

    def _is_out(self, name: str, axis: int) -> bool:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if isinstance(module, nn.modules.conv._ConvNd) and leaf == "weight":
            return axis == int(module.transposed)
        if isinstance(module, nn.Linear) and leaf == "weight":
            return axis == 0
        found = self.facts.matrices.get(owner)
        return found is None or (leaf, axis) != (found[0], found[2])

    def _node(self, axis: Axis) -> Node:
        if axis.owner not in self._nodes:
            self._nodes[axis.owner] = Node(self.model.get_submodule(axis.owner), None, axis.owner)
        return self._nodes[axis.owner]

    def _find_groups(self) -> None:
        """Roots, in the order of the model: each takes the classes that no root before it has."""
        roots = [a for a in self.axes if a.is_root]
        labels = max((int(a.classes.max()) for a in self.axes if a.classes.numel()), default=0) + 1
        group_of = torch.full((labels,), -1, dtype=torch.long)
        chosen: list[Axis] = []
        for axis in roots:
            classes = axis.classes[axis.classes > 0].unique()
            free = classes[group_of[classes] < 0]
            if len(free):
                group_of[free] = len(chosen)
                chosen.append(axis)
        group_of[0] = -1
        members: list[list[tuple[Axis, Tensor]]] = [[] for _ in chosen]
        for axis in self.axes:
            owner = group_of[axis.classes]
            for number in owner.unique().tolist():
                if number >= 0:
                    members[number].append((axis, (owner == number).nonzero().view(-1)))
        self._roots, self._members = chosen, members
        self.left_whole = dict(self._settings.keep)
        for axis in roots:
            if not bool((axis.classes > 0).any()):
                self.left_whole[f"{axis.owner}.out"] = self.layout.why(axis.labels) or "its channels stay"
        self._keys: dict[int, str] = {}
        for number, (axis, own) in enumerate(zip(chosen, members, strict=True)):
            index = next(i for a, i in own if a is axis)
            if axis.classes[index].unique().numel() < 2:
                self.left_whole[f"{axis.owner}.out"] = "its channels only go all together"
            else:
                self._keys[number] = f"{axis.owner}.out"

    def _find_groups_again(self) -> None:
        """After axes were added, or have shrunk."""
        self._settings.keep = dict(self.left_whole)
        self._find_groups()

    # -- what Torch-Pruning and we call -------------------------------------------------------------------------

    def get_all_groups(
        self, ignored_layers: Sequence[nn.Module] = (), root_module_types: Sequence[Any] = ROOTS
    ) -> Iterator[RepairedGroup]:
        """All groups with channels that can go, over all of these channels."""
        ignored = set(ignored_layers)
        for number, key in self._keys.items():
            root, members = self._roots[number], self._members[number]
            layer = self.model.get_submodule(root.owner)
            if key in self.left_whole or not (
                layer in self.matrices or isinstance(layer, tuple(root_module_types))
            ):
                continue
            if any(a.is_output and self.model.get_submodule(a.owner) in ignored for a, _ in members):
                continue
            yield RepairedGroup(self, members, root)

    def is_out_channel_pruning_fn(self, fn: Any) -> bool:
        """Whether a handler prunes output channels."""
        if isinstance(getattr(fn, "__self__", None), MatrixPruner):
            return bool(fn.__name__ == "prune_out_channels")
        return bool(super().is_out_channel_pruning_fn(fn))

    def is_in_channel_pruning_fn(self, fn: Any) -> bool:
        """Whether a handler prunes input channels."""
        if isinstance(getattr(fn, "__self__", None), MatrixPruner):
            return bool(fn.__name__ == "prune_in_channels")
        return bool(super().is_in_channel_pruning_fn(fn))

    def get_pruner_of_module(self, module: nn.Module) -> Any:
        """Torch-Pruning's, or that of a layer of another class."""
        found = self.matrices.get(module)
        return super().get_pruner_of_module(module) if found is None else found

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Any) -> RepairedGroup:
        """The channels ``idxs`` of a layer, and all that go with them.

        Raises:
            GraphError: they have to stay.
        """
        idxs = [idxs] if isinstance(idxs, int) else list(idxs)
        name = self._module2name.get(module)
        root = next((a for a in self.axes if a.owner == name and a.handler == pruning_fn), None)
        if root is None:
            raise GraphError(f"{name!r} has no channels that {getattr(pruning_fn, '__name__', pruning_fn)} prunes")
        wanted = root.classes[torch.tensor(idxs, dtype=torch.long)]
        if bool((wanted == 0).any()):
            raise GraphError(f"channels of {name!r} have to stay: {self.layout.why(root.labels)}")
        return self.group_of(wanted.unique(), root)

    def group_of(self, classes: Tensor, root: Axis) -> RepairedGroup:
        """The group of some classes."""
        members = []
        for axis in self.axes:
            index = torch.isin(axis.classes, classes).nonzero().view(-1)
            if index.numel():
                members.append((axis, index))
        return RepairedGroup(self, members, root)

    def _shrunk(self) -> None:
        """After layers have lost channels."""
        retie(self.model, self._tied)
        self._find_groups_again()
        self._param_to_name = {p: name for name, p in self.model.named_parameters()}

    def keep_whole(self, key: str, reason: str) -> None:
        """Leave a group whole."""
        self.left_whole[key] = reason


def _shared_tensors(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def retie(model: nn.Module, tied: Iterable[Sequence[str]]) -> None:
    """Make parameters of several names one tensor again, after that of the first name was pruned."""
    for first, *others in tied:
        owner, _, leaf = first.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, tensor)


def build_graph(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    ignored_layers: Iterable[nn.Module] = (),
) -> RepairedGraph:
    """Find which channels of a model go together, by one forward pass of a copy.

    No operation makes it fail: channels that enter something that is not understood stay.

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        forward_fn: ``(model, example_inputs) -> outputs``, instead of a plain call.
        output_transform: picks the outputs that matter.
        ignored_layers: layers, or modules all of whose layers, keep their output channels.

    Raises:
        GraphError: the model does not run on the example input.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2))
        >>> [len(group[0].idxs) for group in build_graph(net, torch.randn(1, 4)).get_all_groups()]
        [8]
    """
    return RepairedGraph().build_dependency(model, example_inputs, forward_fn, output_transform, ignored_layers)
