"""Draw the rooms of the package from their imports: a Mermaid flowchart, floor by floor.

An arrow goes from a room to one that it imports; what other arrows imply is left out. Floors are those that
tests/test_packaging.py declares. `python docs/draw_rooms.py` prints the drawing; --write puts it into ARCHITECTURE.md.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PAGE = ROOT / "src" / "bozzetto", ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- rooms -->\n", "<!-- /rooms -->\n"  # around the drawing on the page


def floors() -> dict[str, int]:
    """Floor by room."""
    tree = ast.parse((ROOT / "tests" / "test_packaging.py").read_text(encoding="utf-8"))
    tables = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FLOORS"]
    return dict(ast.literal_eval(tables[0]))


def imports(rooms: set[str]) -> dict[str, set[str]]:
    """Rooms that each room imports, anywhere in its files."""
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            parts = [name.split(".") for name in names if name.split(".")[0] == "bozzetto"]
            found[here] |= {p[1] if len(p) > 1 and p[1] in rooms else "__init__" for p in parts} - {here}
    return found


def drawing() -> str:
    """The flowchart, as a block of Markdown."""
    floor = floors()
    uses, reach = imports(set(floor)), dict[str, set[str]]()
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted(floor, key=floor.__getitem__):  # what is imported comes first
        reach[room] = uses[room].union(*(reach[other] for other in uses[room]))
    for number in sorted(set(floor.values()), reverse=True):
        rooms = [room for room in floor if floor[room] == number]
        names = "; ".join(f'{r.strip("_")}["{r}{"/" if (PACKAGE / r).is_dir() else ".py"}"]' for r in rooms)
        lines.append(f'  subgraph floor{number} ["{number}"]; {names}; end')
    for room in reversed(reach):
        if needed := uses[room].difference(*(reach[other] for other in uses[room])):
            lines.append(f"  {room.strip('_')} --> {' & '.join(r.strip('_') for r in floor if r in needed)}")
    return "\n".join([*lines, "```"]) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + drawing() + END + rest.split(END)[1], encoding="utf-8")
    print(drawing(), end="")
