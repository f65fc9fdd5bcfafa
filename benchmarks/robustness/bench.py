"""A line on the bench: fresh models, pruners, calibrations, errors; what all checks use."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ippro_tp
from benchmarks.robustness.line import Line, Probe, call, count, flat, leaves, picked
from benchmarks.robustness.reference import expected_scores
from ippro_tp import Compensation, PROImportance, update_attention
from ippro_tp.graph.groups import read_group

FEW, BATCH = 5, 8


class Bench:
    """Makes what the checks of one line need.

    Args:
        line: the line.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self.many, self.fresh = line.inputs(line.samples), line.inputs(line.samples, seed=1)
        self.tp_error: str | None = None
        self.plain: nn.Module | None = None  # pruned, not compensated
        bfloat16 = any(p.dtype == torch.bfloat16 for p in line.model().parameters())
        self.tolerance = 0.05 if bfloat16 else 2e-3

    def model(self, planted: bool = True) -> nn.Module:
        """A new instance, always the same."""
        return (self.line if planted else dataclasses.replace(self.line, plant=None)).model()

    def pruner(self, model: nn.Module, importance: Any, **options: Any) -> Any:
        """A plain pruner of Torch-Pruning."""
        fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "channel_groups": {}}
        options = {"pruning_ratio": 0.3, "max_pruning_ratio": 0.9, "num_heads": {}, **fresh, **options}
        example = picked(self.many, 0, 1)
        return tp.pruner.BasePruner(
            model,
            example,
            importance,
            ignored_layers=self.line.kept(model),
            forward_fn=call,
            output_transform=lambda out: sum(t.float().sum() for t in leaves(self.line.outputs(out))),
            **options,
        )

    def groups(self, pruner: Any) -> list[Any]:
        """The groups that the pruner would score."""
        return list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types))

    def calibrated(
        self, pruner: Any, inputs: Any, sizes: int | list[int], imp: PROImportance, loss: Any
    ) -> PROImportance:
        """Calibrate in a loop of our own; ``loss(outputs, number of the first sample)``."""
        total, first = count(inputs), 0
        sizes = [sizes] * -(-total // sizes) if isinstance(sizes, int) else sizes
        with imp.observe(pruner):
            for size in sizes:
                part = picked(inputs, first, min(first + size, total))
                loss(call(pruner.model, part), first).backward()
                first += size
        return imp

    def scores_of(self, sizes: int | list[int], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores of all groups, and those of the reference."""
        model, imp = self.model(planted=False), PROImportance(**options)
        few = picked(self.many, 0, FEW)
        with torch.no_grad():
            probe = Probe(self.line, call(model, few))
        pruner = self.pruner(model, imp, global_pruning=True)
        self.calibrated(pruner, few, sizes, imp, probe)
        groups = self.groups(pruner)
        found = {read_group(g).key: imp(g) for g in groups}
        reference = (
            expected_scores(model, groups, few, probe, stood_for(imp.state_dict()))
            if options.get("reference") == "origin"
            else {}
        )
        return {k: v for k, v in found.items() if v is not None}, reference

    def step(self, model: nn.Module, compensate: bool, **options: Any) -> str:
        """Calibrate with the package's own loss and prune; what compensation reported."""
        imp, comp = PROImportance(), Compensation()
        pruner = self.pruner(model, imp, global_pruning=True, **options)
        self.calibrate(pruner, imp)
        if not compensate:
            pruner.step()
            update_attention(pruner)
            return ""
        with comp.observe(pruner), torch.no_grad():
            for first in range(0, self.line.samples, BATCH):
                call(model, picked(self.many, first, first + BATCH))
        return str(comp.step(pruner))

    def calibrate(self, pruner: Any, imp: PROImportance) -> None:
        """Calibrate by the one call, or by a loop where the inputs are no batch of a loader."""
        if isinstance(self.many, list):
            loss = ippro_tp.LogitNoise()
            self.calibrated(pruner, self.many, BATCH, imp, lambda out, _: loss(self.line.outputs(out), None))
            return
        loader = [(picked(self.many, at, at + BATCH), None) for at in range(0, self.line.samples, BATCH)]
        imp.calibrate(pruner, loader, progress=False)

    @torch.no_grad()
    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """All outputs of each sample in one row, under a fixed random stream."""
        torch.manual_seed(3)
        return flat(self.line.outputs(call(model, inputs)))

    def error(self, model: nn.Module, reference: Tensor) -> float:
        """Squared error on fresh inputs, in shares of the variance of the outputs over the samples."""
        return float((self.outputs(model, self.fresh) - reference).square().sum() / spread(reference))

    def _tp_error(self) -> str | None:
        """Why Torch-Pruning itself cannot do it."""
        model = self.model()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.groups(self.pruner(model, tp.importance.RandomImportance()))
        except Exception as error:
            return f"Torch-Pruning cannot trace it: {type(error).__name__}: {str(error)[:80]}"
        return None


def stood_for(state: Any) -> list[str]:
    """Layers that a norm stands for, as a saved importance names them."""
    if not isinstance(state, dict):
        return []
    return list(state.get("norm_of", ())) + [name for value in state.values() for name in stood_for(value)]


def producers(group: Any) -> list[str]:
    """Names of the layers whose outputs belong to the group."""
    return [layer.name for layer in read_group(group).producers]


class One(tp.importance.Importance):  # type: ignore[misc]
    """Lets one channel of one group go: the group's producers, the channel's position, the group's width."""

    def __init__(self, modules: list[nn.Module], position: int, width: int) -> None:
        self._modules, self._position = set(modules), position
        self.ratios = dict.fromkeys(modules, 1 / width - 1e-6)

    def __call__(self, group: Any, **_: Any) -> Tensor:
        """Zero for the channel, one for all others."""
        scores = torch.ones(len(group[0].idxs))
        if group[0].dep.target.module in self._modules and len(scores) > self._position:
            scores[self._position] = 0
        return scores


def spread(reference: Tensor) -> Tensor:
    """Squares of the deviations from the mean sample."""
    return (reference - reference.mean(0)).square().sum().clamp_min(1e-12)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of one sample, by torch's counter and by hand where it sees nothing.

    It does not see into fused attention and recurrent layers, and leaves products with vectors out.
    """
    model = copy.deepcopy(model).requires_grad_(False)  # the counter fails at some views of parameters
    recurrent = {name: m for name, m in model.named_modules() if isinstance(m, nn.RNNBase)}
    by_hand: list[int] = []

    def multiply(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rows = getattr(args[0], "data", args[0])  # of packed sequences as well
        matrices = sum(p.numel() for p in module.parameters() if p.dim() == 2)
        by_hand.append(matrices * rows.shape[:-1].numel())

    handles = [module.register_forward_hook(multiply) for module in recurrent.values()]
    vectors = {torch.ops.aten.mv: lambda matrix, *_, **__: 2 * matrix.numel()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=vectors)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            call(model, picked(inputs, 0, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    flops = counter.get_flop_counts()
    root = type(model).__name__
    inside = sum(sum(flops.get(f"{root}.{name}", {}).values()) for name in recurrent)
    return int(counter.get_total_flops() - inside) // 2 + sum(by_hand)
