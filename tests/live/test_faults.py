"""Engines as processes that are killed, frozen, slow or hang under load: nothing is lost, and the books say so.

The scenarios are those of ``make bench-faults``, with less load; how fast things go is for that to measure.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import uvloop

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import faults

from sage_core import events as e
from sage_core.log import decode_events
from sage_live.health import HealthConfig, State

RATE, SECONDS = 60.0, 1.0

SLACK_MS = 5000.0
"""What a busy machine may add to anything."""


def run(main: Any) -> Any:
    return uvloop.run(asyncio.wait_for(main, 90))


def well_ended(figures: dict[str, Any]) -> None:
    assert figures["lost"] == figures["refused"] == 0
    assert figures["requests"] == figures["answered"] + figures["streams_cut"]
    assert figures["counts_agree"] and figures["replayed"]


def events_of(folder: Path) -> list[e.AnyEvent]:
    rows = pq.read_table(folder / "run" / "steps.parquet", columns=["step", "events"]).to_pydict()
    return [
        event for step, each in zip(rows["step"], rows["events"], strict=True) for event in decode_events(step, each)
    ]


def test_kill_9_of_one_of_four(tmp_path: Path) -> None:
    figures = run(faults.killed(tmp_path, RATE, SECONDS))
    well_ended(figures)
    assert figures["retries"] >= 1  # the whole answers that it took with it
    assert figures["streams_cut"] >= 1
    assert figures["ejected_s"] < 5
    assert figures["p99_ms_outage_over"] < 10 * figures["p99_ms_before"] + SLACK_MS
    heard = events_of(tmp_path)
    joined = [event.replica for event in heard if isinstance(event, e.ReplicaJoined)]
    assert joined[:4] == [0, 1, 2, 3] and 4 in joined, "it came back, as another replica"
    rows = pq.read_table(tmp_path / "run" / "requests.parquet").to_pydict()
    assert max(rows["retries"]) >= 1
    assert 4 in rows["replica"], "and was given work"
    failed = [reason for reason, outcome in zip(rows["reason"], rows["outcome"], strict=True) if outcome == "failed"]
    assert len(failed) == figures["streams_cut"]


def test_a_frozen_engine_is_cut_off_and_thaws(tmp_path: Path) -> None:
    figures = run(faults.frozen(tmp_path, RATE, SECONDS))
    well_ended(figures)
    assert figures["retries"] >= 1
    assert figures["ejected_s"] < 4 * (faults.HEALTH.interval_s + faults.HEALTH.timeout_s) + SLACK_MS / 1e3


def test_a_slow_and_a_hanging_engine_are_put_out(tmp_path: Path) -> None:
    health = HealthConfig(interval_s=0.2, timeout_s=2.0, stall_s=2.0, slow_s=1.0, slow_answers_min=10)

    async def main() -> faults.Stage:
        options = (("--slow", "3"), ("--hang-after", "5"), (), ())
        async with (
            faults.engines(tmp_path, *options) as fleet,
            faults.stage(tmp_path / "run", fleet, health=health, policy="round_robin") as there,
        ):
            stop = asyncio.Event()
            loading = asyncio.create_task(there.load(RATE, stop))
            slow, hanging = there.watch("engine-0"), there.watch("engine-1")
            await faults.until(lambda: slow.ejections and hanging.ejections)
            assert "one token" in hanging.why
            stop.set()
            await loading
            await there.all_ended()
        return there

    there = run(main())
    assert all(each.answered or each.told for each in there.asked)
    assert there.replayed and there.counts["arrived"] == len(there.asked)
    assert there.counts["retries"] == there.retries >= 1
    states = [(name, state) for _, name, state in there.states]
    assert ("engine-0", State.DRAINING) in states, "a slow one may finish what it has"
    assert ("engine-1", State.EJECTED) in states


def test_without_engines_requests_wait_for_one_or_for_their_time_to_be_up(tmp_path: Path) -> None:
    async def main() -> tuple[faults.Stage, faults.Stage]:
        async with faults.engines(tmp_path, ()) as (engine,), faults.stage(tmp_path / "run", [engine]) as there:
            there.ask()
            await there.all_ended()
            await engine.kill()
            waiting = [there.ask(stream=number % 2 == 0) for number in range(10)]
            await faults.until(lambda: there.watch("engine-0").state is State.EJECTED)
            async with faults.stage(tmp_path / "short", [engine], request_s=0.5, healthy=False) as short:
                late = short.ask()
                await short.all_ended()
                assert late.status == 504
                assert json.loads(late.body)["error"]["code"] == "upstream_timeout"
            assert not any(each.ended for each in waiting)
            await engine.start()
            await there.all_ended()
            assert all(each.answered for each in there.asked)
        return there, short

    there, short = run(main())
    assert there.replayed and there.counts["responded"] == len(there.asked)
    assert short.replayed and short.counts["cancelled"] == 1


def test_an_engine_that_ends_well_finishes_its_streams(tmp_path: Path) -> None:
    """SIGTERM: it listens no more and goes on with what it has. Nobody may lose anything by that."""

    async def main() -> faults.Stage:
        async with faults.engines(tmp_path, (), ()) as fleet, faults.stage(tmp_path / "run", fleet) as there:
            asked = [there.ask(tokens=100, stream=True) for _ in range(6)]
            await faults.until(lambda: all(each.status for each in asked))
            fleet[0].signal(signal.SIGTERM)
            await faults.until(lambda: there.watch("engine-0").state is not State.HEALTHY)
            asked += [there.ask() for _ in range(6)]
            await there.all_ended()
        return there

    there = run(main())
    assert [each.answered for each in there.asked] == [True] * 12
    assert there.counts["retries"] == 0 and there.replayed
