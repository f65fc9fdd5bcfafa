"""Which channels go: calibrate, score, search the ratio, prune; step by step."""

from __future__ import annotations

import copy
import math
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.criteria.registry import find_criterion
from benchmarks.errors import UsageError
from benchmarks.harness.cost import network_cost
from benchmarks.harness.prune import PruneConfig, Pruned, build_pruner, prune, size, widths
from benchmarks.harness.scores import FrozenScores, freeze, group_key, prunable_groups
from benchmarks.harness.search import Found, find_ratio
from benchmarks.pipeline.config import PruneRunConfig, layer_ratios
from benchmarks.pipeline.networks import Network
from benchmarks.pipeline.seeds import derive
from benchmarks.tasks.base import Batch
from ippro_tp import Compensation
from ippro_tp.graph.groups import read_group

TOLERANCE = 0.01
"""A target is met within this fraction of the unpruned network, and within a tenth of itself."""
TRACE_SECONDS = 600.0
"""CPU time after which tracing is given up."""


@dataclass
class GroupPlan:
    """One group: the layers whose outputs it holds, a score per channel, and the channels that go."""

    root: str
    layers: list[str]
    scores: list[float] | None
    removed: list[int]


@dataclass
class StepPlan:
    """One step: what was decided, and the size it led to."""

    ratio: float
    rounding: str
    tries: int
    macs: float
    params: float
    groups: list[GroupPlan]


@dataclass
class Plan:
    """The pruned network and how it came about; sizes are absolute, of one image."""

    model: nn.Module
    base: tuple[float, float]
    widths_before: dict[str, int]
    steps: list[StepPlan] = field(default_factory=list)
    compensation: list[str] = field(default_factory=list)

    @property
    def macs(self) -> float:
        """Remaining MACs as a fraction."""
        return self.steps[-1].macs / self.base[0]

    @property
    def params(self) -> float:
        """Remaining parameters as a fraction."""
        return self.steps[-1].params / self.base[1]

    def record(self) -> dict:
        """Everything but the network, JSON-ready."""
        return {
            "macs_before": self.base[0],
            "params_before": self.base[1],
            "macs": self.steps[-1].macs,
            "params": self.steps[-1].params,
            "macs_fraction": self.macs,
            "params_fraction": self.params,
            "widths_before": self.widths_before,
            "widths": widths(self.model),
            "steps": [asdict(step) for step in self.steps],
        }


