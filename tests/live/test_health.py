"""Who is in service: engines that hang, stall, slow down, flap and come back, over real sockets."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gateway_harness import (
    ANSWER,
    CHAT,
    COMPLETIONS,
    Client,
    Serving,
    ask,
    chat,
    emulated,
    llm_spec,
    run,
    serving,
    sse,
    token,
    until,
)

from sage_core import events as e
from sage_core.errors import ConfigError
from sage_core.units import MILLISECOND, SECOND
from sage_live.health import LOOK_GAP_S, HealthConfig, State, Watch
from sage_live.http.server import HttpServer, Request
from sage_live.pace import Pace, slowness


class Engine:
    """An engine in a test's hands. ``health``: a status, or None for no answer. ``works``: whether it answers requests;
    those that it did not are in ``held``."""

    def __init__(self) -> None:
        self.health: int | None = 200
        self.works = True
        self.status = 200
        self.metrics = b""
        self.probes = 0
        self.asked: list[Request] = []
        self.proofs = 0
        self.held: list[Request] = []
        self.port = 0
        self.server: HttpServer | None = None

    def handle(self, request: Request) -> None:
        if request.path == "/health":
            self.probes += 1
            if self.health is not None:
                request.respond(self.health, b"")
            return
        if request.path == "/metrics":
            request.respond(200 if self.metrics else 500, self.metrics, b"text/plain")
            return
        if request.path == COMPLETIONS:
            self.proofs += 1  # no test here asks for a completion itself
        else:
            self.asked.append(request)
        if self.works:
            self.answer(request)
        else:
            self.held.append(request)

    def answer(self, request: Request) -> None:
        request.respond(self.status, ANSWER if self.status == 200 else b"{}")

    async def start(self, port: int = 0) -> None:
        self.server = await HttpServer.start(self.handle, "127.0.0.1", port)
        self.port = self.server.port

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close()


@asynccontextmanager
async def engines(count: int, **health: Any) -> AsyncIterator[tuple[Serving, list[Engine], list[Watch]]]:
    """So many of them behind a gateway that deals in turn."""
    config = {"interval_s": 0.05, "timeout_s": 2.0, "scrape_s": 0.05, "stall_s": 60.0} | health
    async with AsyncExitStack() as stack:
        made = [Engine() for _ in range(count)]
        for engine in made:
            await engine.start()
            stack.push_async_callback(engine.stop)
        specs = [llm_spec(engine.port, name=f"engine-{number}") for number, engine in enumerate(made)]
        served = await stack.enter_async_context(
            serving(specs, policy="round_robin", health=HealthConfig(**config), grace_s=0.1)
        )
        yield served, made, [served.service.watches[spec.called] for spec in specs]


def asking(served: Serving, count: int, **more: Any) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(ask(served.port, CHAT, chat(str(number), **more))) for number in range(count)]


async def statuses(asked: list[asyncio.Task[Any]]) -> list[int]:
    return [reply.status for reply in await asyncio.gather(*asked)]


def counts(served: Serving) -> tuple[int, int, int]:
    """Responded, failed, retries; and nothing else happened."""
    got = served.service.driver.plane.counts
    assert got.arrived == got.responded + got.failed and served.service.driver.live == 0
    return got.responded, got.failed, got.retries


# --- probes -----------------------------------------------------------------------------------------------------------


def test_an_unhealthy_engine_finishes_the_stream_that_it_is_at_and_gets_no_more() -> None:
    async def main() -> None:
        async with engines(2) as (served, (sick, well), (watch, _)):
            sick.works = False
            client = await Client.open(served.port)
            client.send(CHAT, chat(stream=True))
            await until(lambda: sick.held)
            stream = sick.held[0]
            stream.start(200)
            stream.write(sse(token("a")))
            await client.head()
            sick.health = 503
            await until(lambda: watch.state is State.DRAINING)
            assert "503" in watch.why
            assert await statuses(asking(served, 6)) == [200] * 6
            assert len(well.asked) == 6 and len(sick.asked) == 1
            stream.write(sse(token("b")) + b"data: [DONE]\n\n")
            stream.end()
            body = b""
            while data := await client.chunk():
                body += data
            assert body.endswith(b"data: [DONE]\n\n") and b"error" not in body
            await until(lambda: watch.state is State.EJECTED)
            assert counts(served) == (7, 0, 0)
            client.close()

    run(main())


def test_an_engine_whose_health_hangs_and_whose_work_is_silent_is_cut_off() -> None:
    async def main() -> None:
        async with engines(2, timeout_s=0.3) as (served, (sick, _), (watch, _)):
            sick.works = False
            asked = asking(served, 2)
            await until(lambda: sick.held)
            sick.health = None
            assert await statuses(asked) == [200, 200]
            assert watch.state is State.EJECTED and watch.ejections == 1
            assert "did not answer within 0.3 s" in watch.why and "silent" in watch.why
            assert counts(served) == (2, 0, 1)

    run(main())


def test_one_failed_probe_is_not_enough() -> None:
    async def main() -> None:
        async with engines(1, failures_max=3) as (_, (engine,), (watch,)):
            for _round in range(4):
                engine.health = 500
                seen = engine.probes
                await until(lambda seen=seen: engine.probes > seen)
                engine.health = 200
                seen = engine.probes
                await until(lambda seen=seen: engine.probes > seen + 1)
            assert watch.state is State.HEALTHY and watch.ejections == 0 and watch.why == ""

    run(main())


def test_a_pause_of_the_gateway_is_not_taken_for_a_silence_of_its_engines() -> None:
    async def main() -> None:
        async with engines(3, timeout_s=0.2, failures_max=1) as (_, made, watches):
            for _round in range(4):
                seen = [engine.probes for engine in made]
                await until(lambda seen=seen: all(a.probes > b for a, b in zip(made, seen, strict=True)))
                time.sleep(0.5)  # the pause itself: nothing in this process runs
            seen = [engine.probes for engine in made]
            await until(lambda: all(a.probes > b + 2 for a, b in zip(made, seen, strict=True)))
            assert [watch.ejections for watch in watches] == [0, 0, 0]

    run(main())


def test_trouble_does_not_become_a_storm_of_probes() -> None:
    async def main() -> None:
        async with engines(1, interval_s=30.0) as (served, (engine,), (watch,)):
            engine.status = 500
            before, started = engine.probes, time.monotonic()
            assert await statuses(asking(served, 60)) == [502] * 60
            elapsed = time.monotonic() - started
            assert engine.probes - before <= elapsed / LOOK_GAP_S + 2
            assert watch.state is State.HEALTHY  # the only one it has: better than none

    run(main())


# --- work that stalls -------------------------------------------------------------------------------------------------


def test_a_hanging_engine_is_ejected_although_its_health_is_well() -> None:
    async def main() -> None:
        async with engines(2, stall_s=0.4) as (served, (hung, _), (watch, other)):
            hung.works = False
            asked = asking(served, 4)
            assert await statuses(asked) == [200] * 4
            assert watch.state is State.EJECTED and "did not answer a request for one token" in watch.why
            assert counts(served) == (4, 0, 2)
            assert hung.health == 200
            was = next(joined.replica for joined in served.heard(e.ReplicaJoined))
            seen = hung.proofs
            await until(lambda: hung.proofs > seen + 1)  # asked for a token, and silent still
            assert watch.state is State.EJECTED and other.state is State.HEALTHY
            hung.works = True
            await until(lambda: watch.state is State.HEALTHY)
            assert watch.engine.replica > was
            assert await statuses(asking(served, 4)) == [200] * 4
            assert len(hung.asked) > 2

    run(main())


def test_a_long_answer_on_an_engine_that_works_is_not_a_stall() -> None:
    """400 ms without a word, where 100 are a stall: the engine answers a request for one token in between."""

    async def main() -> None:
        config = HealthConfig(interval_s=0.02, stall_s=0.1)
        async with emulated(iteration_s=0.004) as engine, serving([llm_spec(engine.port)], health=config) as served:
            reply = await ask(served.port, CHAT, chat(max_tokens=100, min_tokens=100))
            assert reply.status == 200
            (watch,) = served.service.watches.values()
            assert watch.ejections == 0
            assert counts(served) == (1, 0, 0)
            assert sum(engine.statistics.ended.values()) > 1

    run(main())


def test_a_whole_answer_is_awaited_while_a_token_can_be_had() -> None:
    async def main() -> None:
        async with engines(1, stall_s=0.1) as (served, (engine,), (watch,)):
            hold = engine.handle

            def long_answer(request: Request) -> None:
                if request.path == CHAT:
                    engine.held.append(request)
                else:
                    hold(request)

            assert engine.server is not None
            engine.server.handler = long_answer
            asked = asking(served, 1)
            await until(lambda: engine.proofs >= 4)
            engine.answer(engine.held[0])
            assert await statuses(asked) == [200]
            assert watch.ejections == 0 and counts(served) == (1, 0, 0)

    run(main())


# --- errors, refusals -------------------------------------------------------------------------------------------------


def test_an_engine_that_answers_with_errors_only_does_not_swallow_the_work_of_all() -> None:
    async def main() -> None:
        async with engines(2, errors_max=5, interval_s=30.0) as (served, (bad, _), (watch, _)):
            bad.status = 500
            got = []
            for _ in range(12):
                got += await statuses(asking(served, 1))
            assert got == [200] * 12
            assert watch.state is State.EJECTED and "5 requests in a row failed" in watch.why
            assert len(bad.asked) == 5

    run(main())


def test_an_engine_that_is_gone_is_out_in_the_turn_in_which_that_is_noticed() -> None:
    """Otherwise it would look idle, and eat every attempt of every request."""

    async def main() -> None:
        async with engines(2, interval_s=30.0, errors_max=1000) as (served, (gone, _), (watch, _)):
            await gone.stop()
            assert await statuses(asking(served, 40)) == [200] * 40
            assert watch.ejections == 1
            responded, failed, retries = counts(served)
            assert (responded, failed) == (40, 0)
            assert 1 <= retries <= 20  # those that were on their way to it; none twice
            dead = served.heard(e.ReplicaLeft)
            assert [left.replica for left in dead] == [0]
            await gone.start(gone.port)
            watch.resume()
            await until(lambda: watch.state is State.HEALTHY)
            assert watch.engine.replica == 2
            await gone.stop()

    run(main())


def test_one_that_goes_away_again_and_again_stays_out_longer_each_time() -> None:
    async def main() -> None:
        async with engines(2, interval_s=0.1, probation_s=20.0) as (_, (flaps, _), (watch, _)):
            out: list[float] = []
            for _ in range(4):
                await flaps.stop()
                await until(lambda: watch.state is State.EJECTED)
                at = time.monotonic()
                await flaps.start(flaps.port)
                await until(lambda: watch.state is State.HEALTHY)
                out.append(time.monotonic() - at)
            assert watch.ejections == 4
            assert out[1] >= 0.1 and out[2] >= 0.2 and out[3] >= 0.4
            await flaps.stop()

    run(main())


# --- operators --------------------------------------------------------------------------------------------------------


def test_the_last_answer_of_a_draining_engine_is_not_lost() -> None:
    async def main() -> None:
        async with engines(1) as (served, (engine,), (watch,)):
            engine.works = False
            asked = asking(served, 1)
            await until(lambda: engine.held)
            left = watch.drain()
            await asyncio.sleep(0)
            assert watch.state is State.DRAINING and not left.is_set()
            engine.answer(engine.held[0])
            assert await statuses(asked) == [200]
            await asyncio.wait_for(left.wait(), 10)
            assert watch.state.value == "drained" and watch.ejections == 0
            assert counts(served) == (1, 0, 0)

    run(main())


def test_an_idle_engine_drains_at_once_and_comes_back_when_resumed() -> None:
    async def main() -> None:
        async with engines(1) as (served, (engine,), (watch,)):
            await asyncio.wait_for(watch.drain().wait(), 10)
            assert watch.state is State.DRAINED and watch.why == "drained by an operator"
            seen = engine.probes
            await asyncio.sleep(0.15)
            assert engine.probes == seen  # it is nobody's business
            watch.resume()
            await until(lambda: watch.state is State.HEALTHY)
            assert watch.engine.replica == 1 and watch.ejections == 0
            assert await statuses(asking(served, 1)) == [200]

    run(main())


def test_a_drain_after_an_ejection_waits_for_the_work_again() -> None:
    async def main() -> None:
        async with engines(1) as (served, (engine,), (watch,)):
            engine.health = 500
            await until(lambda: watch.state is State.EJECTED)
            engine.health = 200
            await until(lambda: watch.state is State.HEALTHY)
            engine.works = False
            asked = asking(served, 1)
            await until(lambda: engine.held)
            removing = asyncio.create_task(served.service.remove_engine("engine-0"))
            await until(lambda: watch.state is State.DRAINING)
            assert not removing.done()
            engine.answer(engine.held[0])
            assert await statuses(asked) == [200]
            await asyncio.wait_for(removing, 10)
            assert counts(served) == (1, 0, 0)

    run(main())


def test_a_drain_that_is_undone_in_time() -> None:
    async def main() -> None:
        async with engines(1) as (served, (engine,), (watch,)):
            engine.works = False
            asked = asking(served, 1)
            await until(lambda: engine.held)
            watch.drain()
            watch.resume()
            engine.works = True
            engine.answer(engine.held[0])
            assert await statuses(asked) == [200]
            await until(lambda: watch.state is State.HEALTHY)
            assert watch.ejections == 0

    run(main())


# --- slowness ---------------------------------------------------------------------------------------------------------


def paced(
    each_ms: float, *, count: int = 40, input_tokens: int = 100, output_tokens: int = 10, every_ms: int = 20
) -> Pace:
    """Answers that took so many milliseconds a token, one every so often, the last of them at ``NOW``."""
    pace = Pace()
    for number in range(count):
        at = NOW - (count - 1 - number) * every_ms * MILLISECOND
        pace.saw(at, round(each_ms * output_tokens * MILLISECOND), input_tokens, output_tokens)
    return pace


NOW = 1000 * SECOND


def test_three_times_as_slow_is_seen() -> None:
    peers = [paced(5.0), paced(5.5), paced(6.0)]
    assert slowness(paced(16.5), peers, NOW, 20) == pytest.approx(3.0)
    assert slowness(paced(5.0), [paced(16.5), *peers[1:]], NOW, 20) < 1


def test_two_are_no_majority_and_few_answers_no_evidence() -> None:
    assert slowness(paced(16.5), [paced(5.5)], NOW, 20) == 1.0
    assert slowness(paced(16.5, count=19), [paced(5.5), paced(5.5)], NOW, 20) == 1.0
    assert slowness(paced(16.5), [paced(5.5, count=3), paced(5.5)], NOW, 20) == 1.0


def test_long_prompts_are_not_slowness() -> None:
    """An engine that is given all the long prompts; with the short ones, which all have, it is as fast as they are."""
    own = paced(60.0, input_tokens=8000)
    for number in range(30):
        own.saw(NOW - number * SECOND, 50 * MILLISECOND, 100, 10)
    assert slowness(own, [paced(5.0), paced(5.0)], NOW, 20) == pytest.approx(1.0)
    assert slowness(paced(60.0, input_tokens=8000), [paced(5.0), paced(5.0)], NOW, 20) == 1.0


def test_more_load_is_not_slowness() -> None:
    """Three times as long, with twice as many answers a second: it has more to do and does more."""
    assert slowness(paced(15.0, every_ms=10), [paced(5.0), paced(5.0)], NOW, 20) == 1.0


def test_a_pause_moves_no_median() -> None:
    own = paced(5.0, count=100)
    for _ in range(30):
        own.saw(NOW, 2 * SECOND, 100, 10)
    assert slowness(own, [paced(5.0), paced(5.0)], NOW, 20) == pytest.approx(1.0)


def test_what_was_is_forgotten() -> None:
    assert slowness(paced(16.5), [paced(5.0), paced(5.0)], NOW + 61 * SECOND, 20) == 1.0
    own = paced(16.5)
    own.clear()
    assert slowness(own, [paced(5.0), paced(5.0)], NOW, 20) == 1.0


def test_a_slow_engine_is_put_out_for_a_while_and_the_others_stay() -> None:
    async def main() -> None:
        config = HealthConfig(interval_s=0.1, slow_s=0.5, slow_answers_min=10, probation_s=0.5)
        async with AsyncExitStack() as stack:
            made = [
                await stack.enter_async_context(emulated(iteration_s=0.004, slow=slow)) for slow in (1.0, 4.0, 1.0, 1.0)
            ]
            specs = [llm_spec(server.port, name=f"engine-{number}") for number, server in enumerate(made)]
            served = await stack.enter_async_context(serving(specs, policy="round_robin", health=config))
            watches = [served.service.watches[spec.called] for spec in specs]
            slow = watches[1]
            got: list[int] = []

            async def user(number: int) -> None:
                while slow.ejections < 2:  # put out, let in again, and put out again
                    got.append((await ask(served.port, CHAT, chat(str(number), stream=number % 2 == 0))).status)

            await asyncio.gather(*(user(number) for number in range(12)))
            assert set(got) == {200}
            assert "times as long as the others" in slow.why
            assert [watch.ejections for watch in watches] == [0, 2, 0, 0]
            assert counts(served) == (len(got), 0, 0)  # it finished what it had
            out = [event for event in served.events if isinstance(event[1], e.ReplicaLeft | e.ReplicaJoined)]
            left = next(at for at, event in out if isinstance(event, e.ReplicaLeft))
            back = next(at for at, event in out if isinstance(event, e.ReplicaJoined) and event.replica == 4)
            assert back - left > 0.2 * SECOND

    run(main())


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_a_report_that_stops_coming_counts_for_nothing() -> None:
    async def main() -> None:
        async with engines(1) as (served, (engine,), (watch,)):
            engine.metrics = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n"
            await until(lambda: watch.reported and served.heard(e.ReplicaReported))
            assert watch.reported["running"] == 3 and watch.reported["waiting"] == 1
            assert served.heard(e.ReplicaReported)[-1].running == 3
            engine.metrics = b""
            await until(lambda: not watch.reported)
            assert watch.state is State.HEALTHY

    run(main())


@pytest.mark.parametrize(
    ("key", "value"),
    [("interval_s", 0), ("timeout_s", -1), ("stall_s", float("nan")), ("failures_max", 0), ("slow_factor", 0.5),
     ("slow_factor", float("nan")), ("errors_max", 0), ("probation_s", float("inf"))],
)  # fmt: skip
def test_a_configuration_that_cannot_be(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"health.{key}: expected"):
        HealthConfig(**{key: value})
