"""One model of ``scan --prune``: its groups are proved, it is pruned, and what comes out is checked.

The reference is the unpruned model in which the removed channels are left out where they are read
(:func:`ippro_tp.graph.trial.reference_outputs`), and, where it can tell, the slower one of the robustness bench,
which shares no code with the package.
"""

from __future__ import annotations

import collections
import copy
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.robustness.line import make_unique
from benchmarks.robustness.reference import NoReferenceError, silenced_outputs
from benchmarks.scan import zoo as scan_zoo
from benchmarks.scan.model import Record, outputs_of, parameters
from benchmarks.scan.zoo import Subject
from ippro_tp import PruneResult, TargetError, load_pruned, prune, save_pruned
from ippro_tp.graph.dependency import RepairedGraph, build_graph
from ippro_tp.graph.groups import read_group
from ippro_tp.graph.onepass import fresh_copy, tensors_in
from ippro_tp.graph.proof import prove
from ippro_tp.graph.trial import cut, difference, reference_outputs

TARGETS = (0.7, 0.5)
TOLERANCE = 1e-4
SAMPLES = 2
PATIENCE = 30
"""Seconds that Torch-Pruning's tracing and group search may take."""
FEW = 10_000_000
"""Models with fewer parameters are compared with the slow reference, too."""
FRESH = 16
"""Number of images, and the seed, of the batch that compensation is judged by."""


def examine_quickly(name: str, record: Record) -> None:
    """As :func:`examine`, with random channels to 0.7 of the MACs alone: no calibration and no compensation."""
    record.data["quick"] = True
    examine(name, record)


