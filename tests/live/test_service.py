"""Between clients and engines: who leaves frees what he had, who reads slowly waits alone, what fails is tried again."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gateway_harness import (
    ANSWER,
    CHAT,
    DONE,
    EMBED,
    EMBEDDINGS,
    LLM,
    Client,
    ask,
    chat,
    embed_spec,
    embedding,
    emulated,
    gateway,
    is_openai_error,
    llm_spec,
    plane_of,
    raw_engine,
    run,
    scripted,
    serving,
    sse,
    token,
    until,
)

from sage_core import events as e
from sage_core.commands import Dispatch
from sage_core.errors import ConfigError
from sage_core.replay import replay
from sage_core.slo import Slo, SloTable
from sage_core.units import RequestKind
from sage_live.call import Call
from sage_live.health import HealthConfig, State
from sage_live.http.server import Request
from sage_live.service import ServiceConfig
from sage_policies.presets import hybrid

LONG = {"max_tokens": 5000, "min_tokens": 5000}


# --- answers that come as a whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_token_ns", [0.0, 20_000.0], ids=["cost unknown", "cost known"])
def test_an_engine_fills_up_though_nobody_sees_first_tokens(input_token_ns: float) -> None:
    """The policy lets half a budget of unread prompts into an engine. Without a stream nobody sees one being read."""

    async def main() -> None:
        costs = {"batch_tokens_max": 2048, "tasks_max": 16, "input_token_ns": input_token_ns}
        specs = lambda port: [llm_spec(port, **costs)]  # noqa: E731
        async with gateway(iteration_s=0.02, specs=specs, policy="hybrid") as (served, engine):
            body = chat("word " * 800, max_tokens=100, min_tokens=100)  # 1,000 tokens, 2 s and more
            asking = [asyncio.create_task(ask(served.port, CHAT, body)) for _ in range(12)]
            await until(lambda: engine.engine.live == 12)
            assert all(reply.status == 200 for reply in await asyncio.gather(*asking))
            counts = [event.count for event in served.heard(e.TokensProduced)]
            assert counts == [0] * 12
        for mechanism in ("native", "reference"):
            assert replay(served.log, plane_of("hybrid", mechanism)).divergence is None

    run(main())


def test_a_prompt_behind_one_that_left_is_not_told_as_late_as_that_would_have_been() -> None:
    async def main() -> None:
        specs = lambda port: [llm_spec(port, input_token_ns=1e6)]  # noqa: E731
        async with gateway(iteration_s=0.02, specs=specs) as (served, engine):
            leaving = asyncio.create_task(ask(served.port, CHAT, chat("word " * 4_800, **LONG)))  # 6 s to read
            await until(lambda: engine.engine.live == 1)
            leaving.cancel()
            await until(lambda: engine.engine.live == 0)
            asking = asyncio.create_task(ask(served.port, CHAT, chat("word", **LONG)))
            async with asyncio.timeout(4):
                await until(lambda: served.heard(e.TokensProduced))
            asking.cancel()

    run(main())


def test_a_whole_answer_is_tried_again_after_its_prompt_was_read() -> None:
    """Nothing of it has left for the client."""

    async def main() -> None:
        async with gateway(iteration_s=0.02, attempts_max=2) as (served, _):
            asking = asyncio.create_task(ask(served.port, CHAT, chat(max_tokens=50, min_tokens=50)))
            await until(lambda: served.heard(e.TokensProduced))
            (watch,) = (each for each in served.service.watches.values() if "llm" in each.engine.name)
            served.service.driver.post(e.TaskFailed(served.heard(e.TokensProduced)[0].task, "made to fail", True))
            reply = await asking
            assert watch.state is State.HEALTHY and reply.status == 200
            assert served.service.driver.plane.counts.retries == 1

    run(main())


# --- who leaves -------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_a_stream_frees_its_slot_in_the_engine() -> None:
    async def main() -> None:
        async with gateway(iteration_s=0.005) as (served, engine):
            stays = asyncio.create_task(ask(served.port, CHAT, chat(stream=True, max_tokens=60, min_tokens=60)))
            client = await Client.open(served.port)
            client.send(CHAT, chat(stream=True, **LONG))
            await client.head()
            await client.chunk()
            await until(lambda: engine.engine.live == 2)
            client.close()
            await until(lambda: engine.statistics.ended["abort"] == 1)
            assert engine.engine.live == 1  # the other goes on
            reply = await stays
            assert reply.whole and reply.events[-1] == "[DONE]"
            counts = served.service.driver.plane.counts
            assert (counts.arrived, counts.cancelled, counts.responded) == (2, 1, 1)
            metrics = (await ask(served.port, "/metrics")).body
            assert b'outcome="cancelled",status="499"} 1' in metrics

    run(main())


def test_a_client_that_leaves_before_its_whole_answer_frees_its_slot() -> None:
    async def main() -> None:
        async with gateway(iteration_s=0.005) as (served, engine):
            client = await Client.open(served.port)
            client.send(CHAT, chat(**LONG))
            await until(lambda: engine.engine.live == 1)
            client.close()
            await until(lambda: engine.statistics.ended["abort"] == 1)
            assert engine.engine.live == 0
            assert not any(watch.engine.flights for watch in served.service.watches.values())

    run(main())


def test_a_client_that_leaves_the_queue_never_reaches_the_engine() -> None:
    async def main() -> None:
        async with gateway(iteration_s=0.005, specs=lambda port: [llm_spec(port, tasks_max=1)]) as (served, engine):
            first = asyncio.create_task(ask(served.port, CHAT, chat(max_tokens=40, min_tokens=40)))
            await until(lambda: engine.engine.live == 1)
            queued = await Client.open(served.port)
            queued.send(CHAT, chat("queued"))
            last = asyncio.create_task(ask(served.port, CHAT, chat("last")))
            plane = served.service.driver.plane
            await until(lambda: plane.tasks_queued == 2)
            queued.close()
            await until(lambda: plane.tasks_queued == 1)
            assert [reply.status for reply in await asyncio.gather(first, last)] == [200, 200]
            assert engine.statistics.ended == {"stop": 0, "length": 2, "abort": 0}
            assert len(served.said(Dispatch)) == 2

    run(main())


def test_a_client_that_leaves_in_the_turn_it_arrived_in_costs_nothing() -> None:
    async def main() -> None:
        async with gateway() as (served, engine):
            service = served.service
            answer = Told()
            service.cancel(service.submit(call(answer)))
            await until(lambda: not service.calls)
            assert served.service.driver.plane.counts.cancelled == 1
            assert engine.engine.live == 0 and not answer.heard
            assert (await ask(served.port, CHAT, chat())).status == 200

    run(main())


def test_who_leaves_a_batch_of_embeddings_does_not_end_it_for_the_others() -> None:
    async def main() -> None:
        held: list[Request] = []
        async with (
            scripted(held.append) as engine,
            serving([embed_spec(engine.port)], policy=lambda: hybrid(window_s=0.05)) as served,
        ):
            first = asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("first")))
            await until(lambda: len(held) == 1)
            clients = [await Client.open(served.port) for _ in range(3)]
            for number, client in enumerate(clients):
                client.send(EMBEDDINGS, embedding(f"text {number}"))
            await until(lambda: len(held) == 2)  # the window is over, and all three are in it
            assert engine.bodies[1]["input"] == ["text 0", "text 1", "text 2"]
            clients[1].close()
            await until(lambda: served.service.driver.plane.counts.cancelled == 1)
            assert engine.gone == 0
            for request in held:
                request.respond(200, vectors(json.loads(request.body)["input"]))
            assert (await first).status == 200
            for number in (0, 2):
                reply = await clients[number].reply()
                assert reply.json["data"] == [{"object": "embedding", "index": 0, "embedding": [f"text {number}"]}]
            # And a batch that nobody wants any more is cut.
            again = [await Client.open(served.port) for _ in range(3)]
            again[0].send(EMBEDDINGS, embedding("busy"))
            await until(lambda: len(held) == 3)
            for client in again[1:]:
                client.send(EMBEDDINGS, embedding("unwanted"))
            await until(lambda: len(held) == 4)
            for client in again[1:]:
                client.close()
            await until(lambda: engine.gone == 1)
            held[2].respond(200, vectors(["busy"]))
            assert (await again[0].reply()).status == 200

    run(main())


def vectors(inputs: list[str] | str) -> bytes:
    """An embedding engine's answer in which each vector says whose it is."""
    given = [inputs] if isinstance(inputs, str) else inputs
    data = [{"object": "embedding", "index": i, "embedding": [text]} for i, text in enumerate(given)]
    usage = {"prompt_tokens": len(given), "total_tokens": len(given)}
    return json.dumps({"object": "list", "data": data, "model": EMBED, "usage": usage}).encode()


