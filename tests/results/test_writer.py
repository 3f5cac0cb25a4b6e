"""Parquet files that stay bounded in memory, readable after an accident, and say what went wrong with the disk."""

from __future__ import annotations

import resource
from pathlib import Path
from types import ModuleType

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.results.recorder import RunRecorder
from sage_bench.results.writer import BUFFER_BYTES, StepWriter, TableWriter
from sage_core.commands import Reject
from sage_core.errors import OutputError
from sage_core.events import RequestArrived
from sage_core.slo import SloTable

SCHEMA = pa.schema([("n", pa.int64()), ("label", pa.dictionary(pa.int32(), pa.string()))])


def test_rows_come_back_with_labels_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.parquet"
    with TableWriter(path, SCHEMA, buffer_rows=2) as table:
        for row in [(1, "a"), (None, "b"), (3, None), (4, "a"), (5, "c")]:
            table.append(row)
    assert pq.read_table(path).schema.equals(SCHEMA)
    assert [tuple(row.values()) for row in pq.read_table(path).to_pylist()] == [
        (1, "a"),
        (None, "b"),
        (3, None),
        (4, "a"),
        (5, "c"),
    ]
    assert table.rows == 5
    assert pq.read_metadata(path).num_row_groups == 3
    table.close()  # again


def test_no_rows_is_a_file_with_columns(tmp_path: Path) -> None:
    TableWriter(tmp_path / "t.parquet", SCHEMA).close()
    assert pq.read_table(tmp_path / "t.parquet").schema.equals(SCHEMA)


def test_other_readers_see_the_same_values(tmp_path: Path, queueing: ModuleType) -> None:
    """The encodings are not pyarrow's defaults; nobody should need pyarrow to read a run."""
    queueing.run(tmp_path, queueing.Queue(rate=50, service_s=0.02, requests=300, queue_max=5, report_s=0.5))
    for name in ("requests", "tasks", "replicas"):
        expected = pq.read_table(tmp_path / f"{name}.parquet")
        found = duckdb.execute(f"SELECT * FROM '{tmp_path}/{name}.parquet'").fetchall()
        assert [tuple(row.values()) for row in expected.to_pylist()] == found
    encodings = pq.read_metadata(tmp_path / "requests.parquet").row_group(0)
    assert "DELTA_BINARY_PACKED" in encodings.column(0).encodings


def test_a_reader_may_skip_row_groups_by_time(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path, queueing.Queue(rate=50, service_s=0.01, requests=300), buffer_rows=100)
    groups = pq.read_metadata(tmp_path / "requests.parquet")
    columns = {groups.schema.column(i).name: i for i in range(groups.num_columns)}
    found = [groups.row_group(i).column(columns["scheduled_ns"]).statistics for i in range(groups.num_row_groups)]
    assert [each.min for each in found] == sorted(each.min for each in found)
    assert groups.row_group(0).column(columns["input_tokens"]).statistics is None


def test_the_log_is_flushed_by_bytes_too(tmp_path: Path) -> None:
    with StepWriter(tmp_path / "steps.parquet") as steps:
        for now in range(5):
            steps(now, bytes(BUFFER_BYTES // 2), bytes(16))
    table = pq.read_table(tmp_path / "steps.parquet")
    assert table["step"].to_pylist() == table["now"].to_pylist() == [0, 1, 2, 3, 4]
    assert pq.read_metadata(tmp_path / "steps.parquet").num_row_groups == 2
    assert steps.steps == 5


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "t.parquet").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"t\.parquet: cannot be written: No space left on device; free some space"):
        TableWriter(tmp_path / "t.parquet", SCHEMA)


def test_a_disk_that_fills_up_during_the_run(tmp_path: Path) -> None:
    def fill() -> None:
        with RunRecorder(tmp_path, {"chat": [("generate", "llm")]}, SloTable(), buffer_rows=1000) as recorder:
            for i in range(50_000):
                recorder(i, [RequestArrived(i, "chat", 0, f"t{i}", 0, 1, 1, i)], [Reject(i, "no", 1)])

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 2**10, hard))
    try:
        with pytest.raises(
            OutputError, match=r"requests\.parquet: cannot be written: File too large; raise the file size"
        ):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pq.read_table(tmp_path / "tasks.parquet").num_rows == 0, "the other files are closed and readable"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file/run.*cannot be written.*choose another output folder"):
        TableWriter(tmp_path / "file" / "run" / "t.parquet", SCHEMA)


def test_an_exception_inside_leaves_a_valid_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TableWriter(tmp_path / "t.parquet", SCHEMA, buffer_rows=2) as table:
            for n in range(3):
                table.append((n, "x"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert pq.read_table(tmp_path / "t.parquet")["n"].to_pylist() == [0, 1, 2]
