"""The pure rooms know neither Torch-Pruning nor how a model is watched, and importance is in small parts."""

import ast
from pathlib import Path

import pytest

import ippro_tp

ROOT = Path(ippro_tp.__file__).parent
PURE = ("estimators", "records.py", "layers.py", "errors.py")
FORBIDDEN = {"torch_pruning", "tracing", "graph", "calibration", "importance", "compensation", "pruning", "cli"}


def imported(path):
    """Names that a module imports: of packages, and of rooms of this one."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*base, node.module or ""))


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_neither_torch_pruning_nor_rooms_below(room):
    files = sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / room]
    assert files
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            top = parts[1] if parts[0] == "ippro_tp" and len(parts) > 1 else parts[0]
            assert top not in FORBIDDEN, f"{path.name} imports {name}"


def test_importance_is_in_small_parts():
    for path in (ROOT / "importance").glob("*.py"):
        assert len(path.read_text().splitlines()) < 400, path.name
