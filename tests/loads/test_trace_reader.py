"""Reading traces: every way a file can be broken gives one message with row, column, expectation and advice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.traces import reader
from sage_bench.traces.blocks import BadId, block_tokens, read_blocks
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


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int8()),
        pa.list_(pa.int64()),
        pa.large_list(pa.int32()),
        pa.large_list(pa.uint64()),
        pa.list_(pa.int32(), 2),
        pa.list_(pa.uint16(), 2),
    ],
    ids=str,
)
def test_any_list_of_integers_is_blocks(
    kind: pa.DataType, write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, over batches that begin within the file, with rows that have none."""
    monkeypatch.setattr(reader, "BATCH_ROWS", 2)
    path = write_trace(
        hash_ids=pa.array([[7, 8], None, [7, 9], None, [0, 3]], kind), metadata={"hash_block_tokens": "32"}
    )
    rows = list(Trace(path).rows(contents=True))
    assert len(rows) > 1
    assert np.concatenate([each.prefix for each in rows]).tolist() == [8, 0, 8, 0, 1]
    assert [each and each.blocks for part in rows for each in part.contents] == [(7, 8), None, (7, 9), None, (0, 3)]


@pytest.mark.parametrize("blocks", [pa.nulls(4), pa.array([[], None, [], []])], ids=["nulls", "empty"])
def test_a_column_without_any_block_is_none(blocks: pa.Array, write_trace: WriteTrace) -> None:
    path = write_trace(hash_ids=blocks, metadata={"hash_block_tokens": "32"})
    (rows,) = Trace(path).rows(contents=True)
    assert rows.prefix.tolist() == [0] * 4 and rows.contents.tolist() == [None] * 4


IDS = st.lists(st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=4), min_size=1, max_size=12)


@given(IDS, st.integers(0, 12))
def test_blocks_are_those_of_the_lists(lists: list[list[int] | None], cut: int) -> None:
    """Also for a slice, whose buffers begin before it."""
    kept = lists[cut:]
    found = read_blocks(pa.array(lists, pa.list_(pa.int64()))[cut:])
    assert len(found.start) == len(kept) + 1
    assert [found.ids[a:b].tolist() for a, b in itertools.pairwise(found.start)] == [each or [] for each in kept]


@given(IDS, st.sampled_from([None, -1, -(2**40), 2**31, 2**63 - 1]), st.data())
def test_the_first_bad_id_is_found(lists: list[list[int] | None], bad: int | None, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(lists) - 1))
    ids: list[int | None] = [*(lists[row] or [])]
    ids.insert(data.draw(st.integers(0, len(ids))), bad)
    broken: list[Any] = [*lists[:row], ids, *lists[row + 1 :]]
    with pytest.raises(BadId) as caught:
        read_blocks(pa.array(broken, pa.list_(pa.int64())))
    assert (caught.value.row, caught.value.found) == (row, bad)


@pytest.mark.parametrize(
    ("stated", "tokens"),
    [("16", 16), ("512", 512), ("", 0), ("0", 0), ("-64", 0), ("x", 0), ("²", 0), ("1.5", 0), ("9" * 5000, 0)],
)
def test_tokens_of_a_block_are_a_number_from_1(stated: str, tokens: int) -> None:
    assert block_tokens(stated) == tokens


def test_a_scan_checks_blocks_where_they_are_used(write_trace: WriteTrace) -> None:
    path = write_trace(hash_ids=pa.array([[1], [2], None, [-1]], pa.list_(pa.int32())))
    assert Trace(path).scan().rows == 4
    assert Trace(write_trace(hash_ids=pa.array([[1], [], None, [2]]), name="good")).scan(prefix=True).with_blocks == 2
    with pytest.raises(DataError, match=r"row 3 \(from 0\), column hash_ids: .* found -1"):
        Trace(path).scan(prefix=True)


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
        r"row 1 .*, column hash_ids: expected block ids from 0 to 2\^31-1, found -4; renumber them",
    ),
    "negative block later": (
        {"hash_ids": pa.array([[1], None, [3, 2, -9]], pa.list_(pa.int32()))},
        r"row 2 .*, column hash_ids: .* found -9; renumber",
    ),
    "64-bit hash": (
        {"hash_ids": pa.array([[1], [5, 2**62]], pa.list_(pa.int64()))},
        r"row 1 .*, column hash_ids: .* found 4611686018427387904; renumber",
    ),
    "unsigned hash": (
        {"hash_ids": pa.array([[], [2**64 - 1]], pa.large_list(pa.uint64()))},
        r"row 1 .*, column hash_ids: .* found 18446744073709551615; renumber",
    ),
    "one more than the last id": (
        {"hash_ids": pa.array([[2**31 - 1, 2**31]], pa.list_(pa.int64()))},
        r"row 0 .*, column hash_ids: .* found 2147483648; renumber",
    ),
    "no first block": (
        {"hash_ids": pa.array([[1], [None, 2]], pa.list_(pa.int32()))},
        r"row 1 .*, column hash_ids: .* found nothing; renumber",
    ),
    "a block missing": (
        {"hash_ids": pa.array([None, [], [1, None]], pa.list_(pa.int32()))},
        r"row 2 .*, column hash_ids: .* found nothing; renumber",
    ),
    "blocks of text": (
        {"hash_ids": [["a"], ["b"]]},
        r"column hash_ids: expected type list of int32 \(block ids\), found list<.*string>; convert",
    ),
    "fractional blocks": ({"hash_ids": [[1.0], [2.0]]}, r"column hash_ids: expected type .*, found list<.*double>"),
    "no lists": ({"hash_ids": [1, 2]}, r"column hash_ids: expected type .*, found int64"),
    "an instant of 19 digits": ({"arrival_s": [0, 2**63 - 1]}, r"row 1 .*, column arrival_s: .* found 9\.22\d+e\+18"),
    "tokens beyond int64": (
        {"prompt_tokens": pa.array([1, 2**64 - 1], pa.uint64())},
        r"row 1 .*, column prompt_tokens: .* found 18446744073709551615",
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
