"""Small trace files written by hand, and the measured ones where they are present."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MEASURED = Path(__file__).resolve().parents[3] / "shared" / "data"

WriteTrace = Callable[..., Path]


@pytest.fixture
def write_trace(tmp_path: Path) -> WriteTrace:
    """``write_trace(arrival_s=..., kind=..., ...)``: a trace file of the given columns, the others filled in."""

    def write(
        name: str = "trace.parquet",
        *,
        drop: str = "",
        row_group: int = 1000,
        metadata: Mapping[str, str] | None = None,
        **columns: Any,
    ) -> Path:
        n = max((len(column) for column in columns.values()), default=4)
        given: Mapping[str, Any] = {
            "arrival_s": [0.5 * i for i in range(n)],
            "prompt_tokens": pa.array([100 + i for i in range(n)], pa.int32()),
            "output_tokens": pa.array([10 + i for i in range(n)], pa.int32()),
            "kind": ["chat"] * n,
            **columns,
        }
        path = tmp_path / name
        table = pa.table({key: value for key, value in given.items() if key != drop}, metadata=metadata)
        pq.write_table(table, path, row_group_size=row_group)
        return path

    return write


@pytest.fixture
def measured() -> Path:
    """The folder of measured traces; skips where it is absent."""
    if not (MEASURED / "trace_azure2023_conv.parquet").is_file():
        pytest.skip("measured traces are not part of the repository: ../shared/data is absent")
    return MEASURED
