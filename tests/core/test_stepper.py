"""One logged step after another: native and in Python the same commands, the same digests, the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sage_bench.results.native_recorder import NativeRecorder
from sage_bench.results.recorder import RunRecorder
from sage_core import events as e
from sage_core.commands import AnyCommand, Dispatch
from sage_core.errors import IllegalEvent
from sage_core.native_plane import make_plane
from sage_core.pipeline import single_request_pipelines
from sage_core.slo import Slo, SloTable
from sage_core.stepper import Stepper
from sage_core.units import Nanos, PoolKind, task_id
from sage_policies.presets import preset

SLO = SloTable({"chat": Slo(ttft_s=1.0, tpot_s=0.1)})
PIPELINES = {name: [(s.op.name, s.op.pool) for s in p.stages] for name, p in single_request_pipelines().items()}
TABLES = ("requests", "tasks", "replicas")

HISTORY: list[tuple[int, list[e.AnyEvent]]] = [
    (0, [e.ReplicaJoined(0, "tiny", int(PoolKind.LLM), 0, "here", 4, 512)]),
    (10, [e.RequestArrived(n, "chat@tiny", 0, "ada", n, 20, 64, 5, 900) for n in range(3)]),
    (20, [e.TokensProduced(task_id(0, 0), 1), e.RequestCancelled(2)]),
    (30, [e.TaskFinished(task_id(0, 0), 5), e.ReplicaReported(0, 1, 0, 7)]),
    (40, [e.TaskFailed(task_id(1, 0), "it hiccupped", True)]),
    (50, [e.ReplicaLeft(0)]),
    (60, [e.RunEnded("enough")]),
]


def steps(stepper: Stepper) -> tuple[list[list[AnyCommand]], bytes]:
    return [stepper.step(Nanos(now), events) for now, events in HISTORY], stepper.digest


def plane(mechanism: str):  # type: ignore[no-untyped-def]
    return make_plane(mechanism, single_request_pipelines(), {"fifo": lambda: preset("fifo")}, "fifo")


def test_native_and_python_say_decide_and_record_the_same(tmp_path: Path) -> None:
    with NativeRecorder(tmp_path / "native", PIPELINES, SLO) as columns:
        (tmp_path / "native").mkdir(exist_ok=True)
        native = steps(Stepper(plane("native"), columns))
    with RunRecorder(tmp_path / "python", PIPELINES, SLO) as rows:

        def record(
            now: int, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
        ) -> None:
            rows(now, events, commands)

        python = steps(Stepper(plane("reference"), record))
    assert native == python
    assert any(isinstance(command, Dispatch) for commands in native[0] for command in commands)
    for table in TABLES:
        left, right = (pq.read_table(tmp_path / side / f"{table}.parquet") for side in ("native", "python"))
        assert left.equals(right) and left.num_rows, table
    assert pq.read_table(tmp_path / "native/steps.parquet")["digest"].to_pylist()[-1] == native[1]
    assert set(pq.read_table(tmp_path / "native/tasks.parquet")["pool"].to_pylist()) == {"tiny"}


def test_without_a_recorder_the_digest_is_the_same() -> None:
    assert steps(Stepper(plane("native"))) == steps(Stepper(plane("reference")))


def test_a_digest_depends_on_every_step() -> None:
    whole, short = Stepper(plane("native")), Stepper(plane("native"))
    for now, events in HISTORY:
        whole.step(Nanos(now), events)
    for now, events in HISTORY[:-1]:
        short.step(Nanos(now), events)
    assert whole.digest != short.digest


def test_columns_need_a_native_plane(tmp_path: Path) -> None:
    with NativeRecorder(tmp_path, PIPELINES, SLO) as columns, pytest.raises(TypeError, match="native plane"):
        Stepper(plane("reference"), columns)


def test_an_event_that_no_log_can_hold_is_refused() -> None:
    with pytest.raises(IllegalEvent):
        Stepper(plane("native")).step(Nanos(0), [e.TokensProduced(1 << 70, 1)])
