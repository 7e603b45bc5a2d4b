"""Rooms of the package, from the import contract and the imports: the drawing and the tables of `architecture.md`."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp
from importlinter import api

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_flashinfer_attn"
BASE = "base"
BASE_TITLE = "Settings, errors, log lines and traces."
WIDTH, MARGIN, GUTTER, GAP, LINE = 960, 20, 26, 30, 17


@dataclass(frozen=True)
class Room:
    """A package of files, or the files on the lowest floor.

    Args:
        name: Name of the package; `BASE` for the lowest floor.
        title: First line of its docstring.
        files: First line of each file's docstring, by path from the repository's root.
        imports: Names of the rooms that it imports, from the top down.
    """

    name: str
    title: str
    files: dict[str, str]
    imports: tuple[str, ...]


def floors() -> list[list[Room]]:
    """Returns the rooms of each floor, from the top down."""
    contract = api.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"][0]
    names = [layer.split(" | ") for layer in contract["layers"]]
    names[-1] = [BASE]
    order = [name for floor in names for name in floor]
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    files: dict[str, dict[str, str]] = {name: {} for name in order}
    imported: dict[str, set[str]] = {name: set() for name in order}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        room = parts[0] if len(parts) > 1 else BASE
        if path.name not in ("__init__.py", "__main__.py"):
            files[room][path.relative_to(ROOT).as_posix()] = _first_line(path)
            targets = graph.find_modules_directly_imported_by(".".join((PACKAGE, *parts)))
            imported[room] |= {_room_of(target, order) for target in targets} - {room}
    return [
        [
            Room(name, _title(name), files[name], tuple(other for other in order if other in imported[name]))
            for name in floor
        ]
        for floor in names
    ]


def _room_of(module: str, order: list[str]) -> str:
    part = f"{module}.".split(".")[1]
    return part if part in order else BASE


def _title(room: str) -> str:
    return BASE_TITLE if room == BASE else _first_line(ROOT / PACKAGE / room / "__init__.py")


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if text is None:
        raise ValueError(f"{path} has no docstring; expected one line that says what the file owns.")
    return text.partition("\n")[0]


def tables(rooms: list[list[Room]]) -> str:
    """Returns one table of files for each room, as Markdown."""
    lines: list[str] = []
    for room in (room for floor in rooms for room in floor):
        lines += [f"### {room.name}", "", f"{room.title} {_imports(room)}", "", "| file | what it owns |", "|---|---|"]
        for path, owns in room.files.items():
            name = path.removeprefix(f"{PACKAGE}/").removeprefix(f"{room.name}/")
            lines.append(f"| [{name}](../{path}) | {owns.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _imports(room: Room) -> str:
    return f"Imports {', '.join(room.imports)}." if room.imports else "Imports no other room."


def arrows(rooms: list[list[Room]]) -> list[tuple[str, str]]:
    """Returns the imports between rooms, without those that others imply."""
    imports = {room.name: set(room.imports) for floor in rooms for room in floor}

    def reached(name: str) -> set[str]:
        return set().union(*({one} | reached(one) for one in imports[name]))

    return [
        (name, target)
        for name, targets in imports.items()
        for target in sorted(targets)
        if not any(target in reached(other) for other in targets - {target})
    ]


@dataclass(frozen=True)
class _Box:
    room: Room
    floor: int
    left: float
    top: float
    width: float
    lines: list[str]

    @property
    def height(self) -> float:
        return 42 + LINE * len(self.lines) + 10

    @property
    def bottom(self) -> float:
        return self.top + self.height


def drawing(rooms: list[list[Room]]) -> str:
    """Returns the floors as SVG: a box for each room with its files, an arrow for each import."""
    boxes: dict[str, _Box] = {}
    top = float(MARGIN)
    for floor, row in enumerate(rooms):
        width = (WIDTH - 2 * MARGIN - 2 * GUTTER - GAP * (len(row) - 1)) / len(row)
        made = []
        for place, room in enumerate(row):
            # A package inside a room is one name.
            depth = 1 if room.name == BASE else 2
            shown = dict.fromkeys(path.split("/")[depth].removesuffix(".py") for path in room.files)
            lines = textwrap.wrap(", ".join(shown), int((width - 24) / 7.3), break_on_hyphens=False)
            made.append(_Box(room, floor, MARGIN + GUTTER + place * (width + GAP), top, width, lines))
        boxes.update({box.room.name: box for box in made})
        top = max(box.bottom for box in made) + GAP
    height = top - GAP + MARGIN
    parts = [*_boxes(boxes), *_lines(boxes, arrows(rooms))]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">',
            "  <!-- Made by `python -m docs.make_pages`. -->",
            "  <title>The rooms of the package: imports go down only</title>",
            '  <defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="#555"/></marker></defs>',
            f'  <rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
            *(f"  {part}" for part in parts),
            "</svg>\n",
        ]
    )


def _boxes(boxes: dict[str, _Box]) -> Iterator[str]:
    for box in boxes.values():
        left = box.left + 12
        yield (
            f'<rect x="{box.left:.0f}" y="{box.top:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="5" '
            'fill="#f6f8fa" stroke="#99a"/>'
        )
        yield f'<text x="{left:.0f}" y="{box.top + 20:.0f}" font-size="15" font-weight="bold">{box.room.name}</text>'
        title = textwrap.shorten(box.room.title, int((box.width - 24) / 5.8), placeholder=" ...")
        yield f'<text x="{left:.0f}" y="{box.top + 37:.0f}" fill="#555" font-size="12">{escape(title)}</text>'
        for number, line in enumerate(box.lines):
            y = box.top + 42 + LINE * (number + 0.8)
            yield f'<text x="{left:.0f}" y="{y:.0f}" font-family="monospace" font-size="12">{escape(line)}</text>'


def _lines(boxes: dict[str, _Box], pairs: list[tuple[str, str]]) -> Iterator[str]:
    for source, target in ((boxes[one], boxes[other]) for one, other in pairs):
        if target.floor - source.floor == 1:
            left = max(source.left, target.left)
            right = min(source.left + source.width, target.left + target.width)
            x = (left + right) / 2
            path = f"M{x:.0f},{source.bottom:.0f} V{target.top - 1:.0f}"
        else:
            # Around the floors between, on the side where the target is.
            is_left = target.left + target.width < WIDTH - MARGIN - GUTTER - 1
            edge, away = (target.left, -GUTTER) if is_left else (target.left + target.width, GUTTER)
            start, end = source.top + source.height / 2, target.top + target.height / 2
            side = source.left if is_left else source.left + source.width
            path = f"M{side:.0f},{start:.0f} H{edge + away:.0f} V{end:.0f} H{edge + (1 if away > 0 else -1):.0f}"
        yield f'<path d="{path}" stroke="#555" stroke-width="1.3" fill="none" marker-end="url(#arrow)"/>'