class Told:
    """An answer that keeps what it is told, or will not hear of it."""

    def __init__(self, deaf: bool = False) -> None:
        self.heard: list[Any] = []
        self.deaf = deaf

    def _tell(self, *what: Any) -> None:
        if self.deaf:
            raise OSError("nobody there")
        self.heard.append(what)

    def complete(self, status: int, body: bytes, content_type: bytes) -> None:
        self._tell(status, body, content_type)

    def begin(self, content_type: bytes) -> None:
        self._tell("begin", content_type)

    def piece(self, data: bytes) -> None:
        self._tell(data)

    def finish(self, data: bytes) -> None:
        self._tell("finish", data)

    def fail(self, error: Exception) -> None:
        self._tell(error)


def call(answer: Any, body: bytes | None = None, **more: Any) -> Call:
    given = json.dumps(chat()).encode() if body is None else body
    return Call(answer, RequestKind.LLM_CHAT, LLM, CHAT, given, **more)


# --- who reads slowly -------------------------------------------------------------------------------------------------


def test_a_client_that_reads_slowly_makes_only_its_own_stream_wait() -> None:
    piece = sse(token("x" * 50_000))
    total = 1000  # 50 MB; the buffers of four sockets take some of it

    async def main() -> None:
        sent = 0

        async def produce(request: Request) -> None:
            nonlocal sent
            writable = asyncio.Event()
            writable.set()
            request.on_writable = lambda yes: writable.set() if yes else writable.clear()
            request.start(200)
            for _ in range(total):
                request.write(piece)
                sent += 1
                await asyncio.sleep(0)
                await writable.wait()
            request.write(DONE)
            request.end()

        def handler(request: Request) -> None:
            if b"slow" in request.body:
                tasks.append(asyncio.create_task(produce(request)))
            else:
                request.respond(200, ANSWER)

        tasks: list[asyncio.Task[None]] = []
        health = HealthConfig(interval_s=0.05, stall_s=0.3)
        async with (
            scripted(handler) as engine,
            serving([llm_spec(engine.port)], health=health) as served,
        ):
            slow = await Client.open(served.port)
            slow.send(CHAT, chat("slow", stream=True))
            await slow.head()
            at = -1
            while at != sent:  # until nothing moves any more
                at = sent
                await asyncio.sleep(0.2)
            assert 0 < sent < total / 2
            flight = next(iter(served.service.watches.values())).engine.flights
            assert [each.paused for each in flight.values()] == [True]
            await asyncio.sleep(1.0)  # more than stall_s: the engine is not to blame
            assert (await ask(served.port, CHAT, chat())).body == ANSWER
            watch = next(iter(served.service.watches.values()))
            assert watch.state is State.HEALTHY and watch.ejections == 0
            pieces: list[bytes] = []
            while data := await slow.chunk():
                pieces.append(data)
            assert b"".join(pieces) == piece * total + DONE
            assert watch.engine.pace.answers == 1  # the quick one: the slow one's time was its client's
            await asyncio.gather(*tasks)

    run(main())


