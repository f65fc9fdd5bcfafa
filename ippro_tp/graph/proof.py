"""Proof of groups: a copy without some channels computes what the original computes without them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .axes import number_axis
from .bench import Bench
from .dependency import RepairedGraph
from .onepass import tensors_in
from .verdicts import Verdict

KEPT = 32
"""Architectures whose verdicts are remembered."""
Number = tuple[str, str, int | None, Tensor]
_KNOWN: dict[str, tuple[dict[str, Verdict], list[Number], list[tuple[Tensor, Tensor]]]] = {}


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
        verdicts, numbers, ties = _KNOWN[print_of]
        if ties:
            graph.tie(graph.facts.classes, ties)
        graph.axes += [number_axis(*number, graph.layout) for number in numbers]
        graph._find_groups_again()
    else:
        with torch.random.fork_rng(devices=[]):
            bench = Bench(graph, seed)
            verdicts = bench.prove()
        found = [(a.owner, a.pruner.leaf, a.pruner.entry, a.labels.clone()) for a in bench.used]
        if len(_KNOWN) >= KEPT:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[print_of] = (verdicts, found, bench.ties)
    for key, verdict in verdicts.items():
        if verdict.status == "whole":
            graph.keep_whole(key, verdict.reason)
    return verdicts


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
