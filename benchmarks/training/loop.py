"""The training loop: images stay on the device, and the host waits for it every few steps only."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.errors import UsageError
from benchmarks.models.cifar import frozen_parameters
from benchmarks.tasks.cifar10 import MEAN, STD
from benchmarks.training.augment import distort, erase, mix, shift_and_mirror
from benchmarks.training.config import TrainingConfig
from benchmarks.training.data import CLASSES, Split
from benchmarks.training.progress import Progress, warm_cosine

WAIT_EVERY = 16
TELL_EVERY = 5.0  # seconds


def normalised(images: Tensor) -> Tensor:
    """Return images of values 0 to 1 with the mean and deviation that the task ``cifar10`` uses."""
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def train(model: nn.Module, data: Split, config: TrainingConfig, seconds: float = 0.0) -> tuple[nn.Module, dict]:
    """Train ``model`` in place.

    Args:
        model: The network, on its device.
        data: Training images on the same device.
        config: The recipe.
        seconds: End after so many, compilation included; 0: after ``config.epochs``.

    Returns:
        The network to use, which is an average of ``model`` if the recipe says so, and what was done.

    Raises:
        UsageError: The loss is not finite, or there are fewer images than a batch holds.
    """
    begin = time.perf_counter()
    steps_per_epoch = len(data) // config.batch_size
    if not steps_per_epoch:
        raise UsageError(f"{len(data)} training images do not fill a batch; choose a lower --batch-size")
    model.train()
    optimizer = _optimizer(model, config)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    batches = _Batches(data, config)
    call, compiled = _callable(model, config, batches)
    spent = time.perf_counter() - begin
    progress = Progress(config.epochs * steps_per_epoch, max(seconds - spent, 1e-3) if seconds else 0.0)
    curve, told, loss = [], time.perf_counter(), torch.zeros(())
    while (part := progress.part) < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm_cosine(part, config.warmup)
        images, targets = batches.next(calm=part >= config.calm)
        loss = _loss(call, images, targets, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if config.ema:
            average.update_parameters(model)
        progress.steps += 1
        if progress.steps % WAIT_EVERY == 0:  # else the clock would run behind a queue of steps
            if not math.isfinite(value := loss.item()):
                raise UsageError(f"the loss became {value} after {progress.steps} steps; lower --learning-rate")
            if time.perf_counter() - told > TELL_EVERY:
                told = time.perf_counter()
                curve.append([round(progress.steps / steps_per_epoch, 2), round(value, 4)])
                print(f"{config.net} {100 * part:.0f} % epoch {curve[-1][0]} loss {value:.3f}", file=sys.stderr)
    done = {
        "epochs_done": round(progress.steps / steps_per_epoch, 2),
        "steps": progress.steps,
        "last_loss": loss.item(),
        "loss_curve": curve,
        "compiled": compiled,
        "warm_up_seconds": round(spent, 1),
        "training_seconds": round(time.perf_counter() - begin, 1),
    }
    return (average.module if config.ema else model).eval(), done


@torch.inference_mode()
def accuracy(model: nn.Module, data: Split, batch_size: int = 500) -> float:
    """Return the top-1 accuracy in eval mode and float32, as a fraction."""
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=data.labels.device)
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        right += (model(normalised(images.float() / 255)).argmax(1) == labels).sum()
    return right.item() / len(data)


class _Batches:
    """Augmented batches without end: images, and targets as probabilities."""

    def __init__(self, data: Split, config: TrainingConfig) -> None:
        self._data, self._config = data, config
        self._draws = random.Random(config.seed)
        self._order: list[Tensor] = []
        self.channels_last = config.device.startswith("cuda") and config.net in CHANNELS_LAST

    def next(self, calm: bool) -> tuple[Tensor, Tensor]:
        if not self._order:
            order = torch.randperm(len(self._data), device=self._data.images.device)
            parts = order.split(self._config.batch_size)
            self._order = [part for part in parts if len(part) == self._config.batch_size]
        index, config = self._order.pop(), self._config
        images = shift_and_mirror(self._data.images[index].float() / 255)
        targets = F.one_hot(self._data.labels[index], CLASSES).float()
        if not calm:
            if config.distortion:
                images = distort(images, config.distortion)
            if self._draws.random() < config.mix:
                images, targets = mix(images, targets, self._draws)
            if config.erasing:
                images = erase(images, config.erasing)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return normalised(images).contiguous(memory_format=layout), targets


CHANNELS_LAST = ("convnext", "mobilevit", "cct2_3x2", "mobilenetv2", "mobilenetv2_half")
"""Networks whose convolutions run faster so."""


def _loss(call: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, config: TrainingConfig) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        outputs = call(images)
    return F.cross_entropy(outputs.float(), targets, label_smoothing=config.label_smoothing)


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    frozen = set(frozen_parameters(model))
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            continue
        plain = parameter.dim() < 2 or name.endswith(("pos_embed", "cls_token", "relative_position_bias_table"))
        (free if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    fused = config.device.startswith("cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=fused)


def _callable(model: nn.Module, config: TrainingConfig, batches: _Batches) -> tuple[Callable[..., Any], bool]:
    """Run forward and backward once, compiled if asked and possible; the model is as before."""
    images, targets = batches.next(calm=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def attempt(call: Callable[..., Any]) -> None:
        _loss(call, images, targets, config).backward()
        if images.is_cuda:
            torch.cuda.synchronize()

    call: Callable[..., Any] = model
    compiled = config.compile
    if compiled:
        try:
            call = torch.compile(model, dynamic=False)
            attempt(call)
        except Exception as error:  # whatever a compiler may raise: training goes on without it
            print(f"{config.net}: torch.compile failed ({type(error).__name__}: {error})", file=sys.stderr)
            call, compiled = model, False
    if not compiled:
        attempt(call)
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    return call, compiled
