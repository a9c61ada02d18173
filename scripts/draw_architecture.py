"""Write the picture of `docs/architecture.md`: rooms of `src/qtarget` and what they import, from the imports themselves.

    python scripts/draw_architecture.py

An arrow that other arrows imply is left out, so that the picture shows the shortest way down.
"""

from __future__ import annotations

from pathlib import Path

import grimp

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- picture: scripts/draw_architecture.py -->\n", "<!-- end of picture -->\n"
FACE = ("qtarget.api", "qtarget.registry")
"""Two files that are one room: the public face."""


def room(module: str) -> str:
    """The room that a module lives in: the first folder below ``qtarget``, or the public face."""
    return "face" if module in FACE else module.split(".")[1]


def arrows() -> dict[str, set[str]]:
    """Which rooms each room imports; imports for type checkers alone do not count."""
    graph = grimp.build_graph("qtarget", exclude_type_checking_imports=True)
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"qtarget"}:
        imported = {room(m) for m in graph.find_modules_directly_imported_by(module) if m != "qtarget"}
        found.setdefault(room(module), set()).update(imported - {room(module)})
    return found


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Rooms that can be reached from ``start`` in at least one step."""
    return graph[start].union(*(reachable(graph, below) for below in graph[start])) if graph[start] else set()


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way implies."""
    return {
        a: {b for b in below if not any(b in reachable(graph, c) for c in below - {b})} for a, below in graph.items()
    }


def mermaid() -> str:
    """The picture, as GitHub and mkdocs draw it."""
    names = {"face": "api, registry: the public face"}
    graph = reduced(arrows())
    lines = [
        f'    {a}["{names.get(a, a)}"] --> {b}["{names.get(b, b)}"]' for a in sorted(graph) for b in sorted(graph[a])
    ]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def page_with_picture(page: str) -> str:
    """The page with today's picture in its place."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + mermaid() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page_with_picture(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
