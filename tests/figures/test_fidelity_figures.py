"""The overlays of `sage validate` show the rows they are drawn from, and only files of that command are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.figures.fidelity import latency_overlay, series_overlay
from sage_bench.figures.style import save
from sage_core.errors import DataError

N = 20


def requests(path: Path, *, tokens: int = 2) -> Path:
    rng = np.random.default_rng(3)
    columns = {}
    for name in ("ttft", "tpot", "e2e"):
        measured = rng.exponential(2.0, N)
        columns |= {f"measured_{name}_s": measured, f"simulated_{name}_s": 1.5 * measured}
    if tokens == 1:
        columns |= {f"{side}_tpot_s": np.full(N, np.nan) for side in ("measured", "simulated")}
    pq.write_table(pa.table({name: pa.array(c, from_pandas=True) for name, c in columns.items()}), path)
    return path


def test_cdfs_are_of_the_rows(tmp_path: Path) -> None:
    path = requests(tmp_path / "requests.parquet")
    rows = pq.read_table(path).to_pandas()
    axes = latency_overlay(path).axes
    for axis, (name, scale) in zip(axes, (("ttft", 1.0), ("tpot", 1e3), ("e2e", 1.0)), strict=True):
        measured, simulated = axis.get_lines()
        for line, side in ((measured, "measured"), (simulated, "simulated")):
            assert line.get_label() == side
            assert np.asarray(line.get_xdata()) == pytest.approx(np.sort(rows[f"{side}_{name}_s"]) * scale)
            assert np.asarray(line.get_ydata())[-1] == 1.0
        assert measured.get_linestyle() != simulated.get_linestyle()  # told apart in grey too


def test_a_latency_that_nobody_has_gets_no_panel(tmp_path: Path) -> None:
    assert len(latency_overlay(requests(tmp_path / "r.parquet", tokens=1)).axes) == 2


def test_series_are_those_of_the_rows_and_files_are_byte_stable(tmp_path: Path) -> None:
    t = np.arange(N, dtype=float)
    names = ("running", "waiting", "kv_cache_pct")
    columns = {f"{side}_{name}": t * i for i, name in enumerate(names) for side in ("measured", "simulated")}
    pq.write_table(pa.table({"t_s": t, **columns}), tmp_path / "series.parquet")
    figure = series_overlay(tmp_path / "series.parquet")
    for i, axis in enumerate(figure.axes):
        for line in axis.get_lines():
            assert np.asarray(line.get_ydata()) == pytest.approx(t * i)
    once, again = (save(series_overlay(tmp_path / "series.parquet"), tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    for draw in (latency_overlay, series_overlay):
        with pytest.raises(DataError, match=r"other\.parquet: not a file of `sage validate`"):
            draw(tmp_path / "other.parquet")
        with pytest.raises(DataError, match=r"nowhere\.parquet"):
            draw(tmp_path / "nowhere.parquet")
