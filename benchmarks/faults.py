"""What engines that fail do to clients: ``make bench-faults`` writes ``results/bench/faults.json``.

Four emulated engines, each a process, behind one gateway, under an open loop of chats, half of them streamed:

* killed: one is killed (SIGKILL) under load, and later started again on its port.
* slow: one takes three times as long for everything.
* hanging: one accepts requests and, after a few, answers none; its health endpoint is well.
* frozen: one is stopped (SIGSTOP) under load, health endpoint and all, and later goes on.
* outage: all are killed, and started again some seconds later; requests wait.

Every request must end: answered; or a stream that had begun, told so and cut; or, where all engines were killed and its
attempts used up, refused with an error. Exit status 1 where one did not, where counts do not agree, where the log does not
replay, or where a good engine was put out.

Client and gateway share a process, and the machine is whatever it is: latencies are for comparison within one run.
``latest_hurt_s`` is how long after the fault the last request left that took more than twice the p99 of before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import uvloop

from sage_bench.compose import make_plane
from sage_bench.config import checked, composed
from sage_bench.replaying import read_log
from sage_bench.serving import Served, Serving, gateway
from sage_core.replay import replay
from sage_live.gateway.app import Gateway, GatewayConfig
from sage_live.health import HealthConfig, State, Watch
from sage_live.http.client import Pool, UpstreamError
from sage_live.http_engine import EngineSpec, _Whole
from sage_live.processes import EngineProcess
from sage_live.service import ServiceConfig

OUT = Path("results/bench/faults.json")
PROFILE = "llama-3.1-8b-h100-tp1"
MODEL = "chat"
CHAT = "/v1/chat/completions"
HEALTH = HealthConfig(interval_s=0.5, timeout_s=2.0, stall_s=3.0, slow_s=2.0, slow_answers_min=20, probation_s=30.0)
OUT_STATES = (State.DRAINING, State.EJECTED)
JSON_BODY = ((b"content-type", b"application/json"),)


class Engine:
    """An emulated engine as a process of its own, on a port that it keeps."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.options = options
        self._folder = folder
        self._process: EngineProcess | None = None
        self._group = 0

    async def start(self) -> None:
        command = [sys.executable, "-m", "sage_bench", "llm", "serve", "--emulate", PROFILE, "--model", MODEL]
        command += ["--port", str(self.port), *self.options]
        self._process = await EngineProcess.start(
            f"engine-{self.port}", command, port=self.port, logs=self._folder, timeout_s=60.0, grace_s=1.0
        )
        listening = (
            each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE
        )
        self._group = next(
            each.pid for each in listening if str(self.port) in (line := each.cmdline()) and "-S" not in line
        )

    def signal(self, number: int) -> None:
        """To the process group of the engine itself, not of the guard above it."""
        os.killpg(self._group, number)

    async def kill(self) -> None:
        """``kill -9``, and wait until the kernel has closed its sockets."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        await self._process.wait()

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()

    def spec(self, name: str) -> EngineSpec:
        return EngineSpec(f"http://127.0.0.1:{self.port}", MODEL, name=name)


@asynccontextmanager
async def engines(folder: Path, *options: Sequence[str]) -> AsyncIterator[list[Engine]]:
    """One for each list of options, started together."""
    made = [Engine(folder, *each) for each in options]
    async with AsyncExitStack() as stack:
        for engine in made:
            stack.push_async_callback(engine.stop)
        await asyncio.gather(*(engine.start() for engine in made))
        yield made


class Asked:
    """One request of the load: the sink of its answer. Instants are seconds of time.monotonic()."""

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self.at = time.monotonic()
        self.took_s = 0.0
        self.status = 0
        self.broken = ""
        self.ended = False
        self._pieces: list[bytes] = []

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_end(self) -> None:
        self.ended = True
        self.took_s = time.monotonic() - self.at

    def on_error(self, error: UpstreamError) -> None:
        self.broken = str(error)
        self.on_end()

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    @property
    def answered(self) -> bool:
        """Wholly, and well."""
        whole = self.body.endswith(b"data: [DONE]\n\n") if self.stream else b'"choices"' in self.body
        return self.status == 200 and not self.broken and whole

    @property
    def refused(self) -> bool:
        """With a status and OpenAI's error body."""
        return self.status >= 400 and not self.broken and self.body.startswith(b'{"error"')

    @property
    def told(self) -> bool:
        """A stream that broke off as it should: with an error event, and cut."""
        return self.stream and bool(self.broken) and b'\n\ndata: {"error"' in self.body


