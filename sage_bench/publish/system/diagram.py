"""Boxes and arrows in print size: every length is in inches, so what is drawn is what is printed.

A diagram is data. That lets a test look up every name it shows in the code, and measure that no text leaves its box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from sage_bench.figures.style import styled

PAGE_IN: Final = 7.0
"""Both columns of a two-column page."""

POINTS: Final = 6.5
LINE_IN: Final = 0.118
"""From one line of text to the next."""

TINTS: Final = {
    "L6": "#E8EEF7",
    "L5": "#E6F4EA",
    "L4": "#FDF3DC",
    "L3": "#F8E4E0",
    "L2": "#EFE6F5",
    "L1": "#EEEEEE",
    "outside": "#FFFFFF",
}
"""By layer: those of ``docs/figures/layers.svg``. ``outside``: what is not ours."""

INK: Final = "#333333"

Side = Literal["n", "e", "s", "w"]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Node:
    """A box. x, y: its middle, from the left and from the bottom. lines: the first is bold. refs: what its names are:
    ``module:attribute``, ``module``, a path with a ``/``, or a command such as ``sage run``."""

    name: str
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    tint: str = "outside"
    refs: tuple[str, ...] = ()
    heavy: bool = False

    def at(self, side: Side, shift: float = 0.0) -> Point:
        """The middle of a side, moved along it to the right or upwards by ``shift``."""
        if side in "ns":
            return self.x + shift, self.y + (self.height if side == "n" else -self.height) / 2
        return self.x + (self.width if side == "e" else -self.width) / 2, self.y + shift


@dataclass(frozen=True, slots=True)
class Group:
    """A frame around nodes, with its title inside, at the top left. refs: as for a node."""

    x: float
    y: float
    width: float
    height: float
    title: str
    refs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrow:
    """A line through ``points`` with a head at its end. label: stands at ``label_at``, which is its middle."""

    points: tuple[Point, ...]
    label: str = ""
    label_at: Point = (0.0, 0.0)
    dashed: bool = False
    both: bool = False
    heavy: bool = False


@dataclass(frozen=True, slots=True)
class Diagram:
    """width, height: of the page it is drawn on."""

    width: float
    height: float
    nodes: Sequence[Node]
    arrows: Sequence[Arrow] = ()
    groups: Sequence[Group] = ()

    def named(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """(text, refs) of every node and group."""
        yield from ((node.lines, node.refs) for node in self.nodes)
        yield from (((group.title,), group.refs) for group in self.groups)


def drawn(diagram: Diagram) -> Figure:
    """The figure of ``diagram``."""
    with canvas(diagram.width, diagram.height) as (figure, axes):
        for group in diagram.groups:
            corner = group.x - group.width / 2, group.y - group.height / 2
            axes.add_patch(
                FancyBboxPatch(corner, group.width, group.height, boxstyle="round,pad=0,rounding_size=0.06", fc="#FAFAFA", ec="#999999", lw=0.6, ls=(0, (4, 2)), zorder=0)
            )  # fmt: skip
            top = corner[1] + group.height - 0.05
            axes.text(corner[0] + 0.07, top, group.title, fontsize=POINTS, va="top", style="italic", color=INK)
        for arrow in diagram.arrows:
            draw_arrow(axes, arrow)
        for node in diagram.nodes:
            draw_node(axes, node)
        return figure


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A page of so many inches; data units are inches."""
    with styled(1, height) as (figure, (axes,)):
        figure.set_layout_engine("none")
        figure.set_size_inches(width, height)
        axes.set_position((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(0, height)
        axes.axis("off")
        yield figure, axes


def draw_node(axes: Axes, node: Node) -> None:
    """Its box, and its lines of text in the middle of it."""
    corner = node.x - node.width / 2, node.y - node.height / 2
    box = FancyBboxPatch(corner, node.width, node.height, boxstyle="round,pad=0,rounding_size=0.05", zorder=3)
    box.set(facecolor=TINTS[node.tint], edgecolor=INK, linewidth=1.8 if node.heavy else 0.7)
    axes.add_patch(box)
    for i, text in enumerate(node.lines):
        y = node.y + ((len(node.lines) - 1) / 2 - i) * LINE_IN
        weight = "bold" if i == 0 else "normal"
        axes.text(node.x, y, text, ha="center", va="center", fontsize=POINTS, weight=weight, zorder=4, gid=node.name)


def draw_arrow(axes: Axes, arrow: Arrow) -> None:
    """Its line, head and label; the label has a white ground, so it may stand on the line."""
    line: dict[str, Any] = {
        "color": INK,
        "lw": 1.8 if arrow.heavy else 0.8,
        "zorder": 1,
        "ls": "--" if arrow.dashed else "-",
    }
    steps = list(pairwise(arrow.points))
    for (xa, ya), (xb, yb) in steps[:-1]:
        axes.plot([xa, xb], [ya, yb], solid_capstyle="round", **line)
    ends = [steps[-1], *([steps[0][::-1]] if arrow.both else [])]
    for start, end in ends:
        head = {"arrowstyle": "-|>,head_width=0.18,head_length=0.32", "shrinkA": 0, "shrinkB": 0, **line}
        axes.annotate("", end, start, arrowprops=head, zorder=1)
    if arrow.label:
        ground = {"fc": "white", "ec": "none", "pad": 0.8}
        axes.text(*arrow.label_at, arrow.label, ha="center", va="center", fontsize=POINTS, bbox=ground, zorder=2)
