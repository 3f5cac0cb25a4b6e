"""RunRecorder: the life of a request as a row, conservation, and what a correct plane can never do."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_bench.results.recorder import RunRecorder
from sage_bench.results.schema import OUTCOMES
from sage_core.commands import Cancel, Dispatch, Fail, Reject, Respond, Task
from sage_core.errors import ConfigError, InvariantViolation
from sage_core.events import (
    ReplicaJoined,
    ReplicaLeft,
    ReplicaReported,
    RequestArrived,
    RequestCancelled,
    TaskFailed,
    TaskFinished,
    TokensProduced,
)
from sage_core.slo import Slo, SloTable
from sage_core.units import MILLISECOND, PoolKind, RequestKind, task_id

MS = MILLISECOND
PIPELINES = {
    "chat": [("generate", "llm")],
    "embed": [("embed", "embed")],
    "rag": [("embed", "embed"), ("generate", "llm")],
}
SLO = SloTable({"chat": Slo(ttft_s=0.1, tpot_s=0.01), "embedding": Slo(e2e_s=0.2), "chat/1": Slo()})
JOINED = [
    ReplicaJoined(0, "llm", PoolKind.LLM, 0, "gpu0", tasks_max=8, batch_tokens_max=2048),
    ReplicaJoined(1, "embed", PoolKind.EMBEDDING, 1, "cpu0", tasks_max=8, batch_tokens_max=2048),
]


def arrived(request: int, at: int, pipeline: str = "chat", priority: int = 0) -> RequestArrived:
    kind = RequestKind.EMBEDDING if pipeline == "embed" else RequestKind.LLM_CHAT
    slo = SLO.of(kind, priority)
    return RequestArrived(
        request, pipeline, kind, "acme", priority, 100, 50, at, slo.ttft_due_at(at), slo.due_at(at, 50)
    )


def task(request: int, queued_at: int, n: int = 0, stage: int = 0, attempt: int = 0) -> Task:
    return Task(task_id(request, n), stage, attempt, 0, queued_at, 100, 50)


def rows(folder: Path, name: str = "requests") -> list[dict[str, Any]]:
    return list(pq.read_table(folder / f"{name}.parquet").to_pylist())


def recorded(folder: Path, *steps: tuple[int, list[Any], list[Any]], **options: Any) -> list[dict[str, Any]]:
    with RunRecorder(folder, PIPELINES, SLO, **options) as recorder:
        recorder(0, JOINED, [])
        for step in steps:
            recorder(*step)
    return rows(folder)


def test_life_of_a_chat_request(tmp_path: Path) -> None:
    (row,) = recorded(
        tmp_path,
        (10 * MS, [arrived(0, 8 * MS)], []),
        (20 * MS, [], [Dispatch(0, (task(0, 10 * MS),))]),
        (50 * MS, [TokensProduced(task_id(0, 0), 1)], []),
        (90 * MS, [TaskFinished(task_id(0, 0), 5)], [Respond(0)]),
    )
    assert row == {
        "request": 0,
        "kind": "chat",
        "tenant": "acme",
        "priority": 0,
        "pipeline": "chat",
        "scheduled_ns": 8 * MS,
        "arrived_ns": 10 * MS,
        "dispatched_ns": 20 * MS,
        "first_token_ns": 50 * MS,
        "ended_ns": 90 * MS,
        "input_tokens": 100,
        "output_tokens": 5,
        "output_tokens_max": 50,
        "ttft_due_ns": 108 * MS,
        "due_ns": (8 + 100 + 49 * 10) * MS,
        "outcome": "responded",
        "reason": None,
        "tasks": 1,
        "retries": 0,
        "replica": 0,
        "node": "gpu0",
        "queue_ns": 10 * MS,
        "ttft_ns": 42 * MS,
        "tpot_ns": 10.0 * MS,
        "e2e_ns": 82 * MS,
        "ttft_ok": True,
        "tpot_ok": True,
        "e2e_ok": True,
        "good": True,
        "warmup": False,
    }
    assert rows(tmp_path, "tasks") == [
        {
            "task": 0,
            "request": 0,
            "stage": 0,
            "op": "generate",
            "pool": "llm",
            "attempt": 0,
            "replica": 0,
            "node": "gpu0",
            "device": 0,
            "queued_ns": 10 * MS,
            "dispatched_ns": 20 * MS,
            "first_token_ns": 50 * MS,
            "ended_ns": 90 * MS,
            "input_tokens": 100,
            "output_tokens": 5,
            "batch": 0,
            "batch_tasks": 1,
            "outcome": "finished",
        }
    ]


@pytest.mark.parametrize(
    ("first_token_ms", "end_ms", "ttft_ok", "tpot_ok"),
    [(100, 140, True, True), (101, 141, False, True), (100, 141, True, False), (101, 142, False, False)],
)
def test_objectives_are_met_up_to_the_threshold(
    tmp_path: Path, first_token_ms: int, end_ms: int, ttft_ok: bool, tpot_ok: bool
) -> None:
    (row,) = recorded(
        tmp_path,
        (0, [arrived(0, 0)], [Dispatch(0, (task(0, 0),))]),
        (first_token_ms * MS, [TokensProduced(task_id(0, 0), 1)], []),
        (end_ms * MS, [TaskFinished(task_id(0, 0), 5)], [Respond(0)]),
    )
    assert (row["ttft_ok"], row["tpot_ok"], row["good"]) == (ttft_ok, tpot_ok, ttft_ok and tpot_ok)


def test_one_output_token_has_no_tpot_and_so_cannot_pass_or_miss_it(tmp_path: Path) -> None:
    (row,) = recorded(
        tmp_path,
        (0, [arrived(0, 0)], [Dispatch(0, (task(0, 0),))]),
        (60 * MS, [TaskFinished(task_id(0, 0), 1)], [Respond(0)]),
    )
    assert row["first_token_ns"] == 60 * MS, "not streamed: the first token came with the response"
    assert (row["tpot_ns"], row["tpot_ok"], row["ttft_ok"], row["good"]) == (None, None, True, True)


@pytest.mark.parametrize(
    ("commands", "outcome", "reason"),
    [([Reject(0, "queue full", 1)], "rejected", "queue full"), ([Fail(0, "attempts")], "failed", "attempts")],
)
def test_what_is_not_responded_misses_every_objective_it_has(
    tmp_path: Path, commands: list[Any], outcome: str, reason: str
) -> None:
    (row,) = recorded(tmp_path, (0, [arrived(0, 0)], commands))
    assert (row["outcome"], row["reason"]) == (outcome, reason)
    assert (row["ttft_ok"], row["tpot_ok"], row["e2e_ok"], row["good"]) == (False, False, False, False)
    assert (row["e2e_ns"], row["dispatched_ns"], row["replica"], row["tasks"]) == (None, None, None, 0)


def test_without_objectives_a_response_is_good_and_verdicts_are_null(tmp_path: Path) -> None:
    good, rejected = recorded(
        tmp_path,
        (0, [arrived(0, 0, priority=1), arrived(1, 0, priority=1)], [Dispatch(0, (task(0, 0),)), Reject(1, "no", 1)]),
        (10**12, [TaskFinished(task_id(0, 0), 3)], [Respond(0)]),
    )[::-1]
    assert good["good"] and not rejected["good"]
    for row in (good, rejected):
        assert [row[name] for name in ("ttft_ok", "tpot_ok", "e2e_ok", "ttft_due_ns", "due_ns")] == [None] * 5


def test_a_cancelled_request_releases_its_task_later(tmp_path: Path) -> None:
    (row,) = recorded(
        tmp_path,
        (0, [arrived(0, 0)], [Dispatch(0, (task(0, 0),))]),
        (5 * MS, [RequestCancelled(0)], [Cancel(0, task_id(0, 0))]),
        (6 * MS, [TaskFinished(task_id(0, 0), 9), TokensProduced(task_id(0, 0), 1)], []),  # late, and harmless
    )
    assert (row["outcome"], row["ended_ns"], row["output_tokens"]) == ("cancelled", 5 * MS, 0)
    assert [(t["outcome"], t["ended_ns"]) for t in rows(tmp_path, "tasks")] == [("cancelled", 5 * MS)]


def test_the_planes_answer_beats_a_client_that_left_in_the_same_step(tmp_path: Path) -> None:
    (row,) = recorded(
        tmp_path,
        (0, [arrived(0, 0)], [Dispatch(0, (task(0, 0),))]),
        (5 * MS, [RequestCancelled(0), TaskFinished(task_id(0, 0), 2)], [Respond(0)]),
        (6 * MS, [RequestCancelled(0)], []),  # already ended
    )
    assert row["outcome"] == "responded"


def test_a_lost_replica_and_a_failed_attempt_are_retries(tmp_path: Path) -> None:
    (row,) = recorded(
        tmp_path,
        (0, [ReplicaJoined(2, "llm", PoolKind.LLM, 2, "gpu1", tasks_max=8, batch_tokens_max=1)], []),
        (0, [arrived(0, 0)], [Dispatch(0, (task(0, 0),))]),
        (5 * MS, [TokensProduced(task_id(0, 0), 1)], []),
        (10 * MS, [ReplicaLeft(0)], []),
        (12 * MS, [], [Dispatch(2, (task(0, 10 * MS, n=1, attempt=1),))]),
        (20 * MS, [TaskFailed(task_id(0, 1), "oom", True)], [Dispatch(2, (task(0, 20 * MS, n=2, attempt=2),))]),
        (30 * MS, [TokensProduced(task_id(0, 2), 1)], []),
        (40 * MS, [TaskFinished(task_id(0, 2), 3)], [Respond(0)]),
    )
    assert [t["outcome"] for t in rows(tmp_path, "tasks")] == ["lost", "failed", "finished"]
    assert (row["tasks"], row["retries"], row["replica"], row["node"]) == (3, 2, 2, "gpu1")
    assert (row["ttft_ns"], row["output_tokens"], row["queue_ns"]) == (30 * MS, 3, 2 * MS)


def test_ttft_of_a_pipeline_is_that_of_its_last_generating_stage(tmp_path: Path) -> None:
    (row,) = recorded(
        tmp_path,
        (0, [arrived(0, 0, "rag")], [Dispatch(1, (task(0, 0),))]),
        (5 * MS, [TaskFinished(task_id(0, 0), 0)], [Dispatch(0, (task(0, 5 * MS, n=1, stage=1),))]),
        (30 * MS, [TokensProduced(task_id(0, 1), 1)], []),
        (50 * MS, [TaskFinished(task_id(0, 1), 5)], [Respond(0)]),
    )
    assert (row["ttft_ns"], row["tpot_ns"], row["tasks"]) == (30 * MS, 5.0 * MS, 2)
    assert [(t["op"], t["pool"], t["batch"]) for t in rows(tmp_path, "tasks")] == [
        ("embed", "embed", 0),
        ("generate", "llm", 1),
    ]


def test_where_nothing_is_generated_ttft_is_undefined(tmp_path: Path) -> None:
    first, second = recorded(
        tmp_path,
        (0, [arrived(0, 0, "embed"), arrived(1, 0, "embed")], [Dispatch(1, (task(0, 0), task(1, 0)))]),
        (200 * MS, [TaskFinished(task_id(0, 0), 0)], [Respond(0)]),
        (201 * MS, [TaskFinished(task_id(1, 0), 0)], [Respond(1)]),
    )
    assert (first["ttft_ns"], first["ttft_ok"], first["e2e_ok"], second["e2e_ok"]) == (None, None, True, False)
    assert [(t["batch"], t["batch_tasks"]) for t in rows(tmp_path, "tasks")] == [(0, 2), (0, 2)]


def test_warm_up_and_cool_down_are_flagged_by_schedule(tmp_path: Path) -> None:
    steps = [(at * MS, [arrived(i, at * MS)], [Reject(i, "no", 1)]) for i, at in enumerate((9, 10, 19, 20))]
    flags = [row["warmup"] for row in recorded(tmp_path, *steps, warmup_ns=10 * MS, cooldown_at=20 * MS)]
    assert flags == [True, False, False, True]


def test_reports_carry_what_the_plane_has_in_flight(tmp_path: Path) -> None:
    recorded(
        tmp_path,
        (0, [arrived(0, 0)], [Dispatch(0, (task(0, 0),))]),
        (5 * MS, [ReplicaReported(0, 7, 3, 11), ReplicaReported(99, 1, 1, 1)], []),
        (9 * MS, [TaskFinished(task_id(0, 0), 1)], [Respond(0)]),
    )
    (report,) = rows(tmp_path, "replicas")
    assert (report["at_ns"], report["pool"], report["running"], report["waiting"]) == (5 * MS, "llm", 7, 3)
    assert (report["kv_blocks_free"], report["in_flight"]) == (11, 1)


def test_a_request_without_an_outcome_is_a_violation_and_still_in_the_file(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, PIPELINES, SLO)
    recorder(0, [*JOINED, *(arrived(i, 0) for i in range(25))], [Dispatch(0, (task(3, 0),)), Respond(7)])
    with pytest.raises(
        InvariantViolation, match=r"24 of 25 requests have no outcome: 0, 1, 2, .* and 14 more"
    ) as caught:
        recorder.close()
    assert len(str(caught.value)) < 200
    assert len(rows(tmp_path)) == 25
    assert [t["ended_ns"] for t in rows(tmp_path, "tasks")] == [None]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((0, [], [Respond(0)]), "request 0 responded, but it already ended or never arrived"),
        ((0, [arrived(0, 0)], [Reject(0, "a", 1), Fail(0, "b")]), "request 0 failed, but it already ended"),
        ((0, [arrived(0, 0), arrived(0, 0)], []), "request 0 arrived twice"),
        ((0, [], [Dispatch(0, (task(0, 0),))]), "request is not live"),
        ((0, [arrived(0, 0)], [Dispatch(0, (task(0, 0),)), Dispatch(0, (task(0, 0),))]), "already in flight"),
        ((0, [arrived(0, 0)], [Dispatch(9, (task(0, 0),))]), "replica 9, which never joined"),
    ],
)
def test_what_no_correct_plane_does(tmp_path: Path, step: tuple[int, list[Any], list[Any]], message: str) -> None:
    recorder = RunRecorder(tmp_path, PIPELINES, SLO)
    recorder(0, JOINED, [])
    with pytest.raises(InvariantViolation, match=message):
        recorder(*step)
    recorder.abort("test")


def test_an_unknown_pipeline_is_the_users_mistake(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"pipeline 'agent' .*chat, embed, rag"),
        RunRecorder(tmp_path, PIPELINES, SLO) as r,
    ):
        r(0, [arrived(0, 0, "agent")], [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_readable_files(tmp_path: Path, error: type[BaseException]) -> None:
    def cut_short() -> None:
        with RunRecorder(tmp_path, PIPELINES, SLO) as recorder:
            recorder(0, [*JOINED, arrived(0, 0), arrived(1, 0)], [Dispatch(0, (task(0, 0),)), Reject(1, "no", 1)])
            raise error

    with pytest.raises(error):
        cut_short()
    assert [(row["request"], row["outcome"], row["ended_ns"]) for row in rows(tmp_path)] == [
        (1, "rejected", 0),
        (0, "failed", None),
    ]
    assert error.__name__ in rows(tmp_path)[1]["reason"]
    assert len(rows(tmp_path, "tasks")) == 1


def test_tasks_can_be_switched_off(tmp_path: Path) -> None:
    recorded(tmp_path, (0, [arrived(0, 0)], [Reject(0, "no", 1)]), tasks=False)
    assert not (tmp_path / "tasks.parquet").exists()


def test_rows_do_not_depend_on_the_buffer(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=50, service_s=0.015, requests=500, queue_max=5)
    for rows_each in (1, 7, 100_000):
        queueing.run(tmp_path / str(rows_each), queue, buffer_rows=rows_each)
    tables = [pq.read_table(tmp_path / name / "requests.parquet") for name in ("1", "7", "100000")]
    assert tables[0].to_pylist() == tables[1].to_pylist() == tables[2].to_pylist()
    assert pq.read_metadata(tmp_path / "7" / "requests.parquet").num_row_groups == -(-500 // 7)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=50, service_s=0.015, requests=300, report_s=0.5)
    first, second = (queueing.run(tmp_path / name, queue).outputs for name in "ab")
    assert first == second
    assert set(first) == {"requests.parquet", "tasks.parquet", "replicas.parquet"}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.floats(5, 200),
    servers=st.integers(1, 4),
    order=st.sampled_from(["fifo", "priority"]),
    queue_max=st.none() | st.integers(0, 10),
    seed=st.integers(0, 2**16),
)
def test_every_request_has_one_row_whose_instants_are_in_order(
    tmp_path: Path, queueing: ModuleType, rate: float, servers: int, order: str, queue_max: int | None, seed: int
) -> None:
    classes = (queueing.Class(), queueing.Class(kind=RequestKind.EMBEDDING, priority=1, output_tokens=0))
    queue = queueing.Queue(rate, 0.02, 80, seed, servers, order, queue_max, classes=classes)
    manifest = queueing.run(tmp_path, queue, buffer_rows=16)
    found = rows(tmp_path)
    assert sorted(row["request"] for row in found) == list(range(80))
    assert {name: manifest.counts[name] for name in OUTCOMES} == {
        name: sum(row["outcome"] == name for row in found) for name in OUTCOMES
    }
    for row in found:
        names = ("scheduled_ns", "arrived_ns", "dispatched_ns", "first_token_ns", "ended_ns")
        instants = [row[name] for name in names if row[name] is not None]
        assert instants == sorted(instants)
        assert (row["outcome"] == "responded") == (row["e2e_ns"] is not None)
        assert row["good"] <= (row["outcome"] == "responded")
        if row["outcome"] == "responded" and row["kind"] == "chat":
            assert row["e2e_ns"] == pytest.approx(row["ttft_ns"] + row["tpot_ns"] * (row["output_tokens"] - 1))
    tasks = rows(tmp_path, "tasks")
    assert len(tasks) == manifest.counts["tasks"] == sum(row["tasks"] for row in found)
