"""What no engine and no client may do to the control plane: lie in numbers, change what a pool is, use up what others need."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateway_harness import (
    ANSWER,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    LLM,
    ask,
    chat,
    embed_spec,
    gateway,
    llm_spec,
    run,
    scripted,
    serving,
    until,
)

from sage_core import events as e
from sage_core.errors import ConfigError
from sage_core.units import PoolKind
from sage_live import service as services
from sage_live.gateway.rate import Limits as RateLimit
from sage_live.gateway.rate import RateLimits
from sage_live.health import HealthConfig
from sage_live.http.client import Pool
from sage_live.http.server import HttpServer, Request
from sage_live.http_engine import EngineSpec
from sage_live.service import ServiceConfig

HUGE = "9" * 23


@pytest.mark.parametrize("metric", ["1e30", "-5", "NaN", "Inf", "nonsense"])
def test_an_engine_that_lies_in_numbers_is_still_only_an_engine(metric: str) -> None:
    lies = json.dumps({**json.loads(ANSWER), "usage": None}).replace(
        "null}", f'{{"prompt_tokens":{HUGE},"completion_tokens":{HUGE}}}}}'
    )

    scrapes = 0

    def handle(request: Request) -> None:
        nonlocal scrapes
        if request.path == "/metrics":
            scrapes += 1
            text = f"vllm:num_requests_running {metric}\nvllm:num_requests_waiting {metric}\nvllm:kv_cache_usage_perc {metric}\n"
            text += f'vllm:cache_config_info{{num_gpu_blocks="{HUGE}",block_size="-3"}} 1\n'
            request.respond(200, text.encode(), b"text/plain")
        else:
            request.respond(200, lies.encode())

    async def main() -> None:
        server = await HttpServer.start(handle, "127.0.0.1", 0)
        health = HealthConfig(interval_s=0.05, scrape_s=0.05)
        async with serving([llm_spec(server.port)], health=health) as served:
            for _ in range(5):
                assert (await ask(served.port, CHAT, chat())).status == 200
            seen = scrapes
            await until(lambda: scrapes > seen + 2)
            assert (await ask(served.port, "/health")).status == 200
            assert served.service.driver.broken is None
            assert all(0 < event.input_tokens < 10_000 for event in served.heard(e.RequestArrived))
        await server.close()

    run(main())


def test_a_pool_is_what_it_was_first_for_as_long_as_the_plane_lives() -> None:
    async def main() -> None:
        async with (
            scripted(lambda request: request.respond(200, ANSWER)) as engine,
            serving([llm_spec(engine.port)]) as served,
        ):
            service = served.service
            url = f"http://127.0.0.1:{engine.port}"
            for clash in (
                EngineSpec(url, "another", name="b", pool=LLM),
                EngineSpec(url, "vectors", PoolKind.EMBEDDING, name="c", pool=LLM),
            ):
                with pytest.raises(ConfigError, match="pool"):
                    service.add_engine(clash)
            await service.remove_engine(f"llm-{engine.port}")
            with pytest.raises(ConfigError, match="pool"):
                service.add_engine(EngineSpec(url, LLM, PoolKind.EMBEDDING, name="d"))
            service.add_engine(llm_spec(engine.port))
            assert (await ask(served.port, CHAT, chat())).status == 200

    run(main())


@pytest.mark.parametrize(
    "wrong",
    [
        {"fixed_ns": float("nan")}, {"output_token_ns": float("inf")}, {"input_token_ns": -1.0}, {"tasks_max": 99_999_999_999},
        {"tasks_max": 0}, {"kv_tokens_max": -1}, {"batch_tokens_max": 1 << 40},
    ],
    ids=str,
)  # fmt: skip
def test_an_engine_is_described_in_possible_numbers(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineSpec("http://127.0.0.1:1", "m", **wrong)  # type: ignore[arg-type]


def test_a_url_does_not_hold_a_password() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="user name or password") as raised:
            Pool("http://user:secret@127.0.0.1:1")
        assert "secret" not in str(raised.value)

    run(main())


def test_requests_for_a_model_whose_last_engine_is_removed_are_told_so_at_once() -> None:
    async def main() -> None:
        held: list[Request] = []

        def handle(request: Request) -> None:
            if request.path == CHAT:
                held.append(request)
            else:
                request.respond(200, b"{}")

        async with scripted(handle) as engine, serving([llm_spec(engine.port, tasks_max=1)]) as served:
            asked = [asyncio.create_task(ask(served.port, CHAT, chat())) for _ in range(3)]
            await until(lambda: held and served.service.driver.plane.tasks_queued == 2)
            await served.service.remove_engine(f"llm-{engine.port}", drain=False)
            replies = await asyncio.wait_for(asyncio.gather(*asked), 10)
            assert [reply.status for reply in replies] == [503] * 3
            assert all("No engine of small is in service" in reply.json["error"]["message"] for reply in replies)
            assert all(int(reply.headers["retry-after"]) > 0 for reply in replies)
            assert (await ask(served.port, CHAT, chat())).status == 404

    run(main())


def test_a_request_waits_only_so_long_for_an_engine_to_come_back() -> None:
    async def main() -> None:
        async with scripted(lambda request: request.respond(200, ANSWER)) as engine:
            specs = [llm_spec(engine.port)]
            async with serving(specs, service=ServiceConfig(no_engine_s=0.3)) as served:
                served.service.watches[f"llm-{engine.port}"].drain()
                reply = await asyncio.wait_for(ask(served.port, CHAT, chat()), 10)
                assert reply.status == 503 and "No engine" in reply.json["error"]["message"]

    run(main())


def test_tokens_are_charged_whatever_a_client_says() -> None:
    async def statuses(body: dict[str, object], headers: dict[str, str], path: str = CHAT) -> list[int]:
        limit = RateLimits(RateLimit(tokens_per_minute=6000))  # 1,000 at once
        async with gateway(rates=limit) as (served, _):
            return [(await ask(served.port, path, body, headers)).status for _ in range(3)]

    small = chat(max_tokens=8)
    lying = {"x-sage-input-tokens": "1", "x-sage-output-tokens-max": "1"}
    assert run(statuses(small, {})) == [200, 200, 200]
    assert run(statuses(chat(max_tokens=800, min_tokens=1), lying))[1:] == [429, 429]
    assert run(statuses({"model": LLM, "messages": small["messages"]}, {}))[1:] == [429, 429], (
        "no cap is the default cap"
    )
    assert run(statuses(chat("word " * 4000, max_tokens=1), lying))[1:] == [429, 429], "a prompt of 20,000 bytes"
    prompts = {"model": LLM, "prompt": ["a"] * 100, "max_tokens": 8}
    assert run(statuses(prompts, {}, COMPLETIONS))[1:] == [429, 429]


def test_what_is_refused_is_not_charged() -> None:
    async def main() -> None:
        async with gateway(rates=RateLimits(RateLimit(tokens_per_minute=6000))) as (served, _):
            for _ in range(5):
                unknown = await ask(served.port, CHAT, {**chat(max_tokens=4000), "model": "nonesuch"})
                assert unknown.status == 404
            assert (await ask(served.port, CHAT, chat(max_tokens=8))).status == 200

    run(main())


def test_a_flood_of_tenant_names_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "TENANTS_MAX", 5)

    async def main() -> None:
        async with gateway() as (served, _):
            for number in range(12):
                reply = await ask(served.port, CHAT, chat(), {"x-sage-tenant": f"t{number}"})
                assert reply.status == 200
            assert (await ask(served.port, CHAT, chat())).status == 200
            tenants = [event.tenant for event in served.heard(e.RequestArrived)]
            assert tenants[:4] == ["t0", "t1", "t2", "t3"] and tenants[-1] == "default"
            assert len(set(tenants)) == 6 and tenants[7] == services.OTHERS

    run(main())


def test_a_broken_plane_says_so_and_tells_nobody_why(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with gateway() as (served, _):
            told: list[Exception] = []
            served.service.driver.on_broken = told.append
            served.service.driver.post(e.TokensProduced(1 << 70, 1))
            reply = await ask(served.port, CHAT, chat())
            assert reply.status == 500 and "TokensProduced" not in reply.body.decode()
            assert (await ask(served.port, "/health")).status == 500
            assert len(told) == 1 and "the control plane broke" in caplog.text

    with pytest.raises(AssertionError, match="no log can hold"):  # the harness looks too
        run(main())


def test_a_request_is_classified_by_what_is_served_not_by_what_a_name_suggests() -> None:
    async def main() -> None:
        async with scripted(lambda request: request.respond(200, ANSWER)) as engine:
            specs = [llm_spec(engine.port, model="bge-chat"), embed_spec(engine.port, model="plain")]
            async with serving(specs) as served:
                assert (await ask(served.port, CHAT, {**chat(), "model": "bge-chat"})).status == 200
                for path, model, body in ((CHAT, "plain", chat()), (EMBEDDINGS, "bge-chat", {"input": "x"})):
                    wrong = await ask(served.port, path, {**body, "model": model})
                    assert wrong.status == 400 and wrong.json["error"]["param"] == "model"
                    assert "registered" in wrong.json["error"]["message"]
                assert [event.kind for event in served.heard(e.RequestArrived)] == [0]

    run(main())
