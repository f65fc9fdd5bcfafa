"""One cell of the grid: its identity, its JSON file, and the machine it ran on."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import resource
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.errors import UsageError

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


def write_json(path: Path, record: dict) -> None:
    """Write ``record`` so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


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


@functools.cache
def environment() -> dict:
    """Return versions, git revision and machine."""
    packages = ("torch", "torchvision", "torch-pruning", "timm", "numpy", "ippro-tp")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": _git_revision(),
    }


def peak_memory_mb() -> float:
    """Return the largest resident set of this process so far, in MiB (it never falls again)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def as_dict(config) -> dict:
    """Return a dataclass as JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _git_revision() -> str | None:
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
