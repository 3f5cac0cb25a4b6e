"""A measured run and its simulation over each other: latency CDFs, and the engine's state over time.

Drawn from the files that ``sage validate`` wrote (``sage_bench.validate.fidelity``), nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sage_bench.figures.style import legend_above, line, styled
from sage_core.errors import DataError

_SIDES: Final = ("measured", "simulated")

_LATENCIES: Final = (("ttft", "TTFT (s)", 1.0), ("tpot", "TPOT (ms)", 1e3), ("e2e", "E2E latency (s)", 1.0))
_SERIES: Final = (("running", "running"), ("waiting", "waiting"), ("kv_cache_pct", "KV cache (%)"))


def latency_overlay(requests: Path) -> Figure:
    """CDFs of TTFT, TPOT and E2E over all requests, measured and simulated. requests: ``fidelity_requests.parquet``.

    Raises :class:`DataError`.
    """
    columns = _read(requests, [f"{side}_{name}_s" for name, _, _ in _LATENCIES for side in _SIDES])
    panels = [each for each in _LATENCIES if not np.isnan(columns[f"measured_{each[0]}_s"]).all()]
    with styled(len(panels), 0.55 + 1.3 * len(panels)) as (figure, axes):
        for axis, (name, label, scale) in zip(axes, panels, strict=True):
            for i, side in enumerate(_SIDES):
                values = columns[f"{side}_{name}_s"]
                values = np.sort(values[~np.isnan(values)]) * scale
                axis.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=side, **line(i))
            axis.set_ylim(0, 1.02)
            axis.set_xlim(left=0)
            axis.set_xlabel(label)
        figure.supylabel("share of requests", fontsize=8)
        legend_above(figure, axes[0])
        return figure


def series_overlay(series: Path) -> Figure:
    """Running and waiting sequences and KV-cache usage over time. series: ``fidelity_series.parquet``.

    Raises :class:`DataError`.
    """
    columns = _read(series, ["t_s", *(f"{side}_{name}" for name, _ in _SERIES for side in _SIDES)])
    with styled(len(_SERIES), 0.55 + 1.1 * len(_SERIES), sharex=True) as (figure, axes):
        for axis, (name, label) in zip(axes, _SERIES, strict=True):
            for i, side in enumerate(_SIDES):
                axis.plot(columns["t_s"], columns[f"{side}_{name}"], label=side, **line(i))
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
        figure.align_ylabels()
        axes[-1].set_xlabel("time (s)")
        legend_above(figure, axes[0])
        return figure


def _read(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    try:
        table = pq.read_table(path, columns=names)
        return {name: table[name].cast(pa.float64()).to_numpy() for name in names}
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a file of `sage validate` ({reason}); run it again") from error