# --- what fails -------------------------------------------------------------------------------------------------------


def refusing(status: int, body: bytes = b'{"error":{"message":"no"}}') -> Any:
    return lambda request: request.respond(status, body)


@pytest.mark.parametrize("status", [500, 502, 503, 429, 401, 408])
def test_an_engine_that_fails_is_replaced_by_another(status: int) -> None:
    async def main() -> None:
        async with (
            scripted(refusing(status)) as bad,
            scripted(lambda request: request.respond(200, ANSWER)) as good,
            serving([llm_spec(bad.port), llm_spec(good.port)], policy="round_robin") as served,
        ):
            replies = [await ask(served.port, CHAT, chat()) for _ in range(6)]
            assert [reply.body for reply in replies] == [ANSWER] * 6
            counts = served.service.driver.plane.counts
            assert counts.retries == len(bad.requests) >= 1
            assert (counts.arrived, counts.responded) == (6, 6)

    run(main())


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [(500, 502, "upstream_failed"), (503, 503, "server_is_overloaded"), (429, 503, "server_is_overloaded")],
)
def test_when_every_attempt_failed_the_client_is_told_so(status: int, told: int, code: str) -> None:
    async def main() -> None:
        # Errors in a row may get the engine ejected; here it has to stay.
        health = HealthConfig(interval_s=0.05, errors_max=1000)
        async with (
            scripted(refusing(status)) as bad,
            serving([llm_spec(bad.port)], attempts_max=3, health=health) as served,
        ):
            for stream in (False, True):
                bad.requests.clear()
                reply = await ask(served.port, CHAT, chat(stream=stream))
                assert (reply.status, reply.json["error"]["code"]) == (told, code)
                assert len(bad.requests) == 3
            counts = served.service.driver.plane.counts
            assert (counts.arrived, counts.failed, counts.retries) == (2, 2, 4)

    run(main())


