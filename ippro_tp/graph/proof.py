"""Proof of groups: a copy without some channels computes what the original computes without them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .axes import Axis, number_axis
from .dependency import RepairedGraph, retie
from .numbers import proposals
from .onepass import call, fresh_copy, plain_operations, run, tensors_in

TOLERANCE = 1e-4
DOUBLE = 30_000_000
"""Models with fewer parameters are compared in double precision, where rounding hides nothing."""
Leaves = set[tuple[str, str]]
Status = Literal["proved", "repaired", "whole"]
KEPT = 32
"""Architectures whose verdicts are remembered."""
_KNOWN: dict[str, tuple[dict[str, Verdict], list[tuple[str, str, int | None, Tensor]]]] = {}


@dataclass(frozen=True)
class Verdict:
    """What is known of a group.

    Attributes:
        status: ``"proved"``; ``"repaired"``: proved after numbers that modules keep were found by trial, or with
            dimensions of heads instead of heads; ``"whole"``: left as it is.
        reason: why it is left whole, or what was repaired; empty for ``"proved"``.
    """

    status: Status
    reason: str = ""


def prove(graph: RepairedGraph, *, seed: int = 0) -> Mapping[str, Verdict]:
    """Try every group on copies of the model, all at once where that works, and leave whole what fails.

    Args:
        graph: of the unpruned model; what fails is entered in its ``left_whole``, numbers that were found are
            added to its axes.
        seed: of the channels that are tried.

    Returns:
        By key of the group, those that the graph left whole included.
    """
    print_of = _fingerprint(graph)
    if print_of in _KNOWN:
        verdicts, numbers = _KNOWN[print_of]
        graph.axes += [number_axis(*number, graph.layout) for number in numbers]
        graph._find_groups_again()
    else:
        axes = len(graph.axes)
        with torch.random.fork_rng(devices=[]):
            verdicts = _Bench(graph, seed).prove()
        found = [(a.owner, a.pruner.leaf, a.pruner.entry, a.labels.clone()) for a in graph.axes[axes:]]
        if len(_KNOWN) >= KEPT:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[print_of] = (verdicts, found)
    for key, verdict in verdicts.items():
        if verdict.status == "whole":
            graph.keep_whole(key, verdict.reason)
    return verdicts


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
    dead = torch.isin(classes.find(torch.arange(len(classes))), removed)
    dead[0] = False
    settings = graph._settings
    return run(
        model,
        _like(settings.inputs, model),
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
    with torch.no_grad():
        for axis in graph.axes if axes is None else axes:
            gone = torch.isin(axis.classes, removed).nonzero().view(-1)
            if gone.numel():
                axis.pruner.pruning_dim = -1
                axis.handler(model.get_submodule(axis.owner), gone.tolist())
    retie(model, graph._tied)


class _Bench:
    """The copies that groups are tried on."""

    def __init__(self, graph: RepairedGraph, seed: int) -> None:
        self.graph, self.seed = graph, seed
        self.model = _spread(fresh_copy(graph.model), seed)
        small = sum(p.numel() for p in self.model.parameters()) < DOUBLE
        self.wide = small and self._run(self.model.double()) is not None
        if small and not self.wide:
            self.model = _spread(fresh_copy(graph.model), seed)
        self.tolerance = 1e-7 if self.wide else TOLERANCE
        self.numbers: list[Axis] = []
        self.why: dict[str, str] = {}
        self.worked: list[Leaves] = []
        self.failed: str | None = None

    def prove(self) -> dict[str, Verdict]:
        graph = self.graph
        verdicts = {key: Verdict("whole", reason) for key, reason in graph.left_whole.items()}
        keys = [k for k in graph._keys.values() if k not in graph.left_whole]
        self.numbers = proposals(graph)
        passed = self._passing(keys)
        repaired = self._repair([key for key in keys if key not in passed])
        passed = self._together([*passed, *repaired])
        for key in keys:
            if key not in passed:
                verdicts[key] = Verdict("whole", self.why.get(key, "it fails together with others"))
            elif key in repaired:
                verdicts[key] = Verdict("repaired", repaired[key])
            else:
                verdicts[key] = Verdict("proved")
        graph.axes += self._used(passed)
        graph._find_groups_again()
        return verdicts

    def _used(self, keys: Sequence[str]) -> list[Axis]:
        classes = torch.cat([torch.zeros(1, dtype=torch.long), *(self._classes(key) for key in keys)])
        classes = classes[classes > 0]
        return [axis for axis in self.numbers if bool(torch.isin(axis.classes, classes).any())]

    def _passing(self, keys: list[str], share: float = 0.0) -> list[str]:
        """Those of ``keys`` that pass: tried together, then without the kinds around the module that failed."""
        if not keys:
            return []
        problem = self._try(keys, share)
        if problem is None:
            return keys
        if len(keys) == 1:
            self.why[keys[0]] = problem
            return []
        kinds = list(dict.fromkeys(map(_kind, keys)))
        if len(kinds) == 1:
            return self._of_one_kind(keys, share)
        near = {_kind(key) for key in keys if self._near(key, self.failed)} if self.failed is not None else set()
        if not near or len(near) == len(kinds):
            near = set(kinds[: len(kinds) // 2])
        passed = self._passing([key for key in keys if _kind(key) not in near], share)
        for kind in kinds:
            if kind in near:
                passed += self._passing([key for key in keys if _kind(key) == kind], share)
        return passed

    def _of_one_kind(self, keys: list[str], share: float) -> list[str]:
        """The same of groups at the same place of repeated blocks: where the first and the last fail, all do."""
        ends = [keys[0], keys[-1]] if len(keys) > 1 else keys
        passed = [key for key in ends if self._passing([key], share)]
        rest = keys[1:-1]
        if not passed:
            if rest and self._try(rest, share) is None:
                return rest
            for key in rest:
                self.why[key] = self.why[keys[0]]
            return []
        half = len(rest) // 2
        return passed + self._passing(rest[:half], share) + self._passing(rest[half:], share)

    def _near(self, key: str, failed: str) -> bool:
        """Whether a group has a layer in the module, or in its parent where it has none itself."""
        number = next(n for n, k in self.graph._keys.items() if k == key)
        return any(a.owner == failed or a.owner.startswith(f"{failed}.") for a, _ in self.graph._members[number])

    def _together(self, keys: list[str]) -> list[str]:
        """Those that pass together, with a quarter of their units gone."""
        passed = self._passing(keys, 0.25)
        if not passed or len(passed) == len(keys) or self._try(passed, 0.25) is None:
            return passed
        kept: list[str] = []
        for key in passed:
            if self._try([*kept, key], 0.25) is None:
                kept.append(key)
        return kept

    def _repair(self, keys: list[str]) -> dict[str, str]:
        """Keys that pass with other numbers; what was found for one is tried on all of its kind."""
        repaired: dict[str, str] = {}
        if not keys:
            return repaired
        more = proposals(self.graph, children=True)
        for kind in dict.fromkeys(map(_kind, keys)):
            waiting = [key for key in keys if _kind(key) == kind]
            while waiting:
                found = self._repaired([waiting[0]], more)
                if found is None:
                    break
                done = [waiting[0]]
                if len(waiting) > 1 and self._repaired(waiting[1:], more, [found]) is not None:
                    done = waiting
                names = ", ".join(sorted(f"{owner}.{leaf}" for owner, leaf in found))
                repaired |= dict.fromkeys(done, f"numbers found by trial: {names or 'none'}")
                waiting = waiting[len(done) :]
        return repaired

    def _repaired(self, keys: list[str], more: list[Axis], trials: list[Leaves] | None = None) -> Leaves | None:
        """Numbers with which these groups pass together; they stay in force."""
        classes = torch.cat([self._classes(key) for key in keys])
        mine = [a for a in more if bool(torch.isin(a.classes, classes).any())]
        leaves = list(dict.fromkeys(self._leaf(a) for a in mine))
        others = [a for a in self.numbers if not bool(torch.isin(a.classes, classes).any())]
        if trials is None:
            trials = [set(), *({leaf} for leaf in leaves)]
            trials += [set(leaves) - {leaf} for leaf in leaves if len(leaves) > 2]
            trials = sorted(trials, key=lambda t: t not in self.worked)[:10]
        known = self.numbers
        for trial in trials:
            self.numbers = [*others, *(a for a in mine if self._leaf(a) in trial)]
            if self._try(keys, 0.0) is None:
                self.worked.append(trial)
                return trial
        self.numbers = known
        return None

    def _leaf(self, axis: Axis) -> tuple[str, str]:
        return type(self.graph.model.get_submodule(axis.owner)).__name__, axis.pruner.leaf

    def _classes(self, key: str) -> Tensor:
        graph = self.graph
        number = next(n for n, k in graph._keys.items() if k == key)
        root, members = graph._roots[number], graph._members[number]
        index = next(i for a, i in members if a is root)
        found: Tensor = root.classes[index].unique()
        return found

    def _try(self, keys: Sequence[str], share: float) -> str | None:
        """What goes wrong when units of these groups go; ``None`` if nothing does."""
        random = torch.Generator().manual_seed(self.seed)
        chosen = []
        for number, key in enumerate(keys):
            classes = self._classes(key)
            # Not as many of each: widths that have to be the same would still be.
            count = max(1, int(share * len(classes))) + number % (4 if share else 3)
            count = min(count, len(classes) - 1)
            chosen.append(classes[torch.randperm(len(classes), generator=random)[:count]])
        removed = torch.cat(chosen)
        pruned = fresh_copy(self.model, shared=True)
        self.failed = None
        try:
            cut(self.graph, pruned, removed, [*self.graph.axes, *self.numbers])
            found = self._run(pruned, quiet=False)
        except Exception as error:  # whatever a model can raise when its widths do not fit
            self.failed = _module_of(error, pruned)
            return f"pruned, it does not run: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:200]
        torch.manual_seed(self.seed)
        wanted = reference_outputs(self.graph, self.model, removed)
        gap = difference(found or [], wanted)
        if gap <= self.tolerance:
            return None
        return f"pruned, it differs from the original without these channels by {gap:.1e}"

    def _run(self, model: nn.Module, quiet: bool = True) -> list[Tensor] | None:
        settings = self.graph._settings
        try:
            torch.manual_seed(self.seed)
            with plain_operations():
                out = call(model, _like(settings.inputs, model), settings.forward_fn)
                return list(
                    tensors_in(out if settings.output_transform is None else settings.output_transform(out))
                )
        except Exception:
            if quiet:
                return None
            raise


def _kind(key: str) -> str:
    """What keys of groups at the same place of repeated blocks have in common."""
    return re.sub(r"[0-9]+", "#", key)


def _module_of(error: Exception, model: nn.Module) -> str | None:
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


def _like(inputs: Any, model: nn.Module) -> Any:
    """``inputs`` in the precision of the model."""
    double = any(p.dtype == torch.float64 for p in model.parameters())
    if not double:
        return inputs
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _like(value, model) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_like(value, model) for value in inputs)
    return inputs


def _spread(model: nn.Module, seed: int) -> nn.Module:
    """Noise on parameters of one number: a branch that is multiplied by 0 or 1e-6 would prove nothing."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all()):
                noise = torch.rand(tensor.shape, generator=random).to(tensor)
                tensor.add_(noise, alpha=0.5 if "running" in name or bool((tensor > 0.5).all()) else 0.1)
    return model


def _fingerprint(graph: RepairedGraph) -> str:
    """What two graphs of one architecture, of the same widths, numbers and kind of input share."""
    lines = []
    for name, module in graph.model.named_modules():
        numbers = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple, list))}
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {numbers}")
    tensors = (*graph.model.named_parameters(), *graph.model.named_buffers())
    lines += [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in tensors]
    lines += [str(tuple(t.shape)) for t in tensors_in(graph._settings.inputs)]
    lines += [str(axis.classes.tolist()) for axis in graph.axes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
