"""A pytest plugin: Torch-Pruning's magnitude criteria become PRO, calibrated by itself on random batches.

For Torch-Pruning's own tests, which know no calibration. Pretrained weights become random ones in any case:
nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from benchmarks.robustness.line import leaves
from ippro_tp import NotCalibratedError, PROImportance, StaleStatisticsError

WITH_PRO = "ROBUSTNESS_WITH_PRO"
"""Environment variable that puts PRO in the place of magnitude."""
REDUCTIONS = {"mean": "mean", "sum": "sum", "max": "max", "prod": "prod", "first": "first"}
MAGNITUDE = tp.importance.GroupMagnitudeImportance
_inputs: dict[int, tuple[Any, Any]] = {}


class SelfCalibratingPRO(PROImportance):
    """``PROImportance`` with the arguments of Torch-Pruning's magnitude, calibrated whenever it has to be."""

    def __init__(
        self, p: int = 2, group_reduction: str | None = "mean", normalizer: Any = "mean", **_: Any
    ) -> None:
        super().__init__(group_reduction=REDUCTIONS.get(str(group_reduction), "joint"), normalizer=normalizer)

    def _normalize(self, *args: Any) -> Tensor:
        """Magnitude's, which ``PROImportance`` asks for by the name that stands for this class now."""
        return MAGNITUDE._normalize(self, *args)

    def __call__(self, group: Any, **more: Any) -> Tensor | None:
        """Scores of a group."""
        try:
            return super().__call__(group, **more)
        except (NotCalibratedError, StaleStatisticsError):
            self._calibrate_on_noise(group._DG)
            return super().__call__(group, **more)

    def _calibrate_on_noise(self, graph: Any) -> None:
        example, forward = _inputs[id(graph)]
        generator = torch.Generator().manual_seed(0)

        def noise(value: Any) -> Any:
            if isinstance(value, Tensor):
                if not value.is_floating_point():
                    return value
                shape = (4, *value.shape[1:])
                return torch.randn(shape, generator=generator).to(value)
            if isinstance(value, dict):
                return {key: noise(one) for key, one in value.items()}
            return type(value)(map(noise, value)) if isinstance(value, (list, tuple)) else value

        with torch.enable_grad(), self.observe(graph):
            for _ in range(2):
                output = _called(graph.model, noise(example), forward)
                sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in leaves(output)).backward()


def _called(model: nn.Module, example: Any, forward: Any) -> Any:
    if forward is not None:
        return forward(model, example)
    if isinstance(example, dict):
        return model(**example)
    try:
        return model(*example) if isinstance(example, (list, tuple)) else model(example)
    except TypeError:
        return model(example)


def _remember_inputs() -> None:
    build = tp.DependencyGraph.build_dependency

    @functools.wraps(build)
    def remembering(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(build).bind(self, model, *args, **kwargs).arguments
        _inputs[id(self)] = bound.get("example_inputs"), bound.get("forward_fn")
        return build(self, model, *args, **kwargs)

    tp.DependencyGraph.build_dependency = remembering


def _no_downloads() -> None:
    for found in pkgutil.iter_modules(torchvision.models.__path__):
        module = importlib.import_module(f"torchvision.models.{found.name}")
        for name, make in list(vars(module).items()):
            if (
                name.startswith("_")
                and inspect.isfunction(make)
                and "weights" in inspect.signature(make).parameters
            ):
                setattr(module, name, _untrained(make))


def _untrained(make: Any) -> Any:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def build(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["weights"] = None
        return make(*bound.args, **bound.kwargs)

    return build


_no_downloads()
if os.environ.get(WITH_PRO):
    _remember_inputs()
    for place in (tp.importance, tp.pruner.importance):
        place.MagnitudeImportance = place.GroupMagnitudeImportance = SelfCalibratingPRO
