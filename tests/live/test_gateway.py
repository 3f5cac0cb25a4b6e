"""The gateway over real sockets, before emulated engines: what clients, operators and engines see of it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent))

from gateway_harness import (
    ANSWER,
    CHAT,
    COMPLETIONS,
    DONE,
    EMBED,
    EMBEDDINGS,
    LLM,
    USAGE,
    Client,
    ask,
    chat,
    embed_spec,
    embedding,
    emulated,
    gateway,
    is_openai_error,
    llm_spec,
    run,
    scripted,
    serving,
    sse,
    token,
    until,
)

from sage_core import events as e
from sage_core._native import StreamRelay
from sage_core.commands import Dispatch, Respond
from sage_core.replay import replay
from sage_core.slo import Slo, SloTable
from sage_core.units import PoolKind, RequestKind
from sage_live.gateway.keyfile import add_key
from sage_live.gateway.keys import ApiKeys
from sage_live.gateway.rate import Limits as RateLimit
from sage_live.gateway.rate import RateLimits
from sage_live.health import State
from sage_live.http.limits import Limits
from sage_live.service import ServiceConfig

# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_with_the_engines_own_bytes() -> None:
    async def main() -> None:
        async with (
            scripted(lambda request: request.respond(200, ANSWER)) as engine,
            serving([llm_spec(engine.port)]) as served,
        ):
            body = json.dumps(chat(temperature=0.5, tools=[{"any": "thing"}])).encode()
            reply = await ask(served.port, CHAT, body)
            assert (reply.status, reply.body) == (200, ANSWER)
            assert engine.requests[0].body == body  # and the engine got the client's
            assert engine.requests[0].path == CHAT

    run(main())


STREAM = sse(
    {"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    token("ünï\ud83d\ude42"),
    token('"choices":[] "usage":{ \r\n\n data: [DONE]'),
    token(" end", created=7),
)


def test_a_streams_bytes_are_the_engines_and_usage_comes_only_when_asked_for() -> None:
    whole = STREAM + sse(USAGE) + DONE

    def handler(request: Any) -> None:
        request.start(200)
        for start in range(0, len(whole), 7):  # anywhere but at the ends of events
            request.write(whole[start : start + 7])
        request.end()

    async def main() -> None:
        async with scripted(handler) as engine, serving([llm_spec(engine.port)]) as served:
            plain = await ask(served.port, CHAT, chat(stream=True))
            assert plain.whole and plain.body == STREAM + DONE
            for given in ({}, {"include_usage": False}, None):
                reply = await ask(served.port, CHAT, chat(stream=True, stream_options=given))
                assert reply.body == STREAM + DONE
            asked = await ask(served.port, CHAT, chat(stream=True, stream_options={"include_usage": True}))
            assert asked.body == whole
            # The gateway asks for it each time: the plane learns true lengths from it.
            assert all(body["stream_options"]["include_usage"] for body in engine.bodies)
            assert [event.output_tokens for event in served.heard(e.TaskFinished)] == [2] * 5

    run(main())


def test_a_stream_whose_lines_end_the_other_way_is_passed_on_event_by_event() -> None:
    requests: list[Any] = []

    async def main() -> None:
        async with scripted(requests.append) as engine, serving([llm_spec(engine.port)]) as served:
            client = await Client.open(served.port)
            client.send(CHAT, chat(stream=True))
            await until(lambda: requests)
            requests[0].start(200)
            first = sse(token("a"))
            requests[0].write(first.replace(b"\n", b"\r\n"))
            assert (await client.head())[0] == 200
            assert await client.chunk() == first  # although nothing has followed it
            requests[0].write((sse(token("b")) + DONE).replace(b"\n", b"\r\n"))
            requests[0].end()
            rest = b""
            while data := await client.chunk():
                rest += data
            assert rest == sse(token("b")) + DONE
            client.close()

    run(main())


def test_tokens_are_relayed_to_clients_that_take_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    relays: list[StreamRelay] = []
    requests: list[Any] = []

    def made(*arguments: Any) -> StreamRelay:
        relays.append(StreamRelay(*arguments))
        return relays[-1]

    async def main() -> None:
        async with scripted(requests.append) as engine, serving([llm_spec(engine.port)]) as served:
            client = await Client.open(served.port)
            client.send(CHAT, chat(stream=True))
            await until(lambda: requests)
            requests[0].start(200)
            for text in "abc":
                requests[0].write(sse(token(text)))
                if text == "a":
                    assert (await client.head())[0] == 200
                assert await client.chunk() == sse(token(text))
            assert [relay.events for relay in relays] == [2]
            requests[0].end(DONE)
            assert await client.chunk() == DONE and not await client.chunk()
            client.close()
            (finished,) = served.heard(e.TaskFinished)
            assert finished.output_tokens == 2  # nobody told the usage: four events, less the role's and the last

    monkeypatch.setattr("sage_core._native.StreamRelay", made)
    run(main())


def test_chat_completions_and_streams_of_an_emulated_engine() -> None:
    async def main() -> None:
        async with gateway() as (served, engine):
            whole = await ask(served.port, CHAT, chat())
            assert whole.json["usage"]["completion_tokens"] == 8
            text = whole.json["choices"][0]["message"]["content"]
            streamed = await ask(served.port, CHAT, chat(stream=True))
            assert streamed.events[-1] == "[DONE]" and streamed.whole
            assert "".join(event["choices"][0]["delta"]["content"] for event in streamed.events[:-1]) == text
            direct = await ask(engine.port, CHAT, chat())
            assert direct.json["choices"] == whole.json["choices"]
            completion = {"model": LLM, "prompt": "Once", "max_tokens": 4, "min_tokens": 4}
            reply = await ask(served.port, COMPLETIONS, completion)
            assert reply.json["object"] == "text_completion" and reply.json["usage"]["completion_tokens"] == 4
            tokens = await ask(served.port, COMPLETIONS, completion | {"prompt": [1, 2, 3]})
            assert tokens.json["usage"]["prompt_tokens"] == 3
            kinds = [event.kind for event in served.heard(e.RequestArrived)]
            assert kinds == [RequestKind.LLM_CHAT] * 2 + [RequestKind.LLM_GENERATE] * 2

    run(main())


def test_embeddings_in_every_form_come_in_order() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            texts = [f"text number {i}" for i in range(20)]
            batch = await ask(served.port, EMBEDDINGS, embedding(texts))
            assert [item["index"] for item in batch.json["data"]] == list(range(20))
            vectors = [item["embedding"] for item in batch.json["data"]]
            for place in (0, 7, 19):
                alone = await ask(served.port, EMBEDDINGS, embedding(texts[place]))
                assert alone.json["data"][0]["embedding"] == vectors[place]
            coded = await ask(served.port, EMBEDDINGS, embedding(texts, encoding_format="base64"))
            for item, vector in zip(coded.json["data"], vectors, strict=True):
                decoded = np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4")
                np.testing.assert_allclose(decoded, np.float32(vector))
            for tokens, count in ([1, 2, 3], 1), ([[1, 2], [3]], 2):
                reply = await ask(served.port, EMBEDDINGS, embedding(tokens))
                assert len(reply.json["data"]) == count and reply.json["usage"]["prompt_tokens"] == 3
            short = await ask(served.port, EMBEDDINGS, embedding("a", dimensions=4))
            assert len(short.json["data"][0]["embedding"]) == 4

    run(main())


# --- documents --------------------------------------------------------------------------------------------------------


def test_models_health_and_the_document() -> None:
    async def main() -> None:
        async with emulated() as engine:
            specs = [
                llm_spec(engine.port),
                llm_spec(engine.port, name="org", model="org/name"),
                embed_spec(engine.port),
            ]
            async with serving(specs) as served:
                listed = await ask(served.port, "/v1/models")
                assert [card["id"] for card in listed.json["data"]] == [LLM, "org/name", EMBED]
                one = await ask(served.port, "/v1/models/org/name")
                assert one.json == listed.json["data"][1] and one.json["object"] == "model"
                missing = await ask(served.port, "/v1/models/none")
                assert missing.status == 404 and missing.json["error"]["code"] == "model_not_found"
                health = await ask(served.port, "/health")
                assert health.json == {"status": "ok", "engines": 3, "healthy": 3}
                document = await ask(served.port, "/openapi.json")
                assert CHAT in document.json["paths"]
                head = await ask(served.port, "/health", method="HEAD")
                assert head.status == 200 and head.body == b""

    run(main())


def test_without_engines_it_is_not_healthy() -> None:
    async def main() -> None:
        async with serving([]) as served:
            assert (await ask(served.port, "/health")).status == 503
            assert (await ask(served.port, "/v1/models")).json["data"] == []
            reply = await ask(served.port, CHAT, chat())
            assert reply.status == 404 and reply.json["error"]["code"] == "model_not_found"

    run(main())


def samples(text: str) -> dict[tuple[str, str], float]:
    """Metric and the label that matters, to its value; summed over other labels."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("outcome") or sample.labels.get("status") or ""
            found[key] = found.get(key, 0) + sample.value
    return found


