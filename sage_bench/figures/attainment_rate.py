"""SLO attainment against offered load, with the capacity of each arm marked where its curve crosses the objective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.style import MARKERS, SOURCES, legend_above, line, styled
from sage_bench.metrics.capacity import ATTAINMENT_MIN
from sage_bench.metrics.statistics import t_interval
from sage_core.errors import DataError


def attainment_rate(
    panels: Mapping[str, pd.DataFrame], capacities: Mapping[str, Mapping[str, float]], arms: Sequence[str], source: str
) -> Figure:
    """A panel for each load. panels: by its name, the columns arm, rate (requests/s), seed, attainment of every run.
    capacities: by panel and arm, requests/s; NaN draws no ring. Raises :class:`DataError` below two rates."""
    if any(frame["rate"].nunique() < 2 for frame in panels.values()) or not panels:
        raise DataError("attainment against rate needs runs at two rates or more; sweep load.rate")
    with styled(len(panels), 0.55 + 1.45 * len(panels), sharex=True) as (figure, axes):
        for axis, (name, frame) in zip(axes, panels.items(), strict=True):
            axis.axhline(100 * ATTAINMENT_MIN, color="black", lw=0.6, ls=":")
            rings = []
            for i, arm in enumerate(arms):
                of = frame[frame["arm"] == arm]
                means = [
                    (float(str(rate)), t_interval(part["attainment"].tolist())) for rate, part in of.groupby("rate")
                ]
                rate = np.array([each for each, _ in means])
                mean, low, high = (np.array([100 * interval[k] for _, interval in means]) for k in range(3))
                look = line(i)
                axis.plot(rate, mean, marker=MARKERS[i % len(MARKERS)], label=arm, **look)
                axis.fill_between(
                    rate, np.clip(low, 0, 100), np.clip(high, 0, 100), color=look["color"], alpha=0.18, lw=0
                )
                rings.append(capacities.get(name, {}).get(arm, math.nan))
            axis.plot(
                rings,
                [100 * ATTAINMENT_MIN] * len(rings),
                "o",
                ms=8,
                mfc="none",
                color="black",
                mew=0.8,
                label="goodput capacity",
            )
            axis.set_ylim(0, 104)
            axis.set_ylabel("least SLO attainment\nof a kind (%)")
            axis.set_title(name, loc="left")
        axes[-1].set_xlabel(f"offered load (requests/s), {SOURCES[source]}")
        legend_above(figure, axes[0])
        return figure
