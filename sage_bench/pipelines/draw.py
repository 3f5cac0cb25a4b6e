"""A pipeline drawn: stages from the request down to the answer, pools by colour, the critical path bold.

Dashed: a decision on which a stage depends, where no other edge says so. Pale: not expected to run.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from sage_bench.figures.style import COLOURS, styled
from sage_bench.pipelines.layout import Layout, laid_out
from sage_bench.pipelines.predict import Prediction, StagePrediction
from sage_bench.pipelines.show import milliseconds
from sage_bench.results.writer import output_error
from sage_core.errors import ConfigError

REQUEST: Final = "request"
FORMATS: Final = ("png", "svg", "pdf")
LAYER_IN: Final = 0.92
HALF_IN: Final = {True: 0.16, False: 0.29}
"""Half the height of a node without a pool, and of one with."""

Edge = tuple[Hashable, Hashable]


def write_figure(plan: Prediction, path: Path) -> None:
    """Draw ``plan`` into ``path``: .png, .svg or .pdf. Raises ConfigError, OutputError."""
    kind = path.suffix.lstrip(".")
    if kind not in FORMATS:
        raise ConfigError(f"--out {path}: expected a name that ends in .{', .'.join(FORMATS)}")
    date: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "sage"}):
            pipeline_figure(plan).savefig(path, format=kind, dpi=200, metadata=date[kind])
    except OSError as error:
        raise output_error(path, error) from error


def pipeline_figure(plan: Prediction) -> Figure:
    """The graph of ``plan``."""
    labels = {each.stage: _label(each) for each in plan.stages}
    widths: dict[Hashable, float] = {REQUEST: 0.9}
    widths |= {name: 0.2 + 0.068 * max(map(len, label)) for name, label in labels.items()}
    inputs, guards = _edges(plan)
    layout = laid_out(widths, [*inputs, *guards])
    bold = {REQUEST, *plan.critical_path}
    steps = set(zip([REQUEST, *plan.critical_path], plan.critical_path, strict=False))
    colours = _colours(plan)
    with styled(1, 1.0) as (figure, (axes,)):
        bends = [x for places in layout.edges.values() for x in places]
        low = min(*bends, *(layout.x[node] - width / 2 for node, width in widths.items()))
        high = max(*bends, *(layout.x[node] + width / 2 for node, width in widths.items()))
        layers = max(layout.layer.values())
        axes.set_xlim(low - 0.15, high + 0.15)
        axes.set_ylim(-LAYER_IN * layers - 0.4, 0.3)
        axes.set_aspect("equal")
        axes.axis("off")
        width, height = max(high - low + 0.4, 3.4), LAYER_IN * layers + 1.3
        figure.set_size_inches(width, height)
        tall = {REQUEST: HALF_IN[True]} | {each.stage: HALF_IN[not each.pool] for each in plan.stages}
        for edge in [*inputs, *guards]:
            _draw_edge(axes, layout, edge, tall, dashed=edge in guards, bold=edge in steps)
        _draw_node(axes, layout, REQUEST, ["request"], widths, tall, "white", bold=REQUEST in bold)
        for each in plan.stages:
            colour = colours.get(each.pool, "#777777")
            name = each.stage
            _draw_node(
                axes, layout, name, labels[name], widths, tall, colour, bold=name in bold, pale=not each.expected
            )
        total = "" if plan.total_ns is None else f", {milliseconds(plan.total_ns)} ms predicted"
        axes.set_title(f"{plan.pipeline}: {plan.input_tokens:,} tokens in{total}", fontsize=9)
        keys = [Line2D([], [], marker="s", ls="", ms=7, color=colour, label=pool) for pool, colour in colours.items()]
        figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 4), fontsize=8, title="pool")
        return figure


def _label(each: StagePrediction) -> list[str]:
    """Lines of text in a node."""
    if not each.pool:
        return [each.stage]
    took = f"{milliseconds(each.end_ns - each.start_ns)} ms" if each.expected and each.served else "?"
    if not each.expected:
        took = "not expected"
    return [" + ".join(each.parts), each.op, took]


def _edges(plan: Prediction) -> tuple[list[Edge], list[Edge]]:
    """(what each stage takes as input, decisions that it depends on without a way along the former)."""
    inputs: list[Edge] = [(name, each.stage) for each in plan.stages for name in dict.fromkeys(each.after)]
    reached: dict[Hashable, set[Hashable]] = {REQUEST: {REQUEST}}
    guards: list[Edge] = []
    for each in plan.stages:
        ways = {each.stage}.union(*(reached[name] for name in each.after))
        for decision in (text.partition(" ")[0] for text in each.when):
            if decision not in ways:
                guards.append((decision, each.stage))
                ways |= reached[decision]
        reached[each.stage] = ways
    return inputs, guards


def _colours(plan: Prediction) -> dict[str, str]:
    """By pool, in order of appearance."""
    pools = list(dict.fromkeys(each.pool for each in plan.stages if each.pool))
    return {pool: COLOURS[i % len(COLOURS)] for i, pool in enumerate(pools)}


def _draw_node(
    axes: Axes,
    layout: Layout,
    node: Hashable,
    label: list[str],
    widths: dict[Hashable, float],
    tall: dict[str, float],
    colour: str,
    *,
    bold: bool,
    pale: bool = False,
) -> None:
    x, y = layout.x[node], -LAYER_IN * layout.layer[node]
    half, width = tall[str(node)], widths[node]
    fade = 0.4 if pale else 1.0
    box = FancyBboxPatch(
        (x - width / 2, y - half), width, 2 * half, boxstyle="round,pad=0,rounding_size=0.08", zorder=3, fc="white"
    )  # fmt: skip
    box.set_linewidth(0)
    axes.add_patch(box)
    tint = FancyBboxPatch(
        (x - width / 2, y - half), width, 2 * half, boxstyle="round,pad=0,rounding_size=0.08", zorder=4
    )
    tint.set_facecolor(matplotlib.colors.to_rgba(colour, 0.22 * fade))
    tint.set_edgecolor("black" if bold else matplotlib.colors.to_rgba(colour if colour != "white" else "black", fade))
    tint.set_linewidth(2.2 if bold else 0.9)
    axes.add_patch(tint)
    for i, text in enumerate(label):
        at = y + (len(label) - 1) * 0.08 - 0.16 * i
        weight = "bold" if i == 0 and len(label) > 1 else "normal"
        axes.text(
            x, at, text, ha="center", va="center", fontsize=8 if i == 0 else 7, weight=weight, alpha=fade, zorder=5
        )


def _draw_edge(axes: Axes, layout: Layout, edge: Edge, tall: dict[str, float], *, dashed: bool, bold: bool) -> None:
    """A smooth line through the points where it passes the layers."""
    places, top = layout.edges[edge], layout.layer[edge[0]]
    points = [(x, -LAYER_IN * (top + i)) for i, x in enumerate(places)]
    points[0] = points[0][0], points[0][1] - tall[str(edge[0])]
    points[-1] = points[-1][0], points[-1][1] + tall[str(edge[1])] + 0.03
    verts, codes = [points[0]], [Curve.MOVETO]
    for (xa, ya), (xb, yb) in pairwise(points):
        middle = (ya + yb) / 2
        verts += [(xa, middle), (xb, middle), (xb, yb)]
        codes += [Curve.CURVE4] * 3
    colour, width = ("black", 2.0) if bold else ("#888888", 0.8)
    axes.add_patch(
        PathPatch(
            Curve(verts, codes), fc="none", ec=colour, lw=width, ls="--" if dashed else "-", zorder=2 if bold else 1
        )
    )
    axes.plot(*points[-1], marker="v", ms=5 if bold else 3.5, color=colour, zorder=2)
