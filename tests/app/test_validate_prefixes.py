"""The blocks that prompts share: those that the trace states, and of these requests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.validate.measured import MeasuredRun, read_run
from sage_bench.validate.prefixes import find_prefix_trace, read_prefixes
from sage_core.errors import DataError
from sage_core.load import Contents

PROMPTS = (70, 33, 15)


@pytest.fixture
def run(tmp_path: Path) -> MeasuredRun:
    i = np.arange(3.0)
    columns = {"arrival_s": i, "queued_s": i, "scheduled_s": i, "first_token_s": i + 1, "last_token_s": i + 2}
    pq.write_table(pa.table(columns | {"prompt_tokens": PROMPTS, "output_tokens": [5, 5, 5]}), tmp_path / "run.parquet")
    return read_run(tmp_path / "run.parquet")


def trace(folder: Path, block: int | str | None = 16, **columns: Any) -> Path:
    whole = {"prompt_tokens": PROMPTS, "hash_ids": [[7, 8, 9, 4], [7, 2], []]} | columns
    table = pa.table({name: pa.array(values) for name, values in whole.items() if values is not None})
    metadata = {} if block is None else {"hash_block_tokens": str(block)}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "trace.parquet")
    return folder / "trace.parquet"


@pytest.mark.parametrize("block", [8, 16])
def test_blocks_are_those_of_the_trace(tmp_path: Path, run: MeasuredRun, block: int) -> None:
    found = read_prefixes(trace(tmp_path, block, hash_ids=[[7, 8, 9, 4], [7, 2], None]), run)
    assert found == [Contents(block, (7, 8, 9, 4)), Contents(block, (7, 2)), Contents(block, ())]


@pytest.mark.parametrize("kind", [pa.large_list(pa.int64()), pa.list_(pa.uint8(), 2)], ids=str)
def test_any_list_of_integers_is_blocks(tmp_path: Path, run: MeasuredRun, kind: pa.DataType) -> None:
    found = read_prefixes(trace(tmp_path, hash_ids=pa.array([[7, 8], [7, 2], None], kind)), run)
    assert [each.blocks for each in found] == [(7, 8), (7, 2), ()]


@pytest.mark.parametrize(("ids", "taken"), [([[1], [1], []], True), ([["a"], ["a"], []], False)])
def test_a_trace_is_found_where_its_blocks_can_be_used(
    tmp_path: Path, run: MeasuredRun, ids: list[Any], taken: bool
) -> None:
    path = trace(tmp_path, hash_ids=ids, output_tokens=[5, 5, 5])
    assert find_prefix_trace(run, 16) == (path if taken else None)


@pytest.mark.parametrize(
    ("block", "columns", "told"),
    [
        (None, {}, "hash_block_tokens, found nothing"),
        (0, {}, "hash_block_tokens, found 0"),
        ("²", {}, "hash_block_tokens, found ²"),
        (16, {"hash_ids": None}, "hash_ids"),
        (16, {"prompt_tokens": [70, 34, 15]}, "row 1 (from 0) has 34 prompt tokens"),
        (16, {"prompt_tokens": [70, 33], "hash_ids": [[], []]}, "2 rows, but"),
        (
            16,
            {"hash_ids": [[1, 2, 3, 4, 5], [], []]},
            "row 0 (from 0), column hash_ids: expected ids of the 4 full",
        ),
        (
            16,
            {"hash_ids": [[], [-1], []]},
            "row 1 (from 0), column hash_ids: expected block ids from 0 to 2^31-1, found -1",
        ),
        (
            16,
            {"hash_ids": [[], [3, 2**62], []]},
            "row 1 (from 0), column hash_ids: expected block ids from 0 to 2^31-1",
        ),
        (16, {"hash_ids": [[], [3, None], []]}, "found nothing; renumber them"),
        (16, {"hash_ids": [["a"], [], []]}, "column hash_ids: expected type list of int32"),
        (16, {"hash_ids": [[1.0], [], []]}, "column hash_ids: expected type list of int32"),
    ],
)
def test_other_traces_are_refused(
    tmp_path: Path, run: MeasuredRun, block: int | str | None, columns: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError) as refused:
        read_prefixes(trace(tmp_path, block, **columns), run)
    assert told in str(refused.value) and "trace.parquet" in str(refused.value)
