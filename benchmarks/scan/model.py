"""One model of the scan, in a process of its own that ``scan`` starts.

Torch-Pruning's own magnitude and ``PROImportance`` go through the same steps, each on a fresh copy, so that a
failure can be told apart: where both fail it is Torch-Pruning's, where only PRO fails it is ours.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import math
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.harness.cells import environment, peak_memory_mb, write_json
from benchmarks.scan import zoo as scan_zoo
from benchmarks.scan.zoo import Subject
from ippro_tp import LogitNoise, PROImportance, update_attention
from ippro_tp.graph.groups import groups_of, read_group

RATIO = 0.3
SCOPES = ("local", "global")
BATCHES, SAMPLES = 2, 2


class TimeLimit(BaseException):
    """The model's time is up; no library catches it by mistake."""


# -- what is recorded -----------------------------------------------------------------------------------------


class Record:
    """The JSON of one model, written after every stage, so that a killed process leaves what it found."""

    def __init__(self, path: Path, fields: dict) -> None:
        self._path = path
        self.data: dict[str, Any] = {**fields, "status": "running", "stages": {}, "environment": environment()}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Record what happens inside under ``name``: what is put into the dictionary, the seconds, the error.

        Errors end the stage and are not raised again, but for :class:`TimeLimit`.
        """
        result: dict[str, Any] = {"ok": None}
        self.data["stages"][name] = result
        self.data["running"] = name
        self.write()
        start = time.monotonic()
        try:
            yield result
            if result["ok"] is None:
                result["ok"] = True
        except TimeLimit as limit:
            result.update(ok=False, error=describe(limit))
            raise
        except Exception as error:  # what the scan is about: anything a model can raise
            result.update(ok=False, error=describe(error))
        finally:
            result["seconds"] = round(time.monotonic() - start, 2)
            gc.collect()  # graphs of Torch-Pruning are cycles

    def passed(self, name: str) -> bool:
        """Whether the stage ran and found nothing wrong."""
        return bool(self.data["stages"].get(name, {}).get("ok"))

    def finish(self, status: str) -> None:
        """Write the last version."""
        self.data.pop("running", None)
        self.data["status"] = status
        self.write()

    def write(self) -> None:
        """Write what is known now."""
        self.data["peak_memory_mb"] = round(peak_memory_mb())
        write_json(self._path, self.data)


def describe(error: BaseException) -> dict:
    """Return type, message and innermost frames of an error as JSON-ready strings."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TimeLimit):
        frames = frames[:-1]  # where it was, not the handler
    lines = str(error).strip().splitlines()
    out_of_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    described = {
        "type": "MemoryLimit" if out_of_memory else type(error).__name__,
        "message": (lines[0] if lines else "")[:300],
    }
    if frames:
        described["frame"] = _place(frames[-1])
        own = [f for f in frames if "/ippro_tp/" in f.filename]
        if own:
            described["own_frame"] = _place(own[-1])
        pruning = [f for f in frames if "/torch_pruning/" in f.filename]
        if pruning:
            described["tp_frame"] = _place(pruning[-1])
    return described


def _place(frame: traceback.FrameSummary) -> str:
    parts = Path(frame.filename).parts
    if "site-packages" in parts:
        parts = parts[parts.index("site-packages") + 1 :]
    elif "benchmarks" in parts:
        parts = parts[parts.index("benchmarks") :]
    elif "ippro_tp" in parts:
        parts = parts[parts.index("ippro_tp") :]
    return f"{'/'.join(parts[-4:])}:{frame.lineno} in {frame.name}"


# -- what is checked ------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> dict:
    """Return everything about a model that a calibration could touch."""
    hooks = [name for name in nn.Module().__dict__ if "hook" in name]
    state: dict[tuple[str, str], Any] = {}
    for name, module in model.named_modules():
        state[name, "attributes"] = sorted(module.__dict__)
        state[name, "training"] = module.training
        state[name, "class"] = type(module)
        state[name, "hooks"] = [tuple(getattr(module, hook) or ()) for hook in hooks]
    for name, p in model.named_parameters():
        state[name, "value"] = p.detach().clone()
        state[name, "parameter"] = (id(p), p.requires_grad, p.grad is None)
        state[name, "parameter hooks"] = (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ()))
    for name, b in model.named_buffers():
        state[name, "buffer"] = b.clone()
    return state


