"""A hook of mkdocs: the pages and pictures of ``benchmarks/results`` are part of the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each page and each picture under ``results/``."""
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".md", ".png", ".csv"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