@dataclass
class Stage:
    """A gateway with its engines and its load."""

    made: Gateway
    pool: Pool
    folder: Path
    asked: list[Asked] = field(default_factory=list)
    states: list[tuple[float, str, State]] = field(default_factory=list)
    retries: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    replayed: bool = False

    def watch(self, name: str) -> Watch:
        return self.made.service.watches[name]

    def ask(self, tokens: int = 32, stream: bool = False) -> Asked:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"request {len(self.asked)}"}],
            "stream": stream,
        }
        body |= {"max_tokens": tokens, "ignore_eos": True}
        asked = Asked(stream)
        self.asked.append(asked)
        self.pool.send("POST", CHAT, JSON_BODY, json.dumps(body).encode(), asked)
        return asked

    async def load(self, rate: float, stop: asyncio.Event) -> None:
        """An open loop at an even rate, every other request streamed, until ``stop``."""
        started, count = time.monotonic(), 0
        while not stop.is_set():
            await asyncio.sleep(max(0.0, started + count / rate - time.monotonic()))
            self.ask(stream=count % 2 == 0)
            count += 1

    async def all_ended(self, timeout_s: float = 60.0) -> None:
        await until(lambda: all(each.ended for each in self.asked), timeout_s)

    def since(self, name: str, state: State, after: float) -> float:
        """Seconds from ``after`` until the engine was in that state."""
        return (
            next(at for at, engine, entered in self.states if engine == name and entered is state and at >= after)
            - after
        )

    def out_since(self, name: str, after: float) -> float:
        """Seconds from ``after`` until it got no more work."""
        return (
            next(at for at, engine, state in self.states if engine == name and state in OUT_STATES and at >= after)
            - after
        )

    def p99_ms(self, begin: float, end: float) -> float | None:
        """Of requests that left within these instants and were answered."""
        took = [each.took_s for each in self.asked if begin <= each.at < end and each.answered]
        return round(float(np.percentile(took, 99)) * 1e3, 1) if took else None