def changes(before: dict, after: dict) -> list[str]:
    """Return what differs between two fingerprints."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        return bool(a == b)

    keys = before.keys() | after.keys()
    return sorted(" ".join(k) for k in keys if not (k in before and k in after and same(before[k], after[k])))


class Checked(tp.importance.Importance):
    """An importance that notes what Torch-Pruning gets from another one, and refuses what would harm it.

    Attributes:
        groups: Number of groups asked for.
        excused: Groups, by key, that may go without scores: the importance has said why.
    """

    def __init__(self, importance: Callable) -> None:
        self._importance = importance
        self.groups = 0
        self.excused: set[str] = set()

    def __call__(self, group: Any, **options: Any) -> Tensor | None:
        """Return the scores of ``group``.

        Raises:
            ArithmeticError: There are none although a layer produces these channels, they are fewer or more than
                the channels, or not finite.
        """
        scores = self._importance(group, **options)
        self.groups += 1
        root, channels = group[0].dep.target.name, len(group[0].idxs)
        if scores is None:
            record = read_group(group)
            if record.producers and record.key not in self.excused:
                raise ArithmeticError(f"no score for the group of {root}")
        elif scores.shape != (channels,):
            raise ArithmeticError(f"shape {tuple(scores.shape)} for {channels} channels of {root}")
        elif not scores.isfinite().all():
            raise ArithmeticError(f"{int((~scores.isfinite()).sum())} of {channels} scores of {root} not finite")
        return scores


def outputs_of(value: Any) -> list[Tensor]:
    """Return all floating-point tensors in a model's output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in outputs_of(v)]
    return []


def energy(value: Any) -> Tensor:
    """Return a loss that depends on every output: the sum of their means of squares."""
    return torch.stack([t.float().square().mean() for t in outputs_of(value) if t.numel()]).sum()


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def build_pruner(subject: Subject, importance: Callable, scope: str) -> tp.pruner.BasePruner:
    """Return a pruner over the subject's model, with its own dictionaries (TP's defaults are shared).

    Embeddings of ``nn.MultiheadAttention`` have to remain divisible by its heads.
    """
    heads = [m.num_heads for m in subject.model.modules() if isinstance(m, nn.MultiheadAttention)]
    return tp.pruner.BasePruner(
        subject.model,
        subject.inputs,
        importance=importance,
        global_pruning=scope == "global",
        pruning_ratio=RATIO,
        max_pruning_ratio=0.9,
        ignored_layers=subject.ignored,
        in_channel_groups={},
        out_channel_groups={},
        num_heads=dict(subject.num_heads),
        channel_groups={},
        round_to=math.lcm(*heads) if heads else None,
        forward_fn=_forward,  # without it, TP hides an error of the model behind that of a second try
    )


