"""``python -m benchmarks robustness``: every line in turn, and the table."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.errors import UsageError
from benchmarks.robustness import (
    nets_calls,
    nets_families,
    nets_hf,
    nets_layers,
    nets_layouts,
    nets_rows,
    nets_vision,
    nets_yolo,
    tp_tests,
)
from benchmarks.robustness.checks import COLUMNS, Checks
from benchmarks.robustness.judge import NONE, OK, REFUSED, WRONG, Cell
from benchmarks.robustness.line import Line

ROOMS = {
    "Rows": (*nets_layouts.LINES, *nets_rows.LINES),
    "Calls": (*nets_calls.LINES, *nets_layers.LINES),
    "Families": (*nets_yolo.LINES, *nets_families.LINES),
    "Vision": nets_vision.LINES,
    "HF": nets_hf.LINES,
}
LINES: dict[str, Line] = {line.name: line for lines in ROOMS.values() for line in lines}
OWN_TESTS = "## Torch-Pruning's own tests"
VERDICTS = (OK, REFUSED, WRONG)


@dataclasses.dataclass(frozen=True)
class RobustnessConfig:
    """Check kinds of models and calls against slow references."""

    only: tuple[str, ...] = ()
    """Lines to check, or groups of them (Rows, Calls, Families, Vision, HF); all if none is given."""
    out: Path = Path("benchmarks/results")
    """Folder of robustness.md, written where all lines are checked, or some of them are updated."""
    update: bool = False
    """Take the lines that are not checked from the page in that folder, and write it again."""
    resume: Path | None = None
    """File that finished lines are written to and taken from."""
    tp_checkout: Path | None = None
    """A checkout of Torch-Pruning, whose own tests are run with PRO in place of its magnitude."""
    tp_results: Path | None = None
    """Folder that their results are kept in and taken from."""


def run(config: RobustnessConfig) -> None:
    """Check lines, print each as it is done, write the table."""
    names = [name for wanted in config.only for name in _names(wanted)] or list(LINES)
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    if config.resume is not None and config.resume.exists():
        found = json.loads(config.resume.read_text())
    for name in names:
        if name not in found:
            found[name] = checked(LINES[name])
            if config.resume is not None:
                config.resume.write_text(json.dumps(found, indent=1))
        print(f"{name}: " + "; ".join(f"{column} {text}" for column, text in found[name].items()), flush=True)
    file = config.out / "robustness.md"
    before = file.read_text() if config.update else ""
    found = {**cells_of(before), **found}
    if config.update or not config.only:
        config.out.mkdir(parents=True, exist_ok=True)
        _, _, last = before.partition(OWN_TESTS)
        own = tp_tests.report(config.tp_checkout, config.tp_results) if config.tp_checkout else last.strip()
        file.write_text(page(found, own))


def checked(line: Line) -> dict[str, str]:
    """The verdicts of one line and the seconds it took."""
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cells = {column: str(cell) for column, cell in Checks(line).run()}
        except Exception as error:
            cells = {COLUMNS[0]: str(Cell(WRONG, f"{type(error).__name__}: {error}"))}
    return {**cells, "s": f"{time.monotonic() - start:.1f}"}


def cells_of(text: str) -> dict[str, dict[str, str]]:
    """The verdicts by line and column that a page was made of."""
    found: dict[str, dict[str, str]] = {}
    for row in re.findall(r"^\| (.*) \|$", text.partition(OWN_TESTS)[0], re.MULTILINE):
        name, _, *verdicts = row.split(" | ")
        if name in LINES and len(verdicts) == len(COLUMNS) + 1:
            found[name] = dict(zip((*COLUMNS, "s"), verdicts, strict=True))
    for name, columns, note in re.findall(r"^\* \*\*([^*]+)\*\*, ([^:]+): (.*)$", text, re.MULTILINE):
        if name in found:
            found[name] |= dict.fromkeys(columns.split(", "), note.replace("\\|", "|"))
    return {name: cells for name, cells in found.items() if cells["s"] != "not run"}


def page(found: dict[str, dict[str, str]], own_tests: str = "") -> str:
    """The table in Markdown, and what is behind each verdict that is not ok."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    )
    parts = ["# Robustness", INTRODUCTION, f"Made with {versions}."]
    counts = Counter(_verdict(text) for cells in found.values() for name, text in cells.items() if name in COLUMNS)
    parts.append(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS) + f" in {len(found)} lines.")
    if missing := [name for name in LINES if name not in found]:
        parts.append(f"Not run: {', '.join(missing)}.")
    for room, lines in ROOMS.items():
        header = ["line", "kind", *COLUMNS, "s"]
        rows = [header, ["---"] * len(header)]
        notes = []
        for line in lines:
            cells = found.get(line.name, {"s": "not run"})
            rows.append([line.name, line.kind, *(_verdict(cells.get(c, NONE)) for c in COLUMNS), cells["s"]])
            notes += _notes(line.name, cells)
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts += [f"## {room}", table, "\n".join(notes)]
    parts += [OWN_TESTS, own_tests] if own_tests else []
    return "\n\n".join(part for part in parts if part) + "\n"


INTRODUCTION = """`python -m benchmarks robustness`; random weights, one thread, 16 or 32 samples for calibration
and as many fresh ones.

* **scores**: those of all samples at once equal those of batches of one, and with `reference="origin"` those that
  autograd gives one sample at a time, to 0.2 % of a group's highest. Where rows
  belong to no single sample, a refusal is right, or a warning that the batch is the unit: both stand as refused.
* **dead**, **duplicate**, **constant**: channels planted in one layer. A dead one scores nothing; one of two equal
  ones and a constant one go, with `Compensation`, without error on fresh inputs (at borders of padded maps: with
  no more than before).
* **pruned**: 30 % globally in a plain pruner of Torch-Pruning; the net runs and gives what the original gives with
  the removed channels silenced and norms over the remaining ones, to 1e-4.
* **compensation**: output error on fresh inputs in shares of the variance, without → with.
* **saved**: the loaded net gives the same bits.
* **prune()**: `prune(..., macs=0.7)` meets 0.7 by torch's counter, leaves the given model alone, and equals the
  silenced original.

`·`: nothing to check, or Torch-Pruning cannot do it with its own magnitude either."""


def _names(wanted: str) -> list[str]:
    rooms = {room.lower(): [line.name for line in lines] for room, lines in ROOMS.items()}
    if wanted.lower() in rooms:
        return rooms[wanted.lower()]
    if wanted not in LINES:
        raise UsageError(f"no line {wanted!r}; there are {', '.join((*ROOMS, *LINES))}")
    return [wanted]


def _verdict(text: str) -> str:
    return text.split(":")[0]


def _notes(name: str, cells: dict[str, str]) -> list[str]:
    texts: dict[str, list[str]] = {}
    for column, text in cells.items():
        if column in COLUMNS and ": " in text:
            texts.setdefault(text.replace("|", "\\|"), []).append(column)
    return [f"* **{name}**, {', '.join(columns)}: {text}" for text, columns in texts.items()]
