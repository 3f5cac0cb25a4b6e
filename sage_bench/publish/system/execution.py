"""The execution model: the tasks that a declared pipeline becomes, on the pools that run them.

Drawn from a plan, as ``sage pipeline show --json`` dumps it. A column is a step of the graph, not a length of time: stages
of microseconds and of seconds stand beside each other.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
from matplotlib.figure import Figure

from sage_bench.figures.style import COLOURS
from sage_bench.pipelines.predict import Prediction, StagePrediction
from sage_bench.pipelines.show import milliseconds
from sage_bench.publish.system.diagram import POINTS, Arrow, Node, canvas, draw_arrow, draw_node
from sage_core.errors import DataError

BOX: Final = (1.22, 0.42)
GAP: Final = (0.34, 0.1)
NAME_IN: Final = 0.6


def read_plan(path: Path) -> Prediction:
    """The plan that ``sage pipeline show --json`` wrote. Raises :class:`DataError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Prediction)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: expected a plan as `sage pipeline show NAME --json` writes it: {error}") from error


def execution_figure(plan: Prediction) -> Figure:
    """A lane a pool, a box a task with its predicted span; the critical path has heavy frames.

    Left out: stages that are not expected to run, and those that take no time, such as joins, whose followers stand for
    them. Raises :class:`DataError` for a plan without any other.
    """
    tasks = [stage for stage in plan.stages if stage.expected and stage.pool]
    if not tasks:
        raise DataError(f"plan of {plan.pipeline}: no stage is expected to run; there is no execution to draw")
    before = _before(plan)
    column: dict[str, int] = {}
    for task in tasks:  # in topological order
        column[task.stage] = max((column[name] + 1 for name in before[task.stage]), default=0)
    pools = list(dict.fromkeys(task.pool for task in tasks))
    cells: dict[tuple[str, int], list[StagePrediction]] = {}
    for task in tasks:
        cells.setdefault((task.pool, column[task.stage]), []).append(task)
    rows = {pool: max(len(of) for (name, _), of in cells.items() if name == pool) for pool in pools}
    width = NAME_IN + (BOX[0] + GAP[0]) * (max(column.values()) + 1) + 0.1
    lane = {pool: rows[pool] * (BOX[1] + GAP[1]) + GAP[1] for pool in pools}
    height = sum(lane.values()) + 0.1
    nodes, top = {}, height - 0.05
    with canvas(width, height) as (figure, axes):
        for i, pool in enumerate(pools):
            colour = COLOURS[i % len(COLOURS)]
            axes.axhspan(top - lane[pool] + 0.03, top - 0.03, color=colour, alpha=0.12, lw=0)
            axes.text(0.1, top - lane[pool] / 2, pool, fontsize=POINTS + 0.5, weight="bold", va="center")
            for (name, at), of in cells.items():
                for row, stage in enumerate(of if name == pool else []):
                    x = NAME_IN + (BOX[0] + GAP[0]) * at + BOX[0] / 2
                    y = top - GAP[1] - BOX[1] / 2 - (BOX[1] + GAP[1]) * (row + (rows[pool] - len(of)) / 2)
                    nodes[stage.stage] = Node(stage.stage, x, y, *BOX, _lines(stage), heavy=stage.critical)
            top -= lane[pool]
        path = [name for name in plan.critical_path if name in nodes]
        heavy = set(pairwise(path))
        for task in tasks:
            draw_node(axes, nodes[task.stage])
            for name in before[task.stage]:
                ends = nodes[name].at("e"), nodes[task.stage].at("w")
                draw_arrow(axes, Arrow(ends, heavy=(name, task.stage) in heavy))
        return figure


def _before(plan: Prediction) -> dict[str, list[str]]:
    """Tasks that each stage waits for, through what takes no time."""
    there = {stage.stage: stage for stage in plan.stages if stage.expected}
    before: dict[str, list[str]] = {}
    for name, stage in there.items():
        ways = ([other] if there[other].pool else before[other] for other in stage.after if other in there)
        before[name] = list(dict.fromkeys(each for way in ways for each in way))
    return before


def _lines(task: StagePrediction) -> tuple[str, ...]:
    tokens = f"{task.op}, {task.input_tokens:,} in" + (f", {task.output_tokens:,} out" if task.output_tokens else "")
    return task.stage, tokens, f"{milliseconds(task.start_ns)} to {milliseconds(task.end_ns)} ms"
