"""Draw the layers from the import graph: ``docs/figures/layers.svg`` and the table in ARCHITECTURE.md.

The order of the layers is what import-linter holds (``[tool.importlinter]`` in pyproject.toml); who imports whom is read
from the sources (grimp). So the picture cannot show what the code does not do, and an import that points upward is an
error here as well. ``--check`` writes nothing and exits 1 if a file on disk differs from what would be written.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from html import escape
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from typing import Any

import grimp
from document import ROOT, publish, with_part

FIGURE = Path("docs/figures/layers.svg")
DOCUMENT = Path("ARCHITECTURE.md")

PACKAGES = {
    "sage_bench": ("L6", "interfaces: the composition root"),
    "sage_live": ("L5", "runtime: asyncio, real engines"),
    "sage_sim": ("L5", "runtime: SimPy, modelled engines"),
    "sage_policies": ("L4", "policies"),
}
FLOORS = (("L3", "kernel"), ("L2", "operators"), ("L1", "contracts"), ("L1", "words"))
"""The floors of ``sage_core``, in the order of its contract in pyproject.toml."""
OPERATORS = "sage_core: operators"


@dataclass(frozen=True)
class Box:
    """One row of the figure: a package, or a floor of the core."""

    layer: str
    name: str
    role: str
    members: tuple[str, ...]  # first-level modules, without the package
    imports: tuple[str, ...]  # names of the boxes it imports from directly, top to bottom


def main() -> int:
    """Write both files, or compare them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    boxes = read(ROOT)
    document = with_part(DOCUMENT, ROOT.joinpath(DOCUMENT).read_text("utf-8"), "layers", table(boxes))
    return publish({FIGURE: figure(boxes), DOCUMENT: document}, check=check)


