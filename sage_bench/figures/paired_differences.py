"""Differences of two arms as points with their intervals, one row a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from sage_bench.figures.style import COLOURS, MARKERS, legend_above, styled
from sage_bench.metrics.statistics import Interval

PANEL_IN = 0.34


def paired_differences(
    rows: Mapping[str, Sequence[Interval]], series: Sequence[str], label: str, *, scale: float = 1.0
) -> Figure:
    """rows: by the name of a comparison (a second line is allowed), one interval for each of ``series``. label: of the axis, with its
    unit, which is that of the intervals over ``scale``."""
    with styled(1, 0.7 + PANEL_IN * len(rows)) as (figure, (axis,)):
        for i, name in enumerate(series):
            at = [row + 0.22 * (i - (len(series) - 1) / 2) for row in range(len(rows))]
            found = [intervals[i] for intervals in rows.values()]
            mean = [each.mean / scale for each in found]
            reach = [
                [(each.mean - each.low) / scale for each in found],
                [(each.high - each.mean) / scale for each in found],
            ]
            axis.errorbar(
                mean, at, xerr=reach, fmt=MARKERS[i], color=COLOURS[i], ms=3.5, elinewidth=0.8, capsize=1.5, label=name
            )
        axis.axvline(0.0, color="black", lw=0.6)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        legend_above(figure, axis)
        return figure
