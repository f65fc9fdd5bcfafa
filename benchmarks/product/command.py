"""``python -m benchmarks product``: `prune()` at matched targets under several importances, refitted or not.

Where ``compare`` drives Torch-Pruning's own pruners over frozen scores, this calls :func:`ippro_tp.prune` as
a user does, heads and streams included, so that transformers and pretrained networks can be compared as well.
One row a cell; a rerun adds what is missing.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.criteria import peers
from benchmarks.criteria.repairs import REPAIRS
from benchmarks.errors import UsageError
from benchmarks.tasks import Task, TaskConfig, build_task
from benchmarks.tasks.imagefolder import unlabelled
from ippro_tp import IPPROError, PROImportance, Recovery, SpaSPImportance, prune

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "pro": PROImportance,
    "ispasp": SpaSPImportance,
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "random": tp.importance.RandomImportance,
}
"""Torch-Pruning's as it ships them, ranked by the same loop, which knows heads and keeps every group alive."""
PEERS: dict[str, Callable[[nn.Module, list], Any]] = {
    "chip": peers.chip,
    "vbp": peers.variance,
    "vbp-all": lambda model, batches: peers.variance(model, batches, hidden=False),
    "l2-plain": lambda model, batches: peers.OnlyWhere(IMPORTANCES["l2"](), peers.is_plain),
}
"""Ours, from published descriptions: they look at the unpruned model first. l2-plain is for folding and GRAIL."""
REFITS = ("none", "compensation", "recovery", *REPAIRS)
COLUMNS = (
    "model", "importance", "refit", "scope", "target", "seed", "calibration", "status", "macs", "params",
    "accuracy", "among", "agreement", "other", "seconds",
)  # fmt: skip
KEY = COLUMNS[: COLUMNS.index("status")]


@dataclass(frozen=True)
class ProductConfig:
    """Compare importances through ``prune()``."""

    task: TaskConfig = field(default_factory=lambda: TaskConfig(task="cifar10"))
    out: Path = Path("runs/product.csv")
    """Rows are added to this file."""
    importances: tuple[str, ...] = ("pro", "l2", "taylor")
    refits: tuple[str, ...] = ("none", "compensation")
    """none, compensation, recovery (compensation and then distillation, without labels); bn (new BatchNorm
    statistics), mean (VBP's), folding, gram (GRAIL's): see ``criteria/repairs.py``."""
    targets: tuple[float, ...] = (0.75, 0.5)
    """Fractions of the MACs that are left."""
    scopes: tuple[str, ...] = ("global",)
    seeds: tuple[int, ...] = (0,)
    """Of the calibration sample, and of all that is random."""
    calibration_dir: Path | None = None
    """Images of another domain for the calibration, in any layout (imagefolder only); none: the task's own."""
    other_dir: Path | None = None
    """Images of another domain, on which agreement is counted besides (imagefolder only)."""
    calibration_images: int = 1000
    test_images: int = 2000
    """0: all."""
    threads: int = 1


def run(config: ProductConfig) -> None:
    """Run all cells that are missing and print each."""
    for name in config.importances:
        if name not in IMPORTANCES and name not in PEERS:
            raise UsageError(f"unknown importance {name!r}; known: {', '.join((*IMPORTANCES, *PEERS))}")
    for refit in config.refits:
        if refit not in REFITS:
            raise UsageError(f"unknown refit {refit!r}; known: {', '.join(REFITS)}")
    torch.set_num_threads(config.threads)
    task = build_task(config.task)
    images, labels = _joined(task, config)
    others = (
        [] if config.other_dir is None else unlabelled(config.task, config.other_dir, config.test_images or 500)
    )
    judge = _Judge(config.task, images, labels, others, task.model)
    done = _read(config.out)
    source = "own" if config.calibration_dir is None else config.calibration_dir.name
    base = [task.model_name, "none", "none", "all", 1.0, 0, "none"]
    _write(config.out, done, [*base, "ok", 1.0, 1.0, *judge.figures(task.model), 0.0])
    for seed in config.seeds:
        loader = _calibration(task, config, seed)
        looked: dict[str, Any] = {}
        for scope in config.scopes:
            for target in config.targets:
                for name in config.importances:
                    for refit in config.refits:
                        cell = (task.model_name, name, refit, scope, target, seed, source)
                        if tuple(map(str, cell)) not in done:
                            _write(config.out, done, [*cell, *_cell(task, loader, judge, cell, looked)])