@pytest.mark.parametrize("status", [400, 404, 413, 422])
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_engine_says_of_the_request_itself_passes_unchanged_and_once(status: int, stream: bool) -> None:
    body = b'{"error": {"message": "context length", "type": "BadRequestError", "param": null, "code": 400}}'

    async def main() -> None:
        async with (
            scripted(refusing(status, body)) as engine,
            serving([llm_spec(engine.port)]) as served,
        ):
            reply = await ask(served.port, CHAT, chat(stream=stream))
            assert (reply.status, reply.body) == (status, body)
            assert len(engine.requests) == 1
            watch = next(iter(served.service.watches.values()))
            assert watch.state is State.HEALTHY

    run(main())


CUT_ANSWERS = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-",
    "half a body": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{",
    "not HTTP": b"\x16\x03\x01 I am no HTTP server\r\n\r\n",
    "not JSON": b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
    "empty": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n",
    "an empty stream": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n",
    "a stream of nothing": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {",
    "an error at once": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b'1c\r\ndata: {"error": {"code":500}}\n\r\n2\r\n\n\n\r\n0\r\n\r\n'
    ),
}


@pytest.mark.parametrize("answer", CUT_ANSWERS.values(), ids=CUT_ANSWERS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_did_not_begin_is_asked_for_again_elsewhere(answer: bytes, stream: bool) -> None:
    good_stream = sse(token("a")) + DONE

    def well(request: Request) -> None:
        if not stream:
            request.respond(200, ANSWER)
            return
        request.start(200)
        request.write(good_stream)
        request.end()

    async def main() -> None:
        health = HealthConfig(interval_s=5.0, errors_max=1000)
        async with (
            raw_engine(answer) as (port, seen),
            scripted(well) as good,
            serving([llm_spec(port), llm_spec(good.port)], policy="round_robin", health=health) as served,
        ):
            for _ in range(4):
                reply = await ask(served.port, CHAT, chat(stream=stream))
                assert (reply.status, reply.whole) == (200, True)
                assert reply.body == (good_stream if stream else ANSWER)
            counts = served.service.driver.plane.counts
            assert counts.responded == counts.arrived == 4
            # A connection that had lain idle and closes without a word is tried once more by itself.
            assert 1 <= counts.retries <= len(seen)

    run(main())


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
TOKENS = sse(token("one")) + sse(token("two"))
BROKEN_STREAMS = {
    "cut": STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(TOKENS), TOKENS),
    "cut within an event": STREAM_HEAD + b"content-length: 5000\r\n\r\n" + TOKENS + b'data: {"id',
    "ended without [DONE]": STREAM_HEAD + b"content-length: %d\r\n\r\n%b" % (len(TOKENS), TOKENS),
    "ended by the connection": STREAM_HEAD + b"\r\n" + TOKENS,
    "turned to garbage": STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\nZZZ\r\n" % (len(TOKENS), TOKENS),
}


