"""Throughput over the number of backends, as bars with intervals, beside what a multiple of one backend would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from sage_bench.figures.style import bar, legend_above, styled
from sage_bench.metrics.statistics import Interval
from sage_core.errors import DataError


def throughput_backends(backends: Sequence[int], series: Mapping[str, Sequence[Interval]], source: str) -> Figure:
    """series: by name, an interval (requests/s) for each number of backends. A mark over each bar is the first of its series
    times the backends: linear scaling. Raises :class:`DataError` where there is nothing to draw."""
    if not backends or not series:
        raise DataError("throughput over backends: no runs; run `sage run experiment=scalability/backends`")
    width = 0.8 / len(series)
    with styled(1, 2.2) as (figure, (axis,)):
        for i, (name, found) in enumerate(series.items()):
            at = np.arange(len(backends)) + (i - (len(series) - 1) / 2) * width
            mean = np.array([each.mean for each in found])
            reach = np.nan_to_num([[each.mean - each.low for each in found], [each.high - each.mean for each in found]])
            axis.bar(
                at,
                mean,
                width * 0.92,
                yerr=reach,
                **bar(i),
                edgecolor="white",
                lw=0,
                error_kw={"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8},
                label=name,
            )
            linear = found[0].mean / backends[0] * np.array(backends)
            label = "linear" if i == len(series) - 1 else "_"  # one entry for all
            axis.hlines(linear, at - width / 2, at + width / 2, color="black", lw=0.9, label=label)
        axis.set_xticks(np.arange(len(backends)), [str(each) for each in backends])
        axis.set_xlabel(f"backends, {source}")
        axis.set_ylabel("throughput (requests/s)")
        axis.grid(axis="x", visible=False)
        legend_above(figure, axis)
        return figure