class Planner:
    """Prunes a network as the flags say.

    Args:
        config: The flags.
        network: Input, classifier and name of the network.
        batches: Calibration batches.
        device: Where everything runs.
    """

    def __init__(
        self, config: PruneRunConfig, network: Network, batches: list[Batch], device: torch.device
    ) -> None:
        self.config, self.batches, self.device = config, batches, device
        self.ignored, self.example = network.ignored, network.example.to(device)
        self.how = PruneConfig(config.max_pruning_ratio, config.round_to)

    def plan(self, model: nn.Module) -> Plan:
        """Prune a copy of ``model`` in ``config.steps`` steps.

        Raises:
            UsageError: Torch-Pruning cannot prune the network, or the target cannot be met.
        """
        with _explained(f"{self.config.model} cannot be pruned"):
            model = copy.deepcopy(model).to(self.device).eval()
            with _time_limit(TRACE_SECONDS):
                list(self._groups(model))
            plan = Plan(model, size(model, self.example), widths(model))
            for number in range(1, self.config.steps + 1):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(derive(self.config.seed, "prune", number))
                    self._step(plan, number)
        return plan

    def probe(self, model: nn.Module) -> None:
        """Prune a copy of ``model`` as far as it goes, without scores worth the name.

        Raises:
            UsageError: Torch-Pruning cannot prune the network, or not as far as the target.
        """
        config = self.config
        with _explained(f"{config.model} cannot be pruned"):
            model = copy.deepcopy(model).to(self.device).eval()
            with _time_limit(TRACE_SECONDS):
                list(self._groups(model))
            self._ratios(model)
            base = size(model, self.example)
            pruner = self._pruner(copy.deepcopy(model))
            scores = freeze(find_criterion("l2").build(model, pruner, [], config.seed), pruner, "l2")
            ranked, largest = self._protected(model, scores, [])
            pruned = self._prune(model, ranked, largest, False)
            unit, goal = config.target
            if unit != "ratio":
                least = pruned.macs / base[0] if unit == "macs" else pruned.params / base[1]
                if least > goal + _tolerance(goal):
                    raise UsageError(
                        f"{unit} {goal:g} of the unpruned network cannot be reached: with "
                        f"{config.max_pruning_ratio:g} of every layer gone {least:.3f} are left; change the "
                        "target, --max-pruning-ratio or --round-to"
                    )

    def _step(self, plan: Plan, number: int) -> None:
        model = plan.model
        title = f"step {number} of {self.config.steps}: " if self.config.steps > 1 else ""
        print(f"{title}scoring channels ({self.config.importance})", file=sys.stderr)
        scores = self.scores(model)
        ranked, largest = self._protected(model, scores, plan.steps)
        found, rounding, ratios = self._search(plan, ranked, number, largest)
        compensation = None
        if self.config.compensate:
            pruner = self._pruner(copy.deepcopy(model))
            print(f"{title}refitting layers (compensation)", file=sys.stderr)
            compensation = Compensation().calibrate(pruner, self.batches)
        layers = {key: read_group(g).producers for g, key in self._groups(model)}
        pruned = self._prune(model, ranked, found.ratio, rounding == "staggered", ratios, compensation)
        order = {name: number for number, name in enumerate(widths(model))}
        groups = [
            GroupPlan(
                key[0],
                [layer.name for layer in producers],
                None if scores.scores[key] is None else scores.scores[key].tolist(),
                sorted(pruned.removed.get(key, [])),
            )
            for key, producers in sorted(layers.items(), key=lambda item: order.get(item[0][0], 0))
        ]
        plan.steps.append(StepPlan(found.ratio, rounding, found.tries, pruned.macs, pruned.params, groups))
        plan.model = pruned.model
        plan.compensation = [str(row) for row in pruned.compensation.rows] if pruned.compensation else []
        if pruned.macs >= plan.base[0]:
            raise UsageError(
                "nothing was pruned: the ratio takes no whole channel; ask for more, or use --round-to 0"
            )

    def scores(self, model: nn.Module) -> FrozenScores:
        """Return the scores of the configured criterion, with depletion and cost term if so configured."""
        name = self.config.importance
        private = copy.deepcopy(model)
        pruner = self._pruner(private)
        criterion = find_criterion(name)
        scores = freeze(criterion.build(private, pruner, self.batches, self.config.seed), pruner, name)
        if not scores.scored:
            raise UsageError(f"{self.config.model} has no group of channels that could be pruned")
        unit = self.config.cost_unit
        costs = None if unit == "none" else network_cost(model, self.example, self.ignored, unit)
        return scores.ranked(criterion.degree, self.config.depletion_kind, costs)

    def _search(
        self, plan: Plan, scores: FrozenScores, number: int, largest: float
    ) -> tuple[Found, str, dict[str, float]]:
        """Return the ratio of this step, how local widths are rounded, and ratios of single groups."""
        config, model = self.config, plan.model
        unit, goal = config.target
        if unit == "ratio":
            share = 1 - (1 - goal) ** (1 / config.steps)
            if goal > config.max_pruning_ratio:
                raise UsageError(
                    f"--pruning-ratio {goal:g} is above --max-pruning-ratio {config.max_pruning_ratio:g}"
                )
            return Found(share, float("nan"), True, 0), "uniform", self._ratios(model)
        column = 0 if unit == "macs" else 1
        before = size(model, self.example)[column] / plan.base[column]
        wanted = 1 - (1 - goal) * number / config.steps
        tolerance = _tolerance(wanted)

        def at(ratio: float, stagger: bool) -> float:
            pruned = self._prune(model, scores, ratio, stagger)
            left = (pruned.macs, pruned.params)[column] / plan.base[column]
            bar.set_postfix_str(f"ratio {ratio:.4f}: {unit} {left:.3f}")
            bar.update()
            return left / before

        bar = tqdm(desc=f"searching {unit} {wanted:.3g}", unit="try", leave=False)
        best: tuple[Found, str] | None = None
        for rounding in ("uniform", "staggered")[: 2 if config.scope == "local" else 1]:
            found = find_ratio(
                lambda ratio, stagger=rounding == "staggered": at(ratio, stagger),
                wanted / before,
                {},
                tolerance / before,
                largest,
            )
            if found.hit:
                bar.close()
                return found, rounding, {}
            if best is None or abs(found.macs * before - wanted) < abs(best[0].macs * before - wanted):
                best = found, rounding
        bar.close()
        nearest = best[0].macs * before
        what = "more" if nearest > wanted else "less"
        raise UsageError(
            f"{unit} {wanted:.3g} of the unpruned network cannot be reached within {100 * tolerance:.2g}%: the "
            f"nearest is {nearest:.3f}, {what} than that, at ratio {best[0].ratio:.3f}; change the target, "
            "--max-pruning-ratio or --round-to"
        )

    def _ratios(self, model: nn.Module) -> dict[str, float]:
        """Return ratios by root layer for the groups that hold a layer of one of the patterns."""
        patterns = {p: 1 - (1 - r) ** (1 / self.config.steps) for p, r in layer_ratios(self.config).items()}
        found: dict[str, float] = {}
        used = set()
        for group, (root, _) in self._groups(model) if patterns else ():
            names = [root, *(layer.name for layer in read_group(group).producers)]
            pattern = next((p for p in patterns if any(re.search(p, name) for name in names)), None)
            if pattern is not None:
                found[root] = patterns[pattern]
                used.add(pattern)
        unused = [p for p in patterns if p not in used]
        if unused:
            raise UsageError(f"--layer-ratios: no prunable layer of {self.config.model} matches {unused[0]!r}")
        return found

    def _groups(self, model: nn.Module) -> Iterator[tuple]:
        for group in prunable_groups(self._pruner(copy.deepcopy(model))):
            yield group, group_key(group)

    def _pruner(self, model: nn.Module):
        return build_pruner(model, self.example, self.ignored, lambda group: None, scope=self.config.scope)

    def _prune(self, model, scores, ratio, stagger, ratios=None, compensation=None) -> Pruned:
        args = (model, self.example, self.ignored, scores, ratio, self.config.scope, self.how)
        return prune(*args, stagger, compensation, ratios)

    def _protected(
        self, model: nn.Module, scores: FrozenScores, steps: list[StepPlan]
    ) -> tuple[FrozenScores, float]:
        """Return ``scores`` with the best channels of each group above all others, and the largest ratio then.

        In a global ranking TP leaves a group untouched if *all* its channels are among the lowest, so the least
        important groups would keep every channel. Here they keep ``1 - max_pruning_ratio`` of them, the best.
        ``steps`` are the earlier ones: the limit is of the unpruned network's channels.
        """
        largest = self.config.max_pruning_ratio
        if self.config.scope != "global":
            left = math.prod(1 - step.ratio for step in steps)
            return scores, max(1 - (1 - largest) / left, 0.0)
        full = {group.root: len(group.scores or []) for group in steps[0].groups} if steps else {}
        top = 2 * max(float(s.abs().max()) for s in scores.scores.values() if s is not None) + 1
        protected = dict(scores.scores)
        pruner = self._pruner(copy.deepcopy(model))
        total = safe = 0
        for group in prunable_groups(pruner):
            values = scores.scores[group_key(group)]
            if values is not None:
                table = values.clone().view(
                    pruner._get_channel_groups(group), -1
                )  # TP ranks means of channel groups
                width = table.shape[1]
                before = full.get(group_key(group)[0], len(values)) / len(values) * width
                kept = min(max(math.ceil(before * (1 - largest)), self.config.round_to, 1), width)
                table[:, table.mean(0).topk(kept).indices] += top
                protected[group_key(group)] = table.view(-1)
                total, safe = total + width, safe + kept
        return FrozenScores(protected, scores.source), max(min(largest, 1 - safe / total - 1e-6), 0.0)


def _tolerance(target: float) -> float:
    return min(TOLERANCE, target / 10)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds of CPU time: TP never ends tracing some networks."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    late = TimeoutError(f"tracing it takes more than {seconds:g} s; Torch-Pruning may never end")
    expired = False

    def stop(*_) -> None:
        nonlocal expired
        expired = True
        raise late

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(
        signal.ITIMER_PROF, seconds, 1.0
    )  # again and again: Torch-Pruning swallows what a trace raises
    try:
        yield
        if expired:  # swallowed on the way: what came of it is not to be trusted
            raise late
    except Exception:
        if expired:
            raise late from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever Torch-Pruning or a half-pruned network raises into one line."""
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise UsageError(
            f"{what}: {type(error).__name__}: {reason} (choose another network, scope or importance, or "
            "--no-compensate)"
        ) from error
