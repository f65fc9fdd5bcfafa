"""``overhead --phases``: where the time of ``prune()`` goes, in plain passes over the calibration images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from tabulate import tabulate

from ippro_tp import Compensation, prune
from ippro_tp.pruning import loop
from ippro_tp.pruning.measure import Meter
from ippro_tp.pruning.scoring import Scorer

if TYPE_CHECKING:
    from benchmarks.overhead.command import OverheadConfig

MODELS = ("tf_efficientnet_lite0", "resnet56", "mobilevitv2_050")
PHASES: dict[str, tuple[Any, str]] = {
    "trace and groups": (loop.Loop, "_structure"),
    "calibrate": (Scorer, "_calibrate"),
    "score": (Scorer, "_ask"),
    "search": (loop.Loop, "_search"),
    "keep samples": (loop.Loop, "_keep_samples"),
    "cut and refit": (Compensation, "step"),
    "count MACs": (Meter, "counts"),
}
"""Methods whose own time, without that of phases inside them, makes a phase."""


def phases(config: OverheadConfig, build, clock: Callable[[], float]) -> Iterator[str]:
    """Yield, for each model, seconds of each phase and how many plain passes that is.

    Args:
        config: of the command; ``batch_size`` 0 stands for 16, ``image_size`` 0 for 32 (CIFAR) and 128.
        build: ``(name, image size) -> (model, image size, batch size)``.
        clock: seconds.
    """
    for name in config.models or MODELS:
        torch.manual_seed(0)
        model, size, _ = build(name, config.image_size)
        model = model.to(config.device).eval()
        batches = [torch.randn(config.batch_size or 16, 3, size, size) for _ in range(config.batches)]
        plain = _plain(model, batches, config.device, clock)
        spent: dict[str, float] = {}
        with _watched(spent, clock):
            start = clock()
            prune(model, batches[0][:1], batches, macs=0.5, progress=False)
            whole = clock() - start
        spent["else"] = whole - sum(spent.values())
        rows = [(phase, f"{s:.2f}", f"{s / plain:.1f}", f"{s / whole:.0%}") for phase, s in spent.items()]
        rows.append(("prune()", f"{whole:.2f}", f"{whole / plain:.1f}", "100%"))
        images = sum(map(len, batches))
        title = f"{name}, {images} images of {size} pixels, a plain pass over them takes {plain:.2f} s"
        yield f"{title}\n\n" + tabulate(
            rows, ("phase", "seconds", "plain passes", "share"), tablefmt="github", disable_numparse=True
        )


def _plain(model: torch.nn.Module, batches: list[torch.Tensor], device: str, clock: Callable[[], float]) -> float:
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            start = clock()
            for images in batches:
                model(images.to(device))
            seconds.append(clock() - start)
    return sorted(seconds[1:])[1]


@contextlib.contextmanager
def _watched(spent: dict[str, float], clock: Callable[[], float]) -> Iterator[None]:
    """Add up the own time of each phase in ``spent``."""
    inner = [0.0]

    def watch(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = clock()
            try:
                return method(*args, **kwargs)
            finally:
                took = clock() - start
                spent[phase] = spent.get(phase, 0.0) + took - inner.pop()
                inner[-1] += took

        return run

    with contextlib.ExitStack() as stack:
        for phase, (owner, name) in PHASES.items():
            stack.enter_context(mock.patch.object(owner, name, watch(phase, getattr(owner, name))))
        yield
