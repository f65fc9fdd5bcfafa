"""What a trial of a cut needs: the cut, the original without the channels, and how far the two are apart."""

from __future__ import annotations

import dis
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .axes import Axis, NumberPruner
from .dependency import RepairedGraph, retie
from .onepass import call, fresh_copy, plain_operations, run, tensors_in

NO_RUN, REFUSED = "pruned, it does not run", "pruned, it refuses to run"
TOLERANCE = 1e-4
CLOSE = 5e-6
"""In single precision a difference up to this is rounding; smaller models with more are compared in double."""
DOUBLE = 30_000_000
"""Models with fewer parameters are compared in double precision, where rounding hides nothing."""
FINE = 1e-6
"""Tolerance in double precision: some layers (Llama's norms) compute in single precision all the same."""
CONTAINERS = (dict, OrderedDict, list, set)


class Trial:
    """Copies of a model that lose channels and get them back.

    Args:
        graph: of the model.
        seed: of random numbers that the model draws, and of those that replace constant parameters.
    """

    def __init__(self, graph: RepairedGraph, seed: int) -> None:
        self._graph, self._seed = graph, seed
        self._model = spread(fresh_copy(graph.model, shared=True), seed)
        self._double: nn.Module | None = None
        self._failed: str | None = None
        self._last: tuple[list[Tensor], nn.Module, State] | None = None

    def __call__(self, removed: Tensor, axes: Sequence[Axis]) -> tuple[str | None, str | None]:
        """What is wrong without some classes of channels, and the name of the module that raised an exception.

        Args:
            removed: ``(n,)`` classes.
            axes: what shrinks.

        Returns:
            ``(None, None)`` if nothing is wrong.
        """
        self._failed = None
        gap, problem = self._gap(self._model, removed, axes)
        tolerance = TOLERANCE
        if problem is None and not gap <= CLOSE and (double := self._doubled()) is not None:
            tolerance, (gap, problem) = FINE, self._gap(double, removed, axes)
        if problem is None and not gap <= tolerance:
            problem = f"pruned, it differs from the original without these channels by {gap:.1e}"
        return problem, self._failed

    def _doubled(self) -> nn.Module | None:
        """A copy in double precision, of models that are small and can be run in it."""
        if self._double is None and sum(p.numel() for p in self._model.parameters()) < DOUBLE:
            try:
                self._double = fresh_copy(self._model).double()
                self._run(self._double)
            except Exception:  # whatever layers raise that know no double precision
                self._double = nn.Identity()
        return None if isinstance(self._double, nn.Identity) else self._double

    def _gap(self, model: nn.Module, removed: Tensor, axes: Sequence[Axis]) -> tuple[float, str | None]:
        """How far ``model`` without these classes is from what it should be, or why it does not run."""
        with restored(model):
            try:
                self._cut(model, removed, axes)
                found = self._run(model)
            except Exception as error:  # whatever a model can raise when its widths do not fit
                self._failed = module_of(error, model)
                what = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
                return float("inf"), f"{REFUSED if refuses(error) else NO_RUN}: {what}"[:200]
        torch.manual_seed(self._seed)
        with restored(model):
            return difference(found, reference_outputs(self._graph, model, removed)), None

    def _cut(self, model: nn.Module, removed: Tensor, axes: Sequence[Axis]) -> None:
        """Cut ``model``: its tensors as the last time, where the same classes go and only numbers differ."""
        numbers = [axis for axis in axes if isinstance(axis.pruner, NumberPruner)]
        tensors = [axis for axis in axes if not isinstance(axis.pruner, NumberPruner)]
        known = [removed, *(axis.classes for axis in tensors)]
        if self._last is not None and self._last[1] is model and _same(self._last[0], known):
            self._last[2].put()
            return cut(self._graph, model, removed, numbers)
        self._last = None
        cut(self._graph, model, removed, tensors)
        self._last = (known, model, State(model))
        return cut(self._graph, model, removed, numbers)

    def _run(self, model: nn.Module) -> list[Tensor]:
        settings = self._graph._settings
        torch.manual_seed(self._seed)
        with plain_operations():
            out = call(model, like(settings.inputs, model), settings.forward_fn)
            return list(tensors_in(out if settings.output_transform is None else settings.output_transform(out)))


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether the same classes go (the first of each), of the very same axes."""
    same = len(one) == len(other) and all(a is b for a, b in zip(one[1:], other[1:], strict=True))
    return same and torch.equal(one[0], other[0])


def reference_outputs(graph: RepairedGraph, model: nn.Module, removed: Tensor) -> list[Tensor]:
    """Outputs of the unpruned ``model`` in which channels are left out where they are read.

    Products read zeros; norms, means, maxima and softmax over the axis see the channels that remain; attention
    keeps the scale of its logits.

    Args:
        graph: of ``model`` or of a copy of it.
        model: a copy that may be run.
        removed: ``(n,)`` classes that are left out.
    """
    classes = graph.layout.classes
    facts = replace(graph.facts, classes=classes)
    dead = marked(len(classes), removed)[classes.find(torch.arange(len(classes)))]
    dead[0] = False
    settings = graph._settings
    return run(
        model,
        like(settings.inputs, model),
        facts,
        removed=dead,
        forward_fn=settings.forward_fn,
        output_transform=settings.output_transform,
    )


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of the outputs, relative to the largest value of each; infinite for other shapes."""
    if len(found) != len(wanted):
        return float("inf")
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if not one.numel():
            continue
        one, other = one.detach().double(), other.detach().double()
        if not bool(torch.equal(one.isfinite(), other.isfinite())):
            return float("inf")
        one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
        worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(1e-12)))
    return worst


