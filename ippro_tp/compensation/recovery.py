"""Recovery: label-free distillation from the unpruned model that never ends worse than it began."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration.guard import evaluating, preserved
from .augmenting import BUILT_IN
from .distilling import Distillation, Plan
from .inputs import KeptInputs


@dataclass(frozen=True)
class RecoveryReport:
    """The outcome of :meth:`Recovery.run`.

    Attributes:
        before: distance between the outputs of the two models on held-out samples, as a share of the power of the
            unpruned model's output: mean square of the difference, divided by the variance.
        after: the same at the end, never more than ``before``.
        steps: number of gradient steps.
        kept: the step whose weights were kept; 0 if none was better than the initial weights.
        lr: the learning rate that led to them.
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
    r"""Distillation without labels: the pruned model is trained to reproduce the unpruned model's outputs.

    All weights are fitted together to

    .. math:: \min \sum_o E \lVert o(x) - o^*(x) \rVert^2 / \mathrm{Var}\, o^*,

    where o runs over the floating-point tensors that the models return, and x over the calibration samples.
    BatchNorm keeps its running statistics, as set by pruning and :class:`Compensation`, and dropout is off: the
    network is trained as it will be used. Some samples are held out, and the weights that come closest to the
    unpruned model on them are kept, which may be the initial ones.

    Run :class:`Compensation` first: it fits each layer by itself in seconds, and this takes minutes to correct
    what remains.

    Args:
        steps: number of gradient steps.
        lr: largest learning rate, with a warm-up and a cosine schedule; of Muon (Jordan et al. 2024) for weights
            with several inputs and outputs, with steps as long as Adam's, and of Adam for the rest. Whenever the
            error on held-out samples explodes, it is divided by three and training continues from the best weights
            so far. ``None``: a hundredth of the error at the start, at most 2e-3, as what is nearly right is
            spoilt by long steps.
        batch_size: samples per step.
        augment: ``"mix"``: images, if they are the only input, ``(B, C, H, W)``, are randomly mirrored left to
            right and shifted by up to an eighth of their size, and half of them are mixed with another (mixup,
            Zhang et al. 2018). ``"shift"``: mirrored and shifted only. ``"mirror"``: mirrored only; the teacher's
            outputs are then computed once. Other inputs are not augmented. A callable takes a batch of inputs as
            the loader yields them (a tensor, a tuple or a dict) and returns those that both models see; its use of
            the global random state follows ``seed``. ``None``: no augmentation.
        held_out: fraction of the samples to hold out.
        max_samples: the largest number of inputs to store; from more, an even selection is kept.
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
        lr: float | None = None,
        batch_size: int = 32,
        augment: Callable[[Any], Any] | Literal["mirror", "shift", "mix"] | None = "mix",
        held_out: float = 0.0625,
        max_samples: int = 16384,
        seed: int = 0,
    ) -> None:
        super().__init__(max_samples)
        if steps < 1:
            raise ValueError(f"steps={steps!r}; give a number >= 1")
        if lr is not None and not 0 < lr < float("inf"):
            raise ValueError(f"lr={lr!r}; give a positive number, or None")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}; give a number >= 1")
        if not (augment in (None, *BUILT_IN) or callable(augment)):
            raise ValueError(f'augment={augment!r}; give "mix", "shift", "mirror", a callable, or None')
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out!r}; give a number between 0 and 1")
        self._plan = Plan(int(steps), lr, int(batch_size), augment, held_out, seed)

    def run(self, model: nn.Module, teacher: nn.Module, progress: bool = False) -> RecoveryReport:
        """Train ``model`` in place to reproduce the outputs of ``teacher``.

        Parameters that require gradients are trained, or all of them if none does. Gradients, flags, modes,
        buffers and random state are restored; after an exception, so are the weights.

        Args:
            model: the pruned model.
            teacher: the unpruned model, on the same device; not changed.
            progress: show a progress bar if tqdm is installed.

        Raises:
            NotCalibratedError: there are no samples.
            ObservationError: the models' outputs do not match, or hold no floating-point tensor; or there is only
                one sample.
            ValueError: both are the same model, share parameters, or have none to train.
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
