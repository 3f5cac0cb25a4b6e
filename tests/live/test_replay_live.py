"""A live run on disk: `sage gateway start --record`, thousands of requests, and `sage replay` gives the same digests."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))

from gateway_harness import CHAT, EMBED, EMBEDDINGS, LLM, Client, ask, chat, embedding, emulated, run, until

from sage_bench.results.manifest import read_manifest

REQUESTS = 2400
USERS = 48
ENV = {key: value for key, value in os.environ.items() if not key.startswith("SAGE_")}


async def load(port: int) -> Counter[str]:
    """Chat, streamed chat and embeddings, as fast as they are answered; what became of each."""
    told: Counter[str] = Counter()
    numbers = iter(range(REQUESTS))

    async def user(me: int) -> None:
        client = await Client.open(port)
        headers = {"x-sage-tenant": f"tenant-{me % 5}", "x-sage-priority": str(me % 3)}
        for number in numbers:
            if number % 200 == 77:  # now and then somebody leaves
                client.send(CHAT, chat(stream=True, max_tokens=400, min_tokens=400), headers)
                await client.head()
                client.close()
                client = await Client.open(port)
                told["left"] += 1
                continue
            if number % 3 == 2:
                client.send(EMBEDDINGS, embedding([f"text {number}"] * (1 + number % 4)), headers)
            else:
                client.send(CHAT, chat(f"request {number}", stream=number % 3 == 0), headers)
            reply = await client.reply()
            told[str(reply.status) if reply.whole else "cut"] += 1
        client.close()

    await asyncio.gather(*(user(me) for me in range(USERS)))
    return told


def test_a_live_run_of_thousands_of_requests_replays_with_equal_digests(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    async def main() -> tuple[Counter[str], float]:
        async with emulated(iteration_s=0.0005) as first, emulated(iteration_s=0.0005, fail_rate=0.01) as second:
            engines = [
                part
                for engine in (first, second)
                for kind, model in (("llm", LLM), ("embedding", EMBED))
                for part in (
                    "--engine",
                    f"http://127.0.0.1:{engine.port},model={model},kind={kind},name={kind}{engine.port}",
                )
            ]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "sage_bench", "gateway", "start", "--port", "0", "policy=hybrid", "slo=interactive"),
                *("--record", str(folder), *engines),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=ENV,
            )
            assert process.stdout is not None
            ready = await process.stdout.readline()
            port = int(re.search(rb":(\d+)/v1", ready)[1])  # type: ignore[index]
            async with asyncio.timeout(20):
                while (await ask(port, "/health")).json["healthy"] < 4:
                    await asyncio.sleep(0.02)
            began = asyncio.get_running_loop().time()
            loading = asyncio.create_task(load(port))
            await until(lambda: first.engine.live or second.engine.live)
            switched = await ask(port, "/v1/management/policy", {"name": "fifo"}, method="PUT")
            assert switched.status == 200
            told = await loading
            took = asyncio.get_running_loop().time() - began
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.communicate(), 20)
            assert process.returncode == 0
            return told, took

    told, took = run(main())
    print(f"{REQUESTS / took:,.0f} requests/s, {dict(told)}")
    assert told == Counter({"200": REQUESTS - 12, "left": 12})
    manifest = read_manifest(folder)
    assert manifest.source == "live"
    counts: dict[str, Any] = dict(manifest.counts)
    assert counts["arrived"] == REQUESTS
    assert counts["responded"] + counts["cancelled"] == REQUESTS and counts["cancelled"] <= 12
    assert counts["retries"] >= 1  # the second engine fails now and then
    outcomes = Counter(pq.read_table(folder / "requests.parquet")["outcome"].to_pylist())
    assert outcomes["responded"] == counts["responded"] and sum(outcomes.values()) == REQUESTS
    digests = []
    for mechanism in ("native", "reference"):
        replayed = subprocess.run(
            [sys.executable, "-m", "sage_bench", "replay", str(folder), "--mechanism", mechanism],
            capture_output=True,
            text=True,
            env=ENV,
            timeout=120,
            check=False,
        )
        assert replayed.returncode == 0, replayed.stdout + replayed.stderr
        assert manifest.digest in replayed.stdout
        digests.append(manifest.digest)
    # And a log that was changed does not.
    steps = pq.read_table(folder / "steps.parquet")
    events = steps["events"].to_pylist()
    at = next(i for i, each in enumerate(events) if b"RequestArrived" in each and b"tenant-1" in each)
    events[at] = events[at].replace(b"tenant-1", b"tenant-9")
    place = steps.schema.get_field_index("events")
    pq.write_table(steps.set_column(place, steps.schema.field(place), [events]), folder / "steps.parquet")
    changed = subprocess.run(
        [sys.executable, "-m", "sage_bench", "replay", str(folder)],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=120,
        check=False,
    )
    assert changed.returncode != 0 and "diverged" in changed.stdout + changed.stderr
