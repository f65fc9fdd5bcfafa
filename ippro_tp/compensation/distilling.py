"""One distillation: the steps, the learning rate, and the weights that came nearest on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration.batches import as_call
from ..errors import ObservationError
from .augmenting import MIRROR, MIX, SHIFT, is_image, mirrored, varied
from .orthogonal import Muon
from .samples import Samples

TOLD = 1 << 28
"""Bytes that what the teacher says to all samples may take."""
LOOKS = 10
"""Times that the held-out samples are looked at."""
WARM_UP = 0.05
"""Part of the steps in which the learning rate rises to its full value."""
RISE = 2.0
"""To how much of what it was the distance may rise: it does while the learning rate is high, and falls later."""
RATE, HIGHEST = 1e-2, 2e-3
"""The learning rate where none is given: this part of the distance at the start, and no more than the second."""
BACK_OFF, GIVE_UP = 3.0, 1e-3
"""The learning rate is divided by the first where it destroys; below that part of what it was, the run ends."""


@dataclass(frozen=True)
class Plan:
    """What :class:`ippro_tp.Recovery` was told; see there."""

    steps: int
    lr: float | None
    batch_size: int
    augment: Callable[[Any], Any] | Literal["mirror", "shift", "mix"] | None
    held_out: float
    seed: int


class Distillation:
    """One training: batches, steps and looks at what is held out. Both models are to be in eval mode.

    Args:
        how: the plan.
        model: is trained.
        teacher: what it is trained to predict.
        parameters: those of ``model`` that are trained.
        samples: what the models are called with, at least two.

    Attributes:
        before, best: distances on the held-out samples.
        step: steps done.
        kept, kept_lr: the step that gave the best weights, and the largest learning rate then.
        held: number of held-out samples.
    """

    def __init__(
        self, how: Plan, model: nn.Module, teacher: nn.Module, parameters: Sequence[Tensor], samples: Samples
    ) -> None:
        self._how, self._model, self._teacher, self._parameters = how, model, teacher, parameters
        self._samples, self._device = samples, parameters[0].device
        usable = samples.finite().nonzero().flatten()
        if len(usable) < 2:
            raise ObservationError("recovery holds samples out: it needs at least two without NaN or inf.")
        self._generator = torch.Generator().manual_seed(how.seed)
        self.held = min(max(1, round(how.held_out * len(usable))), len(usable) - 1)
        order = usable[torch.randperm(len(usable), generator=self._generator)]
        self._trained = order[self.held :]
        self._judged = order[: self.held].split(how.batch_size)
        with torch.no_grad():
            self._wanted = [_floats(self._call(teacher, part)) for part in self._judged]
        self._power = [_power(parts) for parts in zip(*self._wanted, strict=True)]
        self.step = self.kept = 0
        self.before = self.best = self._look()
        self._lr = self.kept_lr = how.lr or min(HIGHEST, RATE * self.before)
        self._told = self._tell()
        self._best = [p.detach().clone() for p in parameters]

    def train(self, tick: Callable[[], object] = bool) -> None:
        """Do the steps, and call ``tick`` after each. At the end, the best weights are in place."""
        how, batches, lowest = self._how, self._batches(), GIVE_UP * self._lr
        optimizer = Muon(self._parameters, lr=self._lr)
        every = max(1, how.steps // LOOKS)
        while self.step < how.steps and self.before > 0 and self._lr >= lowest:
            for group in optimizer.param_groups:
                group["lr"] = self._lr * _schedule((self.step + 1) / how.steps)
            sound = self._learn(optimizer, next(batches))
            self.step += 1
            tick()
            if sound and (self.step % every == 0 or self.step == how.steps):
                sound = self._keep_if_better(self._look())
            if not sound:
                self._restore()
                optimizer.state.clear()
                self._lr /= BACK_OFF
        self._restore()

    def _learn(self, optimizer: torch.optim.Optimizer, batch: Tensor) -> bool:
        """One step; ``False``, and none, where the gradient is not finite."""
        args, kwargs, wanted = self._lesson(batch)
        optimizer.zero_grad()
        self._distance(_floats(self._model(*args, **kwargs)), wanted).backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, math.inf)
        if bool(norm.isfinite()):
            optimizer.step()
        return bool(norm.isfinite())

    def _lesson(self, batch: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """What both models see for some samples, and what the teacher says to it."""
        args, kwargs = self._samples.arguments(batch, self._device)
        turned = torch.zeros(len(batch), dtype=torch.bool)
        how = self._how.augment
        if isinstance(how, str) and is_image(args, kwargs):
            turned = torch.rand(len(batch), generator=self._generator) < 0.5
            args = (varied(args[0], turned, how, self._generator),)
        elif callable(how):
            args, kwargs = self._augmented(args, kwargs)
        if self._told is not None:
            return args, kwargs, [x[turned.long(), batch] for x in self._told]
        with torch.no_grad():
            return args, kwargs, _floats(self._teacher(*args, **kwargs))

    @torch.no_grad()
    def _tell(self) -> list[Tensor] | None:
        """What the teacher says to every sample, as it is and mirrored: ``(views, samples, ...)``.

        ``None`` where that takes longer than asking it in every step, or more than ``TOLD`` bytes, or where its
        outputs have no dimension of samples.
        """
        how, count = self._how, len(self._trained)
        args, kwargs = self._samples.arguments(self._trained[:1], self._device)
        views = 2 if how.augment == MIRROR and is_image(args, kwargs) else 1
        first = _floats(self._call(self._teacher, self._judged[0]))
        endless = callable(how.augment) or (how.augment in (SHIFT, MIX) and is_image(args, kwargs))
        if endless or views * count > how.steps * how.batch_size:
            return None
        if any(x.dim() == 0 or len(x) != len(self._judged[0]) for x in first):
            return None
        if views * self._samples.count * sum(x[0].numel() * x.element_size() for x in first) > TOLD:
            return None
        told = [x.new_zeros(views, self._samples.count, *x.shape[1:]) for x in first]
        for batch in self._trained.split(how.batch_size):
            args, kwargs = self._samples.arguments(batch, self._device)
            for view in range(views):
                turned = torch.full((len(batch),), view == 1)
                shown = (mirrored(args[0], turned),) if views == 2 else args
                for kept, x in zip(told, _floats(self._teacher(*shown, **kwargs)), strict=True):
                    kept[view, batch] = x
        return told

    def _keep_if_better(self, now: float) -> bool:
        """Keep the weights if they are the best so far; ``False`` if the learning rate destroys."""
        if now < self.best:
            self.best, self.kept, self.kept_lr = now, self.step, self._lr
            self._best = [p.detach().clone() for p in self._parameters]
        return now <= RISE * self.before  # False for NaN

    @torch.no_grad()
    def _restore(self) -> None:
        for kept, p in zip(self._best, self._parameters, strict=True):
            p.copy_(kept)

    @torch.no_grad()
    def _look(self) -> float:
        """The distance on the held-out samples."""
        total = 0.0
        for part, wanted in zip(self._judged, self._wanted, strict=True):
            given = _floats(self._call(self._model, part))
            total += len(part) * float(self._distance(given, wanted))
        return total / self.held

    def _distance(self, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        if [x.shape for x in given] != [x.shape for x in wanted]:
            raise ObservationError(
                f"the model returns tensors of shapes {[tuple(x.shape) for x in given]}, its teacher "
                f"{[tuple(x.shape) for x in wanted]}: pruning must leave the outputs alone (ignored_layers)."
            )
        shares = [
            (a.float() - b.float()).square().mean() / p for a, b, p in zip(given, wanted, self._power, strict=True)
        ]
        return torch.stack(shares).mean()

    def _call(self, model: nn.Module, batch: Tensor) -> Any:
        args, kwargs = self._samples.arguments(batch, self._device)
        return model(*args, **kwargs)

    def _augmented(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert callable(self._how.augment)
        if args and kwargs:
            raise ObservationError("augment needs inputs that are given by position or by name, not both.")
        return as_call(self._how.augment(kwargs or (args if len(args) > 1 else args[0])))

    def _batches(self) -> Iterator[Tensor]:
        size = min(self._how.batch_size, len(self._trained))
        while True:
            order = self._trained[torch.randperm(len(self._trained), generator=self._generator)]
            yield from order[: len(order) // size * size].split(size)


def _schedule(done: float) -> float:
    """Part of the learning rate at a part of the steps: a linear rise, then a cosine."""
    return min(1.0, done / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _floats(outputs: Any) -> list[Tensor]:
    """All floating-point tensors in what a model returned, in order.

    Raises:
        ObservationError: there is none.
    """
    found = list(_tensors(outputs))
    if not found:
        raise ObservationError(
            f"the model returned {type(outputs).__name__}, in which no tensor of numbers was found."
        )
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) or hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _power(parts: Sequence[Tensor]) -> float:
    """Mean square of the deviations from the mean; 1 for what does not vary."""
    values = torch.cat([x.float().flatten() for x in parts])
    power = float(values.var(correction=0))
    return power if power > 0 else 1.0
