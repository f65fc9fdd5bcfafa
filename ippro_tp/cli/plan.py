"""Pruning as the flags say: flags to the arguments of ``prune()``, its result to records of plain values."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import IPPROError, TargetError
from ..pruning.pricing import Pricing
from ..pruning.prune import prune_layers
from ..pruning.result import PruneResult
from .config import PruneRunConfig, layer_ratios
from .errors import UsageError
from .evaluate import Batch
from .importances import find_importance
from .networks import Network

TRACE_SECONDS = 600.0
"""CPU time after which pruning is given up before it has begun to search."""


@dataclass(frozen=True)
class Plan:
    """A pruned network, and the widths of the unpruned one."""

    result: PruneResult
    widths_before: dict[str, int]

    @property
    def model(self) -> nn.Module:
        """The pruned network."""
        return self.result.model

    @property
    def compensation(self) -> list[str]:
        """A line per layer that was refitted, or why it was not; of the last step. Then one for the recovery."""
        refitted, recovered = self.result.steps[-1].refitted, self.result.recovered
        rows = [] if refitted is None else [str(row) for row in refitted.rows]
        return rows if recovered is None else [*rows, f"recovery: {recovered}"]

    def record(self) -> dict[str, Any]:
        """Everything but the network, JSON-ready."""
        result = self.result
        steps = [
            {
                "left": step.left,
                "tries": step.tries,
                "groups": [
                    {
                        "root": group.key.removesuffix(".out"),
                        "layers": list(group.layers),
                        "channels": group.before,
                        "kept": group.after,
                        "scores": list(group.scores) or None,
                        "removed": list(group.removed),
                        "reason": group.reason,
                    }
                    for group in step.groups
                ],
            }
            for step in result.steps
        ]
        return {
            "macs_before": result.before.macs,
            "params_before": result.before.params,
            "macs": result.after.macs,
            "params": result.after.params,
            "macs_fraction": result.macs,
            "params_fraction": result.params,
            "latency_fraction": result.latency,
            "widths_before": self.widths_before,
            "widths": widths(result.model),
            "steps": steps,
        }


def widths(model: nn.Module) -> dict[str, int]:
    """Return the number of outputs of each convolution and Linear layer."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear)))
    return {name: m.out_features if isinstance(m, nn.Linear) else m.out_channels for name, m in layers}


@dataclass(frozen=True)
class Planner:
    """Prunes a network as the flags say.

    Args:
        config: The flags.
        network: Input and name of the network.
        batches: Calibration batches.
        device: Where everything runs.
    """

    config: PruneRunConfig
    network: Network
    batches: list[Batch]
    device: torch.device

    def plan(self, model: nn.Module) -> Plan:
        """Prune a copy of ``model``.

        Raises:
            UsageError: The network cannot be pruned, or the target cannot be met.
        """
        config = self.config
        named = find_importance(config.importance)
        cost, depletion = (None if kind == "none" else kind for kind in (config.cost_unit, config.depletion_kind))
        pricing = None
        if not named.priced and (cost or depletion):
            pricing = Pricing(cost, depletion is not None, named.degree)  # type: ignore[arg-type]
        importance = named.make(config.seed, cost, depletion)
        then = ", refitting" * config.compensate + ", recovering" * config.recover
        print(f"scoring channels ({config.importance}), searching{then}", file=sys.stderr)
        return self._pruned(
            model,
            {name: getattr(config, flag) for name, flag in TARGETS.items()},
            self.batches,
            importance=importance,
            compensation=config.compensate,
            recover=config.recover,
            loss_fn=None if named.loss is None else named.loss(config.seed),
            steps=config.steps,
            progress=True,
            pricing=pricing,
        )

    def probe(self, model: nn.Module) -> None:
        """Prune a copy of ``model`` by the size of its weights: can it be done, without scores worth the name.

        Raises:
            UsageError: The network cannot be pruned, or not as far as the target.
        """
        if self.config.latency is not None:
            return  # what a network takes is measured when it is there
        targets = {name: getattr(self.config, flag) for name, flag in TARGETS.items()}
        importance = find_importance("l2").make(0, None, None)
        self._pruned(
            model, targets, self.batches, importance=importance, compensation=False, loss_fn=None, steps=1,
            progress=False,
        )  # fmt: skip

    def _pruned(
        self, model: nn.Module, targets: dict[str, float | None], batches: list[Batch], **options: Any
    ) -> Plan:
        config = self.config
        with explained(config.model), _time_limit(TRACE_SECONDS):
            model = model.to(self.device).eval()
            result = prune_layers(
                model,
                self.network.example,
                batches,
                layer_ratios(config),
                targets,
                scope=config.scope,
                ignored_layers=None,
                round_to=config.round_to or None,
                max_pruning_ratio=config.max_pruning_ratio,
                seed=config.seed,
                **options,
            )
        if result.macs >= 1:
            raise UsageError(
                "nothing was pruned: the ratio removes no whole channel; raise it, or use --round-to 0"
            )
        return Plan(result, widths(model))


TARGETS = {"macs": "macs", "params": "params", "latency": "latency", "ratio": "pruning_ratio"}
"""Targets of ``prune()``, and their flags."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds of CPU time, where the system can: some traces never end."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    late = TimeoutError(f"it takes more than {seconds:g} s; Torch-Pruning may never end")
    expired = False

    def stop(*_: Any) -> None:
        nonlocal expired
        expired = True
        raise late

    before = signal.signal(signal.SIGPROF, stop)
    # Again and again: Torch-Pruning swallows what a trace raises.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
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
def explained(model: str) -> Iterator[None]:
    """Turn whatever pruning raises into one line."""
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except TargetError as error:
        raise UsageError(_flags(error)) from error
    except Exception as error:
        reason = _flags(error).splitlines()[0] if str(error).strip() else "no message"
        kind = "" if isinstance(error, (IPPROError, ValueError)) else f"{type(error).__name__}: "
        raise UsageError(
            f"{model} cannot be pruned: {kind}{reason} (choose another network, scope or importance, or "
            "--no-compensate)"
        ) from error


def _flags(error: Exception) -> str:
    """A message in terms of flags, not of arguments."""
    text = str(error)
    for argument in ("max_pruning_ratio", "round_to", "layer_ratios"):
        text = text.replace(argument, f"--{argument.replace('_', '-')}")
    return text.replace(" or ignored_layers", "")
