"""Recovery: minutes of distillation from the uncut model, without labels, that never end worse than they began."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration.guard import evaluating, preserved
from .distilling import MIRROR, SHIFT, Distillation, Plan
from .inputs import KeptInputs


@dataclass(frozen=True)
class RecoveryReport:
    """What :meth:`Recovery.run` did.

    Attributes:
        before: distance between the outputs of the two models on held-out samples, as a share of the power of the
            uncut model's output: mean square of the difference, divided by the variance.
        after: the same at the end, never more than ``before``.
        steps: gradient steps that were done.
        kept: the step whose weights were kept; 0: those from before, as nothing was better.
        lr: the learning rate that came to that.
        held_out: number of held-out samples.
        seconds: wall-clock time.
    """

    before: float
    after: float
    steps: int
    kept: int
    lr: float
    held_out: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"distance to the unpruned model on {self.held_out} held-out samples "
            f"{self.before:.2%} -> {self.after:.2%} "
            f"(weights of step {self.kept} of {self.steps}, lr {self.lr:.0e}, {self.seconds:.0f} s)"
        )


class Recovery(KeptInputs):
    r"""Distillation without labels: the pruned model is trained to predict what the unpruned one does.

    All weights are fitted together to

    .. math:: \min \sum_o E \lVert o(x) - o^*(x) \rVert^2 / \mathrm{Var}\, o^*,

    o the floating-point tensors that the models return, over the samples of the calibration. BatchNorm keeps its
    statistics, which pruning and :class:`Compensation` have set, and dropout is off: what is trained is the
    network that will be used. Part of the samples is held out, and the weights that came nearest on them are kept:
    those from before, if none came nearer.

    It repairs what :class:`Compensation`, which fits each layer by itself, leaves, and takes minutes where that
    takes seconds; so do that first.

    Args:
        steps: gradient steps.
        lr: largest learning rate of AdamW; it rises in the first steps and falls along a cosine. It is divided by
            three, and the best weights so far are taken up again, whenever held-out samples say that it destroys.
        batch_size: samples per step.
        augment: ``"shift"``: images, where they are the only input, ``(B, C, H, W)``, are mirrored left to right
            and shifted by up to an eighth of their size, by chance; ``"mirror"``: mirrored only, for which the
            teacher has to be asked once. Other inputs are taken as they are. Or a callable: given a batch of
            inputs (as the loader gave them: a tensor, a tuple or a dict), it returns those that both models see
            instead; global random numbers in it follow ``seed``. ``None``: nothing.
        held_out: part of the samples that is only looked at.
        max_samples: inputs that are kept at most; of more, an even choice.
        seed: of the order of the samples and of ``augment``.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pruned = copy.deepcopy(model)
        >>> _ = pruned[0].weight.data[:2].zero_()
        >>> recovery = Recovery(steps=20, batch_size=16).calibrate(model, [torch.randn(64, 4)], progress=False)
        >>> report = recovery.run(pruned, model)
        >>> report.after <= report.before
        True
    """

    _VERB = "run(model, teacher)"

    def __init__(
        self,
        steps: int = 600,
        *,
        lr: float = 2e-3,
        batch_size: int = 32,
        augment: Callable[[Any], Any] | Literal["mirror", "shift"] | None = "shift",
        held_out: float = 0.0625,
        max_samples: int = 16384,
        seed: int = 0,
    ) -> None:
        super().__init__(max_samples)
        if steps < 1:
            raise ValueError(f"steps={steps!r}; give a number >= 1")
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr={lr!r}; give a positive number")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}; give a number >= 1")
        if not (augment in (None, MIRROR, SHIFT) or callable(augment)):
            raise ValueError(f'augment={augment!r}; give "shift", "mirror", a callable, or None')
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out!r}; give a number between 0 and 1")
        self._plan = Plan(int(steps), lr, int(batch_size), augment, held_out, seed)

    def run(self, model: nn.Module, teacher: nn.Module, progress: bool = False) -> RecoveryReport:
        """Train ``model``, in place, to give what ``teacher`` gives.

        Parameters that require gradients are trained, or all if none does. Gradients, flags, modes, buffers and
        random streams are left as they were; after an exception, so are the weights.

        Args:
            model: the pruned model.
            teacher: the unpruned one, unchanged, on the same device.
            progress: show a progress bar if tqdm is installed.

        Raises:
            NotCalibratedError: there are no samples.
            ObservationError: the models return different things, or nothing in floating point; or there is only
                one sample.
            ValueError: both are the same model, or share parameters; or there are none to train.
        """
        self._check_calibrated()
        if model is teacher or {id(p) for p in model.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("the model and its teacher share parameters; give a copy from before pruning.")
        begin = time.perf_counter()
        parameters = [p for p in model.parameters() if p.requires_grad] or list(model.parameters())
        parameters = [p for p in parameters if p.is_floating_point()]
        if not parameters:
            raise ValueError("the model has no parameters that can be trained.")
        with (
            preserved(model), preserved(teacher), evaluating(model), evaluating(teacher),
            _restored_on_error(parameters), _seeded(self._plan.seed), torch.enable_grad(),
        ):  # fmt: skip
            for p in parameters:
                p.requires_grad_(True)
            run = Distillation(self._plan, model, teacher, parameters, self._samples)
            with _progress_bar(self._plan.steps, progress) as tick:
                run.train(tick)
        return RecoveryReport(
            run.before, run.best, run.step, run.kept, run.kept_lr, run.held, time.perf_counter() - begin
        )


@contextmanager
def _progress_bar(steps: int, shown: bool) -> Iterator[Callable[[], object]]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield bool
        return
    with tqdm(total=steps, desc="Recovery", unit="step", leave=False, disable=not shown) as bar:
        yield bar.update


@contextmanager
def _restored_on_error(parameters: Sequence[Tensor]) -> Iterator[None]:
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for value, p in zip(before, parameters, strict=True):
                p.copy_(value)
        raise


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global random numbers follow ``seed`` inside, and go on afterwards as if nothing had been drawn."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