async def until(condition: Any, timeout_s: float = 60.0) -> None:
    """Wait for it. TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def stage(
    folder: Path, fleet: Sequence[Engine], *, health: HealthConfig = HEALTH, policy: str = "least_in_flight",
    request_s: float = 600.0, healthy: bool = True,
) -> AsyncIterator[Stage]:  # fmt: skip
    """Composed as ``sage gateway start --record`` does; at its end the log is replayed and the rows are read."""
    config, _ = checked(composed(["driver=live", "load=clients", f"policy={policy}"]))
    folder.mkdir(parents=True, exist_ok=True)
    states: list[tuple[float, str, State]] = []
    specs = [engine.spec(f"engine-{number}") for number, engine in enumerate(fleet)]
    setting = Serving(
        GatewayConfig(grace_s=5.0),
        ServiceConfig(request_s=request_s),
        health,
        specs,
        record=folder,
        on_state=lambda engine, state, why: states.append((time.monotonic(), engine, State(state))),
    )
    served: list[Served]
    async with gateway(config, setting) as (made, served):
        pool = Pool(f"http://127.0.0.1:{made.port}")
        there = Stage(made, pool, folder, states=states)
        try:
            if healthy:
                await until(lambda: all(watch.state is State.HEALTHY for watch in made.service.watches.values()))
            yield there
            await there.all_ended()
        finally:
            await pool.close()
    there.counts = dict(served[0].counts)
    rows = pq.read_table(folder / "requests.parquet").to_pydict()
    assert len(rows["request"]) == there.counts["arrived"], "a request that arrived is not in the results"
    there.retries = sum(rows["retries"])
    again = replay(read_log(folder / "steps.parquet"), make_plane(config))
    there.replayed = again.divergence is None and again.digest == served[0].digest


# --- scenarios --------------------------------------------------------------------------------------------------------


async def killed(folder: Path, rate: float, seconds: float) -> dict[str, Any]:
    async with engines(folder, (), (), (), ()) as fleet, stage(folder / "run", fleet) as there:
        stop = asyncio.Event()
        loading = asyncio.create_task(there.load(rate, stop))
        begun = time.monotonic()
        await asyncio.sleep(seconds)
        await until(lambda: both_kinds(there.watch("engine-0")))  # there is something to lose
        at = time.monotonic()
        fleet[0].signal(signal.SIGKILL)
        await until(lambda: there.watch("engine-0").state is State.EJECTED)
        await asyncio.sleep(seconds)
        restarted = time.monotonic()
        await fleet[0].start()
        up = time.monotonic()
        await until(lambda: there.watch("engine-0").state is State.HEALTHY)
        await asyncio.sleep(seconds)
        stop.set()
        await loading
        await there.all_ended()
        figures = of_fault(there, "engine-0", begun, at)
        figures["p99_ms_outage_over"] = there.p99_ms(at + figures["ejected_s"], restarted)
        figures["restart_s"] = round(up - restarted, 3)
        figures["readmitted_after_up_s"] = round(there.since("engine-0", State.HEALTHY, at) - (up - at), 3)
    return figures | verdict(there)


async def frozen(folder: Path, rate: float, seconds: float) -> dict[str, Any]:
    async with engines(folder, (), (), (), ()) as fleet, stage(folder / "run", fleet) as there:
        stop = asyncio.Event()
        loading = asyncio.create_task(there.load(rate, stop))
        begun = time.monotonic()
        await asyncio.sleep(seconds)
        await until(lambda: both_kinds(there.watch("engine-0")))
        at = time.monotonic()
        fleet[0].signal(signal.SIGSTOP)
        await until(lambda: there.watch("engine-0").state is State.EJECTED)
        await asyncio.sleep(seconds)
        fleet[0].signal(signal.SIGCONT)
        thawed = time.monotonic()
        await until(lambda: there.watch("engine-0").state is State.HEALTHY)
        await asyncio.sleep(seconds)
        stop.set()
        await loading
        await there.all_ended()
        figures = of_fault(there, "engine-0", begun, at)
        figures["p99_ms_outage_over"] = there.p99_ms(at + figures["ejected_s"] + 0.5, thawed)
        figures["readmitted_after_up_s"] = round(there.since("engine-0", State.HEALTHY, thawed), 3)
    return figures | verdict(there)


async def slow(folder: Path, rate: float, seconds: float) -> dict[str, Any]:
    return await faulty(folder, rate, seconds, ("--slow", "3"))


async def hanging(folder: Path, rate: float, seconds: float) -> dict[str, Any]:
    return await faulty(folder, rate, seconds, ("--hang-after", "20"))


async def faulty(folder: Path, rate: float, seconds: float, options: Sequence[str]) -> dict[str, Any]:
    """One engine of four that is alive and no good."""
    async with engines(folder, options, (), (), ()) as fleet, stage(folder / "run", fleet) as there:
        stop = asyncio.Event()
        begun = time.monotonic()
        loading = asyncio.create_task(there.load(rate, stop))
        await until(lambda: there.watch("engine-0").state is State.EJECTED)
        out = time.monotonic()
        await asyncio.sleep(seconds)
        stop.set()
        await loading
        await there.all_ended()
        figures = {
            "out_of_rotation_s": round(there.out_since("engine-0", begun), 3),
            "ejected_s": round(there.since("engine-0", State.EJECTED, begun), 3),
            "why": there.watch("engine-0").why,
            "p99_ms_with_it": there.p99_ms(begun, out),
            "p99_ms_without_it": there.p99_ms(out, time.monotonic()),
        }
    return figures | verdict(there)


async def outage(folder: Path, rate: float, seconds: float) -> dict[str, Any]:
    async with engines(folder, (), (), (), ()) as fleet, stage(folder / "run", fleet) as there:
        stop = asyncio.Event()
        loading = asyncio.create_task(there.load(rate, stop))
        await asyncio.sleep(seconds)
        at = time.monotonic()
        for engine in fleet:
            engine.signal(signal.SIGKILL)
        await until(lambda: all(there.watch(f"engine-{n}").state is State.EJECTED for n in range(4)))
        await asyncio.sleep(seconds)
        waiting = sum(not each.ended for each in there.asked)
        await asyncio.gather(*(engine.start() for engine in fleet))
        await until(lambda: any(there.watch(f"engine-{n}").state is State.HEALTHY for n in range(4)))
        back = time.monotonic()
        await asyncio.sleep(seconds)
        stop.set()
        await loading
        await there.all_ended()
        figures = {
            "gone_s": round(back - at, 3),
            "waiting_at_the_end": waiting,
            "p99_ms_before": there.p99_ms(0.0, at - 1.0),
            "p99_ms_after": there.p99_ms(back + 1.0, time.monotonic()),
        }
    return figures | verdict(there, several=True)


def both_kinds(watch: Watch) -> bool:
    """Whether the engine has answers underway of both kinds, streamed and whole."""
    calls = [flight.call for flight in watch.engine.flights.values() if isinstance(flight, _Whole)]
    return any(call.begun for call in calls) and not all(call.stream for call in calls)


def of_fault(there: Stage, name: str, begun: float, at: float) -> dict[str, Any]:
    before = there.p99_ms(begun, at - 0.3)
    hurt = [each.at - at for each in there.asked if each.at > at and each.took_s * 1e3 > 2 * (before or 0.0)]
    return {
        "out_of_rotation_s": round(there.out_since(name, at), 4),
        "ejected_s": round(there.since(name, State.EJECTED, at), 4),
        "p99_ms_before": before,
        "p99_ms_first_second": there.p99_ms(at, at + 1.0),
        "latest_hurt_s": round(max(hurt, default=0.0), 3),
        "hurt": len(hurt),
    }


def verdict(there: Stage, several: bool = False) -> dict[str, Any]:
    """What became of every request. ``several``: whether engines other than the first were meant to be put out too."""
    asked, counts = there.asked, there.counts
    lost = [each for each in asked if not (each.answered or each.told or each.refused)]
    others = sum(state is State.EJECTED for _, name, state in there.states if name != "engine-0")
    return {
        "requests": len(asked),
        "answered": sum(each.answered for each in asked),
        "streams_cut": sum(each.told for each in asked),
        "refused": sum(each.refused for each in asked),
        "lost": len(lost),
        "retries": counts["retries"],
        "counts_agree": counts["arrived"] == len(asked) == counts["responded"] + counts["failed"]
        and counts["failed"] == sum(each.told or each.refused for each in asked)
        and counts["retries"] == there.retries,
        "replayed": there.replayed,
        "good_engines_ejected": 0 if several else others,
    }


SCENARIOS = {"killed": killed, "slow": slow, "hanging": hanging, "frozen": frozen, "outage": outage}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SCENARIOS), help="which scenarios")
    parser.add_argument("--rate", type=float, default=80.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each phase")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "rate": options.rate,
        "profile": PROFILE,
        "health": {name: getattr(HEALTH, name) for name in HEALTH.__dataclass_fields__},
    }
    good = True
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            got = figures[name] = uvloop.run(SCENARIOS[name](Path(folder), options.rate, options.seconds))
        good = (
            good
            and not got["lost"]
            and (name == "outage" or not got["refused"])
            and got["counts_agree"]
            and got["replayed"]
            and not got["good_engines_ejected"]
        )
        print(f"{name}: {json.dumps(got)}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
