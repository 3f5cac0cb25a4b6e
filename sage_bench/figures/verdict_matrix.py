"""One arm against all others, cell by cell: how much better or worse, and whether that could be chance."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.style import WIDTH_IN, styled
from sage_core.errors import DataError

_ROW_IN = 0.19


def verdict_matrix(rows: pd.DataFrame, label: str, reach: float) -> Figure:
    """rows: of :func:`sage_bench.metrics.compare.against`. A square for each cell and other arm, coloured by the difference (blue: the
    arm is better) up to ``reach``; a dot where it is significant. label: of the colours, with the unit of the difference times 100.

    Raises :class:`DataError` where there is nothing to show.
    """
    if rows.empty:
        raise DataError("a matrix of verdicts needs two arms in one condition or more")
    cells, others = list(dict.fromkeys(rows["cell"])), list(dict.fromkeys(rows["other"]))
    shape = rows.pivot_table(index="other", columns="cell", values="difference", dropna=False).reindex(others)[cells]
    with styled(1, 1.5 + _ROW_IN * len(others)) as (figure, (axis,)):
        image = axis.imshow(100 * shape.to_numpy(np.float64), cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
        told = rows[rows["verdict"].isin(("better", "worse"))]
        axis.plot(
            [cells.index(cell) for cell in told["cell"]],
            [others.index(other) for other in told["other"]],
            "o",
            ms=1.8,
            color="black",
            ls="none",
        )
        axis.set_xticks(range(len(cells)), cells, rotation=90, fontsize=6)
        axis.set_yticks(range(len(others)), others, fontsize=6)
        axis.grid(visible=False)
        bar = figure.colorbar(image, ax=axis, location="top", fraction=0.05, aspect=30)
        bar.set_label(label, fontsize=7 if len(label) < 14 * WIDTH_IN else 6)
        bar.ax.tick_params(labelsize=6)
        return figure
