"""The pruning loop: trace, calibrate, rank, search, cut, refit; as often as there are steps."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration.batches import batches_of
from ..calibration.guard import evaluating
from ..compensation.step import Compensation, CompensationReport
from ..errors import IPPROError, StructureError, TargetError
from ..layers import forget_caches
from .aiming import WITHIN, LatencyAim
from .cut import Cut, Step
from .latency import LatencyTable
from .measure import Meter, Unit
from .order import Ranked, RemovalOrder
from .scoring import Scorer
from .search import Found, Sizes, find, tolerance
from .structure import Forward, Prunable, Structure, Transform, forward, read_structure, tensors_in

Scope = Literal["global", "local"]


@dataclass(frozen=True)
class Options:
    """How the loop prunes; see :func:`ippro_tp.prune`.

    Attributes:
        layer_ratios: fraction of channels that goes, by regular expression: the first that is found in the name of
            a layer of a group decides for the group, whatever the target.
        table: predicts latencies, where they are the target.
        stairs: widths of groups that have room for it are multiples of this, where ``round_to`` says nothing.
    """

    unit: Unit
    target: float
    scope: Scope
    steps: int
    round_to: int
    max_pruning_ratio: float
    ignored: tuple[str, ...]
    example_inputs: Any
    forward_fn: Forward | None
    output_transform: Transform | None
    progress: bool
    layer_ratios: Mapping[str, float] = field(default_factory=dict)
    table: LatencyTable | None = None
    stairs: int = 0


@dataclass(frozen=True)
class GroupChange:
    """What a step did to one group.

    Attributes:
        key: root layer and side.
        layers: names of the layers whose output channels it holds.
        before, after: channels of the group.
        units: how many of them could go one by one.
        scores: one per unit; empty where there are none.
        removed: units that went.
        reason: why it was left whole; empty where it was not.
    """

    key: str
    layers: tuple[str, ...]
    before: int
    after: int
    units: int
    scores: tuple[float, ...] = ()
    removed: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class StepRecord:
    """One step: all groups, what was refitted, and the size it led to as a fraction of the unpruned model.

    Attributes:
        groups: in the order of the model's modules, those that are left whole too.
        refitted: what the compensation did; ``None`` without.
        left: in the unit of the target.
        tries: sizes that were measured, or predicted, to find the cut.
        predicted: latency that the table predicts, as a fraction; ``None`` where another target was given.
    """

    groups: tuple[GroupChange, ...]
    refitted: CompensationReport | None
    left: float
    tries: int
    predicted: float | None = None


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
        with _explained("the model does not run on the example inputs"):
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
        with _explained("the model does not run once it is cut"):
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
        found, predicted = self._search(ranked, structure, number)
        masks = {r.key: _mask(structure.groups[r.key], r.order[: found.gone[r.key]]) for r in ranked}
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
        multiple = _multiple(prunable, self.options.round_to or stairs)
        return Ranked.of(key, scores, min(least, prunable.units), multiple)

    # -- the search --------------------------------------------------------------------------------------------

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
                found, predicted = self._aim.find(search, lambda gone: self._cut_copy(structure, gone), wanted)
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

    def _channels(self, structure: Structure, groups: Sequence[Ranked]) -> Sizes:
        """The fraction of channels that is left, of those that could go at the first step."""
        per_unit = {key: p.record.width / p.units for key, p in structure.groups.items()}
        now = sum(per_unit[group.key] * group.units for group in groups)
        self._all_channels = self._all_channels or now
        whole = self._all_channels

        def left(gone: Mapping[str, int]) -> float:
            return (now - sum(per_unit[key] * count for key, count in gone.items())) / whole

        return left

    def _measured(self, structure: Structure, ranked: Sequence[Ranked]) -> Sizes:
        """What is left where units of groups are gone: predicted, for latencies."""
        if self._aim is not None:
            return self._aim.predicted(self.model)
        if self.options.unit == "ratio":
            return self._channels(structure, ranked)
        return lambda gone: self._left(self._cut_copy(structure, gone))

    def _cut_copy(self, structure: Structure, gone: Mapping[str, int]) -> nn.Module:
        """A copy of the model without so many units of each group; any will do, for sizes."""
        if not any(gone.values()):
            return self.model
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}  # those cut are made anew
        model = copy.deepcopy(self.model, shared)
        masks = {key: _mask(structure.groups[key], torch.arange(n)) for key, n in gone.items() if n}
        with _explained("the model does not run once it is cut"):
            Cut(structure, masks).apply(model)
        return model

    def _left(self, model: nn.Module) -> float:
        """Size of ``model`` in the unit of the target, as a fraction of the unpruned one's."""
        with _explained("the model does not run once it is cut"):
            if self.options.unit == "params":
                return sum(p.numel() for p in model.parameters()) / self.whole.params
            return self._meter.counts(model).macs / self.whole.macs

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


def _mask(prunable: Prunable, units: Tensor) -> Tensor:
    """Which positions of a group go, where some of its units do."""
    gone = torch.zeros(prunable.units, dtype=torch.bool)
    gone[units] = True
    return gone[prunable.unit]


def _multiple(prunable: Prunable, round_to: int) -> int:
    """So many units, or a multiple, have to stay for all layers' widths to be multiples of ``round_to``."""
    if not round_to:
        return 1
    layers = (*prunable.record.producers, *prunable.record.consumers)
    shares = {len(layer.index) // prunable.units for layer in layers} - {0}
    return math.lcm(*(round_to // math.gcd(round_to, share) for share in shares))


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


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (IPPROError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise StructureError(f"{what}: {type(error).__name__}: {error}") from error
