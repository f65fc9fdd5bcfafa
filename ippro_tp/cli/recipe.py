"""The one training recipe: optimizer, schedule, precision. What varies is in :class:`Recipe`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum or AdamW; the learning rate falls along a cosine or in steps."""

    epochs: int
    learning_rate: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    norm_momentum: float | None = None
    frozen_statistics: bool = False
    schedule: str = "cosine"
    step_epochs: int = 40
    amp: bool = False
    seed: int = 0


def training_mode(model: nn.Module, recipe: Recipe) -> None:
    """Put ``model`` into train mode; with frozen statistics, BatchNorm normalises as in eval mode."""
    model.train()
    for module in model.modules() if recipe.frozen_statistics else ():
        if isinstance(module, _NormBase):
            module.eval()


def make_optimizer(model: nn.Module, recipe: Recipe, frozen: tuple[str, ...] = ()) -> torch.optim.Optimizer:
    """Return the optimizer over all parameters but the ``frozen`` ones; normalisation layers are a group apart."""
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    named = [(n, p) for n, p in model.named_parameters() if n not in frozen and p.requires_grad]
    plain: dict[str, Any] = {}
    special: dict[str, Any] = {}
    if recipe.norm_weight_decay is not None:
        special["weight_decay"] = recipe.norm_weight_decay
    if recipe.norm_momentum is not None and recipe.optimizer == "sgd":
        special |= {"momentum": recipe.norm_momentum, "nesterov": recipe.norm_momentum > 0}
    groups = [
        {"params": [p for _, p in named if id(p) not in norms], **plain},
        {"params": [p for _, p in named if id(p) in norms], **special},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)
    momentum = recipe.momentum
    return torch.optim.SGD(
        groups, recipe.learning_rate, momentum, weight_decay=recipe.weight_decay, nesterov=momentum > 0
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the scheduler, to be stepped after every optimizer step."""
    total = max(recipe.epochs * steps_per_epoch, 1)

    def factor(step: int) -> float:
        if recipe.schedule == "step":
            return 0.1 ** (step // (recipe.step_epochs * steps_per_epoch))
        return (1 + math.cos(math.pi * min(step, total) / total)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def precision(recipe: Recipe, device: torch.device) -> tuple[torch.dtype | None, torch.amp.GradScaler]:
    """Return the autocast dtype (None for float32) and a scaler that does nothing unless it has to."""
    half = device.type == "cuda" and not torch.cuda.is_bf16_supported()
    dtype = (torch.float16 if half else torch.bfloat16) if recipe.amp else None
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
