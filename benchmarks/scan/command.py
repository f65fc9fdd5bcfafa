"""``python -m benchmarks scan``: on which architectures Torch-Pruning works, and PROImportance with it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import pandas as pd
from tqdm.auto import tqdm

from benchmarks.errors import UsageError
from benchmarks.harness.cells import write_json
from benchmarks.scan import model as scan_model
from benchmarks.scan import pruned as scan_pruned
from benchmarks.scan.zoo import (
    Counts,
    Entry,
    resolve,
    timm_families,
    timm_variants,
    torchvision_entries,
    torchvision_names,
)

GRACE = 20
"""Seconds after its limit until a process that does not end by itself is killed."""
SCOPES = ("local", "global")


@dataclass(frozen=True)
class Part:
    """A part of the scan: where its records are, who makes one, and its verdict."""

    folder: str
    look: Callable[[str, scan_model.Record], None]
    verdict: Callable[[dict], str]


@dataclass(frozen=True)
class ScanConfig:
    """Try every torchvision and timm architecture: trace, calibrate, prune with magnitude and with PRO."""

    out: Path = Path("runs/scan")
    """One JSON per model, the parameter counts, and the report."""
    models: tuple[str, ...] = ()
    """Only these: torchvision/NAME, timm/NAME, NAME, or MODULE:FUNCTION."""
    families: tuple[str, ...] = ()
    """Only these files of architectures, such as torchvision/resnet or timm/efficientnet, or all of timm."""
    prune: bool = False
    """Examine ippro_tp.prune() instead of the importances in Torch-Pruning's pruners."""
    quick: bool = False
    """With --prune: random channels to 0.7 of the MACs alone, no calibration and no compensation."""
    variants: Literal["smallest", "larger"] = "smallest"
    """Of timm's files of architectures: the smallest model, or the largest of the four smallest. Every model of
    torchvision is looked at with the smallest, and none with the larger."""
    sample: int = 0
    """At most so many files of architectures, evenly spaced in their list; 0: all."""
    limit_seconds: float = 300
    """Wall clock per model."""
    limit_gb: float = 6
    """Memory per model."""
    max_params: float = 60
    """Leave out models with more millions of parameters."""
    retry_failed: bool = False
    """Examine again what did not work before."""
    report_only: bool = False
    """Make the report of what is in --out."""
    report: Path | None = None
    """Where the report goes; OUT/scan.md by default. With --prune, OUT/prune.md and a CSV beside it."""

    @property
    def part(self) -> Part:
        """What is examined."""
        if self.prune:
            look = scan_pruned.examine_quickly if self.quick else scan_pruned.examine
            return Part("prune", look, scan_pruned.verdict)
        return Part("models", scan_model.examine, lambda record: judge(record)["verdict"])


def run(config: ScanConfig) -> pd.DataFrame:
    """Examine what is missing, then write the report.

    Returns:
        One row per model, as in the report.

    Raises:
        UsageError: A flag names nothing that exists, or there is nothing to report.
    """
    if not config.report_only:
        if config.limit_seconds <= 0 or config.limit_gb <= 0:
            raise UsageError("--limit-seconds and --limit-gb must be positive")
        counts = Counts(config.out / "parameters.json")
        total, candidates = choose(config, counts)
        bar = tqdm(candidates, total=total, unit="model")
        for variants in bar:
            bar.set_postfix_str(variants[0].name)
            for entry in variants:
                record = examine(entry, config)
                tqdm.write(scan_pruned.one_line(record) if config.prune else one_line(record))
                if record["stages"].get("build", {}).get("ok"):
                    break  # the smallest variant that runs stands for its family
    records = load(config.out, config.part.folder)
    if not records:
        raise UsageError(f"no results under {config.out}; run without --report-only first")
    target = config.report or config.out / ("prune.md" if config.prune else "scan.md")
    target.parent.mkdir(parents=True, exist_ok=True)
    if config.prune:
        table = pd.DataFrame([scan_pruned.row(record) for record in records])
        table.to_csv(target.with_suffix(".csv"), index=False)
        target.write_text(scan_pruned.markdown(records, table))
    else:
        table = pd.DataFrame([judge(record) for record in records])
        target.write_text(markdown(records, table))
    print(target)
    return table


# -- examining ------------------------------------------------------------------------------------------------