@pytest.mark.parametrize("answer", BROKEN_STREAMS.values(), ids=BROKEN_STREAMS)
def test_a_stream_that_breaks_says_so_and_is_cut(answer: bytes) -> None:
    async def main() -> None:
        health = HealthConfig(interval_s=5.0, errors_max=1000)
        async with raw_engine(answer) as (port, seen), serving([llm_spec(port)], health=health) as served:
            reply = await ask(served.port, CHAT, chat(stream=True))
            assert len(seen) == 1  # what a client may have seen is not tried again
            counts = served.service.driver.plane.counts
            assert (counts.arrived, counts.failed, counts.retries) == (1, 1, 0)
            if reply.status == 200:
                assert not reply.whole
                error = reply.events[-1]["error"]
                assert reply.body.startswith(sse(token("one")))
            else:  # the whole of it came in one read, so nothing had been passed on
                assert reply.status == 502
                error = reply.json["error"]
            assert error["code"] == "upstream_failed" and b"[DONE]" not in reply.body

    run(main())


def test_an_error_within_a_stream_ends_it_as_one() -> None:
    """As vLLM says it when its worker dies: an event, then [DONE]."""

    async def main() -> None:
        held: list[Request] = []
        async with scripted(held.append) as engine, serving([llm_spec(engine.port)]) as served:
            client = await Client.open(served.port)
            client.send(CHAT, chat(stream=True))
            await until(lambda: held)
            held[0].start(200)
            held[0].write(sse(token("one")))
            await client.head()
            assert await client.chunk() == sse(token("one"))
            held[0].write(sse({"error": {"message": "EngineCore encountered an issue.", "code": 500}}))
            held[0].write(DONE)
            held[0].end()
            error = await client.chunk()
            assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "upstream_failed"
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.chunk()
            assert served.service.driver.plane.counts.failed == 1

    run(main())


