"""What a criterion made of gradients observes: passes of the model, turned into sums by an estimator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import NEVER_CALLED, ObservationError
from ..estimators.base import Estimator
from ..estimators.sums import Sums
from ..records import GroupRecord, Pass, Wiring, Work
from ..tracing.observer import Observer
from ..tracing.plan import Plan
from ..tracing.positions import keep_rows
from .processes import reducing


class GradientObservation:
    """Runs an :class:`Observer` and lets an estimator turn each pass into sums.

    Args:
        model: the model that is calibrated.
        groups: called with the arguments of the first forward pass; gives the groups.
        estimator: decides what is tapped and what is added up.
        loss_scale: asked at each forward pass for what the loss will be multiplied by. Batches whose gradients
            overflow are then left out, as GradScaler does. ``None``: the loss is taken as it is, and overflow is
            an error.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        estimator: Estimator,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        self.sums = Sums()
        self.notes: tuple[str, ...] = ()
        self._model, self._groups, self._estimator = model, groups, estimator
        self._records: Sequence[GroupRecord] = ()
        self.work: Work | None = None  # for whoever counts it
        self._handles: list[RemovableHandle] = []
        self._ask_scale, self._scale = loss_scale, 1.0
        self._grads = Sums()  # of weights, since the last passes were counted
        self._counted = 0
        self._kept: Tensor | None = None  # how many of them did not overflow, on the device
        self._observer = Observer(
            model,
            self._begin,
            self._add,
            Plan(estimator.taps_activations, estimator.taps_through_norms),
            lambda first: self._estimator.unneeded(self._records, first),
            self._loss_scale,
        )

    def __enter__(self) -> GradientObservation:
        self._observer.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._observer.__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        if exc[0] is None:
            self._observer.flush()

    def finish(self) -> None:
        """Check that something was observed.

        Raises:
            ObservationError: no forward pass, or no backward pass, reached the model.
        """
        if self._observer.passes == 0:
            raise ObservationError(NEVER_CALLED)
        if len(self.sums) == 0:
            raise ObservationError(
                "no gradient reached the model inside observe(): call loss.backward() for each batch, with a "
                "loss that depends on the model's output."
            )
        if lost := sorted(self._observer.unfollowed):
            self.notes += (f"channels are not followed through {', '.join(lost)}: scored at their producers",)
        self._tell_unit()
        self._tell_unreached()
        if self._kept is None:
            return
        skipped = self._counted - int(self._kept)
        if skipped == self._counted:
            raise ObservationError(
                f"the gradients of all {skipped} batches overflow: lower the loss scale, "
                "GradScaler(init_scale=...), or use bf16."
            )
        if skipped:
            warnings.warn(
                f"{skipped} of {self._counted} batches were left out: their gradients overflow at this loss scale",
                RuntimeWarning,
                stacklevel=2,
            )

    def _tell_unit(self) -> None:
        """Say where the batch stands for its samples."""
        if not (mixed := self._observer.mixed):
            return
        name, why = next(iter(mixed.items()))
        note = (
            f"the batch is the unit of the scores: {name!r} has rows that belong to no single sample ({why}). "
            "Smaller batches, of one sample at best, give finer scores"
        )
        self.notes += (note,)
        warnings.warn(note, RuntimeWarning, stacklevel=3)

    def _tell_unreached(self) -> None:
        """Name groups that no gradient arrived at, although they were called."""
        wiring, reached, unscored = self.wiring, self._observer.reached, self.unscored
        unreached = []
        for record in self._records:
            names = {producer.name for producer in record.producers} & wiring.seen
            sites = {site.name for name in names for site, _ in wiring.sites_of(name)}
            norms = {wiring.norm_of[name] for name in names if name in wiring.norm_of}
            readers = {consumer.name for consumer in record.consumers}
            if names and record.key not in unscored and not reached & (names | sites | norms | readers):
                unreached.append(record.key)
        if not unreached:
            return
        some = ", ".join(map(repr, unreached[:4])) + (", ..." if len(unreached) > 4 else "")
        note = f"no gradient reached {len(unreached)} groups, which score zero and would go first: {some}"
        self.notes += (note,)
        warnings.warn(
            f"{note}. The loss does not depend on what they do: let loss_fn use every output of the model, or put "
            "their layers into ignored_layers.",
            RuntimeWarning,
            stacklevel=3,
        )

    @property
    def unscored(self) -> dict[str, str]:
        """Groups that cannot be scored, and why: Torch-Pruning would prune something else than what it says."""
        found: dict[str, str] = {}
        for record in self._records:
            if record.problems:
                found[record.key] = (
                    f"Torch-Pruning's index map is impossible ({record.problems[0]}): it would cut other channels "
                    "than it says, as after chunk and slices. ippro_tp.prune() follows where each channel goes."
                )
            names = {producer.name for producer in record.producers}
            wrong = next((sorted(pair) for pair in self._observer.crossed if pair <= names), None)
            if wrong is not None:
                found[record.key] = (
                    f"Torch-Pruning ties {wrong[0]!r} to {wrong[1]!r}, but the channels of one are positions of "
                    "the other (it follows no transpose, as in gMLP's gate). With one of them in the pruner's "
                    "ignored_layers the rest can be pruned."
                )
            for name, layers in self._observer.borrowed.items():
                if name not in record.members and names & layers:
                    found[record.key] = (
                        f"{name!r} reads its channels by a call with its weight, F.linear(x, weight), which "
                        "Torch-Pruning does not see. Call the layer itself in the model's forward."
                    )
        return found

    def _readers(self) -> list[str]:
        if not self._estimator.taps_inputs:
            return []
        return list(dict.fromkeys(layer.name for record in self._records for layer in record.consumers))

    def _loss_scale(self) -> float:
        if self._ask_scale is not None:
            self._scale = self._ask_scale()
        return self._scale

    @property
    def wiring(self) -> Wiring:
        """What the forward passes showed."""
        seen = frozenset(self._observer.seen)
        return Wiring(self._observer.sites, self._observer.norm_of, seen, self._estimator.centered)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], list[str]]:
        self._records = [record.joined for record in self._groups(args, kwargs)]
        names = list(dict.fromkeys(p.name for record in self._records for p in record.producers))
        if not names:
            raise ObservationError(
                "there is no group to score: every prunable layer is ignored, or the model has none. "
                "(Torch-Pruning cannot see through gradient checkpointing with use_reentrant=True.)"
            )
        # Gradients of weights that nobody reads are not computed: only those of activations flow.
        trained = self._estimator.trained_parameters(self._model, self._records)
        if trained and reducing():  # DDP waits for the gradients of all parameters: these are but some
            raise ObservationError(
                "this estimator takes gradients of weights, which DistributedDataParallel would reduce. Call "
                "ddp.module(x) inside observe(), or put `with ddp.no_sync():` around the loop."
            )
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in trained.items():
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._take_grad(name)))
        for name in sorted(self._estimator.sampled(self._records)):
            hook = keep_rows(name, lambda: self._observer.running)
            self._handles.append(self._model.get_submodule(name).register_forward_pre_hook(hook))
        return names, self._readers()

    def _take_grad(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self._ask_scale is None:
                self.sums.add(f"grad/{name}", parameter.grad)
            else:
                wide = parameter.grad.to(torch.promote_types(parameter.grad.dtype, torch.float32))
                self._grads.add(f"grad/{name}", wide / self._scale)
            parameter.grad = None

        return hook

    def _add(self, passes: list[Pass]) -> None:
        with torch.no_grad():
            if self._ask_scale is None:
                for done in passes:
                    self._estimator.update(self.sums, self._records, done)
                return
            fresh, self._grads = self._grads, Sums()
            for done in passes:
                self._estimator.update(fresh, self._records, done)
            device = next(iter(fresh.values())).device
            finite = torch.stack([value.isfinite().all().to(device) for value in fresh.values()]).all()
            # Nothing waits for the device: an overflowed batch adds zeros.
            self.sums.merge(
                {n: torch.where(finite.to(v.device), v, torch.zeros_like(v)) for n, v in fresh.items()}
            )
            self._counted += 1
            self._kept = finite.long() + (0 if self._kept is None else self._kept)


def loss_scale_of(loss_scale: Any) -> Callable[[], float] | None:
    """How to ask for the present scale of the loss: of a number, a GradScaler, or nothing."""
    if loss_scale is None:
        return None
    if callable(getattr(loss_scale, "get_scale", None)):
        return lambda: float(loss_scale.get_scale())
    if not isinstance(loss_scale, (int, float)) or not 0 < loss_scale < float("inf"):
        raise ValueError(f"loss_scale={loss_scale!r}; give a positive number or a torch.amp.GradScaler")
    return lambda: float(loss_scale)