@dataclass
class _Judge:
    """What is measured of a model: against labels, and against the unpruned model."""

    config: TaskConfig
    images: list[Tensor]
    labels: Tensor
    others: list[Tensor]
    unpruned: nn.Module

    def __post_init__(self) -> None:
        self._wanted = _outputs(self.unpruned, self.images, self.config)
        self._others = _outputs(self.unpruned, self.others, self.config) if self.others else None

    def figures(self, model: nn.Module) -> list[float | str]:
        """Per cent: top-1, top-1 among the classes that occur, agreement; agreement on the other images."""
        found = _figures(_outputs(model, self.images, self.config), self._wanted, self.labels)
        if self._others is None:
            return [*found, ""]
        same = _outputs(model, self.others, self.config).argmax(1) == self._others.argmax(1)
        return [*found, round(100 * float(same.float().mean()), 2)]


def _calibration(task: Task, config: ProductConfig, seed: int) -> list:
    if config.calibration_dir is None:
        return task.calibration(seed, config.calibration_images, min(50, config.task.batch_size))
    images = torch.cat(unlabelled(config.task, config.calibration_dir, 4 * config.calibration_images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return list(images[order[: config.calibration_images]].split(min(50, config.task.batch_size)))


def _cell(task: Task, loader: list, judge: _Judge, cell: tuple, looked: dict[str, Any]) -> list:
    _, name, refit, scope, target, seed, _ = cell
    loss_fn = F.cross_entropy if name == "taylor" else None
    start = time.perf_counter()
    compensation = REPAIRS[refit]() if refit in REPAIRS else refit != "none"
    if name in PEERS and name not in looked:  # once for all targets, as some take minutes
        looked[name] = PEERS[name](task.model, loader)
    try:
        result = prune(
            task.model,
            task.example,
            loader,
            macs=target,
            importance=looked[name] if name in PEERS else IMPORTANCES[name](),
            compensation=compensation,
            scope=scope,
            seed=seed,
            loss_fn=loss_fn,
            progress=False,
        )
        if refit == "recovery":
            Recovery(seed=seed).calibrate(task.model, loader, progress=False).run(result.model, task.model)
    except IPPROError as error:
        return [f"{type(error).__name__}: {str(error).splitlines()[0][:150]}", *[""] * 7]
    seconds = time.perf_counter() - start
    return ["ok", round(result.macs, 4), round(result.params, 4), *judge.figures(result.model), round(seconds, 1)]


def _joined(task: Task, config: ProductConfig) -> tuple[list[Tensor], Tensor]:
    batches = list(task.evaluation("test", config.test_images, config.task.batch_size))
    return [images for images, _ in batches], torch.cat([labels for _, labels in batches])


@torch.no_grad()
def _outputs(model: nn.Module, images: list[Tensor], config: TaskConfig) -> Tensor:
    model.eval()
    return torch.cat([model(batch.to(config.device)).cpu() for batch in images])


def _figures(outputs: Tensor, wanted: Tensor, labels: Tensor) -> list[float]:
    """Per cent: top-1 of all outputs; top-1 among the classes that occur; agreement with the unpruned top-1."""
    classes = labels.unique()
    among = classes[outputs[:, classes].argmax(1)]
    same = (outputs.argmax(1) == labels, among == labels, outputs.argmax(1) == wanted.argmax(1))
    return [round(100 * float(each.float().mean()), 2) for each in same]


def _read(path: Path) -> set[tuple[str, ...]]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}


def _write(path: Path, done: set[tuple[str, ...]], row: list) -> None:
    key = tuple(map(str, row[: len(KEY)]))
    if key in done:
        return
    done.add(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerow(row)
    print(*row, flush=True)
