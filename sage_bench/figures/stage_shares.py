"""Where the time of requests through a pipeline went: a stacked bar for each arm, queued and served apart, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sage_bench.figures.style import COLOURS, styled
from sage_core.errors import DataError
from sage_core.units import SECOND


def stage_shares(arms: Mapping[str, pd.DataFrame], source: str) -> Figure:
    """arms: tables of :class:`sage_bench.metrics.stage_spans.StageSpans`, of one pipeline, by name; means over all its requests.

    Service is filled, the time queued in the plane before it hatched in the same colour. Raises :class:`DataError` without a stage.
    """
    if not arms or any(table.empty for table in arms.values()):
        raise DataError("stages: no request went through a declared pipeline; there is nothing to decompose")
    taken = {name: table[(table["queue_ns"] > 0) | (table["service_ns"] > 0)]["name"] for name, table in arms.items()}
    stages = list(dict.fromkeys(str(stage) for names in taken.values() for stage in names))
    with styled(1, 0.85 + 0.32 * len(arms)) as (figure, (axis,)):
        end = 0.0
        for row, table in enumerate(arms.values()):
            left = 0.0
            rows = {str(each["name"]): each for each in table.to_dict("records")}
            whole = float(table["requests"].max())
            for i, stage in enumerate(stages):
                if stage not in rows:
                    continue
                for column, hatch in (("queue_ns", "//////"), ("service_ns", "")):
                    # Means are over requests that had the stage on their path; a bar is over all.
                    width = rows[stage][column] * rows[stage]["requests"] / whole / SECOND
                    axis.barh(
                        row,
                        width,
                        left=left,
                        height=0.66,
                        facecolor="white" if hatch else COLOURS[i % len(COLOURS)],
                        edgecolor=COLOURS[i % len(COLOURS)],
                        hatch=hatch,
                        lw=0.5,
                    )
                    left += width
            end = max(end, left)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.set_xlim(0, 1.02 * end)
        axis.set_xlabel(f"mean time of a request (s), {source}")
        axis.grid(axis="y", visible=False)
        marks = [Patch(color=COLOURS[i % len(COLOURS)], label=stage) for i, stage in enumerate(stages)]
        marks.append(Patch(facecolor="white", edgecolor="black", hatch="//////", lw=0.5, label="queued before it"))
        figure.legend(
            handles=marks, loc="outside upper center", ncols=3, columnspacing=0.9, handlelength=1.0, handletextpad=0.5
        )
        figure.set_figheight(figure.get_figheight() + 0.14 * (-(-len(marks) // 3) - 1))
        return figure
