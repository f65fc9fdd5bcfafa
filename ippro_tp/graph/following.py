"""What follows a layer in a dependency graph."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def norm_after(graph: Any, module: nn.Module) -> _BatchNorm | None:
    """The BatchNorm that is the only reader of ``module``'s output and reads nothing else."""
    node = graph.module2node.get(module)
    if node is None or len(node.outputs) != 1:
        return None
    after = node.outputs[0]
    found = after.module
    return found if isinstance(found, _BatchNorm) and len(after.inputs) == 1 else None
