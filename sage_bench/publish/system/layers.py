"""The layers, as the import graph has them: the overview, and who imports whom."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

import msgspec
from matplotlib.figure import Figure

from sage_bench.publish.system.diagram import (
    INK,
    LINE_IN,
    PAGE_IN,
    POINTS,
    Arrow,
    Diagram,
    Node,
    canvas,
    draw_arrow,
    draw_node,
    drawn,
)
from sage_live.adapters import ADAPTERS

MODULES_WIDTH: Final = 4.9
CHARACTER_IN: Final = 0.051
"""Of a line of text in the size of the figures, on average."""


class LayerBox(msgspec.Struct, frozen=True):
    """One row of the layer map (``tools/layers.py``): a package or a floor of the core. members: its first-level modules.
    imports: names of the boxes that it imports from directly."""

    layer: str
    name: str
    role: str
    members: tuple[str, ...]
    imports: tuple[str, ...]


def overview_figure(boxes: Sequence[LayerBox]) -> Figure:
    """Users above, the layers in the middle, engines and results beside them."""
    return drawn(overview(boxes))


def overview(boxes: Sequence[LayerBox]) -> Diagram:
    """The diagram of :func:`overview_figure`; ``boxes`` from top to bottom."""
    layers = list(dict.fromkeys(box.layer for box in boxes))
    step = 0.6
    bands = {}
    for row, layer in enumerate(layers):
        of = [box for box in boxes if box.layer == layer]
        packages = tuple(dict.fromkeys(box.name.partition(":")[0] for box in of))
        lines = (f"{layer}  {' + '.join(packages)}", *(box.role for box in of))
        bands[layer] = Node(layer, 3.5, step * (len(layers) - row - 0.4), 2.9, 0.5, lines, layer, packages)
    engines = [name for name in ADAPTERS if name not in ("sage", "openai")]
    half = -(-len(engines) // 2)
    names = f"{', '.join(engines[:half])},", ", ".join(engines[half:])

    def beside(layer: str, x: float, *lines: str, refs: tuple[str, ...] = ()) -> Node:
        return Node(lines[0], x, bands[layer].y, 1.5, 0.48, lines, refs=refs)

    left = {
        "L6": beside("L6", 0.9, "researcher, engineer", "command line,", "sweeps of settings"),
        "L5": beside("L5", 0.9, "application", "OpenAI's client, or", "UnifiedInferenceClient", refs=("sage_bench.client:UnifiedInferenceClient",)),
        "L4": beside("L4", 0.9, "policy of one's own", "a file outside the tree", refs=("examples/tutorials/my_policy.py",)),
        "L3": beside("L3", 0.9, "pipeline, cluster", "declared in YAML", refs=("conf/pipeline/", "conf/cluster/")),
    }  # fmt: skip
    right = {
        "L6": beside("L6", 6.1, "results/", "Parquet, figures, report", refs=("results/",)),
        "L5": beside("L5", 6.1, "engines, live", *names),
        "L4": beside("L4", 6.1, "engines, modelled", "by calibrated profiles", refs=("sage_sim/profiles/",)),
        "L2": beside("L2", 6.1, "native/", "the same in C++", refs=("native/",)),
    }
    runtimes = bands["L5"]
    corner = (runtimes.at("e")[0] + right["L5"].at("w")[0]) / 2
    elbow = ((corner, runtimes.y - 0.14), (corner, right["L4"].y), right["L4"].at("w"))
    arrows = [
        *(Arrow((node.at("e"), bands[layer].at("w"))) for layer, node in left.items()),
        Arrow((bands["L6"].at("e"), right["L6"].at("w"))),
        Arrow((runtimes.at("e"), right["L5"].at("w")), both=True),
        Arrow((runtimes.at("e", -0.14), *elbow), both=True),
        Arrow((right["L2"].at("w"), bands["L2"].at("e"))),
    ]
    return Diagram(PAGE_IN, step * len(layers) + 0.08, (*bands.values(), *left.values(), *right.values()), arrows)


def layers_figure(boxes: Sequence[LayerBox]) -> Figure:
    """A row a box with its modules; in the lanes on the right, an arrow into every box that it imports from. All point
    downwards, because :func:`tools/layers.py` refuses to give boxes of which one imports upwards."""
    texts = [
        textwrap.wrap(", ".join(box.members), int(MODULES_WIDTH / CHARACTER_IN), break_long_words=False)
        for box in boxes
    ]
    heights = [LINE_IN * (len(lines) + 1) + 0.1 for lines in texts]
    gap, lane = 0.1, 0.2
    tops = [sum(heights[row:]) + gap * (len(boxes) - row) for row in range(len(boxes))]
    middle = {box.name: tops[row] - heights[row] / 2 for row, box in enumerate(boxes)}
    importers = [box for box in boxes if box.imports]
    right = 0.1 + MODULES_WIDTH
    # The lowest importer has the innermost lane, so that no lane starts across another.
    lanes = {box.name: right + 0.25 + lane * (len(importers) - 1 - i) for i, box in enumerate(importers)}
    with canvas(PAGE_IN, tops[0] + 0.2) as (figure, axes):
        for row, (box, lines) in enumerate(zip(boxes, texts, strict=True)):
            node = Node(box.name, 0.1 + MODULES_WIDTH / 2, middle[box.name], MODULES_WIDTH, heights[row], (), box.layer)
            draw_node(axes, node)
            package, _, floor = box.name.partition(": ")
            title = f"{box.layer}  {package}, {floor or box.role}"
            for i, text in enumerate([title, *lines]):
                y = tops[row] - 0.05 - LINE_IN * (i + 0.5)
                weight = "bold" if i == 0 else "normal"
                axes.text(0.18, y, text, fontsize=POINTS, va="center", weight=weight, zorder=4, gid=box.name)
        for box in importers:
            x, start = lanes[box.name], middle[box.name] - min(heights[0], 0.08)
            axes.plot([right, x, x], [start, start, middle[box.imports[-1]] + 0.05], color=INK, lw=0.8, zorder=1)
        for box in boxes:
            arriving = [lanes[each.name] for each in importers if box.name in each.imports]
            if arriving:
                y = middle[box.name] + 0.05
                draw_arrow(axes, Arrow(((max(arriving), y), (right, y))))
                axes.plot(arriving, [y] * len(arriving), "o", color=INK, ms=3, zorder=2)
        note = "a dot: imports from"
        axes.text(right + 0.12, middle[importers[0].name] + 0.05, note, fontsize=POINTS, va="center", style="italic")
        return figure
