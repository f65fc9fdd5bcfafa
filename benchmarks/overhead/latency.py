"""``overhead --latency``: the latency asked of ``prune()``, what the table predicts, and what is measured."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from tabulate import tabulate
from torch import nn

from ippro_tp import LatencyTable, prune
from ippro_tp.pruning.latency import timing
from ippro_tp.pruning.measure import Meter

if TYPE_CHECKING:
    from benchmarks.overhead.command import OverheadConfig

MODELS = ("tf_efficientnet_lite0", "resnet50", "resnet56", "vit_tiny_patch16_224")
BATCHES = (1, 32)
IMAGES = 8
HEADERS = (
    "model", "batch", "unpruned ms", "spread", "sum is off", "held out is off", "round to", "table s", "asked",
    "predicted", "measured", "measured / asked", "MACs left", "load",
)  # fmt: skip


def latency(config: OverheadConfig, build) -> Iterator[str]:
    """Yield a table row by row; the last part is the whole table.

    Args:
        config: of the command; ``batch_size`` 0 stands for 1 and 32, ``image_size`` 0 for 32 (CIFAR) and 224.
        build: ``(name, image size) -> (model, image size, batch size)``.
    """
    rows = []
    batches = (config.batch_size,) if config.batch_size else BATCHES
    for name in config.models or MODELS:
        for batch in batches:
            torch.manual_seed(0)
            small = name.removeprefix("resnet") in ("20", "32", "44", "56")
            model, size, _ = build(name, config.image_size or (0 if small else 224))
            form = torch.channels_last if config.channels_last else torch.contiguous_format
            model = model.to(config.device, memory_format=form).eval()
            inputs = torch.randn(batch, 3, size, size, device=config.device).to(memory_format=form)
            with _clock(config.clock):
                rows.append((name, batch, *_row(model, inputs, config.latency)))
            yield tabulate(rows[-1:], HEADERS, tablefmt="github", disable_numparse=True)
    yield tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)


def _row(model: nn.Module, inputs: torch.Tensor, asked: float) -> tuple[object, ...]:
    start = time.perf_counter()
    table = LatencyTable.measure(model, inputs)
    seconds = time.perf_counter() - start
    images = [torch.randn(IMAGES, *inputs.shape[1:])]
    result = prune(model, inputs, images, latency=asked, latency_table=table, progress=False)
    measured = Meter(inputs).latency(result.model, model, seconds=max(1.0, 10 * table.whole))
    figures = (1e3 * table.whole, table.anchors[0].spread, table.error, table.held_out_error)
    return (
        f"{figures[0]:.1f}", f"{figures[1]:.1%}", f"{figures[2]:+.1%}", f"{figures[3]:+.1%}",
        table.round_to or "-",
        f"{seconds:.0f}", f"{asked:.2f}", f"{result.predicted_latency:.3f}", f"{measured:.3f}",
        f"{measured / asked:.3f}", f"{result.macs:.3f}", f"{os.getloadavg()[0]:.1f}",
    )  # fmt: skip


@contextlib.contextmanager
def _clock(name: str) -> Iterator[None]:
    """All times are the process's own on a busy machine, if that is asked for."""
    usual = timing.wall_clock
    timing.wall_clock = time.process_time if name == "cpu" else usual
    try:
        yield
    finally:
        timing.wall_clock = usual
