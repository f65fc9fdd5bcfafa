"""Draw which room imports which: ``python docs/tools/rooms.py`` writes the drawing into CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ippro_tp"
PLAIN = ("__init__", "__main__", "errors", "records", "layers")  # single modules that every room may use


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For each room (or single module) of the package, those that it imports, also within functions."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        room = parts[0].removesuffix(".py")
        used = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = parts[: len(parts) - node.level]
                module = (*base, *(node.module or "").split("."))
                names = [module[0]] if module[0] else [alias.name for alias in node.names]
                used.update(name for name in names if name != room)
    return found


def order(graph: dict[str, set[str]]) -> list[str]:
    """Rooms, each after those that it imports.

    Raises:
        ValueError: arrows run in a circle; the message names them.
    """
    done: list[str] = []
    while len(done) < len(graph):
        free = [room for room in graph if room not in done and graph[room] <= set(done)]
        if not free:
            raise ValueError(
                f"imports run in a circle: { ({r: sorted(u) for r, u in graph.items() if r not in done}) }"
            )
        done += free
    return done


def mermaid(graph: dict[str, set[str]]) -> str:
    """The drawing; arrows that follow from others are left out, and so are the single modules."""
    rooms = {room: {u for u in used if u not in PLAIN} for room, used in graph.items() if room not in PLAIN}

    def reached(room: str) -> set[str]:
        return rooms[room].union(*(reached(used) for used in rooms[room])) if rooms[room] else set()

    lines = ["```mermaid", "graph TD"]
    for room in sorted(rooms):
        implied = set().union(*(reached(used) for used in rooms[room]))
        lines += [f"  {room} --> {used}" for used in sorted(rooms[room] - implied)]
    return "\n".join([*lines, "```"])


def main() -> None:
    """Replace the drawing in CONTRIBUTING.md."""
    graph = imports()
    order(graph)
    page = ROOT / "CONTRIBUTING.md"
    text = re.sub(r"```mermaid\n.*?```", mermaid(graph), page.read_text(encoding="utf-8"), flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
