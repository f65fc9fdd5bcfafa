"""The package keeps its shape: rooms, arrows, sizes."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ippro_tp"
MODULES = sorted(PACKAGE.rglob("*.py"))


def tool():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "tools" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_arrow_runs_back():
    graph = tool().imports()
    assert set(tool().order(graph)) == set(graph)


def test_a_circle_is_found():
    with pytest.raises(ValueError, match="circle"):
        tool().order({"a": {"b"}, "b": {"a"}})


def test_the_drawing_is_true():
    assert tool().mermaid(tool().imports()) in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_estimators_are_pure():
    allowed = {"errors", "records", "layers"}
    assert tool().imports()["estimators"] <= allowed
    for path in (PACKAGE / "estimators").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("torch_pruning") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("torch_pruning"), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_owns(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring.splitlines()[0]) > 10
