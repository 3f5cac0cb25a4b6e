"""Reading traces: every way a file can be broken gives one message with row, column, expectation and advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.traces import reader
from sage_bench.traces.reader import Trace
from sage_core.errors import DataError

WriteTrace = Callable[..., Path]


def read(path: Path) -> int:
    return sum(len(rows.arrival_s) for rows in Trace(path).rows(prefix=True))


def test_a_whole_trace_comes_in_batches(write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BATCH_ROWS", 3)
    kinds = ["chat", "generation", "embedding"] * 4
    outputs = pa.array([5, 6, 0] * 4, pa.int32())
    path = write_trace(kind=pa.array(kinds).dictionary_encode(), output_tokens=outputs, row_group=5)
    batches = list(Trace(path).rows())
    assert len(batches) > 3
    assert [rows.first for rows in batches] == np.cumsum([0] + [len(rows.kind) for rows in batches])[:-1].tolist()
    assert np.concatenate([rows.kind for rows in batches]).tolist() == [0, 1, 2] * 4
    summary = Trace(path).scan()
    assert (summary.rows, summary.first_s, summary.last_s) == (12, 0.0, 5.5)
    assert summary.rows_of == {"chat": 4, "generation": 4, "embedding": 4}
    assert summary.output_tokens_max == {"chat": 5, "generation": 6, "embedding": 0}


def test_a_window_is_half_open_and_stops_reading(write_trace: WriteTrace) -> None:
    path = write_trace(arrival_s=[0.0, 1.0, 2.0, 3.0, 4.0])
    assert [rows.arrival_s.tolist() for rows in Trace(path).rows((1.0, 3.0))] == [[1.0, 2.0]]
    assert list(Trace(path).rows((0.2, 0.8))) == []
    assert Trace(path).scan((1.0, 9.0)).rows == 4


def test_prefix_is_the_first_block(write_trace: WriteTrace) -> None:
    blocks = pa.array([[7, 8], [], None, [0]], pa.list_(pa.int32()))
    path = write_trace(hash_ids=blocks)
    assert next(Trace(path).rows(prefix=True)).prefix.tolist() == [8, 0, 0, 1]
    assert next(Trace(path).rows()).prefix.tolist() == [0, 0, 0, 0]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "missing column": ({"drop": "output_tokens"}, "column output_tokens is missing; expected arrival_s"),
    "text for a number": (
        {"arrival_s": ["a", "b"]},
        r"column arrival_s: expected type float64 \(seconds\), found string",
    ),
    "float tokens": ({"prompt_tokens": [1.5, 2.0]}, "column prompt_tokens: expected type int32"),
    "number for a kind": ({"kind": [1, 2]}, "column kind: expected type string, found int64"),
    "unsorted": (
        {"arrival_s": [0.0, 2.0, 1.0]},
        r"row 2 \(from 0\), column arrival_s: expected no less than the row before \(2.0\), found 1.0; sort",
    ),
    "not a number": (
        {"arrival_s": [0.0, math.nan]},
        r"row 1 \(from 0\), column arrival_s: expected a finite .* found nan",
    ),
    "infinite": ({"arrival_s": [0.0, math.inf]}, r"row 1 .* found inf"),
    "negative time": ({"arrival_s": [-1.0, 0.0]}, r"row 0 .*, column arrival_s: .* at least 0, found -1.0"),
    "null": ({"arrival_s": [0.0, None]}, r"row 1 .*, column arrival_s: expected a value in every row, found nothing"),
    "null kind": ({"kind": ["chat", None]}, r"row 1 .*, column kind: expected a value in every row"),
    "no prompt": (
        {"prompt_tokens": pa.array([3, 0], pa.int32())},
        r"row 1 .*, column prompt_tokens: .* at least 1, found 0",
    ),
    "negative tokens": (
        {"output_tokens": pa.array([3, -5], pa.int64())},
        r"row 1 .*, column output_tokens: .* at least 1 .* found -5",
    ),
    "silent chat": (
        {"output_tokens": pa.array([0], pa.int32())},
        r"row 0 .*, column output_tokens: expected at least 1 for chat",
    ),
    "talking embedding": (
        {"kind": ["embedding"]},
        r"row 0 .*, column output_tokens: expected 0 for an embedding, found 10",
    ),
    "unknown kind": (
        {"kind": ["chat", "image"]},
        r"row 1 .*, column kind: expected one of chat, generation, embedding, found 'image'",
    ),
    "negative block": (
        {"hash_ids": pa.array([[1], [-4]], pa.list_(pa.int32()))},
        r"row 1 .*, column hash_ids: expected block ids of at least 0",
    ),
    "no rows": (
        {
            "arrival_s": pa.array([], pa.float64()),
            "prompt_tokens": pa.array([], pa.int32()),
            "output_tokens": pa.array([], pa.int32()),
            "kind": pa.array([], pa.string()),
        },
        "zero rows; expected at least one",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_traces(name: str, write_trace: WriteTrace) -> None:
    columns, says = BROKEN[name]
    path = write_trace(**columns)
    with pytest.raises(DataError, match=says) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value)  # what to do


def test_the_row_number_counts_over_batches(write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BATCH_ROWS", 4)
    times = [float(i) for i in range(20)]
    times[12] = 10.5  # row 12 begins a batch: it is compared with the last row of the one before
    with pytest.raises(
        DataError, match=r"row 12 \(from 0\), column arrival_s: expected no less than the row before \(11.0\)"
    ):
        read(write_trace(arrival_s=times))


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such trace file; .*sage trace import"):
        Trace(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no such trace file"):
        Trace(tmp_path)
    text = tmp_path / "trace.csv"
    text.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(DataError, match=r"not a Parquet file .*convert CSV"):
        Trace(text)
    (tmp_path / "empty.parquet").touch()
    with pytest.raises(DataError, match="not a Parquet file"):
        Trace(tmp_path / "empty.parquet")


def test_damage_in_the_middle_is_reported(tmp_path: Path) -> None:
    n = 200_000
    times = np.arange(n) + np.random.Generator(np.random.PCG64(1)).random(n)  # does not compress away
    tokens = pa.array(np.full(n, 5, np.int32))
    path = tmp_path / "trace.parquet"
    table = pa.table({"arrival_s": times, "prompt_tokens": tokens, "output_tokens": tokens, "kind": ["chat"] * n})
    pq.write_table(table, path, row_group_size=50_000, use_dictionary=False, compression="zstd")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"trace\.parquet: (cannot be read beyond row \d+|row \d+)"):
        read(path)