def test_nothing_is_lost_among_engines_that_fail_at_random() -> None:
    async def main() -> None:
        async with (
            emulated(fail_rate=0.3) as first,
            emulated(fail_rate=0.2) as second,
            raw_engine(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{") as (third, _),
            serving(
                [llm_spec(first.port), llm_spec(second.port), llm_spec(third)],
                policy="round_robin",
                health=HealthConfig(interval_s=5.0, errors_max=10**6),
            ) as served,
        ):
            asked = [ask(served.port, CHAT, chat(f"request {i}", stream=i % 3 == 0)) for i in range(150)]
            replies = await asyncio.gather(*asked)
            told = Counter(reply.status for reply in replies)
            counts = served.service.driver.plane.counts
            assert counts.arrived == 150 == counts.responded + counts.failed
            assert told == Counter({200: counts.responded, 502: counts.failed}) and counts.responded > 75
            assert all(is_openai_error(reply.body) for reply in replies if reply.status != 200)
            assert all(reply.whole for reply in replies)
            assert len(served.heard(e.TaskFailed)) == counts.retries + counts.failed
            assert not served.service.calls

    run(main())


def test_a_request_that_takes_too_long_is_given_up() -> None:
    async def main() -> None:
        async with gateway(iteration_s=0.05, service=ServiceConfig(request_s=0.2)) as (served, engine):
            reply = await ask(served.port, CHAT, chat(**LONG))
            assert (reply.status, reply.json["error"]["code"]) == (504, "upstream_timeout")
            await until(lambda: engine.engine.live == 0)

    run(main())


# --- embeddings together ----------------------------------------------------------------------------------------------


async def batches(served: Any, held: list[Request], count: int) -> list[list[str]]:
    """The inputs of the first ``count`` requests that the engine got."""
    await until(lambda: len(held) >= count)
    inputs = [json.loads(request.body)["input"] for request in held]
    return [[given] if isinstance(given, str) else given for given in inputs]


def test_clients_share_a_call_when_the_engine_is_busy_until_the_window_ends() -> None:
    async def main() -> None:
        held: list[Request] = []
        async with (
            scripted(held.append) as engine,
            serving([embed_spec(engine.port)], policy=lambda: hybrid(window_s=0.3)) as served,
        ):
            tasks = [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("a")))]
            assert await batches(served, held, 1) == [["a"]]  # an idle engine never waits
            began = served.service.driver.now
            tasks += [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding(text))) for text in "bcd"]
            await until(lambda: served.service.driver.plane.tasks_queued == 3)
            inputs = await batches(served, held, 2)
            assert sorted(inputs[1]) == ["b", "c", "d"]  # one call for three clients
            assert served.service.driver.now - began >= 0.25e9  # after the window, though nothing had happened
            for request in held:
                request.respond(200, vectors(json.loads(request.body)["input"]))
            replies = await asyncio.gather(*tasks)
            assert [reply.json["data"][0]["embedding"] for reply in replies] == [["a"], ["b"], ["c"], ["d"]]

    run(main())


def test_a_full_batch_does_not_wait_for_the_window() -> None:
    async def main() -> None:
        held: list[Request] = []
        async with (
            scripted(held.append) as engine,
            serving([embed_spec(engine.port, tasks_max=4)], policy=lambda: hybrid(window_s=60.0)) as served,
        ):
            tasks = [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("first")))]
            await batches(served, held, 1)
            tasks += [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding(f"t{i}"))) for i in range(4)]
            inputs = await batches(served, held, 2)
            assert sum(map(len, inputs[1:])) == 4
            for request in held:
                request.respond(200, vectors(json.loads(request.body)["input"]))
            assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}

    run(main())


def test_a_near_deadline_closes_a_batch_early() -> None:
    async def main() -> None:
        held: list[Request] = []
        async with (
            scripted(held.append) as engine,
            serving([embed_spec(engine.port)], policy=lambda: hybrid(window_s=60.0)) as served,
        ):
            tasks = [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("first")))]
            await batches(served, held, 1)
            tasks.append(asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("patient"))))
            await until(lambda: served.service.driver.plane.tasks_queued == 1)
            wish = {"x-sage-e2e-ms": "700"}
            tasks.append(asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("urgent"), wish)))
            inputs = await batches(served, held, 2)  # within the 0.7 s, not the 60
            assert sorted(inputs[1]) == ["patient", "urgent"]
            for request in held:
                request.respond(200, vectors(json.loads(request.body)["input"]))
            assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}

    run(main())


def test_what_was_asked_differently_is_never_mixed() -> None:
    async def main() -> None:
        held: list[Request] = []
        async with (
            scripted(held.append) as engine,
            serving([embed_spec(engine.port)], policy=lambda: hybrid(window_s=0.2)) as served,
        ):
            tasks = [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("first")))]
            await batches(served, held, 1)
            different: list[dict[str, Any]] = [
                {},
                {"encoding_format": "base64"},
                {"dimensions": 4},
                {"dimensions": 8},
                {"truncate": True},
            ]
            bodies = [embedding(f"t{i}", **more) for i, more in enumerate(different)]
            bodies += [embedding("t5"), embedding([1, 2, 3])]
            tasks += [asyncio.create_task(ask(served.port, EMBEDDINGS, body)) for body in bodies]
            await until(lambda: len(held) == 7)
            sent = sorted(json.dumps(body["input"]) for body in engine.bodies[1:])
            assert sent in (
                sorted(['["t0", "t5"]', '"t1"', '"t2"', '"t3"', '"t4"', "[1, 2, 3]"]),
                sorted(['["t5", "t0"]', '"t1"', '"t2"', '"t3"', '"t4"', "[1, 2, 3]"]),
            )
            for request in held:
                given = json.loads(request.body)["input"]
                request.respond(200, vectors(["ids"] if isinstance(given[0], int) else given))
            assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}

    run(main())


