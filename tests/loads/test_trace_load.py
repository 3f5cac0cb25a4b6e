"""Traces as loads: scaling, windows, labels, embeddings mixed in, and a cap that gives nothing away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sage_bench.loads import Fixed, OnOff, OpenLoop, Poisson, RequestClass, TraceArrivals, TraceLoad, Uniform
from sage_bench.traces import reader
from sage_core.errors import ConfigError, DataError
from sage_core.load import Arrival
from sage_core.rng import Streams
from sage_core.slo import Slo, SloTable
from sage_core.units import NEVER, SECOND, RequestKind

WriteTrace = Callable[..., Path]
QUERY = RequestClass("embedding", input_tokens=Uniform(5, 9), tenants="search")


def load(path: Path, *, seed: int = 1, **changes: Any) -> TraceLoad:
    return TraceLoad(str(path), streams=Streams(seed), slo=SloTable({"chat": Slo(ttft_s=1.0)}), **changes)


def arrivals(path: Path, **changes: Any) -> list[Arrival]:
    found = list(load(path, **changes).arrivals())
    assert [a.request.request for a in found] == list(range(len(found)))
    assert all(a.at <= b.at for a, b in pairwise(found))
    assert all(a.request.scheduled_at == a.at for a in found)
    return found


def test_rows_become_requests(write_trace: WriteTrace) -> None:
    kinds, outputs = ["chat", "generation", "embedding"], pa.array([44, 5, 0], pa.int32())
    blocks = pa.array([[3], None, [0, 1]], pa.list_(pa.int32()))
    path = write_trace(kind=kinds, output_tokens=outputs, arrival_s=[0.0, 0.25, 1.5], hash_ids=blocks)
    found = arrivals(path)
    assert [a.at for a in found] == [0, SECOND // 4, 3 * SECOND // 2]
    assert [a.request.pipeline for a in found] == ["chat", "generate", "embed"]
    assert [a.request.kind for a in found] == [RequestKind.LLM_CHAT, RequestKind.LLM_GENERATE, RequestKind.EMBEDDING]
    assert [a.request.input_tokens for a in found] == [100, 101, 102]
    assert [a.output_tokens for a in found] == [44, 5, 0]
    assert [a.request.output_tokens_max for a in found] == [64, 8, 0]
    assert [a.request.prefix for a in found] == [4, 0, 1]
    assert [a.request.ttft_due_at for a in found] == [SECOND, NEVER, NEVER]
    assert load(path).ended(5, 0) is None


def test_scale_window_and_limits(write_trace: WriteTrace) -> None:
    path = write_trace(arrival_s=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert [a.at for a in arrivals(path, rate_scale=2.0)] == [k * SECOND // 2 for k in range(6)]
    assert [a.at for a in arrivals(path, window_s=(1.0, 4.0))] == [0, SECOND, 2 * SECOND]
    assert [a.request.input_tokens for a in arrivals(path, window_s=(1.0, 4.0))] == [101, 102, 103]
    assert [a.at for a in arrivals(path, window_s=(0.5, 4.0), rate_scale=0.5)] == [SECOND, 3 * SECOND, 5 * SECOND]
    assert len(arrivals(path, limit=4)) == 4
    assert len(arrivals(path, requests=2)) == 2
    assert len(arrivals(path, duration_s=2.0)) == 2
    assert len(arrivals(path, limit=100)) == 6


def test_batches_of_the_file_do_not_show(write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.cumsum(Streams(3).stream("t").standard_exponential(500)).tolist()
    path = write_trace(arrival_s=times)
    changes: dict[str, Any] = {
        "embedding_share": 0.4,
        "embedding": QUERY,
        "classes": {"chat": RequestClass("chat", None, {"a": 0.5, "b": 0.5})},
    }
    whole = arrivals(path, **changes)
    monkeypatch.setattr(reader, "BATCH_ROWS", 7)
    assert arrivals(path, **changes) == whole
    limited = arrivals(path, limit=100, **changes)
    assert sum(a.request.kind == RequestKind.LLM_CHAT for a in limited) == 100
    assert limited == whole[: len(limited)]


def test_embeddings_follow_the_trace(write_trace: WriteTrace) -> None:
    # Busy for 100 s, idle for 900 s: embeddings are busy when the trace is.
    times = [*np.linspace(0, 100, 9000, endpoint=False).tolist(), *np.linspace(100, 1000, 1000).tolist()]
    found = arrivals(write_trace(arrival_s=times), embedding_share=0.3, embedding=QUERY)
    added = [a for a in found if a.request.kind == RequestKind.EMBEDDING]
    assert len(added) / len(found) == pytest.approx(0.3, abs=0.01)
    assert sum(a.at < 100 * SECOND for a in added) / len(added) == pytest.approx(0.9, abs=0.02)
    assert {a.request.tenant for a in added} == {"search"}
    assert {a.request.pipeline for a in added} == {"embed"}


def test_embeddings_may_have_a_process_of_their_own(write_trace: WriteTrace) -> None:
    times = [*np.linspace(0, 100, 9000, endpoint=False).tolist(), *np.linspace(100, 1000, 1000).tolist()]
    for process in (Poisson(), OnOff(1.0, 4.0)):
        own = RequestClass("embedding", input_tokens=Fixed(7), arrivals=process)
        found = arrivals(write_trace(arrival_s=times), embedding_share=0.3, embedding=own)
        added = [a for a in found if a.request.kind == RequestKind.EMBEDDING]
        assert len(added) / len(found) == pytest.approx(0.3, abs=0.01)
        assert sum(a.at < 100 * SECOND for a in added) / len(added) == pytest.approx(0.1, abs=0.02)
        assert found[-1].at == 1000 * SECOND


def test_adding_embeddings_moves_no_row(write_trace: WriteTrace) -> None:
    path = write_trace(arrival_s=[0.1 * i for i in range(300)])
    labelled = {"web": RequestClass("chat", None, {"a": 0.5, "b": 0.5})}
    plain = arrivals(path, classes=labelled)
    mixed = [a for a in arrivals(path, classes=labelled, embedding_share=0.5, embedding=QUERY) if a.request.kind == 0]
    facts = [[(a.at, a.request.tenant, a.request.input_tokens) for a in found] for found in (plain, mixed)]
    assert facts[0] == facts[1]
    assert len({tenant for _, tenant, _ in facts[0]}) == 2


def test_rows_of_a_kind_are_split_over_its_classes(write_trace: WriteTrace) -> None:
    path = write_trace(arrival_s=[0.01 * i for i in range(5000)], output_tokens=pa.array([9] * 5000, pa.int32()))
    classes = {
        "web": RequestClass("chat", None, "web", priority=0),
        "jobs": RequestClass("chat", 0.25, "jobs", priority=2, pipeline="rag", output_tokens_max=100),
    }
    seen = Counter(
        (a.request.tenant, a.request.priority, a.request.pipeline, a.request.output_tokens_max)
        for a in arrivals(path, classes=classes)
    )
    assert sorted(seen) == [("jobs", 2, "rag", 100), ("web", 0, "chat", 16)]
    assert seen["jobs", 2, "rag", 100] / 5000 == pytest.approx(0.25, abs=0.02)


def test_the_cap_is_one_number_a_kind(write_trace: WriteTrace) -> None:
    path = write_trace(output_tokens=pa.array([1, 900, 40, 1025], pa.int32()))
    assert {a.request.output_tokens_max for a in arrivals(path)} == {2048}
    assert {a.request.output_tokens_max for a in arrivals(path, window_s=(0.0, 1.5))} == {1024}
    with pytest.raises(
        ConfigError, match=r"load\.classes\.web\.output_tokens_max: 1000 is below the longest chat output .* 1025"
    ):
        load(path, classes={"web": RequestClass("chat", None, output_tokens_max=1000)})


def test_a_broken_row_is_found_before_the_run(write_trace: WriteTrace) -> None:
    path = write_trace(arrival_s=[0.0, 1.0, 2.0, 0.5])
    with pytest.raises(DataError, match="row 3"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rate_scale": 0.0}, r"load\.rate_scale"),
        ({"rate_scale": 1e-10}, r"load\.rate_scale: 1e-10 stretches the trace"),
        (
            {"embedding_share": 0.5, "embedding": QUERY, "classes": {"embedding": RequestClass("chat")}},
            "the name is taken",
        ),
        ({"window_s": (5.0, 5.0)}, r"load\.window_s\[1\]"),
        ({"window_s": (90.0, 95.0)}, r"load\.window_s: no request in .* ends at 1.500 s"),
        ({"window_s": (1.0,)}, r"load\.window_s: expected \[from, to\]"),
        ({"limit": 0}, r"load\.limit"),
        ({"embedding_share": 1.0, "embedding": QUERY}, r"load\.embedding_share"),
        ({"embedding_share": 0.5}, r"load\.embedding: expected a request class"),
        ({"embedding_share": 0.5, "embedding": RequestClass("embedding")}, r"load\.classes\.embedding\.input_tokens"),
        (
            {"classes": {"web": RequestClass("chat", input_tokens=Fixed(5))}},
            r"load\.classes\.web: the trace brings lengths",
        ),
        ({"classes": {"web": RequestClass("chat", 0.5)}}, "shares must sum to 1"),
    ],
)
def test_bad_arguments_name_the_key(changes: dict[str, Any], says: str, write_trace: WriteTrace) -> None:
    with pytest.raises(ConfigError, match=says):
        load(write_trace(), **changes)


def test_a_trace_with_embeddings_takes_no_others(write_trace: WriteTrace) -> None:
    path = write_trace(kind=["chat", "embedding"], output_tokens=pa.array([5, 0], pa.int32()))
    with pytest.raises(ConfigError, match=r"has 1 embedding requests of its own; set load\.embedding_share=0"):
        load(path, embedding_share=0.3, embedding=QUERY)


def test_a_trace_as_an_arrival_process(write_trace: WriteTrace) -> None:
    path = write_trace(arrival_s=[3.0, 3.0, 4.0, 7.0, 8.0])
    process = TraceArrivals(str(path))
    mix = {"e": RequestClass("embedding", 1.0, input_tokens=Fixed(3))}
    of = OpenLoop(2.0, mix, process, requests=5000, streams=Streams(1), slo=SloTable())
    at = np.array([a.at for a in of.arrivals()]) / SECOND
    assert at[-1] / 5000 == pytest.approx(0.5, rel=0.001)
    # Five arrivals in five seconds with their closing gap of 1.25 s become five in 2.5 s.
    assert at[:7] == pytest.approx(np.array([0.0, 0.0, 1.0, 4.0, 5.0, 6.25, 6.25]) * 0.4)
    assert of.files() == [str(path)]
    with pytest.raises(DataError, match="at least two instants"):
        TraceArrivals(str(path), kind="embedding")


def test_files_are_named_for_the_manifest(write_trace: WriteTrace) -> None:
    path = write_trace()
    assert load(path).files() == [str(path)]


def test_the_measured_hour_in_full(measured: Path) -> None:
    path = measured / "trace_azure2023_conv.parquet"
    found = arrivals(path, embedding_share=0.3, embedding=QUERY)
    assert sum(a.request.kind == RequestKind.LLM_CHAT for a in found) == 19_366
    assert (len(found) - 19_366) / len(found) == pytest.approx(0.3, abs=0.01)
    assert {a.request.output_tokens_max for a in found if a.request.kind == RequestKind.LLM_CHAT} == {1024}
