"""Scores for the analyses: any arm of the registry, and PRO from statistics that are gathered once and kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness.arm import ArmRunner, Settings
from benchmarks.harness.finetune import Recipe
from benchmarks.harness.prune import PruneConfig, build_pruner
from benchmarks.harness.scores import FrozenScores, freeze
from benchmarks.models.checkpoints import fingerprint
from benchmarks.tasks import Batch, Task, TaskConfig
from ippro_tp import FisherNoise, PROImportance
from ippro_tp.estimators.base import reduce_layers
from ippro_tp.estimators.paper import PaperEstimator

MODES = ("eval", "train")


def arm_scores(config: TaskConfig, task: Task, images: int) -> ArmRunner:
    """Return a runner whose ``scores(name, "none", seed)`` are those of ``compare`` with ``images`` images."""
    settings = Settings(
        calibration_images=images,
        test_images=0,
        split="test",
        batch_size=config.batch_size,
        tolerance=0.01,
        cost_exponent=None,
        prune=PruneConfig(),
        recipe=Recipe(),
        device=config.device,
    )
    return ArmRunner(task, settings)


def freeze_on(task: Task, importance: PROImportance, source: str) -> FrozenScores:
    """Return the scores of a calibrated ``importance`` for all groups of the task's network."""
    pruner = build_pruner(copy.deepcopy(task.model), task.example, task.ignored, importance)
    return freeze(importance, pruner, source)


def part(scores: FrozenScores) -> list[Tensor]:
    """Return the scores of each group that has any, in the order of the groups."""
    return [s.double() for s in scores.scores.values() if s is not None]


def kept_channels(scores: Tensor, ratio: float) -> Tensor:
    """Return a mask of the channels that stay when a fraction ``ratio`` of the lowest scores is removed.

    Args:
        scores: ``(channels,)``.
        ratio: As Torch-Pruning reads it: ``int(channels * (1 - ratio))`` stay.
    """
    removed = len(scores) - int(len(scores) * (1 - ratio))
    mask = torch.ones(len(scores), dtype=torch.bool)
    mask[scores.topk(removed, largest=False).indices] = False
    return mask


def pool_size(task: Task) -> int:
    """Return how many images calibration can draw from."""
    return len(task.train) - int(len(task.train) * 0.1)


@dataclass(frozen=True)
class Statistics:
    """Which statistics of PRO: the estimator, the images, and the mode of the network."""

    estimator: str
    images: int
    seed: int = 0
    mode: str = "eval"


def gather(task: Task, what: Statistics, batches: Iterable[Batch], batch_size: int) -> tuple[dict, float]:
    """Run a calibration; return the state of the importance and the CPU seconds it took.

    Every image has the same weight, also in a last batch that is not full: the loss of ``"paper"`` is the mean
    cross-entropy of a batch of ``batch_size``, summed over the batches. Its state serves both targets.

    Args:
        task: The network, which stays as it is.
        what: Which statistics; ``images`` is not read.
        batches: The calibration images.
        batch_size: What the mean in the loss divides by.
    """
    model = copy.deepcopy(task.model)
    device = next(model.parameters()).device
    target = "norm" if what.estimator == "paper" else None
    importance = PROImportance(estimator=what.estimator, target=target, cost=None)
    noise = FisherNoise(seed=what.seed)
    pruner = build_pruner(model, task.example, task.ignored, importance)
    begin = time.process_time()
    with importance.observe(pruner):
        model.train(what.mode == "train")
        for images, labels in batches:
            logits, labels = model(images.to(device)), labels.to(device)
            if what.estimator == "paper":
                loss = F.cross_entropy(logits, labels, reduction="sum") / batch_size
            else:
                loss = noise(logits, labels)
            loss.backward()
    return importance.state_dict(), time.process_time() - begin


def statistics(config: TaskConfig, task: Task, folder: Path, what: Statistics) -> dict:
    """Return the state for ``what``, from the file in ``folder`` where an earlier run left it."""
    name = f"{task.name}-{task.model_name}-{fingerprint(task.model)}".replace("/", "_")
    name += f"-{what.estimator}-{what.images}-seed{what.seed}-{what.mode}-batch{config.batch_size}.pt"
    path = folder / "statistics" / name
    if path.exists():
        return torch.load(path, weights_only=True)
    batches = task.calibration(what.seed, what.images, config.batch_size)
    state, seconds = gather(task, what, batches, config.batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    torch.save(state | {"seconds": seconds}, partial)
    partial.replace(path)
    return state | {"seconds": seconds}


def importance_of(state: dict, target: str = "conv", step_size: float = 1.0) -> PROImportance:
    """Return the importance of a gathered ``state``.

    Args:
        state: What :func:`gather` returned.
        target: Of ``"paper"``: ``"conv"`` or ``"norm"``.
        step_size: Of ``"paper"``: lambda.
    """
    settings = state["settings"]
    paper = {"step_size": step_size, "target": target} if settings["estimator"] == "paper" else {}
    importance = PROImportance(settings["estimator"], **paper, cost=None)
    # The sums for target "norm" hold the gradients of all weights, and so those for "conv" too.
    wanted = settings | {"target": target} if "target" in settings else settings
    importance.load_state_dict({**state, "settings": wanted})
    return importance


def projective_terms(importance: PROImportance, model: nn.Module) -> dict[str, Tensor]:
    r"""Return what Eq. 4 is made of, for each group.

    Args:
        importance: A calibrated one, estimator ``"paper"``, reduction ``"joint"``.
        model: The network it was calibrated on, or a copy.

    Returns:
        For each group ``(4, width)`` float64: :math:`\lVert F\rVert`, :math:`F\cdot\nabla`,
        :math:`\lVert\nabla\rVert` and the gradient d of the extra coordinate.
    """
    reader = _Terms(importance.step_size, importance.target)
    for record in importance._records.values():
        reader.scores(importance._sums, record, importance._observed.wiring, "joint", model)
    return reader.terms


class _Terms(PaperEstimator):
    """The estimator of the paper, which also keeps the terms of its formula."""

    def __init__(self, step_size: float, target: str) -> None:
        super().__init__(step_size, target)
        self.terms: dict[str, Tensor] = {}

    def scores(self, sums, record, wiring, reduction, model) -> Tensor:
        layers = [layer for layer in self.layers(record, wiring) if layer.name in wiring.seen]
        parts = [self._filter_sums(sums, model, layer) for layer in layers]
        square, dot, grad = (reduce_layers([p[i] for p in parts], layers, record.width, "sum") for i in range(3))
        offset = self._joint_offset(sums, wiring, layers, record.width).to(square.device)
        self.terms[record.key] = torch.stack([square.sqrt(), dot, grad.sqrt(), offset])
        return super().scores(sums, record, wiring, reduction, model)
