"""One request's stages over time, a line a stage: queued in the plane, then served."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sage_bench.figures.style import COLOURS, styled
from sage_core.errors import DataError
from sage_core.units import SECOND

QUEUED, SERVED = COLOURS[5], COLOURS[0]


def stage_waterfall(requests: Mapping[str, pd.DataFrame], source: str) -> Figure:
    """requests: by title, the rows of ``StageSpans.spans`` of one request, in order of time. Raises :class:`DataError` without rows."""
    if not requests or any(rows.empty for rows in requests.values()):
        raise DataError("waterfall: no such request went through stages; there is nothing to draw")
    longest = max(len(rows) for rows in requests.values())
    with styled(len(requests), 0.5 + len(requests) * (0.3 + 0.2 * longest), sharex=True) as (figure, axes):
        end = 0.0
        for axis, (title, rows) in zip(axes, requests.items(), strict=True):
            at, names = 0.0, []
            for line, row in enumerate(rows.to_dict("records")):
                at += row["gap_ns"] / SECOND
                for column, colour in (("queue_ns", QUEUED), ("service_ns", SERVED)):
                    span = row[column] / SECOND
                    # The edge keeps a span visible that is shorter than a dot is wide.
                    axis.barh(line, span, left=at, height=0.7, color=colour, ec=colour, lw=0.5 if span else 0)
                    at += span
                names.append(str(row["name"]))
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.4, -0.6)
            end = max(end, at)
            axis.set_title(title, loc="left", pad=2)
            axis.grid(axis="y", visible=False)
        axes[-1].set_xlim(0, 1.02 * end)
        axes[-1].set_xlabel(f"since the request was scheduled (s), {source}")
        marks = [Patch(color=QUEUED, label="queued in the plane"), Patch(color=SERVED, label="dispatched to done")]
        figure.legend(handles=marks, loc="outside upper center", ncols=2, columnspacing=0.9, handlelength=1.0)
        return figure
