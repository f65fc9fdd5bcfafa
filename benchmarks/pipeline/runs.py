"""Several ``prune`` runs side by side, from their records alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.harness.tables import github_table, spread
from benchmarks.pipeline.figures import PHASES


def read_runs(directory: Path) -> pd.DataFrame:
    """Return one row per finished run in the folders of ``directory``, none if there are none.

    Columns: the folder's name, the run's title, importance, whether it was compensated, epochs of training before
    it was pruned, seed, sizes as fractions, and the quality after each phase in per cent.
    """
    return pd.DataFrame([_row(path.parent) for path in sorted(directory.glob("*/results.json"))])


def _row(folder: Path) -> dict:
    result = json.loads((folder / "results.json").read_text())
    settings = json.loads((folder / "config.json").read_text())["identity"]
    row = {"run": folder.name, "title": result["title"], "importance": result["importance"]}
    row |= {"compensated": bool(result["compensation"])}
    row |= {name: settings[name] for name in ("train_epochs", "seed")}
    row |= {size: round(result["plan"][size], 4) for size in ("macs_fraction", "params_fraction")}
    return row | {p: round(100 * result["quality"].get(p, np.nan), 2) for p in PHASES}


def markdown(finished: pd.DataFrame) -> str:
    """Return a table for each title: a row per importance, mean and standard deviation over its runs."""
    parts = []
    phases = [phase for phase in PHASES if finished[phase].notna().any()]
    for title, part in finished.groupby("title", sort=False):
        rows = []
        for (importance, compensated, trained), same in part.groupby(
            ["importance", "compensated", "train_epochs"]
        ):
            arm = importance + " + compensation" * compensated
            arm += f", epochs of training before: {trained}" if trained else ""
            row = {"importance": arm, "runs": len(same), "MACs left (%)": spread(100 * same.macs_fraction)}
            rows.append(row | {PHASES[phase]: spread(same[phase]) for phase in phases})
        parts.append(f"## {title}\n\n{github_table(pd.DataFrame(rows))}\n")
    return "\n".join(parts)
