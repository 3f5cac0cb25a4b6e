"""A live run, its simulation and, if there is one, its repetition over each other: latency CDFs of one kind of request.

Drawn from the files that ``sage validate RUN`` wrote (``sage_bench.validate.live``), nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from sage_bench.figures.style import legend_above, line, styled
from sage_core.errors import DataError

_PANELS: Final = (
    ("ttft", "TTFT (s)", 1.0),
    ("tpot", "TPOT (ms)", 1e3),
    ("e2e", "E2E latency (s)", 1.0),
    ("queue", "queue time in the plane (s)", 1.0),
)


def run_overlay(requests: Path, kind: str, against: Path | None = None) -> Figure:
    """CDFs of every latency that requests of ``kind`` have. requests, against: ``fidelity_requests.parquet`` and
    ``fidelity_against.parquet``.

    Raises :class:`DataError`.
    """
    names = [name for name, _, _ in _PANELS]
    rows = _read(requests, kind, [f"{side}_{name}_s" for name in names for side in ("measured", "simulated")])
    curves = {"measured": (rows, "measured"), "simulated": (rows, "simulated")}
    if against is not None:
        curves["measured again"] = (_read(against, kind, [f"measured_{name}_s" for name in names]), "measured")
    panels = [each for each in _PANELS if rows[f"measured_{each[0]}_s"].notna().any()]
    if not panels:
        raise DataError(f"{requests}: no {kind} request in it")
    with styled(len(panels), 0.55 + 1.2 * len(panels)) as (figure, axes):
        for axis, (name, label, scale) in zip(axes, panels, strict=True):
            for i, (title, (frame, side)) in enumerate(curves.items()):
                values = np.sort(frame[f"{side}_{name}_s"].dropna().to_numpy()) * scale
                axis.step(
                    values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post", label=title, **line(i)
                )
            axis.set_ylim(0, 1.02)
            axis.set_xlim(left=0)
            axis.set_xlabel(f"{kind} {label}")
        figure.supylabel("share of requests", fontsize=8)
        legend_above(figure, axes[0])
        return figure


def _read(path: Path, kind: str, names: list[str]) -> pd.DataFrame:
    try:
        frame: pd.DataFrame = pq.read_table(path, columns=["kind", *names]).to_pandas()
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a file of `sage validate RUN` ({reason}); run it again") from error
    return frame[frame["kind"] == kind]
