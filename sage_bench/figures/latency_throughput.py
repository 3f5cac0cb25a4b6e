"""Latency against what is served: the curve an arm follows as the offered load grows, and where it turns back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.style import MARKERS, SOURCES, legend_above, line, plain_log, styled
from sage_bench.metrics.definitions import METRICS
from sage_core.errors import DataError


def latency_throughput(
    panels: Mapping[str, pd.DataFrame], arms: Sequence[str], metric: str, kind: str, source: str
) -> Figure:
    """A panel for each load. panels: by its name, the columns arm, rate, served_rps and ``metric`` of every run; a point is the
    mean over the runs of an arm at a rate. Raises :class:`DataError` below two rates."""
    if any(frame["rate"].nunique() < 2 for frame in panels.values()) or not panels:
        raise DataError("latency against throughput needs runs at two rates or more; sweep load.rate")
    about = METRICS[metric]
    with styled(len(panels), 0.55 + 1.45 * len(panels), sharex=True) as (figure, axes):
        for axis, (name, frame) in zip(axes, panels.items(), strict=True):
            for i, arm in enumerate(arms):
                curve = frame[frame["arm"] == arm].groupby("rate")[["served_rps", metric]].mean().sort_index()
                axis.plot(
                    curve["served_rps"].to_numpy(np.float64),
                    curve[metric].to_numpy(np.float64) / about.scale,
                    marker=MARKERS[i % len(MARKERS)],
                    label=arm,
                    **line(i),
                )
            axis.set_yscale("log")
            plain_log(axis.yaxis)
            axis.set_ylabel(f"{kind} {about.label} ({about.unit})")
            axis.set_title(name, loc="left")
        axes[-1].set_xlabel(f"served (requests/s), {SOURCES[source]}")
        legend_above(figure, axes[0])
        return figure
