"""Latency against offered load, with the saturation point of each policy marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.style import MARKERS, SOURCES, legend_above, line, plain_log, styled
from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.saturation import Saturation
from sage_core.errors import DataError
from sage_core.units import SECOND


def latency_rate(means: pd.DataFrame, points: Mapping[str, Saturation], panels: Sequence[tuple[str, str]]) -> Figure:
    """One panel per (kind, metric), one curve per policy over the nominal rates, with its interval over the runs.

    means: of :func:`sage_bench.metrics.compare.means`, of one sweep; the metrics are spans in ns. points: where each
    policy saturates; a ring marks its latency there. Raises :class:`DataError` below two rates, and for runs of different
    sources.
    """
    whole = means[(means["tenant"] == ALL) & (means["priority"] == ALL)]
    sources = whole["source"].unique()
    if len(sources) != 1:
        raise DataError(f"runs of different sources ({', '.join(sorted(sources))}) in one figure; keep them apart")
    if whole["rate"].nunique() < 2:
        raise DataError("latency against rate needs runs at two rates or more; sweep load.rate")
    policies = list(whole["policy"].unique())
    with styled(len(panels), 0.55 + 1.5 * len(panels), sharex=True) as (figure, axes):
        for axis, (kind, metric) in zip(axes, panels, strict=True):
            lowest = math.inf
            part = whole[(whole["kind"] == kind) & (whole["metric"] == metric)]
            for i, policy in enumerate(policies):
                curve = part[part["policy"] == policy].sort_values("rate")
                mean, low, high = (curve[name].to_numpy(np.float64) / SECOND for name in ("mean", "low", "high"))
                look = line(i)
                rate = curve["rate"].to_numpy(np.float64)
                axis.plot(rate, mean, marker=MARKERS[i % len(MARKERS)], label=policy, **look)
                lowest = min(lowest, *mean)
                at = points[policy].rate_rps if policy in points else math.nan
                axis.plot(
                    rate[rate == at],
                    mean[rate == at],
                    "o",
                    ms=8,
                    mfc="none",
                    color="black",
                    mew=0.8,
                    label="saturation point" if i == len(policies) - 1 else None,
                )
                # On a log axis an interval that reaches below zero is drawn down to a tenth of its mean.
                axis.fill_between(rate, np.maximum(low, mean / 10), high, color=look["color"], alpha=0.18, lw=0)
            axis.set_yscale("log")
            axis.set_ylim(0.8 * lowest, None)
            plain_log(axis.yaxis)
            axis.set_ylabel(f"{'' if kind == ALL else kind + ' '}{METRICS[metric].label} (s)")
        axes[-1].set_xlabel(f"offered load (requests/s), {SOURCES[sources[0]]}")
        legend_above(figure, axes[0])
        return figure