def choose(config: ScanConfig, counts: Counts) -> tuple[int, Iterator[list[Entry]]]:
    """Return what to examine: lists of variants, of which the first one that can be built is taken.

    Returns:
        How many lists there are, and the lists; parameters are counted on the way.

    Raises:
        UsageError: A flag names nothing that exists.
    """
    if config.models:
        entries = [[entry] for name in config.models for entry in resolve(name, counts)]
        return len(entries), iter(entries)
    torchvision, timm = torchvision_names(), timm_families()
    if config.families:
        unknown = set(config.families) - {*torchvision.values(), *timm, "torchvision", "timm"}
        if unknown:
            raise UsageError(f"no family {sorted(unknown)[0]!r}; use torchvision/MODULE or timm/MODULE")
        torchvision = {n: family for n, family in torchvision.items() if _chosen(family, config.families)}
        timm = [family for family in timm if _chosen(family, config.families)]
    if config.variants == "larger":
        torchvision = {}
    if 0 < config.sample < len(timm):
        timm = [timm[number * len(timm) // config.sample] for number in range(config.sample)]
    ones = ([entry] for entry in torchvision_entries(counts, torchvision))
    return len(torchvision) + len(timm), itertools.chain(ones, (_variants(f, config, counts) for f in timm))


def _variants(family: str, config: ScanConfig, counts: Counts) -> list[Entry]:
    """Variants of a family in the order in which they are tried."""
    found = timm_variants(family, counts)
    if config.variants == "smallest":
        return found
    fitting = [entry for entry in found[1:] if entry.params is None or entry.params <= config.max_params * 1e6]
    return [*reversed(fitting), *found[:1]]


def _chosen(family: str, families: tuple[str, ...]) -> bool:
    return family in families or family.partition("/")[0] in families


def examine(entry: Entry, config: ScanConfig) -> dict:
    """Return the record of one model, from its file or by running it."""
    path = entry.path(config.out, config.part.folder)
    if path.exists():
        record = json.loads(path.read_text())
        if not stale(record, config):
            return record
    if entry.params is not None and entry.params > config.max_params * 1e6:
        record = {"name": entry.name, "family": entry.family, "params": entry.params, "stages": {}}
        record["status"] = "too large"
        write_json(path, record)
        return record
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    limits = (config.limit_seconds, config.limit_gb)
    process = start_child(config.part.look, entry, path, log, *limits)
    process.join(config.limit_seconds + GRACE)
    ending = f"exit code {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
        ending = f"killed after {config.limit_seconds + GRACE:g} s"
    record = json.loads(path.read_text()) if path.exists() else unstarted(entry)
    if record["status"] == "running":
        lines = log.read_text().strip().splitlines()
        stage = record["stages"].setdefault(record.pop("running", "build"), {})
        message = f"{ending}; {lines[-1] if lines else ''}"[:300]
        stage.update(ok=False, error={"type": "Killed", "message": message})
        record["status"] = "killed"
        write_json(path, record)
    return record


def start_child(
    look: Callable[[str, scan_model.Record], None], entry: Entry, path: Path, log: Path, *limits: float
) -> BaseProcess:
    """Start the examination of one model in a process of its own.

    Processes are forked from one that has imported the libraries and done nothing else: importing them anew
    takes longer than examining most models.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_pruning", "torchvision", "timm", "benchmarks.scan.pruned"])
    process = context.Process(
        target=scan_model.main, args=(look, entry.name, entry.family, path, log, *limits), daemon=True
    )
    process.start()
    return process


def unstarted(entry: Entry) -> dict:
    """Return the record of a process that ended before it wrote one."""
    return {
        "name": entry.name,
        "family": entry.family,
        "params": entry.params,
        "status": "running",
        "stages": {},
    }


def stale(record: dict, config: ScanConfig) -> bool:
    """Return whether a record has to be made again."""
    if record["status"] == "running":
        return True
    if record["status"] == "too large":
        return record["params"] <= config.max_params * 1e6
    if record["status"] in ("time limit", "killed") and config.limit_seconds > record.get("limit_seconds", 0):
        return True
    if record.get("quick") and not (config.quick or config.report_only):
        return True
    return config.retry_failed and config.part.verdict(record) != "works"


def load(out: Path, folder: str = "models") -> list[dict]:
    """Return all records under ``out`` of a part of the scan."""
    records = [json.loads(path.read_text()) for path in sorted((out / folder).glob("*.json"))]
    return [record for record in records if record["status"] != "running"]


# -- judging --------------------------------------------------------------------------------------------------


def judge(record: dict) -> dict:
    """Return a record as one row of the table.

    ``verdict`` is one of "too large", "not built" (no input size runs), "not traced" (by Torch-Pruning),
    "TP fails" (magnitude works in neither scope, or PRO breaks the model and so do random channels), "works" (PRO
    works wherever magnitude does), "ours", and
    "unfinished" (the time was up after the trace).
    """
    stages = record["stages"]

    def passed(name: str) -> bool:
        return bool(stages.get(name, {}).get("ok"))

    scores = stages.get("scores", {})
    magnitude = {s: passed(f"magnitude {s}") for s in SCOPES}
    pro = {s: passed(f"calibrate {s}") and passed("scores") and passed(f"pro {s}") for s in SCOPES}
    broken = {s: stages.get(f"random {s}", {}).get("ok") is False for s in SCOPES}
    problems = list(our_failures(record))
    if record["status"] == "too large":
        verdict = "too large"
    elif not passed("build"):
        verdict = "not built"
    elif not passed("trace"):
        verdict = "not traced"
    elif problems:
        verdict = "ours"
    elif record["status"] == "time limit" or any(magnitude[s] and not pro[s] and not broken[s] for s in SCOPES):
        verdict = "unfinished"
    elif any(broken.values()):
        verdict = "TP fails"
    else:
        verdict = "works" if any(magnitude.values()) else "TP fails"
    return {
        "name": record["name"],
        "family": record["family"],
        "params": record["params"],
        "side": stages.get("build", {}).get("side"),
        "groups": stages.get("magnitude local", {}).get("groups"),
        **{kind: scores.get(kind) for kind in ("sigma", "identity", "none")},
        **{f"magnitude {s}": magnitude[s] for s in SCOPES},
        **{f"pro {s}": pro[s] for s in SCOPES},
        "verdict": verdict,
    }


def our_failures(record: dict) -> Iterator[tuple[str, dict]]:
    """Yield stage and error of what fails with PRO and not with magnitude.

    Calibration and scores are ours whatever Torch-Pruning does; a step is, if it works with magnitude and with
    random channels.
    """
    stages = record["stages"]
    for stage in ("calibrate local", "scores", "pro local", "calibrate global", "pro global"):
        result = stages.get(stage)
        if result is None or result.get("ok") or _late(result):
            continue
        kind, _, scope = stage.partition(" ")
        if kind == "pro" and not stages.get(f"magnitude {scope}", {}).get("ok"):
            continue
        if kind == "pro" and stages.get(f"random {scope}", {}).get("ok") is False:
            continue  # Torch-Pruning breaks the model for random channels, too
        yield stage, result.get("error", {"type": "unknown", "message": ""})


def their_failures(record: dict) -> Iterator[tuple[str, dict]]:
    """Yield stage and error of what Torch-Pruning cannot do with magnitude, or with random channels."""
    for stage in ("trace", *(f"{kind} {s}" for kind in ("magnitude", "random") for s in SCOPES)):
        result = record["stages"].get(stage)
        if result is not None and not result.get("ok") and not (stage != "trace" and _late(result)):
            yield stage, result.get("error", {"type": "unknown", "message": ""})


def _late(result: dict) -> bool:
    """Whether a stage ended because the time for all stages was up."""
    return result.get("error", {}).get("type") == "TimeLimit"


def one_line(record: dict) -> str:
    """Return a record as a line of the log."""
    row = judge(record)
    seconds = sum(stage.get("seconds", 0) for stage in record["stages"].values())
    failures = [*our_failures(record), *their_failures(record)]
    why = "; ".join(f"{stage}: {error['type']}: {error['message'][:80]}" for stage, error in failures[:2])
    return f"{row['verdict']:10} {record['name']} {seconds:.0f} s {why}".rstrip()


# -- reporting ------------------------------------------------------------------------------------------------


def markdown(records: list[dict], table: pd.DataFrame) -> str:
    """Return the report: totals, a table per family, and the lists of failures."""
    parts = ["# Architectures", preface(records), totals(table)]
    columns = {
        "models": lambda g: len(g),
        "traced": lambda g: int(g.verdict.isin(["TP fails", "works", "ours", "unfinished"]).sum()),
        "magnitude": lambda g: _marks(g, "magnitude"),
        "PRO": lambda g: _marks(g, "pro"),
        "groups": lambda g: _sum(g.groups),
        "sigma": lambda g: _sum(g.sigma),
        "identity": lambda g: _sum(g.identity),
        "no producer": lambda g: _sum(g.none),
        "model, or smallest": lambda g: _smallest(g),
    }
    for library in sorted({family.partition("/")[0] for family in table.family}):
        part = table[(table.family.str.partition("/")[0] == library) & (table.verdict != "too large")]
        if part.empty:
            continue
        rows = [
            {"family": family.partition("/")[2] or family, **{name: make(g) for name, make in columns.items()}}
            for family, g in part.groupby("family")
        ]
        parts += [f"## {library}", pd.DataFrame(rows).to_markdown(index=False)]
    parts += ["## Where only PRO fails", failures(records, our_failures)]
    parts += ["## Where Torch-Pruning fails", failures(records, their_failures)]
    late = ", ".join(table[table.verdict == "unfinished"].name)
    parts += ["## Out of time after the trace", late or "None."]
    unbuilt = [(r["name"], r["stages"].get("build", {}).get("error", {})) for r in records if _unbuilt(r)]
    lines = [f"* {name}: {error.get('type')}: {error.get('message')}" for name, error in unbuilt]
    parts += ["## Not built", "\n".join(lines) or "None."]
    large = table[table.verdict == "too large"]
    names = ", ".join(f"{r['name']} ({r['params'] / 1e6:.0f} M)" for r in large.to_dict("records"))
    parts += ["## Left out for their size", names or "None."]
    return "\n\n".join(parts) + "\n"


def preface(records: list[dict]) -> str:
    """Return how the records were made."""
    made = [record for record in records if "environment" in record]
    packages = (record["environment"]["versions"].items() for record in made)
    versions = sorted({", ".join(f"{name} {version}" for name, version in p if version) for p in packages})
    limits = sorted({f"{record['limit_seconds']:g} s and {record['limit_gb']:g} GiB" for record in made})
    return (
        "`python -m benchmarks scan`, one process a model, random weights, ratio 0.3. Under *magnitude* "
        "and *PRO*: for how many models a local step works, a global step works. *groups*: with an activation as "
        "sigma, with the identity, with no producer, as PRO found them.\n\n"
        f"Made with {'; '.join(versions) or 'nothing yet'}. Limits: {', '.join(limits) or 'none'}."
    )


def totals(table: pd.DataFrame) -> str:
    """Return how many models get how far; those without a result are not counted."""
    rows = []
    libraries = table.family.str.partition("/")[0]
    for library in [*sorted(set(libraries)), "all"]:
        part = table[(libraries == library) | (library == "all")]
        part = part[~part.verdict.isin(["too large", "not built", "unfinished"])]
        row = {"": library, "models tried": len(part), "traced by TP": int((part.verdict != "not traced").sum())}
        for scope in SCOPES:
            works = part[part[f"magnitude {scope}"]]
            row[f"{scope}: TP magnitude works"] = len(works)
            row[f"{scope}: of these PRO works"] = int(works[f"pro {scope}"].sum())
            row[f"{scope}: PRO works"] = int(part[f"pro {scope}"].sum())
        rows.append(row)
    return pd.DataFrame(rows).to_markdown(index=False)


def failures(records: list[dict], kind: Callable[[dict], Iterable[tuple[str, dict]]]) -> str:
    """Return a list of failures, equal ones of a model in one line."""
    lines = []
    for record in records:
        found: dict[str, list[str]] = {}
        for stage, error in kind(record):
            place = error.get("frame", "")
            text = f"{error['type']}: {error['message']}" + (f" ({place})" if place else "")
            found.setdefault(text.replace("|", "\\|").replace("\n", " "), []).append(stage)
        lines += [f"* **{record['name']}** {', '.join(stages)}: {text}" for text, stages in found.items()]
    return "\n".join(lines) or "None."


def _unbuilt(record: dict) -> bool:
    return judge(record)["verdict"] == "not built"


def _marks(group: pd.DataFrame, criterion: str) -> str:
    """How many models work locally and globally."""
    return f"{int(group[f'{criterion} local'].sum())}, {int(group[f'{criterion} global'].sum())}"


def _sum(column: pd.Series) -> int | str:
    numbers = column.dropna()
    return int(numbers.sum()) if len(numbers) else ""


def _smallest(group: pd.DataFrame) -> str:
    row = group[group.verdict != "not built"] if (group.verdict != "not built").any() else group
    row = row.sort_values("params").iloc[0]
    side = f", {int(row.side)} px" if pd.notna(row.side) else ""
    return f"{row['name'].rpartition('/')[2]}{side}"
