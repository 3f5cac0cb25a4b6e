"""Request timeline (waterfall): what each request of a stretch of time was doing, a line a request, a panel a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sage_bench.figures.style import SOURCES, styled
from sage_bench.results.reader import Run, Runs
from sage_core.errors import DataError
from sage_core.units import SECOND

SPANS: Final = (("queued", "#E69F00"), ("to first token", "#56B4E9"), ("decode", "#0072B2"), ("embedding", "#009E73"))

_COLUMNS: Final = ("request", "kind", "scheduled_ns", "dispatched_ns", "first_token_ns", "ended_ns", "outcome")


def timeline(
    runs: Mapping[str, Run], start_s: float | None = None, span_s: float | None = None, requests: int = 30
) -> Figure:
    """Requests scheduled within ``span_s`` from ``start_s`` on: at most ``requests`` of them, evenly picked.

    By default the stretch begins at a third of the arrivals of the first run and is as long as its median end-to-end
    latency, or longer if that is needed to find so many. Runs of one seed show the same requests. A generating request
    is queued until its first dispatch, on the way to its first token (in the engine's queue, then in prefill) until that
    comes, then in decode; in a pipeline of several stages *to first token* is everything between. An embedding is
    queued, then in service. A cross marks a request that ended without a response. Raises :class:`DataError` if there is
    no request in the stretch, and for runs of different sources.
    """
    source = Runs(list(runs.values())).source()
    tables = {
        name: run.frame("requests", _COLUMNS).sort_values(["scheduled_ns", "request"]) for name, run in runs.items()
    }
    if start_s is None or span_s is None:
        name, first = next(iter(tables.items()))
        if first.empty:
            raise DataError(f"{runs[name].folder / 'requests.parquet'}: no requests; there is no timeline to draw")
        begin, length = _stretch(first, requests)
        start_s, span_s = begin if start_s is None else start_s, length if span_s is None else span_s
    with styled(len(runs), 0.6 + 1.6 * len(runs), sharex=True) as (figure, axes):
        drawn: set[str] = set()
        for axis, (name, table) in zip(axes, tables.items(), strict=True):
            at = table["scheduled_ns"]
            rows = table[at.between(start_s * SECOND, (start_s + span_s) * SECOND)]
            if rows.empty:
                raise DataError(
                    f"{runs[name].folder / 'requests.parquet'}: no request from {start_s:g} s to {start_s + span_s:g} s; "
                    "choose another stretch"
                )
            drawn |= _draw(axis, rows.iloc[:: -(-len(rows) // requests)])
            axis.set_title(name, loc="left", pad=2)
        figure.supylabel("requests, by scheduled arrival", fontsize=8)
        axes[-1].set_xlabel(f"time (s), {SOURCES[source]}")
        marks: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in SPANS if name in drawn]
        if "no response" in drawn:
            marks.append(Line2D([], [], color="black", marker="x", ls="", ms=3.5, label="no response"))
        figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), columnspacing=0.9, handlelength=1.0)
        return figure


def _stretch(rows: pd.DataFrame, requests: int) -> tuple[float, float]:
    scheduled, latency = rows["scheduled_ns"].to_numpy(), rows["ended_ns"] - rows["scheduled_ns"]
    generating = latency[rows["first_token_ns"].notna()]
    begin = len(rows) // 3
    enough = scheduled[min(begin + requests, len(rows)) - 1] - scheduled[begin]
    return float(scheduled[begin]) / SECOND, max((generating if len(generating) else latency).median(), enough) / SECOND


def _draw(axis: Axes, rows: pd.DataFrame) -> set[str]:
    """Draw ``rows`` from top to bottom; what the legend has to explain."""
    seconds = {name: rows[name].to_numpy(np.float64) / SECOND for name in _COLUMNS if name.endswith("_ns")}
    ended, token = seconds["ended_ns"], seconds["first_token_ns"]
    dispatched = np.where(np.isnan(seconds["dispatched_ns"]), ended, seconds["dispatched_ns"])
    generates = (rows["kind"] != "embedding").to_numpy()
    spans = {
        "queued": (seconds["scheduled_ns"], dispatched),
        "to first token": (dispatched, np.where(generates, np.where(np.isnan(token), ended, token), np.nan)),
        "decode": (np.where(generates, token, np.nan), ended),
        "embedding": (np.where(generates, np.nan, dispatched), ended),
    }
    lines = np.arange(len(rows))
    found = set()
    for name, colour in SPANS:
        left, right = spans[name]
        there = right > left  # false where either did not happen
        if there.any():
            found.add(name)
        # The edge keeps a span visible that is shorter than a dot is wide.
        axis.barh(lines[there], (right - left)[there], left=left[there], height=0.7, color=colour, ec=colour, lw=0.5)
    failed = (rows["outcome"] != "responded").to_numpy()
    if failed.any():
        found.add("no response")
        axis.plot(ended[failed], lines[failed], "x", color="black", ms=3.5)
    axis.set_ylim(len(rows) - 0.3, -0.7)
    axis.set_yticks([])
    axis.grid(axis="y", visible=False)
    return found
