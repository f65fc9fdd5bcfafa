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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [leaf for target in node.targets for leaf in ast.walk(target) if isinstance(leaf, ast.expr)]
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def attributes(tree: ast.ClassDef) -> set[str]:
    """Names that the methods of a class set on ``self``, and fields of a dataclass."""
    names = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and _is_name(node.target)}
    for node in ast.walk(tree):
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and _is_name(target.value, "self"):
                names.add(target.attr)
    return names


def _is_name(node: ast.expr, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and name in (None, node.id)


def test_attributes_are_counted():
    body = "self.a, other.b = 1, 2; self.c += self.d; self.e: int = 0"
    code = f"class A:\n  x: int = 0\n  def f(self):\n    {body}"
    assert attributes(ast.parse(code).body[0]) == {"x", "a", "c", "e"}


FLAGS = {"PruneRunConfig"}
"""The flags of a command: one attribute each."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_classes_hold_little(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name not in FLAGS:
            assert len(attributes(node)) <= 20, f"{node.name}: {sorted(attributes(node))}"
