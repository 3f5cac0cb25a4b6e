"""What placing every job of a cluster costs, over the size of the cluster: a curve a strategy."""

from __future__ import annotations

import re
from collections.abc import Mapping

from matplotlib.figure import Figure

from sage_bench.figures.style import MARKERS, legend_above, line, plain_log, styled
from sage_core.errors import DataError


def placement(figures: Mapping[str, float]) -> Figure:
    """figures: of ``benchmarks/placement.py``. DataError: they hold no plans."""
    curves: dict[str, dict[int, float]] = {}
    for key, value in figures.items():
        if found := re.fullmatch(r"plan_cpu_s_(\w+)_(\d+)", key):
            curves.setdefault(found[1], {})[int(found[2])] = value
    if not curves:
        raise DataError("placement: no key plan_cpu_s_STRATEGY_NODES; `benchmarks/placement.py` writes them")
    with styled(1, 2.2) as (figure, (axis,)):
        for i, (strategy, points) in enumerate(curves.items()):
            nodes = sorted(points)
            axis.plot(nodes, [points[each] for each in nodes], marker=MARKERS[i], label=strategy, **line(i))
        axis.set_xscale("log")
        axis.set_yscale("log")
        plain_log(axis.xaxis)
        plain_log(axis.yaxis)
        axis.set_xlabel("nodes, with ten jobs each")
        axis.set_ylabel("CPU time of a plan (s)")
        legend_above(figure, axis)
        return figure