def test_metrics_count_what_happened() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            for _i in range(3):
                await ask(served.port, CHAT, chat())
            await ask(served.port, CHAT, chat(stream=True))
            await ask(served.port, EMBEDDINGS, embedding("two tokens"))
            await ask(served.port, CHAT, chat("x" * 300000))  # 400 of the engine
            await ask(served.port, CHAT, b"{")
            await ask(served.port, CHAT, {"model": "none", "messages": [{"role": "user"}]})
            reply = await ask(served.port, "/metrics")
            assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            got = samples(reply.body.decode())
            assert got["sage_requests_arrived_total", ""] == 6
            assert got["sage_requests_ended_total", "responded"] == 5
            assert got["sage_requests_ended_total", "failed"] == 1
            assert got["sage_requests_refused_total", "400"] == 1
            assert got["sage_requests_refused_total", "404"] == 1
            assert got["sage_output_tokens_total", ""] == 4 * 8
            assert got["gen_ai_server_time_to_first_token_seconds_count", ""] == 1
            assert got["gen_ai_server_request_duration_seconds_count", ""] == 6
            assert got["sage_engine_healthy", ""] == 2
            assert got["sage_live_requests", ""] == got["sage_queue_depth", ""] == 0
            for pool in (LLM, EMBED):
                assert f'sage_queue_depth{{pool="{pool}"}} 0' in reply.body.decode()
            assert got["sage_idle_dispatch_seconds_count", ""] == 6

    run(main())


