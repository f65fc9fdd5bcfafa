"""The registry of what operations do to channels; :mod:`.moves`, :mod:`.meetings` and others fill it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .provenance import Provenance

Rule = Callable[["Provenance", Any, Any, Any], Any]
RULES: dict[str, Rule] = {}
READERS: set[str] = set()
"""Operations whose rule asks which elements are of channels that remain."""


def rule(*names: str, reads: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operations of ``torch.ops.aten``; with ``reads`` it leaves out removed channels."""

    def register(made: Rule) -> Rule:
        for name in names:
            RULES[name] = made
        if reads:
            READERS.update(names)
        return made

    return register
