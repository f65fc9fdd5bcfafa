"""The pruning loop: trace, calibrate, rank, search, cut, refit; as often as there are steps."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batches import batches_of
from ..calibration.guard import evaluating
from ..compensation.step import Compensation, CompensationReport
from ..errors import StructureError, TargetError
from ..layers import forget_caches
from .aiming import WITHIN, LatencyAim
from .cut import Cut, Step
from .measure import Meter
from .order import Ranked, RemovalOrder
from .scoring import Scorer
from .search import Found, Sizes, find, tolerance
from .sizing import BROKEN, BrokenCutError, cut_copy, cut_sizes, explained, macs_of, mask_of, multiple_of, widened
from .steps import GroupChange, Options, StepRecord
from .structure import Prunable, Structure, forward, read_structure, tensors_in

NARROW = 16
"""Widths at which a model may fail to run before the search is given up."""


@dataclass
class Loop:
    """Prunes a model in place, step by step.

    Args:
        model: a copy that belongs to the loop.
        options: how.
        scorer: asks the importance.
        loader: calibration batches, for the compensation.
        compensation: refits layers after each cut; ``None``: no layer is.

    Attributes:
        whole: size of the unpruned model.
    """

    model: nn.Module
    options: Options
    scorer: Scorer
    loader: Iterable[Any]
    compensation: Compensation | None
    _units: dict[str, int] = field(default_factory=dict)
    _all_channels: float = 0.0
    _sampled: bool = False

    def __post_init__(self) -> None:
        with explained("the model does not run on the example inputs"):
            self._shapes = self._output_shapes()
        self._meter = Meter(self.options.example_inputs, self.options.forward_fn)
        self.whole = self._meter.counts(self.model)
        self._aim: LatencyAim | None = None
        if self.options.table is not None:
            unpruned = copy.deepcopy(self.model)
            self._aim = LatencyAim(self.options.table, lambda model: self._meter.latency(model, unpruned))

    def run(self) -> list[StepRecord]:
        """Make all steps.

        Raises:
            TargetError: the target cannot be met.
            StructureError: the model cannot be traced, or does not run once it is cut.
        """
        records = [self._step(number) for number in range(1, self.options.steps + 1)]
        with explained(BROKEN):
            shapes = self._output_shapes()
        if shapes != self._shapes:
            raise StructureError(
                "the pruned model's outputs have other shapes than the unpruned one's: name the layers that make "
                "them in ignored_layers=."
            )
        return records

    def _step(self, number: int) -> StepRecord:
        structure = self._structure()
        if not structure.groups:
            raise TargetError(f"no group of channels can be pruned: {_listed(structure.left_whole)}", 1.0)
        scores, unscored = self.scorer.scores(structure)
        for module in self.model.modules():  # tensors with a graph cannot be copied
            forget_caches(module)
        if not scores:
            raise TargetError(f"no group of channels has a score: {_listed(unscored)}", 1.0)
        ranked = [self._ranked(structure.groups[key], values) for key, values in scores.items()]
        ranked, found, predicted = self._reached(ranked, structure, number)
        masks = {r.key: mask_of(structure.groups[r.key], r.order[: found.gone[r.key]]) for r in ranked}
        refitted = self._cut(structure, masks)
        groups = [
            _change(structure.groups[r.key], scores[r.key], r.order[: found.gone[r.key]], masks[r.key])
            for r in ranked
        ]
        whole = {**unscored, **structure.left_whole}
        for key, why in whole.items():
            layer = key.removesuffix(".out")
            width = _outputs(self.model.get_submodule(layer))
            groups.append(GroupChange(key, (layer,), width, width, 0, reason=why))
        place = {name: number for number, (name, _) in enumerate(self.model.named_modules())}
        groups.sort(key=lambda group: min((place[name] for name in group.layers), default=0))
        return StepRecord(tuple(groups), refitted, found.left, found.tries, predicted)

    def _structure(self) -> Structure:
        options = self.options
        structure = read_structure(
            self.model,
            options.example_inputs,
            forward_fn=options.forward_fn,
            output_transform=options.output_transform,
            ignored=[self.model.get_submodule(name) for name in options.ignored],
            global_pruning=options.scope == "global",
        )
        for key, prunable in structure.groups.items():
            self._units.setdefault(key, prunable.units)
        return structure

    def _ranked(self, prunable: Prunable, scores: Tensor) -> Ranked:
        key = prunable.record.key
        least = max(math.ceil((1 - self.options.max_pruning_ratio) * self._units[key] - 1e-9), 1)
        stairs = self.options.stairs if prunable.units >= 4 * self.options.stairs else 0
        multiple = math.lcm(prunable.multiple, multiple_of(prunable, self.options.round_to or stairs))
        return Ranked.of(key, scores, min(least, prunable.units), multiple, prunable.indispensable(scores))

    # -- the search --------------------------------------------------------------------------------------------

    def _reached(
        self, ranked: list[Ranked], structure: Structure, number: int
    ) -> tuple[list[Ranked], Found, float | None]:
        """What :meth:`_search` finds among widths at which the model runs, and the groups as they are then."""
        broken: StructureError
        for _ in range(NARROW):
            try:
                found, predicted = self._search(ranked, structure, number)
                if self.options.unit != "macs":  # no size was measured by running the model
                    macs_of(cut_copy(structure, ranked, found.gone), self._meter, found.gone)
                return ranked, found, predicted
            except BrokenCutError as error:
                ranked, broken = widened(ranked, structure, error, self._meter), error
        raise broken

    def _search(self, ranked: Sequence[Ranked], structure: Structure, number: int) -> tuple[Found, float | None]:
        """The cut of a step, and the latency predicted for it where that is the target."""
        options = self.options
        fixed = self._fixed(ranked, structure, number)
        order = RemovalOrder([group for group in ranked if group.key not in fixed], options.scope)
        goal = 1 - options.target if options.unit == "ratio" else options.target
        wanted = 1 - (1 - goal) * number / options.steps
        measured = self._measured(structure, ranked)
        if not order.groups:
            return Found(fixed, measured(fixed), 1), None
        predicted, margin = None, tolerance(wanted)
        with self._shown(measured, wanted) as shown:

            def search(aim: float) -> Found:
                found = find(order, lambda gone: shown({**fixed, **gone}), aim)
                return replace(found, gone={**fixed, **found.gone})

            if self._aim is None or number < options.steps:
                found = search(wanted)
                predicted = None if self._aim is None else found.left
            else:
                found, predicted = self._aim.find(search, lambda gone: cut_copy(structure, ranked, gone), wanted)
                margin = WITHIN * wanted
        if abs(found.left - wanted) <= margin or (options.unit == "ratio" and fixed):
            return found, predicted
        unit = {"macs": "MACs", "params": "parameters", "ratio": "channels", "latency": "latency"}[options.unit]
        percent = f"{100 * margin:.3g}%"
        bounds = f"max_pruning_ratio={options.max_pruning_ratio:g}"
        bounds += f", round_to={options.round_to}" if options.round_to else ""
        raise TargetError(
            f"{options.unit}={options.target:g} cannot be met within {percent} of the whole: {wanted:.4g} "
            f"of the {unit} is to be left, and the nearest is {found.left:.4g}. Change the target, {bounds} or "
            f"ignored_layers; groups left whole: {_listed(structure.left_whole)}.",
            found.left if options.unit != "ratio" else 1 - found.left,
        )

    def _fixed(self, ranked: Sequence[Ranked], structure: Structure, number: int) -> dict[str, int]:
        """Units that go in this step of groups whose ratio is told and not searched for."""
        options, fixed = self.options, {}
        unused = set(options.layer_ratios)
        default = options.target if options.unit == "ratio" and options.scope == "local" else None
        for group in ranked:
            names = [group.key, *(layer.name for layer in structure.groups[group.key].record.producers)]
            found = (p for p in options.layer_ratios if any(re.search(p, name) for name in names))
            pattern = next(found, None)
            unused.discard(pattern or "")
            ratio = default if pattern is None else options.layer_ratios[pattern]
            if ratio is not None:
                left = self._units[group.key] * (1 - ratio) ** (number / options.steps)
                fixed[group.key] = min(group.rounded(max(group.units - int(left + 1e-9), 0)), group.most)
        if unused:
            raise ValueError(f"layer_ratios: no layer that can be pruned matches {min(unused)!r}")
        return fixed

    def _measured(self, structure: Structure, ranked: Sequence[Ranked]) -> Sizes:
        """What is left where units of groups are gone: predicted, for latencies."""
        if self._aim is not None:
            return self._aim.predicted(self.model)
        if self.options.unit == "ratio":
            return self._channels(structure, ranked)
        return cut_sizes(structure, ranked, self._meter, self.whole, self.options.unit)

    def _channels(self, structure: Structure, groups: Sequence[Ranked]) -> Sizes:
        """The fraction of channels that is left, of those that could go at the first step."""
        per_unit = {key: p.record.width / p.units for key, p in structure.groups.items()}
        now = sum(per_unit[group.key] * group.units for group in groups)
        self._all_channels = self._all_channels or now
        whole = self._all_channels

        def left(gone: Mapping[str, int]) -> float:
            return (now - sum(per_unit[key] * count for key, count in gone.items())) / whole

        return left

    @contextmanager
    def _shown(self, sizes: Sizes, wanted: float) -> Iterator[Sizes]:
        """The same, with a progress bar if tqdm is there and progress is wanted."""
        try:
            from tqdm.auto import tqdm
        except ImportError:
            yield sizes
            return
        desc, hidden = f"searching {self.options.unit} {wanted:.3g}", not self.options.progress

        with tqdm(desc=desc, unit="try", leave=False, disable=hidden) as bar:

            def shown(gone: Mapping[str, int]) -> float:
                left = sizes(gone)
                bar.set_postfix_str(f"{left:.4f}")
                bar.update()
                return left

            yield shown

    # -- the cut -----------------------------------------------------------------------------------------------

    def _cut(self, structure: Structure, masks: Mapping[str, Tensor]) -> CompensationReport | None:
        cut = Cut(structure, masks)
        if not len(cut):
            return None if self.compensation is None else CompensationReport(())
        if self.compensation is None:
            cut.prune()
            return None
        self._keep_samples(self.compensation, structure)
        return self.compensation.step(Step(structure, cut))

    def _keep_samples(self, compensation: Compensation, structure: Structure) -> None:
        if self._sampled:  # inputs stay valid from step to step
            return
        forward_fn = self.options.forward_fn
        if forward_fn is None:
            compensation.calibrate(structure, self.loader, progress=self.options.progress)
        else:
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            batches = batches_of(self.loader, device, None, self.options.progress, "Compensation")
            with compensation.observe(structure), torch.no_grad():
                for inputs, _ in batches:
                    forward_fn(self.model, inputs)
        self._sampled = True

    def _output_shapes(self) -> list[torch.Size]:
        options = self.options
        with evaluating(self.model), torch.no_grad():
            outputs = forward(self.model, options.example_inputs, options.forward_fn)
        return [tensor.shape for tensor in tensors_in(outputs)]


def _outputs(module: nn.Module) -> int:
    for name in ("out_channels", "out_features", "num_features", "embedding_dim", "embed_dim", "hidden_size"):
        if isinstance(value := getattr(module, name, None), int):
            return value
    return 0


def _change(prunable: Prunable, scores: Tensor, removed: Tensor, mask: Tensor) -> GroupChange:
    record = prunable.record
    return GroupChange(
        record.key,
        tuple(layer.name for layer in record.producers),
        record.width,
        record.width - int(mask.sum()),
        prunable.units,
        tuple(scores.tolist()),
        tuple(sorted(removed.tolist())),
    )


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{key} ({reason})" for key, reason in list(reasons.items())[:5]]
    more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return ", ".join(shown) + more if shown else "it has none"
