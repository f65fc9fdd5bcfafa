"""What is checked of a line, each against a reference that shares no code with the package."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import ippro_tp
from benchmarks.robustness.bench import BATCH, FEW, Bench, One, macs, parameters, producers
from benchmarks.robustness.judge import NONE, REFUSED, Cell, Refused, Skipped, WrongError, judged
from benchmarks.robustness.line import CONSTANT, DEAD, DOUBLE, call, flat, picked
from benchmarks.robustness.reference import NoReferenceError, silenced_outputs
from ippro_tp import Compensation, IPPROError, PROImportance, load_pruned, save_pruned
from ippro_tp.graph.groups import read_group

COLUMNS = ("scores", "dead", "duplicate", "constant", "pruned", "compensation", "saved", "prune()")


class Checks(Bench):
    """All checks of one line."""

    def run(self) -> Iterator[tuple[str, Cell]]:
        """Verdicts by column."""
        self.tp_error = self._tp_error()
        checks: dict[str, Callable[[], str | None]] = {
            "scores": self.scores,
            "dead": self.dead,
            "duplicate": self.duplicate,
            "constant": self.constant,
            "pruned": self.pruned,
            "compensation": self.compensation,
            "saved": self.saved,
            "prune()": self.prune,
        }
        stopped = broken = False
        for name in COLUMNS:
            if name != "prune()" and self.tp_error:
                yield name, Cell(NONE, self.tp_error if name == "scores" else "")
            elif name != "prune()" and (stopped or (broken and name in ("compensation", "saved"))):
                yield name, Cell(NONE)
            else:
                cell = judged(checks[name])
                stopped = stopped or (name == "scores" and cell.verdict == REFUSED and "Error: " in cell.note)
                broken = broken or (name == "pruned" and cell.verdict == NONE)
                yield name, cell

    # -- the checks --------------------------------------------------------------------------------------------

    def scores(self) -> str | None:
        """However samples are cut into batches, and as autograd finds them one by one."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            whole, _ = self.scores_of(FEW)
        told = next((str(w.message) for w in caught if "batch" in str(w.message)), None)
        if told is not None:
            raise Refused(" ".join(told.split())[:200])
        if self.line.refuse:
            raise WrongError("samples depend on each other, and it was neither refused nor told")
        if self.line.draws:
            raise Skipped("other draws")
        ones, _ = self.scores_of(1)
        origin, reference = self.scores_of([FEW - 2, 2], reference="origin", cost=None, depletion=None)
        for what, found, right in (("batches of one", whole, ones), ("autograd", origin, reference)):
            for key, expected in right.items():
                if key not in found:
                    continue
                high = float(expected.abs().max())
                off = float((found[key].double() - expected.double()).abs().max())
                if off > self.tolerance * high + 1e-9:
                    raise WrongError(f"{key}: off by {off / max(high, 1e-30):.2g} of the highest from {what}")
        checked = len([key for key in reference if key in origin])
        return f"{checked} of {len(origin)} groups by autograd" if checked < len(origin) else None

    def _planted(self, pruner: Any) -> tuple[Any, Tensor]:
        """The group with the planted channels, and where its channels stand in it."""
        if self.line.plant is None:
            raise Skipped
        group = next((g for g in self.groups(pruner) if self.line.plant in producers(g)), None)
        if group is None:
            raise Skipped("Torch-Pruning finds no group")
        own = next(p for p in read_group(group).producers if p.name == self.line.plant)
        return group, own.root[own.index.argsort()]

    def dead(self) -> str | None:
        """A filter of zeros has no importance at all."""
        imp = PROImportance()
        pruner = self.pruner(self.model(), imp)
        group, position = self._planted(pruner)
        self.calibrate(pruner, imp)
        scores = imp(group)
        if scores is None:
            raise Skipped("left whole")
        dead, others = scores[position[DEAD]], scores[scores > 0]
        if not len(others) or dead > 1e-4 * others.median():
            raise WrongError(f"scores {float(dead):.3g}, median {float(scores.median()):.3g}")
        return None

    def _removed(self, channel: int) -> tuple[float, float, str]:
        """Errors after removing one planted channel, without and with compensation; what was not compensated."""
        errors, report = [], ""
        for compensate in (False, True):
            model = self.model()
            reference, before = self.outputs(model, self.fresh), parameters(model)
            group, position = self._planted(self.pruner(model, tp.importance.RandomImportance()))
            names = [model.get_submodule(name) for name in producers(group)]
            one = One(names, int(position[channel]), len(position))
            pruner = self.pruner(model, one, pruning_ratio=0.0, pruning_ratio_dict=one.ratios)
            if compensate:
                comp = Compensation()
                with comp.observe(pruner), torch.no_grad():
                    call(model, self.many)
                report = str(comp.step(pruner))
            else:
                pruner.step()
            if parameters(model) == before:
                raise Skipped("Torch-Pruning does not prune one channel of it")
            try:
                errors.append(self.error(model, reference))
            except RuntimeError as error:
                raise Skipped(f"Torch-Pruning breaks it: {error}") from error
        left = [row for row in report.splitlines() if "not compensated" in row]
        return errors[0], errors[1], next(iter(left), "")

    def duplicate(self) -> str | None:
        """One of two equal channels goes at no cost."""
        plain, compensated, left = self._removed(DOUBLE[1])
        if compensated > max(2e-3, 0.02 * plain):
            if left:
                raise Refused(left)
            raise WrongError(f"error {plain:.2g} without, {compensated:.2g} with compensation")
        return None

    def constant(self) -> str | None:
        """A channel that never varies goes at no cost, but at the border of padded maps."""
        plain, compensated, left = self._removed(CONSTANT)
        limit = 1.01 * plain + 1e-6 if self.line.padded else max(1e-5, 1e-3 * plain)
        if compensated > limit:
            if left:
                raise Refused(left)
            raise WrongError(f"error {plain:.2g} without, {compensated:.2g} with compensation")
        return None

    def pruned(self) -> str | None:
        """The pruned net runs on batches of any size, and is the original without what was removed."""
        original, model = self.model(planted=False), self.model(planted=False)
        try:
            self.step(model, compensate=False)
            return self._same_as_silenced(original, model)
        except Exception as error:
            if isinstance(error, (IPPROError, Skipped)):
                raise
            raise (Skipped(f"Torch-Pruning breaks it: {error}") if self._tp_breaks() else error) from error

    def _tp_breaks(self) -> bool:
        """Whether Torch-Pruning's magnitude breaks the net as well."""
        original, model = self.model(planted=False), self.model(planted=False)
        try:
            self.pruner(model, tp.importance.MagnitudeImportance(), global_pruning=True).step()
            self._same_as_silenced(original, model)
        except Exception:
            return True
        return False

    def _same_as_silenced(self, original: nn.Module, model: nn.Module) -> str | None:
        if parameters(model) == parameters(original):
            raise WrongError("nothing was pruned")
        few = picked(self.many, 0, 3)
        found, _ = self.outputs(model, few), self.outputs(model, picked(self.many, 0, 1))
        torch.manual_seed(3)
        try:
            right = flat(self.line.outputs(silenced_outputs(original, model, few)))
        except NoReferenceError as why:
            return f"no reference: {why}"
        except ValueError as error:
            raise WrongError(str(error)) from error
        off = float((found - right).abs().max() / right.abs().max().clamp_min(1e-12))
        if not off < 1e-4:
            raise WrongError(f"differs by {off:.2g} from the original without the removed channels")
        return None

    def compensation(self) -> str | None:
        """Compensation never raises the error on fresh inputs."""
        errors, reports = [], []
        for compensate in (False, True):
            model = self.model()
            reference = self.outputs(model, self.fresh)
            reports.append(self.step(model, compensate))
            errors.append(self.error(model, reference))
            self.plain = self.plain or model
        if "nan" in reports[1].lower():
            raise WrongError("nan in the report")
        if not errors[1] <= errors[0] * 1.01 + 1e-6:
            raise WrongError(f"error {errors[0]:.3g} without, {errors[1]:.3g} with")
        return f"{errors[0]:.2g} → {errors[1]:.2g}"

    def saved(self) -> str | None:
        """The loaded model gives the same bits."""
        if self.plain is None:
            self.plain = self.model()
            self.step(self.plain, compensate=False)
        with tempfile.TemporaryDirectory() as folder:
            save_pruned(self.plain, folder, builder=self.line.build)
            again = load_pruned(folder, builder=self.line.build)
        if not torch.equal(self.outputs(self.plain, self.fresh), self.outputs(again, self.fresh)):
            raise WrongError("the loaded model gives other outputs")
        return None

    def prune(self) -> str | None:
        """``prune(..., macs=0.7)`` meets the target, leaves the given model alone and is the silenced original."""
        prune = getattr(ippro_tp, "prune", None)
        if prune is None:
            raise Skipped
        if isinstance(self.many, list):
            raise Skipped("no batch of a loader")
        notes = []
        loader = [(picked(self.many, at, at + BATCH), None) for at in range(0, self.line.samples, BATCH)]
        for compensation in (False, True):
            original, given = self.model(planted=False), self.model(planted=False)
            result = prune(
                given, picked(self.many, 0, 1), loader, macs=0.7, compensation=compensation, progress=False
            )
            if any(
                not torch.equal(a, b)
                for a, b in zip(given.state_dict().values(), original.state_dict().values(), strict=True)
            ):
                raise WrongError("the given model was changed")
            left = macs(result.model, self.many) / macs(original, self.many)
            if abs(left - 0.7) > 0.011 or abs(left - result.macs) > 1e-3:
                raise WrongError(f"{left:.3f} of the MACs are left, it says {result.macs:.3f}")
            if not compensation:
                notes.append(self._same_as_silenced(original, result.model) or "")
                reference, plain = self.outputs(original, self.fresh), result.model
            else:
                errors = self.error(plain, reference), self.error(result.model, reference)
                if not errors[1] <= errors[0] * 1.01 + 1e-6:
                    raise WrongError(f"error {errors[0]:.3g} without, {errors[1]:.3g} with compensation")
        return "; ".join(filter(None, notes)) or None
