"""``python -m benchmarks product-table``: the rows of product CSVs as Markdown, means over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.errors import UsageError
from benchmarks.harness.tables import spread

VALUES = ("accuracy", "among", "agreement", "other")


@dataclass(frozen=True)
class ProductTableConfig:
    """Print what ``product`` wrote as a table."""

    rows: tuple[Path, ...]
    """Files of ``product``."""
    values: tuple[str, ...] = ("accuracy",)
    """Any of accuracy, among, agreement, other."""


def run(config: ProductTableConfig) -> None:
    """Print one table per network."""
    for value in config.values:
        if value not in VALUES:
            raise UsageError(f"unknown value {value!r}; known: {', '.join(VALUES)}")
    table = pd.concat([pd.read_csv(path) for path in config.rows])
    for model in dict.fromkeys(table.model):
        print(markdown(table[table.model == model], config.values))


def markdown(rows: pd.DataFrame, values: tuple[str, ...]) -> str:
    """One line per importance, refit, scope and calibration; a column per target; values are joined by slashes."""
    unpruned = rows[rows.importance == "none"].iloc[0]
    pruned = rows[(rows.importance != "none") & (rows.status == "ok")]
    targets = sorted(pruned.target.unique(), reverse=True)
    names = ["importance", "refit", "scope", "calibration"]
    lines = [
        f"{unpruned.model}: {' / '.join(values)}; unpruned {_joined([unpruned[v] for v in values])}",
        "",
        f"| {' | '.join(names)} | seeds | {' | '.join(f'MACs {t:g}' for t in targets)} |",
        f"|{'---|' * (len(names) + 1 + len(targets))}",
    ]
    for key, group in pruned.groupby(names, sort=False):
        cells = []
        for target in targets:
            found = group[group.target == target]
            cells.append(" / ".join(spread(found[v]) for v in values) if len(found) else "")
        lines.append(f"| {' | '.join(key)} | {group.seed.nunique()} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _joined(values: list[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)
