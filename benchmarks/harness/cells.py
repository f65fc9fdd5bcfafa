"""One cell of the grid: its identity, its JSON file, and the machine it ran on."""

from __future__ import annotations

import dataclasses
import json
import resource
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import UsageError
from ippro_tp.cli.files import as_dict, environment, write_json

__all__ = ["Cell", "as_dict", "environment", "peak_memory_mb", "read_finished", "write_json"]

UNPRUNED = "unpruned"
"""Name of the arm that prunes nothing."""
OPTIONS = {"depletion": "none", "compensation": "none", "schedule": "once", "widths": "scores"}
"""Fields that are named only where they are not the default: cells from before they came are the same."""


@dataclass(frozen=True)
class Cell:
    """What is varied: arm, cost term, scope, MACs target, seed, and the options."""

    criterion: str
    cost: str
    scope: str
    target: float
    seed: int
    compensation: str = "none"
    schedule: str = "once"
    widths: str = "scores"
    depletion: str = "none"

    @property
    def varied(self) -> dict:
        """The fields that name this cell in its JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if OPTIONS.get(name) != value}

    @property
    def _chosen(self) -> list[str]:
        return [value for name in OPTIONS if (value := getattr(self, name)) != OPTIONS[name]]

    def path(self, out: Path, task: str, model: str) -> Path:
        """Return the JSON file of this cell under ``out``."""
        cost = [self.cost] if self.cost != "none" else []
        arm = "+".join([self.criterion, *cost, *self._chosen])
        model = model.replace("/", "_")
        return out / "cells" / f"{task}-{model}" / f"{arm}__{self.scope}__{self.target:g}__seed{self.seed}.json"

    @property
    def label(self) -> str:
        """Short description for progress bars and error lists."""
        text = f"{self.criterion} cost={self.cost} {self.scope} {self.target:g} seed {self.seed}"
        return " ".join([text, *self._chosen])


def read_finished(path: Path, config: dict) -> bool:
    """Return whether ``path`` holds this very cell, done; a failed one counts as not done.

    Raises:
        UsageError: The file holds a cell of another configuration.
    """
    if not path.exists():
        return False
    try:
        record = json.loads(path.read_text())
        stored = record["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no cell of ours ({error!r}); delete it or choose another --out") from error
    wanted = json.loads(json.dumps(config))
    if stored != wanted:
        keys = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
        changes = ", ".join(f"{k}: {stored.get(k)!r} -> {wanted.get(k)!r}" for k in keys)
        raise UsageError(
            f"{path} was made with another configuration ({changes}); choose another --out or delete it"
        )
    return record["status"] == "ok"


def peak_memory_mb() -> float:
    """Return the largest resident set of this process so far, in MiB (it never falls again)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