def _forward(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return model(*inputs)


def prune_and_run(subject: Subject, pruner: tp.pruner.BasePruner, result: dict) -> None:
    """Take a step, and check that the pruned model is smaller and runs forwards and backwards."""
    model = subject.model
    with torch.no_grad():
        shapes = [t.shape[1:] for t in outputs_of(model(*subject.batch(2)))]
    before = result["params_before"] = parameters(model)
    pruner.step()
    update_attention(pruner)
    after = result["params_after"] = parameters(model)
    model.eval().zero_grad()
    outputs = model(*subject.batch(2))
    if not subject.detector and [t.shape[1:] for t in outputs_of(outputs)] != shapes:
        raise ArithmeticError("the pruned model's output has another shape")
    energy(outputs).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        raise ArithmeticError("no gradient reaches a parameter of the pruned model")
    result["finite"] = all(bool(t.isfinite().all()) for t in [*outputs_of(outputs), *gradients])
    if after >= before:
        result.update(ok=False, error={"type": "NoOp", "message": "step() removed nothing, without an error"})


def prune_at_random(fresh: Callable[[], Subject], scope: str, result: dict) -> None:
    """Prune random channels, five times: an importance only chooses channels, and some break the model."""
    for seed in range(5):
        subject = fresh()
        torch.manual_seed(seed)
        result["seed"] = seed
        prune_and_run(subject, build_pruner(subject, tp.importance.RandomImportance(), scope), result)


def calibrate(subject: Subject, pruner: tp.pruner.BasePruner, importance: PROImportance) -> None:
    """Gather statistics on random images; detectors go with a loss of their own.

    Logits of random weights may be of any size and saturate a softmax: the loss is noise on the logits.
    """
    if subject.detector:
        with importance.observe(pruner):
            for _ in range(BATCHES):
                energy(subject.model(*subject.batch(SAMPLES))).backward()
        return
    batches = [subject.batch(SAMPLES + n)[0] for n in range(BATCHES)]
    importance.calibrate(pruner, batches, LogitNoise(), progress=False)


def check_scores(asked: Checked, importance: PROImportance, pruner: tp.pruner.BasePruner) -> dict:
    """Score every group; return how many have an activation, the identity or no producer."""
    rows = {row.root: row for row in importance.report()}
    kinds: collections.Counter[str] = collections.Counter()
    activations: collections.Counter[str] = collections.Counter()
    notes: list[str] = []
    sites: dict[str, dict[str, str | None]] = {}
    for group in groups_of(pruner):
        record = read_group(group)
        row = rows[record.key]
        kinds["none" if not record.producers else "identity" if row.fallback else "sigma"] += 1
        activations.update({site.split(" #")[0] for site in row.sites.values() if site is not None})
        notes += [f"{record.key}: {note}" for note in row.notes]
        sites[record.key] = dict(row.sites)
        asked(group)
    found = {kind: kinds[kind] for kind in ("sigma", "identity", "none")}
    return {**found, "activations": activations, "notes": notes, "sites": sites}


# -- all of it ------------------------------------------------------------------------------------------------


def examine(name: str, record: Record, side: int | None = None) -> None:
    """Fill ``record`` with what happens to the model ``name``."""
    found: list[Subject] = []
    with record.stage("build") as result:
        found.append(scan_zoo.subject(name, side))
        side = result["side"] = found[0].side
        record.data["params"] = parameters(found[0].model)
    if not record.passed("build"):
        return

    def fresh() -> Subject:
        return found.pop() if found else scan_zoo.subject(name, side)

    asked = Checked(tp.importance.MagnitudeImportance(p=2))
    pruners: list[tuple[Subject, tp.pruner.BasePruner]] = []
    with record.stage("trace"):
        subject = fresh()
        pruners.append((subject, build_pruner(subject, asked, SCOPES[0])))
    if not record.passed("trace"):
        return
    for scope in SCOPES:
        with record.stage(f"magnitude {scope}") as result:
            if not pruners:
                subject = fresh()
                pruners.append((subject, build_pruner(subject, asked, scope)))
            asked.groups = 0
            try:
                prune_and_run(*pruners.pop(), result)
            finally:
                result["groups"] = asked.groups
    for scope in SCOPES:
        importance = PROImportance()
        asked = Checked(importance)
        with record.stage(f"calibrate {scope}") as result:
            subject = fresh()
            pruner = build_pruner(subject, asked, scope)
            before = fingerprint(subject.model)
            calibrate(subject, pruner, importance)
            asked.excused = {row.root for row in importance.report() if any("not scored" in n for n in row.notes)}
            touched = changes(before, fingerprint(subject.model))
            if touched:
                result.update(ok=False, error={"type": "Touched", "message": ", ".join(touched[:5])})
        if not record.passed(f"calibrate {scope}"):
            continue
        if "scores" not in record.data["stages"]:
            with record.stage("scores") as result:
                result.update(check_scores(asked, importance, pruner))
        with record.stage(f"pro {scope}") as result:
            prune_and_run(subject, pruner, result)
        if not record.passed(f"pro {scope}"):
            with record.stage(f"random {scope}") as result:
                prune_at_random(fresh, scope, result)


def limit_resources(seconds: float, gigabytes: float) -> None:
    """Raise :class:`TimeLimit` after ``seconds``, again and again, and refuse memory beyond ``gigabytes``."""

    def stop(*_: Any) -> None:
        raise TimeLimit(f"no end within {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 3)  # again, should something catch everything
    # Not RLIMIT_AS: the address space that libraries reserve without using it would count.
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def main(
    look: Callable[[str, Record], None],
    name: str,
    family: str,
    path: Path,
    log: Path,
    seconds: float,
    gigabytes: float,
) -> None:
    """Examine one model and write its JSON; everything it prints goes to ``log``. Runs in a process of its own.

    Args:
        look: fills the record: :func:`examine`, or that of another part of the scan.
        name: As in :class:`benchmarks.scan.zoo.Entry`.
        family: The same.
        path: The JSON file.
        log: The text file.
        seconds: Limit of the wall clock.
        gigabytes: Limit of the memory.
    """
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    limits = {"limit_seconds": seconds, "limit_gb": gigabytes}
    record = Record(path, {"name": name, "family": family, "params": None, **limits})
    status = "done"
    try:
        limit_resources(seconds, gigabytes)
        look(name, record)
    except TimeLimit:
        status = "time limit"
    signal.setitimer(signal.ITIMER_REAL, 0)
    record.finish(status)