def read(root: Path) -> list[Box]:
    """Boxes from top to bottom. Raises ``SystemExit`` if a module has no box or imports upward."""
    config = tomllib.loads(root.joinpath("pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    floors = [_members(line) for line in _contract(config, "core")["layers"]]
    _see_sources(root)
    graph = grimp.build_graph(*config["root_packages"], cache_dir=None)

    names = [*PACKAGES, *(f"sage_core: {role}" for _, role in FLOORS)]
    members: dict[str, list[str]] = {name: [] for name in names}
    edges: set[tuple[str, str]] = set()
    for module in sorted(graph.modules):
        source = _box_of(module, floors)
        if source is None:
            continue
        if module.count(".") == 1:
            members[source].append(module.split(".")[1])
        targets = {_box_of(target, floors) for target in graph.find_modules_directly_imported_by(module)}
        # An extension has no Python source, so grimp shows an import of sage_core._native as one of its package. The
        # package itself exports nothing, hence there is no other reason to import it.
        if "sage_core" in graph.find_modules_directly_imported_by(module):
            targets.add(OPERATORS)
        edges |= {(source, target) for target in targets if target is not None and target != source}
    members[OPERATORS].append("_native")

    upward = [f"{source} -> {target}" for source, target in sorted(edges) if names.index(source) > names.index(target)]
    if upward:
        raise SystemExit(f"imports that point upward: {', '.join(upward)}; run `make lint-layers` for the lines")
    labels = [*PACKAGES.values(), *FLOORS]
    return [
        Box(layer, name, role, tuple(sorted(members[name])), tuple(other for other in names if (name, other) in edges))
        for name, (layer, role) in zip(names, labels, strict=True)
    ]


def table(boxes: list[Box]) -> str:
    """Markdown rows, top layer first."""
    rows = [
        f"| {box.layer} | {_title(box)} | {', '.join(f'`{m}`' for m in box.members) or '(nothing yet)'} "
        f"| {', '.join(box.imports) or 'nothing of ours'} |"
        for box in boxes
    ]
    return "\n".join(["| layer | what | modules | imports from |", "|---|---|---|---|", *rows])


def figure(boxes: list[Box]) -> str:
    """SVG: one row a box; each has a lane on the right, with a dot on the arrow into every box that it imports."""
    left, width, lane, gap, line = 14, 520, 15, 14, 15
    wrapped = [textwrap.wrap(", ".join(box.members) or "(nothing yet)", 76, break_long_words=False) for box in boxes]
    heights = [30 + line * len(lines) for lines in wrapped]
    tops = [gap + sum(heights[:row]) + gap * row for row in range(len(boxes))]
    bottom = tops[-1] + heights[-1] + gap
    right = left + width
    rows = {box.name: row for row, box in enumerate(boxes)}

    parts: list[str] = []
    for row, (box, lines) in enumerate(zip(boxes, wrapped, strict=True)):
        y = tops[row]
        parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="{heights[row]}" rx="4" class="{box.layer}"/>')
        parts.append(f'<text x="{left + 10}" y="{y + 18}" class="name">{box.layer}  {escape(_plain(box))}</text>')
        for number, text in enumerate(lines):
            y_text = y + 34 + line * number
            parts.append(f'<text x="{left + 10}" y="{y_text}" class="modules">{escape(text)}</text>')

    importers = [box for box in boxes if box.imports]
    # The lowest importer takes the innermost lane, so that no lane starts across another.
    lanes = {box.name: right + 22 + lane * (len(importers) - 1 - number) for number, box in enumerate(importers)}
    entries = {name: tops[row] + 14 for name, row in rows.items()}
    for box in importers:
        start = tops[rows[box.name]] + heights[rows[box.name]] - 9
        parts.append(f'<path class="lane" d="M{right},{start} H{lanes[box.name]} V{entries[box.imports[-1]]}"/>')
    for name, y in entries.items():
        arriving = [lanes[box.name] for box in importers if name in box.imports]
        if arriving:
            parts.append(f'<path class="lane" d="M{max(arriving)},{y} H{right + 2}" marker-end="url(#head)"/>')
            parts.extend(f'<circle cx="{x}" cy="{y}" r="3" fill="#444"/>' for x in arriving)

    total = right + 22 + lane * len(importers)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {bottom}" width="{total}" height="{bottom}">',
            "<title>Layers of SAGE; a dot on an arrow means: imports from</title>",
            "<style>",
            "text { font-family: sans-serif; fill: #111 } .name { font-size: 13px; font-weight: bold }",
            ".modules { font-size: 11.5px } rect { stroke: #444; stroke-width: 1 }",
            ".L6 { fill: #e8eef7 } .L5 { fill: #e6f4ea } .L4 { fill: #fdf3dc }",
            ".L3 { fill: #f8e4e0 } .L2 { fill: #efe6f5 } .L1 { fill: #eeeeee }",
            ".lane { fill: none; stroke: #444; stroke-width: 1.1 }",
            "</style>",
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>',
            f'<rect width="{total}" height="{bottom}" style="fill: white; stroke: none"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _see_sources(root: Path) -> None:
    """Find the packages where they are written: the finder of an editable install shows ``conf/``'s parent, which is the
    whole checkout, as a part of ``sage_bench``."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder in (BuiltinImporter, FrozenImporter, PathFinder)]
    sys.path[:0] = [str(root), str(root / "policies")]


def _contract(config: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(contract for contract in config["contracts"] if contract["id"] == name)
    return found


def _members(line: str) -> list[str]:
    """Modules of one line of a layers contract: ``"a : (b)"`` gives a and b (parentheses: may be absent)."""
    return [name.strip(" ()") for name in line.replace("|", ":").split(":")]


def _box_of(module: str, floors: list[list[str]]) -> str | None:
    package, _, rest = module.partition(".")
    if package in PACKAGES:
        return package
    if package != "sage_core" or not rest:
        return None
    for members, (_, role) in zip(floors, FLOORS, strict=True):
        if rest.split(".")[0] in members:
            return f"sage_core: {role}"
    raise SystemExit(f"{module} has no layer: name it in the contract 'core' of [tool.importlinter] in pyproject.toml")


def _title(box: Box) -> str:
    package, _, floor = box.name.partition(": ")
    return f"`{package}`, {floor or box.role}"


def _plain(box: Box) -> str:
    return _title(box).replace("`", "")


if __name__ == "__main__":
    raise SystemExit(main())