# --- what clients say in headers --------------------------------------------------------------------------------------


def test_request_ids_are_echoed_whatever_the_answer() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            name = {"x-request-id": "my-own/1"}
            for path, body in (
                (CHAT, chat()),
                (CHAT, chat(stream=True)),
                (EMBEDDINGS, embedding()),
                (CHAT, chat("x" * 300000)),
                (CHAT, b"{"),
                ("/nowhere", None),
            ):
                assert (await ask(served.port, path, body, name)).headers["x-request-id"] == "my-own/1"
            own = await ask(served.port, CHAT, chat())
            assert own.headers["x-request-id"] == own.headers["x-sage-request"] == "4"

    run(main())


def test_tenant_priority_and_objectives_reach_the_plane() -> None:
    slo = SloTable({"chat": Slo(ttft_s=1.0, tpot_s=0.1), "chat/3": Slo(e2e_s=9.0)})

    async def main() -> None:
        async with gateway(slo=slo) as (served, _):
            wishes = {
                "x-sage-tenant": "alice",
                "x-sage-priority": "-2",
                "x-sage-ttft-ms": "250",
                "x-sage-e2e-ms": "1500.5",
                "x-sage-input-tokens": "77",
                "x-sage-output-tokens-max": "500",
            }
            reply = await ask(served.port, CHAT, chat(), wishes)
            assert reply.json["usage"]["prompt_tokens"] == 77  # it was passed on
            await ask(served.port, CHAT, chat())
            await ask(served.port, CHAT, chat(), {"x-sage-priority": "3"})
            stated, plain, third = served.heard(e.RequestArrived)
            assert (stated.tenant, stated.priority, stated.pipeline) == ("alice", -2, f"chat@{LLM}")
            assert (stated.input_tokens, stated.output_tokens_max) == (77, 8)  # another cap is not for anybody to state
            assert stated.ttft_due_at - stated.scheduled_at == 250_000_000
            assert stated.due_at - stated.scheduled_at == 1_500_500_000
            assert (plain.tenant, plain.priority, plain.output_tokens_max) == ("default", 0, 8)
            assert plain.ttft_due_at - plain.scheduled_at == 1_000_000_000
            assert plain.due_at - plain.scheduled_at == 1_700_000_000  # TTFT and 7 more tokens
            assert third.due_at - third.scheduled_at == 9_000_000_000
            await ask(served.port, CHAT, chat(n=None, max_tokens=None, min_tokens=0))
            assert served.heard(e.RequestArrived)[-1].output_tokens_max == 1024
            for name, value in {
                "x-sage-tenant": "ü",
                "x-sage-priority": "high",
                "x-sage-ttft-ms": "nan",
                "x-sage-e2e-ms": "-1",
                "x-sage-input-tokens": "0",
                "x-sage-output-tokens-max": "1e3",
            }.items():
                bad = await ask(served.port, CHAT, chat(), {name: value})
                assert bad.status == 400 and bad.json["error"]["param"] == name
            scheduled = await ask(served.port, CHAT, chat(), {"x-sage-scheduled-ns": "1"})
            assert scheduled.status == 200
            arrived_at, last = next((at, x) for at, x in reversed(served.events) if type(x) is e.RequestArrived)
            assert 0 <= arrived_at - last.scheduled_at < 1_000_000_000  # nobody said that it is to be believed

    run(main())


