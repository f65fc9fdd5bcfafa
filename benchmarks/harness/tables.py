"""Cells and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from tabulate import tabulate


def github_table(frame: pd.DataFrame) -> str:
    """Return ``frame`` as a Markdown table, the cells as they are."""
    return tabulate(frame, headers="keys", tablefmt="github", showindex=False, disable_numparse=True)


def spread(values: Iterable[float], form: str = "{:.1f}") -> str:
    """Return the mean of ``values``, with the standard deviation where there are several; a dot for none."""
    values = pd.Series(values, dtype=float).dropna()
    if not len(values):
        return "·"
    mean = form.format(values.mean())
    return f"{mean} ± {form.format(values.std())}" if len(values) > 1 else mean
