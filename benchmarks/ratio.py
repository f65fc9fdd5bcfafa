"""``ratio``: what calibration costs beside the same forwards and backwards without us."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch.nn import functional as F

from benchmarks.prune import build_pruner
from benchmarks.tasks import TaskConfig, build_task
from ippro_tp import SpaSPImportance


@dataclass(frozen=True)
class RatioConfig(TaskConfig):
    """Time calibrations against plain passes over the same images, interleaved in one process."""

    rounds: int = 7
    """Measurements of each; the first round warms up and is not counted."""
    images: int = 250
    """Calibration images per measurement."""
    seed: int = 0
    """Seed of the calibration sample."""
    threads: int = 0
    """Threads of PyTorch; 0 for its default."""


def run(config: RatioConfig) -> None:
    """Print the median and the quartiles of time / plain time: PRO's estimators, and i-SpaSP."""
    if config.threads:
        torch.set_num_threads(config.threads)
    task = build_task(config)
    batches = [
        (x.to(config.device), y.to(config.device))
        for x, y in task.calibration(config.seed, config.images, config.batch_size)
    ]
    model = copy.deepcopy(task.model)
    pruner = build_pruner(model, task.example, task.ignored, lambda group: None)

    def plain() -> None:
        model.zero_grad()
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()

    runs: dict[str, Callable[[], None]] = {"plain": plain}
    for estimator in ("expected", "paper"):
        runs[estimator] = lambda estimator=estimator: _calibrate(estimator, pruner, batches)

    def forwards() -> None:
        with torch.no_grad():
            for images, _ in batches:
                model(images)

    forward_runs = {
        "plain": forwards,
        "ispasp": lambda: SpaSPImportance().calibrate(pruner, batches, progress=False),
    }
    print(f"{task.name} {task.model_name}, {config.images} images, {torch.get_num_threads()} threads")
    for title, group in (("forward and backward", runs), ("forward", forward_runs)):
        print(f"\n{title}:\n{summary(_interleaved(group, config))}")


def _interleaved(runs: dict[str, Callable[[], object]], config: RatioConfig) -> dict[str, list[float]]:
    """Return the seconds of each run in each round but the first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(config.rounds + 1):
        for name, function in runs.items():
            elapsed = _time(function, config.device)
            if number:
                seconds[name].append(elapsed)
    return seconds


def summary(seconds: dict[str, list[float]]) -> str:
    """Return a table of median seconds, and median and quartiles of the ratio to ``plain`` by round."""
    rows = []
    for name, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append((name, statistics.median(values), middle, low, high))
    return tabulate(rows, ("run", "seconds", "ratio", "25 %", "75 %"), floatfmt=".3f", tablefmt="github")


def _calibrate(estimator: str, pruner, batches) -> None:
    from ippro_tp import PROImportance

    PROImportance(estimator=estimator).calibrate(pruner, batches, progress=False)


def _time(function: Callable[[], object], device: str) -> float:
    """Seconds on the device; of the CPU, its own time: what else the machine does counts for nothing."""
    if device == "cpu":
        begin = time.process_time()
        function()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
