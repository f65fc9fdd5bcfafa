"""Each private thing of Torch-Pruning that the package uses is there, and none is used that is not named here."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from torch import nn

import ippro_tp

PACKAGE = Path(ippro_tp.__file__).parent
THEIRS = Path(tp.__file__).parent

CONTRACT: dict[type, set[str]] = {
    tp.DependencyGraph: {"_module2name", "_param_to_name", "_pruning_history"},
    tp.dependency.Group: {"_DG", "_group"},
    tp.pruner.BasePruner: {
        "_check_pruning_ratio",
        "_downstream_node_as_root_if_attention",
        "_get_channel_groups",
        "_is_atten_group",
        "_layer_to_scope",
        "_round_to",
        "_scope_initial_channels",
    },
    tp.pruner.BasePruningFunc: {"_prune_parameter_and_grad"},
    tp.importance.GroupMagnitudeImportance: {"_normalize"},
}
"""Private names of Torch-Pruning by the class whose instances have them."""


def _modules(package: object) -> Iterator[object]:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(found.name)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.AST) -> set[str]:
    """Private functions, classes, variables and attributes of ``self`` that a piece of code defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if _is_private(name)}


@cache
def theirs() -> frozenset[str]:
    """All private names that Torch-Pruning defines."""
    trees = [ast.parse(file.read_text()) for file in THEIRS.rglob("*.py")]
    return frozenset(set().union(*map(_defined, trees)) - {"_"} - set(dir(nn.Module())))


@cache
def _inherited(cls: type) -> set[str]:
    """Private names that a class has from Torch-Pruning."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("torch_pruning")]
    return set().union(*(_defined(ast.parse(inspect.getsource(base))) for base in bases)) if bases else set()


@cache
def used() -> dict[str, set[str]]:
    """Private names of Torch-Pruning that the package reads, calls or overrides, and where."""
    found: dict[str, set[str]] = {}
    for module in _modules(ippro_tp):
        file = Path(module.__file__)
        own = {name: cls for name, cls in vars(module).items() if isinstance(cls, type)}

        def note(name: str, node: ast.AST, place: str = file.relative_to(PACKAGE).as_posix()) -> None:
            found.setdefault(name, set()).add(f"{place}:{node.lineno}")

        tree = ast.parse(file.read_text())
        ours = {id(node): set() for node in ast.walk(tree)}  # what the class around a node has from Torch-Pruning
        for outer in ast.walk(tree):
            if isinstance(outer, ast.ClassDef) and outer.name in own:
                for node in ast.walk(outer):
                    ours[id(node)] |= _inherited(own[outer.name])
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in ours[id(node)]:
                note(node.name, node)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in theirs():
                note(node.value, node)
            if isinstance(node, ast.Attribute) and node.attr in theirs():
                on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if not on_self or node.attr in ours[id(node)]:
                    note(node.attr, node)
    return found


def _instance(cls: type) -> object:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    importance = tp.importance.GroupMagnitudeImportance()
    pruner = tp.pruner.BasePruner(model, torch.randn(1, 3, 8, 8), importance, pruning_ratio=0.5)
    group = next(pruner.DG.get_all_groups())
    function = pruner.DG.get_pruner_of_module(model[0])
    return next(each for each in (pruner.DG, group, pruner, function, importance) if isinstance(each, cls))


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls, names in CONTRACT.items() for name in sorted(names)]
)
def test_torch_pruning_has_it(cls: type, name: str) -> None:
    assert hasattr(_instance(cls), name)


def test_all_that_is_used_is_named() -> None:
    named = set().union(*CONTRACT.values())
    assert {name: places for name, places in used().items() if name not in named} == {}


def test_all_that_is_named_is_used() -> None:
    assert set().union(*CONTRACT.values()) - used().keys() == set()
