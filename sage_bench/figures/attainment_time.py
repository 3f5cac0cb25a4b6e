"""SLO attainment over time, by when requests were scheduled, around what happened to the system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sage_bench.figures.style import legend_above, line, styled
from sage_core.errors import DataError

Curve = NDArray[np.float64]


def attainment_time(
    panels: Mapping[str, Mapping[str, Curve]], edges_s: Curve, marks_s: Sequence[float], source: str
) -> Figure:
    """panels: by title, shares of a stretch by the name of a curve, each (n,). edges_s: (n + 1,) of the stretches. marks_s: instants to
    mark. Raises :class:`DataError` where there is nothing to draw."""
    if not panels or not all(panels.values()):
        raise DataError("attainment over time: no runs; run `sage run experiment=robustness`")
    with styled(len(panels), 0.5 + 1.3 * len(panels), sharex=True) as (figure, axes):
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for i, (name, shares) in enumerate(curves.items()):
                axis.stairs(100 * shares, edges_s, baseline=None, label=name, **line(i))
            for at in marks_s:
                axis.axvline(at, color="black", ls=":", lw=0.8)
            axis.set_title(title, loc="left", pad=2)
            axis.set_ylim(-3, 103)
        figure.supylabel("SLO attainment (%)", fontsize=8)
        axes[-1].set_xlabel(f"scheduled arrival (s), {source}")
        legend_above(figure, axes[0])
        return figure