def cut(graph: RepairedGraph, model: nn.Module, removed: Tensor, axes: Sequence[Axis] | None = None) -> None:
    """Remove classes of channels from ``model``, a copy of the graph's."""
    dead = marked(len(graph.layout.classes), removed)
    with torch.no_grad():
        for axis in graph.axes if axes is None else axes:
            gone = dead[axis.classes].nonzero().view(-1)
            if gone.numel():
                axis.pruner.pruning_dim = -1
                axis.handler(model.get_submodule(axis.owner), gone.tolist())
    retie(model, graph._tied)


def module_of(error: Exception, model: nn.Module) -> str | None:
    """Name of the innermost module with code of its own in whose forward pass an error arose."""
    names = {module: name for name, module in model.named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names and trace.tb_frame.f_code.co_name != "_call_impl":
            found = owner
        trace = trace.tb_next
    if found is None:
        return None
    name: str = names[found]
    return name.rpartition(".")[0] if type(found).__module__.startswith("torch.nn") else name


def refuses(error: Exception) -> bool:
    """Whether a ``raise`` or ``assert`` of Python's made an error, and not an operation that does not fit."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    instructions = {i.offset: i.opname for i in dis.get_instructions(trace.tb_frame.f_code)}
    return instructions.get(trace.tb_lasti) == "RAISE_VARARGS"


def marked(size: int, chosen: Tensor) -> Tensor:
    """``(size,)`` boolean, true at the numbers ``chosen``."""
    made = torch.zeros(size, dtype=torch.bool)
    made[chosen] = True
    return made


class State:
    """What is set on the modules of ``model`` now: tensors, numbers, lists and dicts, not what tensors hold."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
        containers = [v for _, kept in self._attributes for v in kept.values() if type(v) in CONTAINERS]
        self._held = [(v, v.copy()) for v in containers if v]
        self._empty = [v for v in containers if not v]

    def put(self) -> None:
        """Set it again."""
        for now, kept in (*self._attributes, *self._held):
            now.clear()
            now.extend(kept) if isinstance(now, list) else now.update(kept)
        for container in self._empty:
            container.clear()


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever is set on the modules of ``model`` inside is undone."""
    state = State(model)
    try:
        yield
    finally:
        state.put()


def like(inputs: Any, model: nn.Module) -> Any:
    """``inputs`` in the precision of the model."""
    if any(p.dtype == torch.float64 for p in model.parameters()):
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return inputs


def spread(model: nn.Module, seed: int) -> nn.Module:
    """Noise on parameters of one number: a branch that is multiplied by 0 or 1e-6 would prove nothing.

    They are made anew: others may share them.
    """
    random = torch.Generator().manual_seed(seed)
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not _constant(tensor):
                continue
            if id(tensor) not in made:
                with torch.no_grad():
                    noise = torch.rand(tensor.shape, generator=random).to(tensor)
                    large = "running" in leaf or bool((tensor > 0.5).all())
                    moved = tensor + noise * (0.5 if large else 0.1)
                own = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = (tensor, nn.Parameter(moved, tensor.requires_grad) if own else moved)
            setattr(module, leaf, made[id(tensor)][1])
    return model


def _constant(tensor: Tensor) -> bool:
    """Whether all elements of a floating-point tensor are one number."""
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return False
    flat = tensor.detach().reshape(-1)
    return bool(flat[0] == flat[1]) and bool((flat == flat[0]).all())
