"""Torch-Pruning's own tests, as they are and with PRO in place of its magnitude criterion."""

from __future__ import annotations

from pathlib import Path


def report(checkout: Path) -> str:
    """Run both and compare, in Markdown."""
    raise NotImplementedError(checkout)
