"""Training that can be killed at any moment and goes on where it was."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data import Images
from .errors import UsageError
from .objectives import Classification, Segmentation, divergence
from .recipe import Recipe, make_optimizer, make_scheduler, precision, training_mode
from .seeds import derive
from .store import Store


@dataclass
class Trainer:
    """Trains networks of one run by one recipe.

    Args:
        images: Where batches come from; each is a function of phase, epoch and number.
        objective: The loss.
        store: Where checkpoints go.
        device: Where networks are trained.
        checkpoint_every: Steps between checkpoints inside an epoch; 0 for none.
    """

    images: Images
    objective: Classification | Segmentation
    store: Store
    device: torch.device
    checkpoint_every: int

    def train(
        self,
        model: nn.Module,
        recipe: Recipe,
        phase: str,
        frozen: tuple[str, ...] = (),
        teacher: nn.Module | None = None,
    ) -> dict[str, Any]:
        """Train ``model`` in place, from the newest checkpoint of ``phase`` if there is one.

        Args:
            model: The network, on the trainer's device; left in eval mode.
            recipe: How.
            phase: Name of the checkpoint, and part of all seeds.
            frozen: Names of parameters that stay as they are.
            teacher: Unpruned network in eval mode whose prediction makes half of the loss.

        Returns:
            ``{"loss": [mean per epoch], "seconds": ...}``.
        """
        optimizer = make_optimizer(model, recipe, frozen)
        scheduler = make_scheduler(optimizer, recipe, self.images.steps_per_epoch)
        dtype, scaler = precision(recipe, self.device)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        position: dict[str, Any] = {"epoch": 0, "step": 0, "sum": 0.0, "loss": [], "seconds": 0.0}
        saved = self.store.load_checkpoint(phase)
        if saved is not None:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            position = saved["position"]
        begin = time.perf_counter() - position["seconds"]

        def keep() -> None:
            position["seconds"] = time.perf_counter() - begin
            states = {name: part.state_dict() for name, part in parts.items()}
            self.store.save_checkpoint(phase, states | {"position": position})

        total = recipe.epochs * self.images.steps_per_epoch
        done = position["epoch"] * self.images.steps_per_epoch + position["step"]
        training_mode(model, recipe)
        cuda = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=cuda),
            tqdm(total=total, initial=done, desc=phase, unit="step", smoothing=0.05) as bar,
        ):
            while position["epoch"] < recipe.epochs:
                epoch = position["epoch"]
                for images, targets in self.images.epoch(phase, epoch, position["step"]):
                    torch.manual_seed(derive(recipe.seed, phase, epoch, position["step"]))  # dropout
                    loss = self._step(model, images, targets, optimizer, scaler, dtype, teacher)
                    scheduler.step()
                    if not math.isfinite(loss):
                        flag = "--train-lr" if phase == "trained" else "--lr"
                        raise UsageError(
                            f"the loss became {loss} in epoch {epoch + 1} ({phase}): choose a lower {flag}, and "
                            "another --out"
                        )
                    position["sum"] += loss
                    position["step"] += 1
                    bar.update()
                    every = self.checkpoint_every
                    if every and position["step"] % every == 0 and position["step"] < self.images.steps_per_epoch:
                        keep()
                position["loss"].append(position["sum"] / self.images.steps_per_epoch)
                position |= {"epoch": epoch + 1, "step": 0, "sum": 0.0}
                bar.set_postfix(loss=f"{position['loss'][-1]:.3f}")
                keep()
        model.eval()
        return {"loss": position["loss"], "seconds": round(position["seconds"], 2)}

    def _step(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        dtype: torch.dtype | None,
        teacher: nn.Module | None,
    ) -> float:
        images, targets = (x.to(self.device, non_blocking=True) for x in (images, targets))
        autocast = torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            outputs = model(images)
            loss = self.objective.loss(outputs, targets)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(images)
                loss = (loss + divergence(outputs, wanted)) / 2
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()