def test_a_schedule_is_believed_where_it_is_trusted() -> None:
    async def main() -> None:
        async with gateway(service=ServiceConfig(trust_schedule=True)) as (served, _):
            due = time.monotonic_ns() - 1_000_000
            headers = {"x-sage-scheduled-ns": str(due), "x-request-id": "7", "x-sage-output-tokens-max": "500"}
            reply = await ask(served.port, CHAT, chat(), headers)
            assert reply.headers["x-sage-request"] == "7"
            arrived = served.heard(e.RequestArrived)[0]
            assert arrived.request == 7 and arrived.scheduled_at == max(0, due - served.service.driver.origin_ns)
            assert arrived.output_tokens_max == 500
            # A number that was given out, one far ahead, and one that is no number: the next free one instead.
            for wanted, given in ("7", "8"), ("9" * 5000, "9"), ("x", "10"), ("3", "3"), ("3", "11"):
                reply = await ask(served.port, CHAT, chat(), {"x-request-id": wanted})
                assert (reply.status, reply.headers["x-sage-request"]) == (200, given)
            late = await ask(served.port, CHAT, chat(), {"x-sage-scheduled-ns": "1"})
            future = await ask(served.port, CHAT, chat(), {"x-sage-scheduled-ns": str(2**62)})
            assert late.status == future.status == 200

    run(main())


# --- who may ask, and how much ----------------------------------------------------------------------------------------


