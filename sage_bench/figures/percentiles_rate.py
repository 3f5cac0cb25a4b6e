"""Latency percentiles of one system over the offered rate, its saturation point marked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from sage_bench.figures.style import MARKERS, legend_above, line, plain_log, styled
from sage_bench.metrics.saturation import Saturation
from sage_bench.metrics.statistics import Interval
from sage_core.errors import DataError
from sage_core.units import SECOND


def percentiles_rate(
    panels: Mapping[str, Mapping[str, Mapping[float, Interval]]], knee: Saturation, source: str
) -> Figure:
    """panels: by the label of their axis, curves (``p50``) of intervals (ns) by rate (requests/s). knee: a line at the highest
    rate that is sustained, and a shade up to the first that is not. Raises :class:`DataError` below two rates."""
    rates = sorted({rate for curves in panels.values() for curve in curves.values() for rate in curve})
    if len(rates) < 2:
        raise DataError("latency over rate needs runs at two rates or more; sweep load.rate")
    with styled(len(panels), 0.55 + 1.6 * len(panels), sharex=True) as (figure, axes):
        for axis, (label, curves) in zip(axes, panels.items(), strict=True):
            for i, (name, curve) in enumerate(curves.items()):
                known = [rate for rate in rates if rate in curve and curve[rate].n]
                mean, low, high = (
                    np.array([getattr(curve[rate], part) for rate in known]) / SECOND
                    for part in ("mean", "low", "high")
                )
                look = line(i)
                axis.plot(known, mean, marker=MARKERS[i], label=name, **look)
                axis.fill_between(known, np.maximum(low, mean / 10), high, color=look["color"], alpha=0.18, lw=0)
            if not math.isnan(knee.rate_rps):
                axis.axvline(knee.rate_rps, color="black", ls=":", lw=0.9, label="saturation point")
                if not math.isnan(knee.next_rps):
                    axis.axvspan(knee.rate_rps, knee.next_rps, color="black", alpha=0.08, lw=0)
            axis.set_xscale("log")
            axis.set_yscale("log")
            plain_log(axis.yaxis)
            axis.set_ylabel(label)
        plain_log(axes[-1].xaxis)
        axes[-1].set_xlabel(f"offered load (requests/s), {source}")
        legend_above(figure, axes[0])
        return figure