def examine(name: str, record: Record, side: int | None = None) -> None:
    """Fill ``record`` with what ``prune()`` makes of the model ``name``."""
    quick: dict[str, Any] = {}
    if record.data.get("quick"):
        quick = {"importance": tp.importance.RandomImportance(), "compensation": False}
    found: list[Subject] = []
    with record.stage("build") as result:
        found.append(scan_zoo.subject(name, side))
        with torch.no_grad():
            few = parameters(found[0].model) < FEW
            for parameter in found[0].model.parameters():  # the slow reference tells channels by their numbers
                if few and parameter.numel() > 1 and parameter.dtype == torch.float32:
                    make_unique(parameter)
        result["side"] = found[0].side
        record.data["params"] = parameters(found[0].model)
    if not found:
        return
    subject = found[0]
    graphs: list[RepairedGraph] = []
    with record.stage("graph") as result:
        start = time.monotonic()
        graphs.append(build_graph(copy.deepcopy(subject.model), subject.inputs))
        result["trace_seconds"] = round(time.monotonic() - start, 2)
        start = time.monotonic()
        verdicts = prove(graphs[0])
        result["prove_seconds"] = round(time.monotonic() - start, 2)
        result["verdicts"] = {key: [verdict.status, verdict.reason] for key, verdict in verdicts.items()}
    if not record.passed("graph"):
        return
    refitted: list[PruneResult] = []
    with record.stage("prune 0.7") as result:
        refitted.append(reach(subject, TARGETS[0], result, **quick))
    if refitted:
        plain = _cut(graphs[0], subject, refitted[0])
        with record.stage("same 0.7") as result:
            compare(subject, graphs[0], refitted[0], plain, result)
        if not quick:
            with record.stage("compensation") as result:
                judge_compensation(subject, plain, refitted[0], result)
        with record.stage("saved") as result:
            save(subject, refitted[0].model)
        del plain
    if quick:
        return
    found_random: list[PruneResult] = []
    random = tp.importance.RandomImportance()
    with record.stage("prune 0.5") as result:
        found_random.append(reach(subject, TARGETS[1], result, importance=random, compensation=False))
    if found_random:
        with record.stage("same 0.5") as result:
            compare(subject, graphs[0], found_random[0], found_random[0].model, result)
    with record.stage("torch-pruning") as result, at_most(PATIENCE):  # it may never end
        result["groups"] = torch_pruning_groups(subject)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeoutError` after ``seconds``; the alarm that was set before is set again."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end within {seconds:g} s")

    known = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, known)
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1) if left else 0, interval)


def _cut(graph: RepairedGraph, subject: Subject, pruned: PruneResult) -> nn.Module:
    """The model without what ``pruned`` lost, before Compensation."""
    model = fresh_copy(subject.model)
    cut(graph, model, removed_classes(graph, pruned))
    return model


def torch_pruning_groups(subject: Subject) -> int:
    """Trace the model and search for groups as Torch-Pruning does; its stage is timed."""
    graph = tp.DependencyGraph()
    graph.build_dependency(copy.deepcopy(subject.model), subject.inputs, forward_fn=_call)
    return len(list(graph.get_all_groups()))


def loader(subject: Subject) -> list[Any]:
    """Two batches of calibration images; the batches of detectors are lists."""
    return [subject.batch(SAMPLES)[0], subject.batch(SAMPLES + 1)[0]]


def reach(subject: Subject, macs: float, result: dict, **options: Any) -> PruneResult:
    """Prune to ``macs``, or to the nearest that can be met."""
    if subject.detector and "importance" not in options:
        options["importance"] = tp.importance.MagnitudeImportance(p=2)  # random boxes have no loss without targets
        options["compensation"] = False
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    try:
        pruned = prune(subject.model, subject.inputs, loader(subject), macs=macs, progress=False, **options)
    except TargetError as error:
        result["refused"] = str(error)[:300]
        if error.nearest is None or not 0 < error.nearest < 0.999:
            raise
        pruned = prune(
            subject.model, subject.inputs, loader(subject), macs=error.nearest, progress=False, **options
        )
        macs = error.nearest
    result.update(macs=round(pruned.macs, 4), params=round(pruned.params, 4), asked=macs)
    result["groups"] = sum(not group.reason for group in pruned.groups)
    result["tries"] = pruned.steps[0].tries
    after = subject.model.state_dict()
    if not all(torch.equal(after[key], value) for key, value in before.items()):
        raise ArithmeticError("the given model was changed")
    return pruned


def removed_classes(graph: RepairedGraph, pruned: PruneResult) -> Tensor:
    """Labels of the channels that are gone."""
    gone = {group.key: torch.tensor(group.removed, dtype=torch.long) for group in pruned.steps[0].groups}
    found = [torch.zeros(0, dtype=torch.long)]
    for group in graph.get_all_groups():
        units = gone.get(read_group(group).key)
        if units is not None:
            found.append(group.unit.unique()[units])
    return torch.cat(found)


def compare(subject: Subject, graph: RepairedGraph, pruned: PruneResult, plain: nn.Module, result: dict) -> None:
    """Compare the outputs with the references, in single precision and in double where the model can.

    Raises:
        ArithmeticError: They differ by more than :data:`TOLERANCE` in both, or ``plain`` has other shapes.
    """
    after = pruned.model.state_dict()
    if any(value.shape != after[key].shape for key, value in plain.state_dict().items()):
        raise ArithmeticError("the pruned model has other shapes than its record says")
    classes = removed_classes(graph, pruned)
    result["difference"] = _gap(graph, subject.model, plain, subject.inputs, classes)
    gaps = [result["difference"]]
    if result["difference"] > 1e-6:
        try:
            inputs = tuple(_double(value) for value in subject.inputs)
            models = [fresh_copy(model).double() for model in (subject.model, plain)]
            result["double"] = _gap(graph, *models, inputs, classes)
            gaps.append(result["double"])
        except RuntimeError as error:
            result["double_error"] = str(error)[:200]
    try:
        with torch.no_grad():
            silenced = outputs_of(silenced_outputs(copy.deepcopy(subject.model), plain, subject.inputs))
            result["silenced"] = difference(outputs_of(_call(plain, subject.inputs)), silenced)
    except NoReferenceError as why:
        result["silenced"] = str(why)
    except Exception as error:  # the slow reference knows a few kinds of layers only
        result["silenced"] = f"{type(error).__name__}: {error}"[:200]
    if not min(gaps) <= TOLERANCE:
        raise ArithmeticError(f"differs by {min(gaps):.1e} from the original without the removed channels")


def _gap(graph: RepairedGraph, original: nn.Module, pruned: nn.Module, inputs: Any, classes: Tensor) -> float:
    torch.manual_seed(0)
    wanted = reference_outputs(graph, fresh_copy(original), classes)
    torch.manual_seed(0)
    with torch.no_grad():
        found = list(tensors_in(_call(pruned.eval(), inputs)))
    return difference(found, wanted)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return [_double(one) for one in value] if isinstance(value, list) else value


def save(subject: Subject, model: nn.Module) -> None:
    """Save the pruned model and load it.

    Raises:
        ArithmeticError: It gives other bits.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, folder)
        again = load_pruned(folder)
    with torch.no_grad():
        outputs = []
        for one in (model, again):
            torch.manual_seed(0)
            outputs.append(outputs_of(_call(one.eval(), subject.inputs)))
    if not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)):
        raise ArithmeticError("the loaded model gives other outputs")


def judge_compensation(subject: Subject, plain: nn.Module, refitted: PruneResult, result: dict) -> None:
    """Compare the errors with and without compensation on images that were not seen.

    Raises:
        ArithmeticError: Compensation made it worse.
    """
    if subject.detector:
        result["skipped"] = "detections of random weights have no error"
        return
    inputs = subject.batch(FRESH)
    with torch.no_grad():
        wanted, before, after = (
            outputs_of(_call(model.eval(), inputs)) for model in (subject.model, plain, refitted.model)
        )
    result["before"], result["after"] = _error(before, wanted), _error(after, wanted)
    report = refitted.steps[0].refitted
    reasons = collections.Counter(row.skipped for row in report.rows) if report is not None else {}
    result["layers"] = {reason or "refitted": count for reason, count in reasons.items()}
    if not result["after"] <= result["before"] * 1.01 + 1e-6:
        raise ArithmeticError(f"error {result['before']:.3g} without, {result['after']:.3g} with compensation")


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Squared error in shares of the squares of what is wanted."""
    pairs = list(zip(found, wanted, strict=True))
    total = sum(float(w.double().square().sum()) for _, w in pairs)
    return sum(float((f.double() - w.double()).square().sum()) for f, w in pairs) / max(total, 1e-12)


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs)


# -- judging --------------------------------------------------------------------------------------------------


def verdict(record: dict) -> str:
    """Return "works" where the model is pruned to 0.7 of its MACs and is the original without the channels.

    Otherwise "too large", "not built", "not traced", "refused" (0.7 cannot be met), "differs", "harmed" (by
    Compensation), "not saved", or "fails".
    """
    stages = record["stages"]

    def passed(name: str) -> bool:
        return bool(stages.get(name, {}).get("ok"))

    if record["status"] == "too large":
        return "too large"
    if not passed("build"):
        return "not built"
    if not passed("graph"):
        return "not traced"
    first = stages.get("prune 0.7", {})
    if "refused" in first:
        return "refused"
    if not first.get("ok"):
        return "fails"
    for stage, what in (("same 0.7", "differs"), ("same 0.5", "differs"), ("saved", "not saved")):
        if stages.get(stage, {}).get("ok") is False:
            return what
    if stages.get("compensation", {}).get("ok") is False:
        return "harmed"
    return "works" if passed("same 0.7") and passed("saved") else "fails"


def row(record: dict) -> dict:
    """Return a record as one row of the table."""
    stages = record["stages"]
    graph, first, second = (stages.get(name, {}) for name in ("graph", "prune 0.7", "prune 0.5"))
    same, again, refit = (stages.get(name, {}) for name in ("same 0.7", "same 0.5", "compensation"))
    counts = collections.Counter(status for status, _ in graph.get("verdicts", {}).values())
    reasons = collections.Counter(why for status, why in graph.get("verdicts", {}).values() if status == "whole")
    theirs = stages.get("torch-pruning", {})
    return {
        "name": record["name"],
        "family": record["family"],
        "params": record["params"],
        "side": stages.get("build", {}).get("side"),
        "verdict": verdict(record),
        "proved": counts["proved"],
        "repaired": counts["repaired"],
        "left whole": counts["whole"],
        "MACs for 0.7": first.get("macs"),
        "MACs for 0.5": second.get("macs"),
        "difference": same.get("double", same.get("difference")),
        "difference at 0.5": again.get("double", again.get("difference")),
        "silenced": same["silenced"] if isinstance(same.get("silenced"), float) else None,
        "saved": stages.get("saved", {}).get("ok"),
        "error": refit.get("before"),
        "error compensated": refit.get("after"),
        "trace s": graph.get("trace_seconds"),
        "proof s": graph.get("prove_seconds"),
        "Torch-Pruning s": theirs.get("seconds") if theirs.get("ok") else None,
        "quick": bool(record.get("quick")),
        "revision": record.get("environment", {}).get("git"),
        "reason": problem(record),
        "why whole": "; ".join(f"{count} x {why}" for why, count in reasons.most_common()),
    }


def problem(record: dict) -> str:
    """Return the first error or refusal of a record; empty if there is none."""
    for name, stage in record["stages"].items():
        if name != "torch-pruning" and stage.get("ok") is False:
            return f"{name}: {stage['error']['type']}: {stage['error']['message']}"
        if "refused" in stage:
            return f"{name}: {stage['refused']}"
    return ""


def one_line(record: dict) -> str:
    """Return a record as a line of the log."""
    seconds = sum(stage.get("seconds", 0) for stage in record["stages"].values())
    return f"{verdict(record):10} {record['name']} {seconds:.0f} s {problem(record)[:160]}".rstrip()


def markdown(records: list[dict], table: Any) -> str:
    """Return the report: totals, a table of all models, and what fails."""
    made = [record for record in records if "environment" in record]
    revisions = collections.Counter(record["environment"]["git"] for record in made)
    parts = [
        "# Architectures through prune()",
        "`python -m benchmarks scan --prune`, one process a model, random weights, smallest input. 0.7: "
        "`PROImportance`; 0.5: random channels. *difference*: largest of the outputs from the original without "
        "the removed channels, relative, in double precision where single leaves more than 1e-6. *silenced*: the "
        "same from a reference that shares no code with the package, where it can tell; it takes means along an "
        "axis of channels over all of them, removed or not (EfficientViM's states). Errors are squared, on "
        "images that neither calibration nor Compensation has seen, with 5 samples to refit from.",
        f"{int(table.quick.sum())} of {len(table)} models were looked at quickly: random channels to 0.7, no "
        "calibration, no compensation, not to 0.5.",
        "Revisions: " + ", ".join(f"{name} ({count} models)" for name, count in revisions.most_common()) + ".",
        totals(table),
    ]
    columns = ["verdict", "proved", "repaired", "left whole", "MACs for 0.7", "MACs for 0.5", "difference"]
    columns += ["silenced", "error", "error compensated", "trace s", "proof s", "Torch-Pruning s"]
    for library in sorted(set(table.family.str.partition("/")[0])):
        part = table[table.family.str.partition("/")[0] == library]
        shown = part[["name", *columns]].assign(name=part.name.str.partition("/")[2])
        parts += [f"## {library}", shown.to_markdown(index=False, floatfmt=".3g")]
    bad = table[(table.reason != "")]
    lines = [f"* **{one['name']}** ({one.verdict}) {one.reason}" for _, one in bad.iterrows()]
    parts += ["## What does not hold", "\n".join(lines).replace("|", "\\|") or "Nothing."]
    whole = table[table["why whole"] != ""]
    lines = [f"* **{one['name']}** {one['why whole']}" for _, one in whole.iterrows()]
    parts += ["## Left whole", "\n".join(lines).replace("|", "\\|") or "Nothing."]
    return "\n\n".join(parts) + "\n"


def totals(table: Any) -> str:
    """Return how many models of each library get how far."""
    import pandas as pd

    rows = []
    libraries = table.family.str.partition("/")[0]
    for library in [*sorted(set(libraries)), "all"]:
        part = table[(libraries == library) | (library == "all")]
        part = part[~part.verdict.isin(["too large", "not built"])]
        timed = part[part["Torch-Pruning s"].notna() & part["proof s"].notna()]
        rows.append(
            {
                "": library,
                "models": len(part),
                "work": int((part.verdict == "works").sum()),
                "traced": int((part.verdict != "not traced").sum()),
                "0.7 met": int(((part["MACs for 0.7"] - 0.7).abs() <= 0.0101).sum()),
                "0.5 met": int(((part["MACs for 0.5"] - 0.5).abs() <= 0.0101).sum()),
                "equal": int((part.difference <= TOLERANCE).sum()),
                "saved": int((part.saved == True).sum()),  # noqa: E712
                "compensated without harm": int((part["error compensated"] <= part["error"] * 1.01 + 1e-6).sum()),
                "seconds: proof": round(float(timed["proof s"].sum()), 1),
                "seconds: Torch-Pruning": round(float(timed["Torch-Pruning s"].sum()), 1),
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False)
