"""An extension of griffe: references and formulas of docstrings, written for Sphinx, as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

import ippro_tp


def markdown(text: str) -> str:
    """``text`` with roles and formulas as Markdown; names of the interface become links.

    Example:
        >>> markdown(r"see :func:`~ippro_tp.prune` and :meth:`observe`, with :math:`x^2`")
        'see [`prune`][ippro_tp.prune] and `observe`, with $x^2$'
    """
    text = re.sub(r"^\.\. math:: (.*(?:\n[ ]+\S.*)*)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", lambda found: f"${' '.join(found[1].split())}$", text)
    return re.sub(r":(?:class|func|meth|mod|attr|data):`~?\.*([^`]+)`", _link, text)


def _block(found: re.Match[str]) -> str:
    return f"$$\n{' '.join(found[1].split())}\n$$"


def _link(found: re.Match[str]) -> str:
    name = found[1].rpartition(".")[2]
    return f"[`{name}`][ippro_tp.{name}]" if name in ippro_tp.__all__ else f"`{name}`"


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
