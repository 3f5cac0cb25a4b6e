"""Latency CDF: for each policy, the share of requests answered within a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sage_bench.figures.style import SOURCES, legend_above, line, plain_log, styled
from sage_bench.results.reader import Run, Runs
from sage_core.errors import DataError
from sage_core.units import SECOND

Latency = Literal["ttft_ns", "e2e_ns"]
LABELS: Final = {"ttft_ns": "TTFT (s)", "e2e_ns": "E2E latency (s)"}

POINTS: Final = 500
"""Steps a curve is drawn with: more cannot be told apart in print."""


def latency_cdf(arms: Mapping[str, Sequence[Run]], panels: Sequence[tuple[str, Latency]]) -> Figure:
    """One panel per (kind, latency), one curve per arm, over the counted requests of all its runs.

    The curve is a share of the *offered* requests: one that was rejected or failed never arrives, and its arm's curve ends
    below 1. Raises :class:`DataError` for runs of different sources or a panel without a single latency.
    """
    source = Runs([run for runs in arms.values() for run in runs]).source()
    with styled(len(panels), 0.55 + 1.45 * len(panels)) as (figure, axes):
        for axis, (kind, latency) in zip(axes, panels, strict=True):
            lows, highs = [], []
            for i, (name, runs) in enumerate(arms.items()):
                seconds, share = _curve(runs, kind, latency)
                if len(seconds):
                    lows.append(seconds[len(seconds) // 100])
                    highs.append(seconds[-1])
                axis.step(seconds, share, where="post", label=name, **line(i))
            if not lows:
                raise DataError(f"no {kind} request has a {latency}: there is no CDF to draw")
            axis.set_xscale("log")
            # The fastest percent would stretch the axis by decades that say nothing.
            axis.set_xlim(0.8 * min(lows), 1.25 * max(highs))
            plain_log(axis.xaxis)
            axis.set_ylim(0, 1.02)
            axis.set_yticks(np.linspace(0, 1, 5))
            axis.set_xlabel(f"{kind} {LABELS[latency]}, {SOURCES[source]}")
        figure.supylabel("share of offered requests", fontsize=8)
        legend_above(figure, axes[0])
        return figure


def _curve(runs: Sequence[Run], kind: str, latency: Latency) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    offered, parts = 0, []
    for run in runs:
        rows = run.frame("requests", ("kind", "outcome", "warmup", latency))
        rows = rows[(rows["kind"] == kind) & ~rows["warmup"]]
        offered += len(rows)
        parts.append(rows.loc[(rows["outcome"] == "responded") & rows[latency].notna(), latency].to_numpy(np.float64))
    samples = np.sort(np.concatenate(parts)) / SECOND if parts else np.empty(0)
    keep = np.unique(np.linspace(0, len(samples) - 1, min(POINTS, len(samples))).round().astype(np.int64))
    return samples[keep], (keep + 1) / max(offered, 1)
