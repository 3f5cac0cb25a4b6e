"""Finding runs and refusing what is not one, by the name of the file."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.results.reader import Run, load_runs
from sage_core.errors import DataError


@pytest.fixture
def run(tmp_path: Path, queueing: ModuleType) -> Run:
    queueing.run(tmp_path / "e" / "r1", queueing.Queue(rate=10, service_s=0.01, requests=40))
    return load_runs(tmp_path)[0]


def test_runs_are_found_below_a_folder_in_order(tmp_path: Path, run: Run, queueing: ModuleType) -> None:
    queueing.run(tmp_path / "a" / "r0", queueing.Queue(rate=10, service_s=0.01, requests=5), policy="lifo")
    runs = load_runs(tmp_path)
    assert [each.folder.name for each in runs] == ["r0", "r1"]
    assert list(runs.by(lambda m: m.policy.name)) == ["fifo", "lifo"]
    assert len(runs.where(lambda m: m.policy.name == "lifo")) == 1
    assert [each.folder for each in load_runs(run.folder)] == [run.folder]


def test_tables_are_read_by_column(run: Run) -> None:
    frame = run.frame("requests", ["kind", "e2e_ns"])
    assert list(frame.columns) == ["kind", "e2e_ns"] and len(frame) == 40
    assert isinstance(frame["kind"].dtype, pd.CategoricalDtype)
    assert run.has("tasks") and not run.has("steps")


def test_sources_do_not_mix(tmp_path: Path, run: Run, queueing: ModuleType) -> None:
    assert load_runs(tmp_path).source() == "simulation"
    queueing.run(tmp_path / "live", queueing.Queue(rate=10, service_s=0.01, requests=5), source="live")
    with pytest.raises(DataError, match=r"different sources \(live, simulation\).*keep them in separate folders"):
        load_runs(tmp_path).source()


def test_no_such_folder_no_runs_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_runs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no runs"):
        load_runs(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        load_runs(tmp_path / "x.parquet")


def test_a_run_without_its_manifest(tmp_path: Path, run: Run) -> None:
    (run.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"r1/manifest\.json: missing"):
        load_runs(tmp_path)


def test_broken_tables_are_named(run: Run) -> None:
    path = run.folder / "requests.parquet"
    content = path.read_bytes()
    foreign = pa.table({"request": [1.5], "x": [2]})
    cases = {
        "empty": b"",
        "cut short": content[: len(content) // 2],
        "not ours": b"PAR1 but not really, PAR1",
    }
    for message, broken in cases.items():
        path.write_bytes(broken)
        with pytest.raises(DataError, match=message) as caught:
            run.table("requests")
        assert str(path) in str(caught.value)
    pq.write_table(foreign, path)
    with pytest.raises(DataError, match=r"column 'request' is double, expected int64"):
        run.table("requests")
    pq.write_table(pa.table({"x": [2]}), path)
    with pytest.raises(DataError, match="no column 'request'"):
        run.table("requests")
    path.unlink()
    with pytest.raises(DataError, match=r"requests\.parquet: missing"):
        run.table("requests")
