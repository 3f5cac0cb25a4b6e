"""SLO attainment per policy and kind, as bars with the interval over the runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.style import SOURCES, bar, legend_above, styled
from sage_bench.metrics.measure import ALL
from sage_core.errors import DataError


def slo_attainment(means: pd.DataFrame) -> Figure:
    """Groups of bars: all requests, then each kind; a bar per policy.

    means: of :func:`sage_bench.metrics.compare.means`, of one condition. Raises :class:`DataError` for runs of different
    sources.
    """
    part = means[(means["metric"] == "slo_attainment") & (means["tenant"] == ALL) & (means["priority"] == ALL)]
    sources = part["source"].unique()
    if len(sources) != 1:
        raise DataError(f"runs of different sources ({', '.join(sorted(sources))}) in one figure; keep them apart")
    policies, kinds = list(part["policy"].unique()), list(part["kind"].unique())
    width = 0.8 / len(policies)
    with styled(1, 2.2) as (figure, (axis,)):
        for i, policy in enumerate(policies):
            bars = part[part["policy"] == policy].set_index("kind").reindex(kinds)
            mean = 100 * bars["mean"].to_numpy(np.float64)
            # Attainment is a share: an interval may not promise more than all or less than nothing.
            low = np.clip(100 * bars["low"].to_numpy(np.float64), 0, 100)
            high = np.clip(100 * bars["high"].to_numpy(np.float64), 0, 100)
            at = np.arange(len(kinds)) + (i - (len(policies) - 1) / 2) * width
            axis.bar(
                at,
                mean,
                width * 0.92,
                yerr=np.nan_to_num([mean - low, high - mean]),
                **bar(i),
                edgecolor="white",
                lw=0,
                error_kw={"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8},
                label=policy,
            )
        axis.set_xticks(np.arange(len(kinds)), ["all requests" if kind == ALL else kind for kind in kinds])
        axis.set_ylim(0, 105)
        axis.set_ylabel("SLO attainment (% of offered)")
        axis.set_xlabel(f"kind of request, {SOURCES[sources[0]]}")
        axis.grid(axis="x", visible=False)
        legend_above(figure, axis)
        return figure
