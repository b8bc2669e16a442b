"""The rooms of the package, their order, and who imports whom; draws `docs/architecture.svg`.

    python scripts/architecture.py

`ORDER` is the one place where the order stands: the picture shows it, and tests/test_layers.py
holds every import to it.
"""

from __future__ import annotations

import ast
import html
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rmipo_lite"
PICTURE = ROOT / "docs" / "architecture.svg"

# From the first room to the last. A room imports from those before its own; two in one line not
# from each other. `version` stands apart: a number that everybody may read.
ORDER: tuple[tuple[str, ...], ...] = (
    ("version",),
    ("system",),
    ("ops", "output"),
    ("methods", "parallel"),
    ("options",),
    ("config",),
    ("adapters", "data"),
    ("checkpoints",),
    ("tokens",),
    ("model",),
    ("planning",),
    ("step", "watch", "export"),
    ("training",),
    ("judging", "inspection"),
    ("results",),
    ("run", "environment"),
    ("comparing",),
    ("__init__",),
    ("demo",),
    ("selftest",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


@dataclass(frozen=True)
class Import:
    """One name that a file imports from another file of the package.

    Attributes:
        by, of: dotted modules.
        name: what is imported of it; empty for the module itself.
    """

    by: str
    of: str
    name: str = ""


@dataclass
class Module:
    """What a file says of its imports.

    Attributes:
        name: dotted, a room's `__init__` as the room.
        imports: all of them: at the top, in functions and for type checkers alone.
        private_uses: `module._name` of modules that it imports.
        named: the files that a room's `__init__` names in `__all__`.
    """

    name: str
    imports: list[Import] = field(default_factory=list)
    private_uses: list[Import] = field(default_factory=list)
    named: set[str] = field(default_factory=set)


def room_of(module: str) -> str:
    """The room of a dotted module; the landing's files are rooms of their own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """Dotted module -> source of every file of the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def read(texts: dict[str, str]) -> list[Module]:
    """The modules of these sources."""
    return [_read_one(name, text, set(texts)) for name, text in texts.items()]


def _read_one(name: str, text: str, known: set[str]) -> Module:
    module = Module(name)
    modules_by_variable: dict[str, str] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        for of, imported, variable in _imported(node, known):
            module.imports.append(Import(name, of, imported))
            if not imported:
                modules_by_variable[variable] = of
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            module.named = set(ast.literal_eval(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = modules_by_variable.get(node.value.id)
            if owner is not None and _is_private(node.attr):
                module.private_uses.append(Import(name, owner, node.attr))
    return module


def _imported(node: ast.AST, known: set[str]) -> Iterator[tuple[str, str, str]]:
    """(module, name in it or "", variable) of everything that a statement imports of us."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name in known:
                yield alias.name, "", alias.asname or alias.name
    elif isinstance(node, ast.ImportFrom) and (node.module or "") in known:
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            if inside in known:
                yield inside, "", alias.asname or alias.name
            else:
                yield str(node.module), alias.name, ""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def violations(modules: list[Module]) -> list[str]:
    """Everything that breaks the order, in a line each."""
    by_name = {module.name: module for module in modules}
    found = []
    for module in modules:
        here = room_of(module.name)
        if here not in FLOOR:
            found.append(f"{module.name} is in no room of the order")
            continue
        for imported in module.imports:
            there = room_of(imported.of)
            if there == here:
                continue
            if FLOOR.get(there, len(ORDER)) >= FLOOR[here]:
                found.append(f"{module.name} imports upward: {imported.of} {imported.name}".strip())
            parts = imported.of.split(".")
            face = by_name.get(".".join(parts[:2]))
            if len(parts) > 2 and (face is None or parts[2] not in face.named):
                found.append(f"{module.name} imports {imported.of}, which its room doesn't name")
        for use in (*module.imports, *module.private_uses):
            if _is_private(use.name) and room_of(use.of) != here:
                found.append(f"{module.name} takes the private {use.of}.{use.name}")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(modules)]


def circles(modules: list[Module]) -> list[list[str]]:
    """Circles among files, each from its first name round to it again."""
    edges = {m.name: sorted({i.of for i in m.imports} - {m.name}) for m in modules}
    state: dict[str, int] = {}
    path: list[str] = []
    found = []

    def walk(name: str) -> None:
        state[name] = 1
        path.append(name)
        for other in edges.get(name, []):
            if state.get(other) == 1:
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                walk(other)
        path.pop()
        state[name] = 2

    for name in edges:
        if name not in state:
            walk(name)
    return found


# ---- the picture ----------------------------------------------------------------------------

_WIDTH, _ROW, _BOX, _LEFT = 1080, 76, (370, 58), 130
_STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1b1f24 } .small { font-size: 11.5px; fill: #57606a }
rect { fill: #eef3f8; stroke: #9fb3c8 } path { fill: none; stroke: #6b86a3; stroke-opacity: .45 }
svg { background: #fff }
@media (prefers-color-scheme: dark) {
  svg { background: #14171a } text { fill: #e3e7eb } .small { fill: #9aa5b1 }
  rect { fill: #223040; stroke: #4d6580 } path { stroke: #8fb0d0 }
}
"""


def picture(modules: list[Module]) -> str:
    """The rooms from the first (top) to the last, with a bow from each to what it imports."""
    arrows = {
        (room_of(imported.by), room_of(imported.of))
        for module in modules
        for imported in module.imports
        if room_of(imported.of) not in (room_of(imported.by), "version")
    }
    rows = ORDER[1:]
    boxes = {
        room: (_LEFT + 460 * column, 20 + _ROW * floor)
        for floor, rooms in enumerate(rows)
        for column, room in enumerate(rooms)
    }
    lines = [_arrow(boxes[a], boxes[b]) for a, b in sorted(arrows)]
    for room, (x, y) in boxes.items():
        lines.append(f'<rect x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" rx="6"/>')
        lines.append(f'<text x="{x + 12}" y="{y + 19}">{room}</text>')
        for place, line in enumerate(_about(room)):
            lines.append(
                f'<text class="small" x="{x + 12}" y="{y + 34 + 14 * place}">{line}</text>'
            )
    height = 20 + _ROW * len(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="The rooms of rmipo_lite and their imports">'
        f"<style>{_STYLE}</style>{''.join(lines)}</svg>\n"
    )


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From the importing room up to the imported: a bow outside a column, a line between two."""
    (width, height), (x0, y0), (x1, y1) = _BOX, start, end
    y0, y1 = y0 + height // 2, y1 + height // 2
    if x0 != x1:
        a, b = (x0 + width, x1) if x0 < x1 else (x0, x1 + width)
        middle = (a + b) // 2
        return f'<path d="M{a} {y0} C{middle} {y0} {middle} {y1} {b} {y1}"/>'
    is_left = x0 == _LEFT
    edge = x0 if is_left else x0 + width
    reach = 14 + 1.9 * (abs(y0 - y1) / _ROW) ** 1.6
    bow = round(edge - reach if is_left else edge + reach)
    return f'<path d="M{edge} {y0} C{bow} {y0} {bow} {y1} {edge} {y1}"/>'


def _about(room: str) -> list[str]:
    """The first sentence of a room's docstring, in two lines at most."""
    path = PACKAGE / room / "__init__.py"
    text = path if path.is_file() else PACKAGE / f"{room}.py"
    doc = ast.get_docstring(ast.parse(text.read_text(encoding="utf-8"))) or ""
    sentence = html.escape(" ".join(doc.partition("\n\n")[0].split()))
    return textwrap.wrap(sentence, 56)[:2]


if __name__ == "__main__":
    PICTURE.write_text(picture(read(sources())), encoding="utf-8")
