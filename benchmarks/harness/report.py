"""``report``: Markdown tables, a CSV and figures from the JSON files of ``compare`` or ``prune``, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import stats
from tabulate import tabulate

from benchmarks.errors import UsageError
from benchmarks.harness.cells import UNPRUNED
from benchmarks.harness.figures import PANELS, draw_curves
from benchmarks.harness.tables import github_table, spread
from ippro_tp.cli import runs

PHASES = PANELS | {"bn": "BN re-estimated"}
REFITS = {
    "none": "",
    "fold": " + compensation",
    "recover": " + recovery",
    "mean": " + mean in the bias",
    "folding": " + folding",
    "gram": " + Gram ridge",
}
"""Of ``--compensate``, as the tables name them."""
REFERENCE = "l1"
MISSED, FAILED, ABSENT = "missed", "failed", "·"


@dataclass(frozen=True)
class ReportConfig:
    """Turn the results in a folder into ``report.md``, a CSV and, for ``compare``, figures beside them."""

    directory: tyro.conf.Positional[Path]
    """The --out folder of ``compare``, or the folder that holds those of several ``prune`` runs."""
    arms: tuple[str, ...] = ()
    """Show only these arms, as the tables name them ("pro / macs"); empty for all."""


def run(config: ReportConfig) -> None:
    """Write the report into ``config.directory`` and print its tables."""
    finished = runs.read_runs(config.directory)
    if len(finished) and not config.arms:
        pd.DataFrame(finished).to_csv(config.directory / "runs.csv", index=False)
        text = runs.markdown(finished)
        (config.directory / "report.md").write_text(text)
        print(text)
        return
    cells = _chosen(read_cells(config.directory), config.arms)
    cells.to_csv(config.directory / "cells.csv", index=False)
    figures = draw_curves(cells, config.directory)
    text = markdown(cells)
    text += "".join(f"\n![Accuracy against MACs]({path.name})\n" for path in figures)
    (config.directory / "report.md").write_text(text)
    print(text)
    print(
        f"wrote {', '.join(map(str, (config.directory / 'report.md', config.directory / 'cells.csv', *figures)))}"
    )


def _chosen(cells: pd.DataFrame, arms: tuple[str, ...]) -> pd.DataFrame:
    unknown = sorted(set(arms) - set(cells.arm))
    if unknown:
        known = ", ".join(map(repr, dict.fromkeys(cells.arm)))
        raise UsageError(f"no results of the arm {unknown[0]!r}; there are {known}")
    return cells[cells.arm.isin([*arms, UNPRUNED])] if arms else cells


def read_cells(directory: Path) -> pd.DataFrame:
    """Return one row per cell: what was varied, ``status``, ``hit``, sizes, seconds and accuracies in per cent.

    The accuracies of cells that missed their target are left empty.
    """
    paths = sorted(directory.glob("cells/**/*.json"))
    if not paths:
        raise UsageError(
            f"no results under {directory / 'cells'}; run `python -m benchmarks compare --out {directory}`"
        )
    return pd.DataFrame([_row(json.loads(path.read_text())) for path in paths])


def _row(record: dict) -> dict:
    config, hit = record["config"], bool(record.get("hit", False))
    arm = config["criterion"] if config["cost"] == "none" else f"{config['criterion']} / {config['cost']}"
    depletion = config.get("depletion", "none")
    arm += {"none": "", "log": ", depletion"}.get(depletion, f", {depletion}")
    arm += REFITS[config.get("compensation", "none")]
    arm += "" if config.get("schedule", "once") == "once" else ", front to back"
    arm += "" if config.get("widths", "scores") == "scores" else ", widths measured"
    row = {"task": f"{config['task']} {config['model']}", "arm": arm}
    row |= {name: config[name] for name in ("criterion", "cost", "scope", "target", "seed")}
    row |= {"status": record["status"], "error": record.get("error", ""), "hit": hit}
    row |= {
        name: record.get(name) for name in ("ratio", "rounding", "macs_fraction", "params_fraction", "min_width")
    }
    accuracies = record.get("accuracy") or {}
    row |= {phase: 100 * accuracies[phase] if hit and phase in accuracies else np.nan for phase in PHASES}
    seconds = record.get("seconds", {})
    row |= {
        f"seconds_{phase}": seconds.get(phase) for phase in ("calibration", "scoring", "pruning", "evaluation")
    }
    row |= {f"seconds_{phase}": seconds.get(phase) for phase in ("batchnorm", "finetune")}
    return row | {"peak_memory_mb": record.get("peak_memory_mb")}


def markdown(cells: pd.DataFrame) -> str:
    """Return the tables, the paired differences, and the lists of missed and failed cells."""
    parts = []
    for (task, scope), part in cells[cells.criterion != UNPRUNED].groupby(["task", "scope"], sort=False):
        base = cells[(cells.task == task) & (cells.criterion == UNPRUNED) & (cells.status == "ok")]
        parts.append(f"## {task}, {scope} ranking\n\n{_base_line(base)}{_table(part)}\n\n{_caption(part)}\n")
        differences = paired_differences(part)
        if len(differences):
            parts.append(f"Paired differences from {REFERENCE}, in points of accuracy (same target, same seed)\n")
            parts.append(github_table(differences) + "\n")
    missed = cells[(cells.status == "ok") & ~cells.hit]
    if len(missed):
        rows = missed[["task", "arm", "scope", "target", "seed", "macs_fraction"]]
        parts.append(f"## Missed MACs targets: {len(missed)} cells, not shown as results\n")
        parts.append(tabulate(rows, headers="keys", tablefmt="github", showindex=False, floatfmt=".3f") + "\n")
    failed = cells[cells.status != "ok"]
    if len(failed):
        rows = failed[["task", "arm", "scope", "target", "seed", "error"]]
        parts.append(f"## Failed: {len(failed)} cells\n")
        parts.append(tabulate(rows, headers="keys", tablefmt="github", showindex=False) + "\n")
    return "\n".join(parts)


def _phases(part: pd.DataFrame) -> list[str]:
    return [phase for phase in PHASES if part[phase].notna().any()]


def _base_line(base: pd.DataFrame) -> str:
    if not len(base):
        return ""
    values = ", ".join(f"{PHASES[phase]} {spread(base[phase])}" for phase in _phases(base))
    return f"Unpruned: {values}.\n\n".replace("as pruned", "as it is")


def _table(part: pd.DataFrame) -> str:
    targets = sorted(part.target.unique(), reverse=True)
    phases = _phases(part) or ["pruned"]
    rows = []
    for arm in _arms(part):
        row = [arm]
        for target in targets:
            row.append(_entry(part[(part.arm == arm) & (part.target == target)], phases))
        rows.append(row)
    return tabulate(rows, ["criterion", *(f"MACs {target:g}" for target in targets)], tablefmt="github")


def _entry(group: pd.DataFrame, phases: list[str]) -> str:
    if not len(group):
        return ABSENT
    failed, hits = group[group.status != "ok"], group[group.hit]
    missed = len(group) - len(failed) - len(hits)
    notes = [f"{MISSED} {missed} of {len(group)}"] if missed else []
    notes += [f"{FAILED} {len(failed)} of {len(group)}"] if len(failed) else []
    # A mean over some of the seeds would compare another sample: all or none.
    return ", ".join(notes) if notes else " / ".join(spread(hits[phase]) for phase in phases)


def _caption(part: pd.DataFrame) -> str:
    names = " / ".join(PHASES[phase] for phase in _phases(part) or ["pruned"])
    seeds = part.seed.nunique()
    text = f"Top-1 accuracy in per cent, {names}; mean ± standard deviation over {seeds} seed{'s'[: seeds > 1]}."
    staggered = sorted(part[part.hit & (part.rounding == "staggered")].target.unique(), reverse=True)
    if staggered:
        values = ", ".join(f"{target:g}" for target in staggered)
        text += f" At MACs {values} no uniform ratio fits: widths rounded group by group, alike in all arms."
    return text


def _arms(part: pd.DataFrame) -> list[str]:
    """Return the arms with missed or failed cells first, then by rising accuracy after BatchNorm re-estimation."""
    whole = part[part.groupby("arm").hit.transform("all")]
    means = whole.groupby("arm", sort=False)["bn"].mean().sort_values(kind="stable")
    incomplete = [arm for arm in dict.fromkeys(part.arm) if arm not in means.index]
    return incomplete + list(means.index)


def paired_differences(part: pd.DataFrame, phase: str = "bn", reference: str = REFERENCE) -> pd.DataFrame:
    """Return for each arm its mean difference from ``reference`` with a 95 % bootstrap interval over cells.

    Pairs are cells of the same target and seed in which both arms met the target.
    """
    index = ["target", "seed"]
    hits = part[part.hit & part[phase].notna()]
    base = hits[hits.arm == reference].set_index(index)[phase]
    rows = []
    for arm in _arms(part):
        own = hits[hits.arm == arm].set_index(index)[phase]
        pairs = pd.concat([own, base], axis=1, join="inner", keys=["own", "base"])
        if arm == reference or not len(pairs):
            continue
        difference = (pairs.own - pairs.base).to_numpy()
        low, high = bootstrap_interval(difference)
        interval = "·" if np.isnan(low) else f"{low:+.1f} to {high:+.1f}"
        rows.append(
            {
                "criterion": arm,
                "pairs": len(pairs),
                "mean": f"{difference.mean():+.1f}",
                "95 % interval": interval,
            }
        )
    return pd.DataFrame(rows)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of the mean; NaN for fewer than three values."""
    if len(values) < 3:
        return float("nan"), float("nan")
    result = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
