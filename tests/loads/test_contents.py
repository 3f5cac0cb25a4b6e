"""What prompts share, from traces and from classes, on the backends' side of the oracle boundary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sage_bench.loads import Fixed, OpenLoop, RequestClass, TraceLoad, Uniform
from sage_bench.loads.mix import BLOCK_TOKENS
from sage_core.errors import ConfigError, DataError
from sage_core.load import Arrival, ColumnLoad, Contents
from sage_core.rng import Streams
from sage_core.slo import SloTable

WriteTrace = Callable[..., Path]


def blocks(path: Path) -> list[Contents | None]:
    load = TraceLoad(str(path), streams=Streams(1), slo=SloTable({}))
    return [arrival.contents for arrival in load.arrivals()]


def mixed(*, prefixes: int, prefix_tokens: int, low: int = 40, high: int = 200) -> OpenLoop:
    chat = RequestClass(
        "chat", input_tokens=Uniform(low, high), output_tokens=Fixed(5), output_tokens_max=8, prefixes=prefixes,
        prefix_tokens=prefix_tokens, share=0.5,
    )  # fmt: skip
    plain = RequestClass("chat", input_tokens=Fixed(100), output_tokens=Fixed(5), output_tokens_max=8)
    return OpenLoop(10.0, {"shared": chat, "plain": plain}, requests=400, streams=Streams(3), slo=SloTable({}))


def test_a_trace_states_its_blocks_and_no_more_than_the_prompt_fills(write_trace: WriteTrace) -> None:
    ids = pa.array([[4, 5, 6], [4, 9], [], None], pa.list_(pa.int32()))
    path = write_trace(
        arrival_s=[0.0, 1.0, 2.0, 3.0], prompt_tokens=[1100, 1024, 600, 700], output_tokens=[3] * 4, hash_ids=ids,
        metadata={"hash_block_tokens": "512"},
    )  # fmt: skip
    # The third block of the first prompt is a part of one: 1,100 tokens fill two.
    assert blocks(path) == [Contents(512, (4, 5)), Contents(512, (4, 9)), None, None]


def test_blocks_of_no_stated_length_say_nothing(write_trace: WriteTrace) -> None:
    ids = pa.array([[4, 5], [4, 9]], pa.list_(pa.int32()))
    path = write_trace(arrival_s=[0.0, 1.0], prompt_tokens=[900, 900], output_tokens=[3, 3], hash_ids=ids)
    assert blocks(path) == [None, None]


@pytest.mark.parametrize(
    ("metadata", "told"),
    [(None, "is missing"), ({"hash_block_tokens": "x"}, "is 'x'"), ({"hash_block_tokens": "-64"}, "is '-64'")],
)
def test_blocks_of_no_stated_length_are_told(
    write_trace: WriteTrace, metadata: dict[str, str] | None, told: str
) -> None:
    ids = pa.array([[4, 5], None, [4, 9]], pa.list_(pa.int32()))
    path = write_trace(hash_ids=ids, metadata=metadata)
    (note,) = TraceLoad(str(path), streams=Streams(1), slo=SloTable({})).notes
    assert "2 rows have hash_ids" in note and f"hash_block_tokens {told}" in note and str(path) in note


@pytest.mark.parametrize(
    ("ids", "metadata"),
    [(pa.nulls(2, pa.list_(pa.int32())), None), (pa.array([[4], [4]]), {"hash_block_tokens": "16"})],
)
def test_nothing_is_told_of_no_blocks_or_stated_ones(
    write_trace: WriteTrace, ids: pa.Array, metadata: dict[str, str] | None
) -> None:
    path = write_trace(hash_ids=ids, metadata=metadata)
    assert TraceLoad(str(path), streams=Streams(1), slo=SloTable({})).notes == []


def test_a_bad_block_late_in_a_trace_stops_the_load_before_it_begins(write_trace: WriteTrace) -> None:
    path = write_trace(hash_ids=pa.array([[4], [4], [4], [2**31]], pa.list_(pa.int64())))
    with pytest.raises(DataError, match=r"row 3 \(from 0\), column hash_ids"):
        TraceLoad(str(path), streams=Streams(1), slo=SloTable({}))


def test_a_negative_block_is_named(write_trace: WriteTrace) -> None:
    ids = pa.array([[4, 5], [4, -9]], pa.list_(pa.int32()))
    path = write_trace(
        arrival_s=[0.0, 1.0], prompt_tokens=[900, 900], output_tokens=[3, 3], hash_ids=ids,
        metadata={"hash_block_tokens": "16"},
    )  # fmt: skip
    with pytest.raises(
        DataError, match=r"row 1 \(from 0\), column hash_ids: expected block ids from 0 to 2\^31-1, found -9"
    ):
        blocks(path)


def test_requests_of_one_prefix_share_its_blocks(tmp_path: Path) -> None:
    found = list(mixed(prefixes=3, prefix_tokens=64).arrivals())
    shared = [arrival for arrival in found if arrival.request.prefix]
    assert len(shared) > 100
    of_prefix: dict[int, set[int]] = {}
    for arrival in shared:
        assert arrival.contents is not None
        assert arrival.contents.block_tokens == 16
        assert len(arrival.contents.blocks) == min(arrival.request.input_tokens, 64) // 16
        of_prefix.setdefault(arrival.request.prefix, set()).update(arrival.contents.blocks)
    assert {prefix: len(ids) for prefix, ids in of_prefix.items()} == {1: 4, 2: 4, 3: 4}
    assert not set.intersection(*of_prefix.values())
    assert all(arrival.contents is None for arrival in found if not arrival.request.prefix)


def test_a_prompt_shorter_than_a_block_shares_nothing() -> None:
    found = list(mixed(prefixes=2, prefix_tokens=64, low=3, high=15).arrivals())
    assert all(arrival.contents is None for arrival in found)


@pytest.mark.parametrize("prefix_tokens", [0, 64])
def test_columns_are_the_arrivals(prefix_tokens: int) -> None:
    load = mixed(prefixes=3, prefix_tokens=prefix_tokens)
    assert isinstance(load, ColumnLoad)
    rows: list[Arrival] = []
    for c in load.columns():
        for i, at in enumerate(c.at.tolist()):
            row: Any = (
                c.first + i, c.pipelines[c.pipeline[i]], c.kind[i], c.tenants[c.tenant[i]], c.priority[i],
                c.input_tokens[i], c.output_tokens_max[i], at, c.ttft_due_at[i], c.due_at[i], c.prefix[i],
                c.output_tokens[i], None if c.contents is None else c.contents[i],
            )  # fmt: skip
            rows.append(row)
    arrivals = [
        (
            a.request.request, a.request.pipeline, a.request.kind, a.request.tenant, a.request.priority,
            a.request.input_tokens, a.request.output_tokens_max, a.at, a.request.ttft_due_at, a.request.due_at,
            a.request.prefix, a.output_tokens, a.contents,
        )
        for a in load.arrivals()
    ]  # fmt: skip
    assert rows == arrivals
    assert np.any([row[-1] is not None for row in arrivals]) == bool(prefix_tokens)


@pytest.mark.parametrize("tokens", [1, BLOCK_TOKENS - 1])
def test_a_prefix_of_less_than_a_block_is_a_mistake(tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"prefix_tokens: {tokens} is less than one block.* at least 16, or 0"):
        RequestClass("chat", prefixes=2, prefix_tokens=tokens)
    RequestClass("chat", prefixes=2, prefix_tokens=BLOCK_TOKENS)


def test_tokens_of_no_prefix_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"load\.classes\.prefix_tokens: .*set load\.classes\.<name>\.prefixes too"):
        RequestClass("chat", prefix_tokens=64)
