"""``refit``: time of a step of Compensation, beside plain forward passes over its samples."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch_pruning as tp
from tabulate import tabulate
from torch import nn

from benchmarks.errors import UsageError
from benchmarks.harness.prune import build_pruner
from benchmarks.overhead.command import CLOCKS, OverheadConfig, Subject, build_subject, timed
from ippro_tp import Compensation

CIFAR, OTHERS = (1000, 32), (128, 96)
"""Samples and image size that are usual for ResNets of CIFAR, and for other networks."""


@dataclass(frozen=True)
class RefitConfig:
    """What a step of Compensation costs beside plain passes, with random weights and images: no data needed."""

    models: tuple[str, ...] = ("resnet20", "resnet56", "resnet50", "tf_efficientnet_lite0")
    """As for ``overhead``."""
    samples: int = 0
    """Images that layers are fitted to; 0 for 1,000 (CIFAR) and 128 (others)."""
    image_size: int = 0
    """Height and width; 0 for 32 (CIFAR) and 96 (others)."""
    batch_size: int = 32
    """Images per plain pass."""
    pruning_ratio: float = 0.3
    """Channels to remove, uniformly by L2; 0.3 leaves about half of the MACs."""
    rounds: int = 3
    """Measurements, after one that warms up."""
    threads: int = 1
    """Threads of PyTorch; 0 for its default."""
    clock: str = "cpu"
    """wall; or cpu, the process's own time, for one thread on a busy machine."""


def run(config: RefitConfig) -> None:
    """Print a table, one line per model."""
    if config.clock not in CLOCKS:
        raise UsageError(f"--clock {config.clock!r}; choose one of {', '.join(CLOCKS)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    headers = ("model", "samples", "pixels", "plain s", "pruning s", "step s", "step / plain", "spread", "skipped")
    print(tabulate(list(_rows(config)), headers, tablefmt="github", disable_numparse=True))


def _rows(config: RefitConfig) -> Iterator[tuple[str, ...]]:
    for name in config.models:
        samples, size = CIFAR if name.startswith("resnet") and name[6:] in ("20", "32", "44", "56") else OTHERS
        samples, size = config.samples or samples, config.image_size or size
        overhead = OverheadConfig(
            image_size=size,
            batch_size=config.batch_size,
            batches=-(-samples // config.batch_size),
            clock=config.clock,
        )
        yield _row(build_subject(name, overhead), config, samples)


def _row(subject: Subject, config: RefitConfig, samples: int) -> tuple[str, ...]:
    images = [images for images, _ in subject.batches]
    plain: list[float] = []
    pruning: list[float] = []
    steps: list[float] = []
    skipped = 0
    for number in range(config.rounds + 1):
        seconds = timed(lambda: _passes(subject.model, images), subject.config)[0]
        cut = timed(_pruner(subject, config).step, subject.config)[0]
        pruner = _pruner(subject, config)
        compensation = Compensation().calibrate(pruner, images, max_samples=samples, progress=False)
        taken, report = timed(lambda c=compensation, p=pruner: c.step(p), subject.config)
        skipped = sum(bool(row.skipped) for row in report.rows)
        if number:
            plain.append(seconds)
            pruning.append(cut)
            steps.append(taken)
    ratios = [a / b for a, b in zip(steps, plain, strict=True)]
    times = (f"{statistics.median(values):.2f}" for values in (plain, pruning, steps, ratios))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return (subject.name, str(samples), str(images[0].shape[-1]), *times, spread, str(skipped))


@torch.no_grad()
def _passes(model: nn.Module, batches: list[torch.Tensor]) -> None:
    for images in batches:
        model(images)


def _pruner(subject: Subject, config: RefitConfig) -> tp.pruner.BasePruner:
    model = copy.deepcopy(subject.model)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    example = subject.batches[0][0][:1]
    importance = tp.importance.GroupMagnitudeImportance()
    return build_pruner(model, example, tuple(last), importance, ratio=config.pruning_ratio)
