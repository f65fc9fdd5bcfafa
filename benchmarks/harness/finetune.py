"""One plain training recipe, the same for all arms and for the unpruned network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

if TYPE_CHECKING:  # the tasks import this module
    from benchmarks.tasks.base import Task


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum and a cosine from the learning rate to zero, step by step, in float32."""

    epochs: int = 0
    learning_rate: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4


def finetune(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    seed: int,
    device: str | torch.device,
    label: str = "fine-tuning",
) -> float:
    """Train ``model`` in place on the task's training split; return the mean loss of the last epoch.

    Args:
        model: The network; left in eval mode.
        task: Supplies the images, the augmentation and the names of parameters that stay as they are.
        recipe: The schedule.
        seed: Of the order of the images, the augmentation and dropout.
        device: Where ``model`` lives.
        label: Text before the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for n, p in model.named_parameters() if n not in task.frozen]
    optimizer = torch.optim.SGD(
        parameters, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    batches = -(-task.training_images // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(recipe.epochs * batches, 1))
    model.train()
    loss_sum, count = math.nan, 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in tqdm(range(recipe.epochs), desc=label, unit="epoch", leave=False):
            loss_sum, count = 0.0, 0
            for images, labels in task.training(generator, recipe.batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum, count = loss_sum + loss.item() * len(labels), count + len(labels)
    model.eval()
    return loss_sum / count


def reinitialise(model: nn.Module, frozen: tuple[str, ...], seed: int) -> None:
    """Give all layers of ``model`` the weights that PyTorch gives new ones, but for those named in ``frozen``."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if name in frozen}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, value in kept.items():
            model.get_parameter(name).copy_(value)