def test_one_clients_bad_input_does_not_fail_those_it_shares_a_call_with() -> None:
    async def main() -> None:
        held: list[Request] = []
        async with (
            scripted(held.append) as engine,
            serving([embed_spec(engine.port)], policy=lambda: hybrid(window_s=0.1)) as served,
        ):
            first = asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("first")))
            await until(lambda: len(held) == 1)
            tasks = [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding(t))) for t in ("good", "bad")]
            await until(lambda: len(held) == 2)
            held[1].respond(400, b'{"error":{"message":"too long"}}')
            await until(lambda: len(held) == 4)
            for request in held:
                given = json.loads(request.body)["input"]
                if given == "bad":
                    request.respond(400, b'{"error":{"message":"too long: bad"}}')
                elif not request.answered:
                    request.respond(200, vectors(given))
            replies = await asyncio.gather(*tasks)
            assert [reply.status for reply in replies] == [200, 400]
            assert replies[1].body == b'{"error":{"message":"too long: bad"}}'
            assert (await first).status == 200
            assert served.service.driver.plane.counts.retries == 0

    run(main())


def test_a_batch_that_fails_is_tried_again() -> None:
    async def main() -> None:
        held: list[Request] = []
        async with (
            scripted(held.append) as engine,
            serving([embed_spec(engine.port)], policy=lambda: hybrid(window_s=0.05)) as served,
        ):
            first = asyncio.create_task(ask(served.port, EMBEDDINGS, embedding("first")))
            await until(lambda: len(held) == 1)
            tasks = [asyncio.create_task(ask(served.port, EMBEDDINGS, embedding(t))) for t in ("b", "c")]
            await until(lambda: len(held) == 2)
            held[1].respond(200, vectors("one vector too few"))
            await until(lambda: len(held) == 3)
            for request in held:
                if not request.answered:
                    request.respond(200, vectors(json.loads(request.body)["input"]))
            while not all(task.done() for task in tasks):
                for request in held:
                    if not request.answered:
                        request.respond(200, vectors(json.loads(request.body)["input"]))
                await asyncio.sleep(0.01)
            assert [task.result().json["data"][0]["embedding"] for task in tasks] == [["b"], ["c"]]
            assert (await first).status == 200
            assert served.service.driver.plane.counts.retries == 2

    run(main())


# --- the service by itself --------------------------------------------------------------------------------------------


def test_objectives_and_caps_beyond_all_measure_do_not_break_the_plane() -> None:
    slo = SloTable({"chat": Slo(ttft_s=1.0, tpot_s=1e6), "embedding": Slo(e2e_s=1e9)})

    async def main() -> None:
        async with (
            scripted(lambda request: request.respond(200, ANSWER)) as engine,
            serving([llm_spec(engine.port)], slo=slo) as served,
        ):
            for more in ({"max_tokens": 2**31 - 1, "n": 128}, {"max_tokens": 2**31 - 1}):
                reply = await ask(served.port, CHAT, chat(**more))
                assert reply.status == 200, reply.body
            far = {"x-sage-e2e-ms": "1e9", "x-sage-ttft-ms": "1e-300", "x-sage-input-tokens": str(2**31 - 1)}
            assert (await ask(served.port, CHAT, chat(), far)).status == 200
            assert served.heard(e.RequestArrived)[0].due_at == 2**63 - 1

    run(main())