def test_keys_open_the_endpoints_they_are_for(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, alice = add_key(path, "alice", priority_min=2)
    _, operator = add_key(path, "ops", manage=True)

    async def main() -> None:
        async with gateway(keys=ApiKeys(path)) as (served, _):
            for path_, body in (CHAT, chat()), (EMBEDDINGS, embedding()), ("/v1/models", None):
                for headers in ({}, {"authorization": "Bearer sage-00000000-x"}):
                    reply = await ask(served.port, path_, body, headers)
                    assert reply.status == 401 and reply.json["error"]["code"] == "invalid_api_key"
                    assert reply.headers["www-authenticate"] == "Bearer"
                assert (await ask(served.port, path_, body, {"authorization": f"Bearer {alice}"})).status == 200
            forged = {"authorization": f"Bearer {alice}", "x-sage-tenant": "bob", "x-sage-priority": "-5"}
            await ask(served.port, CHAT, chat(), forged)
            arrived = served.heard(e.RequestArrived)[-1]
            assert (arrived.tenant, arrived.priority) == ("alice", 2)
            manage = "/v1/management/engines"
            assert (await ask(served.port, manage)).status == 401
            assert (await ask(served.port, manage, headers={"authorization": f"Bearer {alice}"})).status == 403
            assert (await ask(served.port, manage, headers={"authorization": f"Bearer {operator}"})).status == 200
            for open_path in ("/health", "/metrics", "/openapi.json"):
                assert (await ask(served.port, open_path)).status == 200

    run(main())


def test_a_tenant_over_its_rate_is_told_when_to_come_back() -> None:
    async def main() -> None:
        async with gateway(rates=RateLimits(RateLimit(requests_per_minute=12))) as (served, _):
            replies = [await ask(served.port, CHAT, chat()) for _ in range(4)]
            assert [reply.status for reply in replies] == [200, 200, 429, 429]
            refused = replies[-1]
            assert refused.json["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 5
            assert (int(refused.headers["retry-after"]) - 1) * 1000 < int(refused.headers["retry-after-ms"]) <= 5000
            other = await ask(served.port, CHAT, chat(), {"x-sage-tenant": "bob"})
            assert other.status == 200
            assert len(served.heard(e.RequestArrived)) == 3

    run(main())


def test_bodies_and_live_requests_are_bounded() -> None:
    async def main() -> None:
        async with gateway(limits=Limits(body_bytes_max=2000), service=ServiceConfig(live_max=2), iteration_s=0.02) as (
            served,
            _,
        ):
            big = await ask(served.port, CHAT, chat("x" * 3000))
            assert big.status == 413 and is_openai_error(big.body)
            held = [asyncio.create_task(ask(served.port, CHAT, chat(max_tokens=50, min_tokens=50))) for _ in range(2)]
            await until(lambda: served.service.driver.live == 2)
            full = await ask(served.port, CHAT, chat())
            assert full.status == 503 and full.headers["retry-after"] == "1"
            assert full.json["error"]["type"] == "service_unavailable_error"
            assert [reply.status for reply in await asyncio.gather(*held)] == [200, 200]
            assert (await ask(served.port, CHAT, chat())).status == 200

    run(main())


# --- the control plane in the path ------------------------------------------------------------------------------------


def test_a_request_that_finds_an_idle_engine_leaves_in_the_step_that_it_arrives_in() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            for _i in range(20):
                await ask(served.port, CHAT, chat())
            arrived = {event.request: at for at, event in served.events if type(event) is e.RequestArrived}
            sent = {c.tasks[0].task >> 16: at for at, c in served.commands if type(c) is Dispatch}
            assert arrived == sent  # the same step: the same instant of the log
            text = (await ask(served.port, "/metrics")).body.decode()
            got = samples(text)
            assert got["sage_idle_dispatch_seconds_count", ""] == 20
            assert got["sage_idle_dispatch_seconds_sum", ""] / 20 < 0.02

    run(main())


def test_a_request_that_had_to_wait_is_not_counted_as_idle_dispatch() -> None:
    async def main() -> None:
        async with gateway(specs=lambda port: [llm_spec(port, tasks_max=1)], iteration_s=0.004) as (served, _):
            replies = await asyncio.gather(*(ask(served.port, CHAT, chat()) for _ in range(4)))
            assert [reply.status for reply in replies] == [200] * 4
            got = samples((await ask(served.port, "/metrics")).body.decode())
            assert got["sage_idle_dispatch_seconds_count", ""] == 1
            assert got["sage_queue_time_seconds_count", ""] == 4

    run(main())


def test_its_log_replays_with_equal_digests_in_the_same_process() -> None:
    from gateway_harness import plane_of

    async def main() -> Any:
        async with gateway(policy="hybrid") as (served, _):
            asked = [ask(served.port, CHAT, chat(str(i), stream=i % 2 == 0)) for i in range(40)]
            asked += [ask(served.port, EMBEDDINGS, embedding(f"t{i}")) for i in range(40)]
            assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
            put = await ask(served.port, "/v1/management/policy", {"name": "fifo"}, method="PUT")
            assert put.status == 200
            await ask(served.port, CHAT, chat())
        return served

    served = run(main())
    for mechanism in ("native", "reference"):
        again = replay(served.log, plane_of("hybrid", mechanism))
        assert again.divergence is None
        assert again.digest == served.log[-1].digest == served.service.driver.digest
        assert again.steps == len(served.log)


# --- management -------------------------------------------------------------------------------------------------------

ENGINES = "/v1/management/engines"


def test_engines_come_and_go_under_load_without_loss() -> None:
    async def main() -> None:
        async with (
            emulated(iteration_s=0.002) as first,
            emulated(iteration_s=0.002) as second,
            serving([llm_spec(first.port, name="first", tasks_max=4)]) as served,
        ):
            statuses: list[int] = []
            going = True

            async def user(stream: bool) -> None:
                while going:
                    reply = await ask(served.port, CHAT, chat(stream=stream))
                    statuses.append(reply.status if reply.whole else -1)

            users = [asyncio.create_task(user(i % 2 == 0)) for i in range(12)]
            await until(lambda: len(statuses) > 20)
            new = {"url": f"http://127.0.0.1:{second.port}", "model": LLM, "name": "second", "tasks_max": 4}
            added = await ask(served.port, ENGINES, new)
            assert added.status == 201 and added.json["state"] == "starting"
            assert (await ask(served.port, ENGINES, new)).status == 409
            await until(lambda: served.service.watches["second"].engine.served > 10)
            drained = await ask(served.port, f"{ENGINES}/first/drain", b"", method="POST")
            assert drained.status == 202
            await until(lambda: served.service.watches["first"].state is State.DRAINED)
            shown = await ask(served.port, f"{ENGINES}/first")
            assert shown.json["state"] == "drained" and shown.json["in_flight"] == 0
            before = len(statuses)
            await until(lambda: len(statuses) > before + 20)
            assert (await ask(served.port, f"{ENGINES}/first/resume", b"", method="POST")).status == 202
            await until(lambda: served.service.watches["first"].state is State.HEALTHY)
            gone = await ask(served.port, f"{ENGINES}/second", method="DELETE")
            assert gone.status == 204 and gone.body == b""
            listed = await ask(served.port, ENGINES)
            assert [engine["name"] for engine in listed.json["data"]] == ["first"]
            before = len(statuses)
            await until(lambda: len(statuses) > before + 20)
            going = False
            await asyncio.gather(*users)
            assert set(statuses) == {200}
            counts = served.service.driver.plane.counts
            assert counts.arrived == counts.responded == len(statuses)
            assert counts.retries == 0

    run(main())


def test_an_engine_can_be_taken_out_by_force() -> None:
    async def main() -> None:
        async with emulated(iteration_s=0.02) as slow, emulated() as other:
            specs = [llm_spec(slow.port, name="slow"), llm_spec(other.port, name="other")]
            async with serving(specs, policy="round_robin") as served:
                streams = [
                    asyncio.create_task(ask(served.port, CHAT, chat(max_tokens=400, min_tokens=400))) for _ in "ab"
                ]
                await until(lambda: served.service.watches["slow"].engine.flights)
                gone = await ask(served.port, f"{ENGINES}/slow?force=true", method="DELETE")
                assert gone.status == 204
                replies = await asyncio.gather(*streams)
                assert [reply.status for reply in replies] == [200, 200]  # one of them was sent again
                assert served.service.driver.plane.counts.retries == 1
                await until(lambda: slow.engine.live == 0)

    run(main())


def test_the_policy_is_switched_and_obeyed() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            policy = "/v1/management/policy"
            before = await ask(served.port, policy)
            assert before.json["name"] == "fifo" and "hybrid" in before.json["known"]
            after = await ask(served.port, policy, {"name": "slo_aware"}, method="PUT")
            assert after.json["name"] == "slo_aware"
            assert (await ask(served.port, CHAT, chat())).status == 200
            assert served.heard(e.PolicyChanged) == [e.PolicyChanged("slo_aware")]
            assert served.service.driver.plane.policy.name == "slo_aware"
            assert b'sage_policy_info{policy="slo_aware"} 1' in (await ask(served.port, "/metrics")).body
            for body, status in (({"name": "nonsense"}, 400), ({}, 400), (b"", 400), ({"name": "fifo", "x": 1}, 400)):
                assert (await ask(served.port, policy, body, method="PUT")).status == status

    run(main())


def test_queue_and_configuration_are_shown() -> None:
    async def main() -> None:
        async with gateway(settings={"policy": {"name": "fifo"}}, specs=lambda p: [llm_spec(p, tasks_max=1)]) as (
            served,
            _,
        ):
            asked = [asyncio.create_task(ask(served.port, CHAT, chat(max_tokens=99, min_tokens=99))) for _ in range(3)]
            await until(lambda: served.service.driver.plane.tasks_queued == 2)
            queue = (await ask(served.port, "/v1/management/queue")).json
            assert (queue["queued"], queue["live"], queue["in_flight"]) == (2, 3, 1)
            assert queue["counts"]["arrived"] == 3
            await asyncio.gather(*asked)
            assert (await ask(served.port, "/v1/management/config")).json == {"policy": {"name": "fifo"}}

    run(main())


def test_management_says_what_is_wrong() -> None:
    async def main() -> None:
        async with gateway() as (served, engine):
            url = f"http://127.0.0.1:{engine.port}"
            for body in (
                {"url": "ftp://x", "model": "m"},
                {"url": "http://h:99999", "model": "m"},
                {"url": url, "model": "m", "adapter": "none"},
                {"url": url, "model": LLM, "kind": "embedding", "name": "e2"},
                {"url": url},
                [],
            ):
                reply = await ask(served.port, ENGINES, body)
                assert reply.status == 400 and is_openai_error(reply.body), body
            assert len(served.service.watches) == 2
            for path, method, status in (
                (f"{ENGINES}/none", "GET", 404),
                (f"{ENGINES}/none", "DELETE", 404),
                (f"{ENGINES}/none/drain", "POST", 404),
                (ENGINES, "PATCH", 405),
                (f"{ENGINES}/x", "POST", 405),
                (f"{ENGINES}/x/drain", "GET", 405),
                ("/v1/management/policy", "DELETE", 405),
                ("/v1/management/queue", "POST", 405),
                ("/v1/management/nothing", "GET", 404),
            ):
                reply = await ask(served.port, path, b"{}" if method != "GET" else None, method=method)
                assert reply.status == status and is_openai_error(reply.body), path

    run(main())


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_gateway_that_is_told_to_stop_finishes_what_it_has() -> None:
    async def main() -> None:
        async with emulated(iteration_s=0.02) as engine:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "sage_bench", "gateway", "start", "--port", "0", "policy=fifo"),
                *("--engine", f"http://127.0.0.1:{engine.port},model={LLM},kind=llm"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={key: value for key, value in os.environ.items() if not key.startswith("SAGE_")},
            )
            assert process.stdout is not None
            ready = await process.stdout.readline()
            port = int(re.search(rb":(\d+)/v1", ready)[1])  # type: ignore[index]
            async with asyncio.timeout(20):
                while (await ask(port, "/health")).status != 200:
                    await asyncio.sleep(0.02)
            stream, whole = await Client.open(port), await Client.open(port)
            stream.send(CHAT, chat(stream=True, max_tokens=60, min_tokens=60))
            whole.send(CHAT, chat(max_tokens=60, min_tokens=60))
            await until(lambda: engine.engine.live == 2)
            late = await Client.open(port)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while True:  # the signal is on its way
                    late.send("/health")
                    reply = await late.reply()
                    if reply.status == 503:
                        break
            refused = await ask(port, CHAT, chat())
            assert refused.status == 503 and refused.json["error"]["code"] == "server_is_overloaded"
            ended = await stream.reply()
            assert ended.whole and ended.events[-1] == "[DONE]"
            assert (await whole.reply()).json["usage"]["completion_tokens"] == 60
            output, _ = await asyncio.wait_for(process.communicate(), 20)
            assert process.returncode == 0, output
            assert b"2 responded, 0 rejected, 0 cancelled, 0 failed" in output

    run(main())


def test_what_does_not_end_within_the_grace_is_failed_and_said_so() -> None:
    async def main() -> None:
        async with emulated(iteration_s=0.05) as engine, serving([llm_spec(engine.port)], grace_s=0.1) as served:
            client = await Client.open(served.port)
            client.send(CHAT, chat(stream=True, max_tokens=900, min_tokens=900))
            await client.head()
            await served.gateway.close()
            with_error = b""
            try:
                while data := await client.chunk():
                    with_error += data
                raise AssertionError("the stream must not look whole")
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            await until(lambda: engine.engine.live == 0)
            counts = served.service.driver.plane.counts
            assert (counts.arrived, counts.failed) == (1, 1)
            assert served.said(Respond) == []
            assert (
                json.loads(with_error.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"]
                == "server_is_overloaded"
            )

    run(main())


def test_pools_of_one_model_are_of_one_kind() -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            wrong = await ask(served.port, EMBEDDINGS, embedding(model=LLM))
            assert wrong.status == 400 and wrong.json["error"]["param"] == "model"
            wrong = await ask(served.port, CHAT, chat(model=EMBED))
            assert wrong.status == 400
            assert {w.engine.spec.kind for w in served.service.watches.values()} == {PoolKind.LLM, PoolKind.EMBEDDING}

    run(main())
