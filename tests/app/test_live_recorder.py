"""The record of a system in service: a full disk costs the record, not the service."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from sage_bench.results import native_recorder
from sage_bench.serving import LiveRecorder
from sage_core import events as e
from sage_core.errors import OutputError
from sage_core.native_plane import make_plane
from sage_core.pipeline import single_request_pipelines
from sage_core.slo import SloTable
from sage_core.stepper import Stepper
from sage_core.units import Nanos, PoolKind, task_id
from sage_policies.presets import preset

PIPELINES = {name: [(s.op.name, s.op.pool) for s in p.stages] for name, p in single_request_pipelines().items()}
REQUESTS = 400


def serve(recorder: LiveRecorder) -> int:
    """Requests that were dispatched and answered."""
    plane = make_plane("native", single_request_pipelines(), {"fifo": lambda: preset("fifo")}, "fifo")
    stepper = Stepper(plane, recorder)
    stepper.step(Nanos(0), [e.ReplicaJoined(0, "m", int(PoolKind.LLM), 0, "here", 4, 512)])
    for n in range(REQUESTS):
        stepper.step(Nanos(2 * n + 1), [e.RequestArrived(n, "chat@m", 0, "ada", 0, 20, 64, 0)])
        stepper.step(Nanos(2 * n + 2), [e.TaskFinished(task_id(n, 0), 5)])
    return plane.counts.responded


def test_a_full_disk_does_not_stop_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def full(self: object, table: pa.Table) -> None:
        nonlocal written
        written += table.num_rows
        if written > 100:
            raise OutputError("requests.parquet: no space left")

    monkeypatch.setattr(native_recorder.TableFile, "write", full)
    recorder = LiveRecorder(tmp_path, PIPELINES, SloTable(), buffer_rows=20)
    with pytest.raises(OutputError, match="no space left"), recorder:
        assert serve(recorder) == REQUESTS
    assert written < 2 * REQUESTS, "it went on writing to a full disk: there are four times as many rows"


def test_with_room_everything_is_recorded(tmp_path: Path) -> None:
    with LiveRecorder(tmp_path, PIPELINES, SloTable(), buffer_rows=20) as recorder:
        assert serve(recorder) == REQUESTS
    assert recorder.counts()["responded"] == REQUESTS
