"""``report``: one finished run, or several side by side, from their records alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .config import ReportConfig
from .errors import UsageError

PHASES = {"unpruned": "unpruned", "pruned": "pruned", "bn": "BN re-estimated", "finetuned": "fine-tuned"}
"""The phases of a run, and what they are called."""


def run(config: ReportConfig) -> None:
    """Print the report of a run, or write and print the table of several.

    Raises:
        UsageError: There is no finished run.
    """
    folder = config.directory
    if (folder / "results.json").is_file():
        print((folder / "report.md").read_text())
        return
    finished = read_runs(folder)
    if not finished:
        raise UsageError(f"no finished run in {folder}; give the --out folder of a prune, or a folder of several")
    text = markdown(finished)
    (folder / "report.md").write_text(text)
    print(text)


def read_runs(directory: Path) -> list[dict[str, Any]]:
    """Return one record per finished run in the folders of ``directory``, none if there are none.

    Keys: the folder's name (``run``), the run's title, importance, whether it was compensated, epochs of training
    before it was pruned, seed, sizes as fractions, and the quality after each phase in per cent, ``None`` where
    there was none.
    """
    return [_record(path.parent) for path in sorted(directory.glob("*/results.json"))]


def _record(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "results.json").read_text())
    settings = json.loads((folder / "config.json").read_text())["identity"]
    record = {"run": folder.name, "title": result["title"], "importance": result["importance"]}
    record |= {"compensated": bool(result["compensation"])}
    record |= {name: settings[name] for name in ("train_epochs", "seed")}
    record |= {size: round(result["plan"][size], 4) for size in ("macs_fraction", "params_fraction")}
    quality = result["quality"]
    return record | {p: round(100 * quality[p], 2) if p in quality else None for p in PHASES}


def markdown(finished: list[dict[str, Any]]) -> str:
    """Return a table for each title: a row per importance, mean and standard deviation over its runs."""
    phases = [phase for phase in PHASES if any(record[phase] is not None for record in finished)]
    parts = []
    for title in dict.fromkeys(record["title"] for record in finished):
        rows: dict[str, list[dict[str, Any]]] = {}
        for record in finished:
            if record["title"] == title:
                rows.setdefault(_arm(record), []).append(record)
        head = ["importance", "runs", "MACs left (%)", *(PHASES[phase] for phase in phases)]
        cells = [
            [arm, len(same), spread(100 * r["macs_fraction"] for r in same)]
            + [spread(r[phase] for r in same) for phase in phases]
            for arm, same in sorted(rows.items())
        ]
        parts.append(f"## {title}\n\n{tabulate(cells, head, tablefmt='github', disable_numparse=True)}\n")
    return "\n".join(parts)


def _arm(record: dict[str, Any]) -> str:
    text = record["importance"] + " + compensation" * record["compensated"]
    return text + (f", epochs of training before: {record['train_epochs']}" if record["train_epochs"] else "")


def spread(values: Iterable[float | None], form: str = "{:.1f}") -> str:
    """Return the mean of ``values``, with the standard deviation where there are several; a dot for none.

    Example:
        >>> spread([1.0, 2.0, None]), spread([])
        ('1.5 ± 0.7', '·')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "·"
    mean = form.format(statistics.mean(known))
    return f"{mean} ± {form.format(statistics.stdev(known))}" if len(known) > 1 else mean
