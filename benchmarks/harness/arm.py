"""All cells of one arm: score, search, prune, evaluate, keeping what cells share."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.criteria.registry import find_criterion
from benchmarks.criteria.repairs import REPAIRS
from benchmarks.harness.cells import UNPRUNED, Cell, environment, peak_memory_mb
from benchmarks.harness.cost import network_cost
from benchmarks.harness.evaluate import accuracy, reestimate_batchnorm
from benchmarks.harness.finetune import Recipe, finetune, reinitialise
from benchmarks.harness.prune import PruneConfig, Pruned, build_pruner, prune, size, widths
from benchmarks.harness.schedule import prune_front_to_back
from benchmarks.harness.scores import FrozenScores, freeze
from benchmarks.harness.search import Found, find_ratio
from benchmarks.harness.widths import Prediction, minimise
from benchmarks.tasks import Batch, Task
from ippro_tp import Compensation, Recovery


@dataclass(frozen=True)
class Settings:
    """Everything of the protocol that does not vary between cells."""

    calibration_images: int
    test_images: int
    split: str
    batch_size: int
    tolerance: float
    cost_exponent: float | None
    prune: PruneConfig
    recipe: Recipe
    device: str
    block_epochs: int = 0
    from_scratch: bool = False
    bn_augmented: bool = False
    width_tries: int = 0
    recovery_steps: int = 0


@dataclass
class Plan:
    """A pruned network with how it was found, and its accuracy once known."""

    pruned: Pruned | None
    found: Found
    rounding: str
    seconds: float
    accuracy: float | None = None


@dataclass
class ArmRunner:
    """Runs cells of one task; scores, plans and MACs are computed once and shared where they are the same."""

    task: Task
    settings: Settings
    _base: tuple[float, float] | None = None
    _batches: dict[int, list[Batch]] = field(default_factory=dict)
    _scores: dict[tuple, tuple[FrozenScores, dict[str, float]]] = field(default_factory=dict)
    _memos: dict[tuple, dict[float, float]] = field(default_factory=dict)
    _measured: dict[tuple, FrozenScores] = field(default_factory=dict)
    _plans: dict[tuple, Plan] = field(default_factory=dict)
    _compensations: dict[tuple[type, int], Compensation] = field(default_factory=dict)

    def run(self, cell: Cell) -> dict:
        """Return the record of ``cell``; an exception becomes a record with ``status`` ``"failed"``."""
        seconds: dict[str, float] = {}
        record = {"cell": cell.varied, "status": "ok", "seconds": seconds}
        try:
            record |= self._unpruned(cell, seconds) if cell.criterion == UNPRUNED else self._pruned(cell, seconds)
        except Exception as error:
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            record["traceback"] = traceback.format_exc().splitlines()[-12:]
        return record | {"peak_memory_mb": round(peak_memory_mb(), 1), "environment": environment()}

    def forget(self) -> None:
        """Drop scores and plans of the arm that was run last; calibration images and local MACs stay."""
        self._scores.clear()
        self._measured.clear()
        self._plans.clear()
        self._memos = {key: memo for key, memo in self._memos.items() if key[0] == "local"}

    def base_size(self) -> tuple[float, float]:
        """Return MACs and parameters of the unpruned network."""
        if self._base is None:
            self._base = size(self.task.model, self.task.example)
        return self._base

    def batches(self, seed: int) -> list[Batch]:
        """Return the calibration batches of ``seed``."""
        if seed not in self._batches:
            self._batches[seed] = self.task.calibration(
                seed, self.settings.calibration_images, self.settings.batch_size
            )
        return self._batches[seed]

    def scores(
        self, name: str, cost: str, seed: int, depletion: str = "none"
    ) -> tuple[FrozenScores, dict[str, float]]:
        """Return the frozen scores of the criterion ``name`` and the seconds they took."""
        arm = find_criterion(name)
        key = (name, seed if arm.seeded else None)
        if key not in self._scores:
            self._scores[key] = self._score(name, seed)
        scores, seconds = self._scores[key]
        task = self.task
        costs = None if cost == "none" else network_cost(task.model, task.example, task.ignored, cost)
        return scores.ranked(arm.degree, depletion, costs, self.settings.cost_exponent), seconds

    def _score(self, name: str, seed: int) -> tuple[FrozenScores, dict[str, float]]:
        model, seconds = copy.deepcopy(self.task.model), {}
        pruner = build_pruner(model, self.task.example, self.task.ignored, lambda group: None)
        batches = self.batches(seed)
        with torch.random.fork_rng(devices=[]):
            with _timed(seconds, "calibration"):
                importance = find_criterion(name).build(model, pruner, batches, seed)
            with _timed(seconds, "scoring"):
                return freeze(importance, pruner, name), seconds

    def _plan(self, cell: Cell, scores: FrozenScores) -> Plan:
        """Return the pruned network of ``cell``, made once for all seeds of a criterion without one."""
        seed = cell.seed if find_criterion(cell.criterion).seeded or cell.widths == "measured" else None
        arm = (cell.criterion, cell.cost, cell.depletion)
        key = (*arm, cell.scope, cell.widths, cell.target, seed)
        if key not in self._plans:
            begin = time.perf_counter()
            # Local widths do not depend on the scores, only on which groups have any.
            shared = ("local", scores.scored) if cell.scope == "local" else ("global", *arm, seed)
            shared = key if cell.widths == "measured" else shared
            found, rounding, pruned = self._search(cell, scores, self._memo(shared, False), stagger=False)
            if not found.hit and cell.scope == "local":
                retry = self._search(cell, scores, self._memo(shared, True), stagger=True)
                if retry[0].hit:
                    found, rounding, pruned = retry
            self._plans[key] = Plan(pruned, found, rounding, time.perf_counter() - begin)
        return self._plans[key]

    def _memo(self, shared: tuple, stagger: bool) -> dict[float, float]:
        return self._memos.setdefault((*shared, stagger), {})

    def _search(self, cell: Cell, scores: FrozenScores, memo: dict[float, float], stagger: bool):
        tried: dict[float, Pruned] = {}

        def macs_at(ratio: float) -> float:
            tried.clear()  # only the last one is worth its memory: the search ends at it, or it is made again
            tried[ratio] = self._prune(scores, ratio, cell.scope, stagger)
            return tried[ratio].macs / self.base_size()[0]

        settings = self.settings
        found = find_ratio(macs_at, cell.target, memo, settings.tolerance, settings.prune.max_pruning_ratio)
        pruned = tried.get(found.ratio) or self._prune(scores, found.ratio, cell.scope, stagger)
        return found, "staggered" if stagger else "uniform", pruned

    def _prune(
        self,
        scores: FrozenScores,
        ratio: float,
        scope: str,
        stagger: bool,
        compensation: Compensation | None = None,
    ) -> Pruned:
        task, how = self.task, self.settings.prune
        return prune(task.model, task.example, task.ignored, scores, ratio, scope, how, stagger, compensation)

    def _with_measured_widths(self, cell: Cell, scores: FrozenScores) -> FrozenScores:
        """Return ``scores`` with a factor for each group: those with which the pruned network predicts best."""
        key = (cell.criterion, cell.cost, cell.depletion, cell.target, cell.seed)
        if key in self._measured:
            return self._measured[key]
        groups = sorted(scores.scored)
        prediction = Prediction(copy.deepcopy(self.task.model), self.batches(cell.seed), self.settings.device)

        def scaled(logs: torch.Tensor) -> FrozenScores:
            return scores.ranked(1, costs=dict(zip(groups, (-logs).exp().tolist(), strict=True)), exponent=1.0)

        def distance(logs: torch.Tensor) -> tuple[float, float]:
            found, _, pruned = self._search(cell, scaled(logs), {}, stagger=False)
            return prediction.distance(pruned.model) if found.hit else math.inf, found.macs

        start, _ = distance(torch.zeros(len(groups)))
        per_mac = start / (1 - cell.target) if math.isfinite(start) else 0.0

        def value(logs: torch.Tensor) -> float:
            far, macs = distance(logs)
            return far + per_mac * (macs - cell.target)  # a network a little above the target is no better for it

        logs = minimise(value, len(groups), self.settings.width_tries, cell.seed)
        self._measured[key] = scaled(logs)
        return self._measured[key]

    def _compensation(self, cell: Cell) -> Compensation:
        """Return the refit of ``cell``, ours or a peer's, calibrated on the images of its seed."""
        make = REPAIRS.get(cell.compensation, Compensation)
        if (make, cell.seed) not in self._compensations:
            model = copy.deepcopy(self.task.model)
            pruner = build_pruner(model, self.task.example, self.task.ignored, lambda group: None)
            made = make().calibrate(pruner, self.batches(cell.seed), progress=False)
            self._compensations[make, cell.seed] = made
        return self._compensations[make, cell.seed]

    def _compensated(self, cell: Cell, scores: FrozenScores, plan: Plan, seconds: dict[str, float]) -> Plan:
        """Return the same network as ``plan``'s, pruned with compensation."""
        with _timed(seconds, "calibration"):
            compensation = self._compensation(cell)
        with _timed(seconds, "compensation"):
            pruned = self._prune(scores, plan.found.ratio, cell.scope, plan.rounding == "staggered", compensation)
        if pruned.widths != plan.pruned.widths:
            raise ArithmeticError("compensation changed which channels are pruned")
        return Plan(pruned, plan.found, plan.rounding, plan.seconds)

    def _recover(self, cell: Cell, model: torch.nn.Module) -> None:
        """Distil the unpruned network into ``model``, on the calibration images and without labels."""
        for name in self.task.frozen:
            model.get_parameter(name).requires_grad_(False)
        steps = {"steps": self.settings.recovery_steps} if self.settings.recovery_steps else {}
        recovery = Recovery(**steps, seed=cell.seed)
        recovery.calibrate(self.task.model, self.batches(cell.seed), progress=False)
        recovery.run(model, copy.deepcopy(self.task.model))

    def _front_to_back(self, cell: Cell, plan: Plan, seconds: dict[str, float]) -> Plan:
        """Return a network of the widths of ``plan``'s, pruned group by group with a new calibration for each."""
        task, settings, batches = self.task, self.settings, self.batches(cell.seed)
        recipe = dataclasses.replace(settings.recipe, epochs=settings.block_epochs)

        def build(model: torch.nn.Module, pruner) -> Callable:
            with torch.random.fork_rng(devices=[]):
                return find_criterion(cell.criterion).build(model, pruner, batches, cell.seed)

        def between(model: torch.nn.Module) -> None:
            if settings.block_epochs:
                finetune(model, task, recipe, cell.seed, settings.device)

        compensation = self._compensation(cell) if cell.compensation != "none" else None
        with _timed(seconds, "schedule"):
            pruned = prune_front_to_back(
                task.model,
                task.example,
                task.ignored,
                plan.pruned.widths,
                build,
                settings.prune,
                compensation,
                between,
            )
        return Plan(pruned, plan.found, plan.rounding, plan.seconds)

    def _pruned(self, cell: Cell, seconds: dict[str, float]) -> dict:
        scores, spent = self.scores(cell.criterion, cell.cost, cell.seed, cell.depletion)
        seconds |= spent
        if cell.widths == "measured":
            with _timed(seconds, "widths"):
                scores = self._with_measured_widths(cell, scores)
        plan = self._plan(cell, scores)
        seconds["pruning"] = plan.seconds
        if cell.schedule != "once" and plan.found.hit:
            plan = self._front_to_back(cell, plan, seconds)
        elif cell.compensation != "none" and plan.found.hit:
            plan = self._compensated(cell, scores, plan, seconds)
        if cell.compensation == "recover" and plan.found.hit:
            with _timed(seconds, "recovery"):
                self._recover(cell, plan.pruned.model)
        base_macs, base_params = self.base_size()
        pruned = plan.pruned
        if pruned.macs >= base_macs:
            raise ArithmeticError("nothing was pruned: no ratio brings the MACs below the unpruned network's")
        kept = pruned.widths
        record = {
            "hit": plan.found.hit,
            "ratio": plan.found.ratio,
            "rounding": plan.rounding,
            "tries": plan.found.tries,
            "macs": pruned.macs,
            "macs_fraction": pruned.macs / base_macs,
            "params": pruned.params,
            "params_fraction": pruned.params / base_params,
            "widths": kept,
            "min_width": min(kept.values()),
        }
        if not plan.found.hit:
            return record | {"accuracy": {}}
        if plan.accuracy is None:
            with _timed(seconds, "evaluation"):
                plan.accuracy = self._accuracy(pruned.model)
        return record | {"accuracy": {"pruned": plan.accuracy} | self._after(pruned.model, cell, seconds)}

    def _unpruned(self, cell: Cell, seconds: dict[str, float]) -> dict:
        kept = widths(self.task.model)
        macs, params = self.base_size()
        with _timed(seconds, "evaluation"):
            as_is = self._accuracy(copy.deepcopy(self.task.model))
        sizes = {"macs": macs, "macs_fraction": 1.0, "params": params, "params_fraction": 1.0}
        accuracies = {"pruned": as_is} | self._after(self.task.model, cell, seconds)
        return sizes | {"hit": True, "widths": kept, "min_width": min(kept.values()), "accuracy": accuracies}

    def _after(self, model: torch.nn.Module, cell: Cell, seconds: dict[str, float]) -> dict[str, float]:
        """Return the accuracy after BatchNorm re-estimation and, from the network as pruned, after fine-tuning."""
        settings, result = self.settings, {}
        recalibrated = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with _timed(seconds, "batchnorm"):
            batches = self.batches(cell.seed)
            batches = self.task.augmented(batches, cell.seed) if settings.bn_augmented else batches
            reestimate_batchnorm(recalibrated, batches, settings.device)
            result["bn"] = self._accuracy(recalibrated)
        if settings.recipe.epochs > 0:
            tuned = copy.deepcopy(model)
            with _timed(seconds, "finetune"):
                finetune(tuned, self.task, settings.recipe, cell.seed, settings.device)
                result["finetuned"] = self._accuracy(tuned)
            if settings.from_scratch:
                reinitialise(tuned, self.task.frozen, cell.seed)
                with _timed(seconds, "scratch"):
                    finetune(tuned, self.task, settings.recipe, cell.seed, settings.device)
                    result["scratch"] = self._accuracy(tuned)
        return result

    def _accuracy(self, model: torch.nn.Module) -> float:
        settings = self.settings
        images: Iterable[Batch] = self.task.evaluation(settings.split, settings.test_images, settings.batch_size)
        return accuracy(copy.deepcopy(model).to(memory_format=torch.channels_last), images, settings.device)


@contextmanager
def _timed(seconds: dict[str, float], phase: str):
    begin = time.perf_counter()
    yield
    seconds[phase] = round(seconds.get(phase, 0.0) + time.perf_counter() - begin, 3)
