"""Tasks by name; a new one is a module with ``DEFAULTS`` and ``build(config) -> Task`` listed in ``TASKS``."""

from __future__ import annotations

from benchmarks.errors import UsageError
from benchmarks.tasks import cifar10, digits, imagefolder
from benchmarks.tasks.base import Batch, Task, TaskConfig, TaskDefaults

__all__ = ["TASKS", "Batch", "Task", "TaskConfig", "TaskDefaults", "build_task", "defaults_of"]

TASKS = {"digits": digits, "cifar10": cifar10, "imagefolder": imagefolder}


def _module(name: str):
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return TASKS[name]


def defaults_of(name: str) -> TaskDefaults:
    """Return the default grid of the task called ``name``."""
    return _module(name).DEFAULTS


def build_task(config: TaskConfig) -> Task:
    """Return the task that ``config`` describes, with its trained network in eval mode on ``config.device``."""
    task = _module(config.task).build(config)
    task.model.to(config.device).eval()
    task.example = task.example.to(config.device)
    return task