def test_a_listener_that_fails_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            service = served.service
            deaf = Told(deaf=True)
            with caplog.at_level(logging.ERROR):
                service.submit(call(deaf))
                assert (await ask(served.port, CHAT, chat())).status == 200
                await until(lambda: not service.calls)
            assert "could not be told" in caplog.text

    run(main())


def test_a_body_that_cannot_be_passed_on_is_its_clients_error() -> None:
    """The gateway checks bodies; whoever calls the service in his own process may not have."""

    async def main() -> None:
        async with emulated() as engine:
            specs = [llm_spec(engine.port, upstream_model="other"), embed_spec(engine.port, upstream_model=EMBED)]
            async with serving(specs) as served:
                answers = [Told() for _ in range(4)]
                calls = [call(answers[0], b'{"model": '), call(answers[1], b'"model"}')]
                calls += [
                    Call(answer, RequestKind.EMBEDDING, EMBED, EMBEDDINGS, body)
                    for answer, body in zip(answers[2:], (b'{"input": 5', b"{}"), strict=True)
                ]
                for each in calls:
                    served.service.submit(each)
                await until(lambda: not served.service.calls)
                assert [answer.heard[0][0] for answer in answers[:3]] == [400] * 3
                assert json.loads(answers[3].heard[0][1])["error"]  # whatever: it was answered
                assert not any(watch.engine.flights for watch in served.service.watches.values())

    run(main())


def test_engines_that_clash_are_refused_and_leave_nothing_behind() -> None:
    async def main() -> None:
        async with gateway() as (served, engine):
            service = served.service
            for spec in (
                llm_spec(engine.port),  # the name is taken
                llm_spec(engine.port, name="x", model=EMBED),  # a model of another kind
                llm_spec(engine.port, name="x", pool="elsewhere"),
            ):
                with pytest.raises(ConfigError):
                    service.add_engine(spec)
            with pytest.raises(ConfigError):
                service.add_engine(llm_spec(engine.port, name="x", adapter="none"))
            assert len(service.watches) == 2 and set(service.models) == {LLM, EMBED}
            with pytest.raises(KeyError):
                await service.remove_engine("none")

    run(main())


def test_what_a_client_writes_about_priority_does_not_reach_an_engine_that_schedules_by_it() -> None:
    async def main() -> None:
        async with scripted(lambda request: request.respond(200, ANSWER)) as engine:
            specs = [llm_spec(engine.port, priority_scheduling=True)]
            async with serving(specs) as served:
                await ask(served.port, CHAT, chat(), {"x-sage-priority": "3"})
                await ask(served.port, CHAT, chat(priority=-100))
                hidden = json.dumps(chat()).replace('"model"', '"\\u0070riority": -100, "model"').encode()
                await ask(served.port, CHAT, hidden, {"x-sage-priority": "2"})
                await ask(served.port, CHAT, chat())
                assert [body.get("priority") for body in engine.bodies] == [3, 0, 2, None]

    run(main())


def test_an_engine_that_serves_the_larger_priority_first_is_told_the_negative() -> None:
    async def main() -> None:
        async with (
            scripted(lambda request: request.respond(200, ANSWER)) as engine,
            serving([llm_spec(engine.port, adapter="sglang", priority_scheduling=True)]) as served,
        ):
            await ask(served.port, CHAT, chat(), {"x-sage-priority": "3"})
            assert [body.get("priority") for body in engine.bodies] == [-3]

    run(main())


def test_the_engines_own_name_for_the_model_is_what_it_is_asked_for() -> None:
    async def main() -> None:
        async with (
            scripted(lambda request: request.respond(200, ANSWER)) as engine,
            serving([llm_spec(engine.port, upstream_model="org/model", api_key="k")]) as served,
        ):
            await ask(served.port, CHAT, chat())
            assert engine.bodies[0]["model"] == "org/model"
            assert engine.requests[0].headers[b"authorization"] == b"Bearer k"

    run(main())
