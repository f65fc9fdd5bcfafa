"""What the analyses share: their flags, one JSON per row, and the table, CSV and figure made of the rows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness.cells import environment, read_finished, write_json
from benchmarks.models.checkpoints import fingerprint
from benchmarks.tasks import Task, TaskConfig


@dataclass(frozen=True)
class AnalysisConfig(TaskConfig):
    """Flags of every analysis."""

    out: Path = Path("runs/paper")
    """Folder of the results; a second run only adds what is missing."""


@dataclass(frozen=True)
class Rows:
    """The rows of one analysis of one network, each in its JSON file.

    Args:
        folder: Where they lie, and the table, CSV and figure beside them.
        common: Configuration that all rows share; a row of another one is refused.
    """

    folder: Path
    common: dict

    @classmethod
    def of(cls, config: AnalysisConfig, task: Task, analysis: str, **common) -> Rows:
        """Return the rows of ``analysis`` for the network of ``task`` under ``config.out``."""
        common |= {"task": task.name, "model": task.model_name, "weights": fingerprint(task.model)}
        common |= {"batch_size": config.batch_size, "train_images": len(task.train)}
        model = task.model_name.replace("/", "_")
        return cls(config.out / f"{analysis}-{task.name}-{model}", common)

    def missing(self, varied: Iterable[dict]) -> list[dict]:
        """Return those of ``varied`` that have no finished row yet.

        Raises:
            UsageError: A row was made with another configuration.
        """
        return [row for row in varied if not read_finished(self._path(row), self.common | row)]

    def write(self, varied: dict, values: dict) -> None:
        """Write a row: what was varied, and the values found."""
        record = {"config": self.common | varied, "status": "ok", "values": values}
        write_json(self._path(varied), record | {"environment": environment()})

    def read(self) -> pd.DataFrame:
        """Return all rows, what was varied beside the values; parts of a row's name sort it."""
        records = [json.loads(path.read_text()) for path in sorted(self.folder.glob("rows/*.json"))]
        return pd.DataFrame(
            [
                {k: v for k, v in record["config"].items() if k not in self.common} | record["values"]
                for record in records
            ]
        )

    def publish(self, frame: pd.DataFrame, text: str, figure: Figure, name: str) -> None:
        """Write ``name.md``, ``name.csv`` and ``name.png`` into the folder, and print the text."""
        frame.to_csv(self.folder / f"{name}.csv", index=False, float_format="%.6g")
        (self.folder / f"{name}.md").write_text(f"{text.rstrip()}\n\n![{name}]({name}.png)\n")
        save_png(figure, self.folder / f"{name}.png")
        print(text)
        print(f"wrote {name}.md, {name}.csv and {name}.png in {self.folder}")

    def _path(self, varied: dict) -> Path:
        parts = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in varied.items() if v is not None)
        return self.folder / "rows" / f"{'__'.join(parts).replace('/', '_')}.json"


def save_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` with a palette of 200 colours: a quarter of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(200).save(path, optimize=True)
