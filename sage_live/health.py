"""Who is in service: probes, ejection and re-admission of engines.

An engine is ejected when it cannot be reached, when its health endpoint fails or hangs, when it has work and has not
said a word for too long, or when it is much slower than the others of its pool. It is asked on, and let in again under
a new replica id when it answers; one that was slow comes back after a probation that doubles each time.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sage_core import events as e
from sage_core.errors import ConfigError
from sage_live.driver import LiveDriver
from sage_live.http.client import UpstreamError
from sage_live.http_engine import HttpEngine


class State(StrEnum):
    """Of an engine, as operators see it."""

    STARTING = "starting"
    """It has not been healthy yet."""
    HEALTHY = "healthy"
    EJECTED = "ejected"
    """Out of service until a probe succeeds (and its probation is over)."""
    DRAINING = "draining"
    """It finishes what it has and gets no more, by an operator's wish or because it was slow."""
    DRAINED = "drained"
    """An operator's wish; it does not come back by itself."""


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """Seconds and counts. slow_factor: times the median pace of the others of its pool; 0 switches that rule off, and
    so does a pool of fewer than three engines, because of two nobody can say which is the odd one."""

    interval_s: float = 2.0
    timeout_s: float = 2.0
    failures_max: int = 2
    scrape_s: float = 1.0
    stall_s: float = 60.0
    slow_factor: float = 2.0
    slow_answers_min: int = 20
    probation_s: float = 30.0

    def __post_init__(self) -> None:
        for key in ("interval_s", "timeout_s", "scrape_s", "stall_s", "probation_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"health.{key}: expected seconds above 0, got {getattr(self, key)!r}")
        if self.failures_max < 1:
            raise ConfigError(f"health.failures_max: expected 1 or more, got {self.failures_max!r}")
        if self.slow_factor and self.slow_factor <= 1:
            raise ConfigError(f"health.slow_factor: expected more than 1, or 0 for off, got {self.slow_factor!r}")


class _Reply:
    """A small answer, whole: the sink of a probe."""

    __slots__ = ("body", "done", "status")

    def __init__(self, done: asyncio.Future[tuple[int, bytes]]) -> None:
        self.done = done
        self.status = 0
        self.body = b""

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result((self.status, self.body))

    def on_error(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Watch:
    """One engine's health: a task of its own, which ends with :meth:`close`."""

    def __init__(
        self,
        engine: HttpEngine,
        driver: LiveDriver,
        config: HealthConfig,
        peers: Callable[[HttpEngine], Sequence[HttpEngine]],
        tell: Callable[[HttpEngine, State, str], None],
    ) -> None:
        self.engine = engine
        self.state = State.STARTING
        self.why = ""
        self.ejections = 0
        self.reported: Mapping[str, int] = {}
        self._driver = driver
        self._config = config
        self._peers = peers
        self._tell = tell
        self._failures = 0
        self._back_at = 0
        self._probation = config.probation_s
        self._kv_tokens: int | None = None
        self._look_now = asyncio.Event()
        self._left = asyncio.Event()
        engine.on_trouble = self._on_trouble
        engine.on_idle = self._on_idle
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._probe_on()), loop.create_task(self._scrape_on())]

    async def close(self) -> None:
        """Watch no more. The replica stays as it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drain(self) -> asyncio.Event:
        """Finish what it has, get no more, stay out. The event is set when it is out."""
        if self.state is State.HEALTHY:
            self._enter(State.DRAINING, "drained by an operator")
            self._driver.post(e.ReplicaDraining(self.engine.replica))
            self._on_idle()
        elif self.state is not State.DRAINING:
            self._enter(State.DRAINED, "drained by an operator")
            self._left.set()
        self._back_at = -1
        return self._left

    def resume(self) -> None:
        """Undo :meth:`drain`: in service again at the next probe that succeeds."""
        if self.state is State.DRAINED:
            self._left.clear()
            self._back_at = self._driver.now
            self._enter(State.EJECTED, "resumed by an operator, not probed yet")
            self._look_now.set()

    # --- probes ---------------------------------------------------------------------------------------------------

    async def _ask(self, path: str) -> tuple[int, bytes]:
        done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        exchange = self.engine.pool.send("GET", path, (), b"", _Reply(done))
        try:
            return await asyncio.wait_for(done, self._config.timeout_s)
        finally:
            exchange.abort()

    async def _probe_on(self) -> None:
        interval = min(0.1, self._config.interval_s)  # until it is up: a newcomer should not wait
        while True:
            await self._probe()
            interval = (
                self._config.interval_s if self.state is State.HEALTHY else min(interval * 2, self._config.interval_s)
            )
            self._look_now.clear()
            try:
                await asyncio.wait_for(self._look_now.wait(), interval)
            except TimeoutError:
                continue

    async def _probe(self) -> None:
        try:
            status, _ = await self._ask(self.engine.adapter.health)
        except TimeoutError:
            self._failed(f"its health endpoint did not answer within {self._config.timeout_s:g} s", certain=False)
        except UpstreamError as error:
            self._failed(str(error), certain=True)
        else:
            if status == 200:
                self._failures = 0
                await self._well()
            else:
                self._failed(f"its health endpoint answered {status}", certain=False)

    async def _well(self) -> None:
        now = self._driver.now
        if self.state is State.STARTING or (self.state is State.EJECTED and 0 <= self._back_at <= now):
            await self._scrape()
            joined = self.engine.as_joined(self._driver.replica_number(), self._kv_tokens)
            self.engine.heard_ns = now
            self._enter(State.HEALTHY, "")
            self._driver.join(self.engine, joined)
        elif self.state is State.HEALTHY:
            self._stalled(now)
            self._slow(now)

    def _failed(self, why: str, *, certain: bool) -> None:
        self._failures += 1
        if self.state in (State.HEALTHY, State.DRAINING) and (certain or self._failures >= self._config.failures_max):
            self._eject(why)
        self.why = why

    def _stalled(self, now: int) -> None:
        limit = int(self._config.stall_s * 1e9)
        flights = self.engine.flights.values()
        oldest = min((flight.since for flight in flights), default=now)
        if now - max(oldest, self.engine.heard_ns) > limit:
            self._eject(f"it has work and said nothing of it for {self._config.stall_s:g} s")

    def _slow(self, now: int) -> None:
        config, engine = self._config, self.engine
        others = [peer.pace for peer in self._peers(engine) if peer.pace.count >= config.slow_answers_min]
        if not config.slow_factor or engine.pace.count < config.slow_answers_min or len(others) < 2:
            return
        median = statistics.median(pace.ns for pace in others)
        if engine.pace.ns > config.slow_factor * median:
            why = f"it takes {engine.pace.ns / median:.1f} times as long as the others"
            self._back_at = now + int(self._probation * 1e9)
            self._probation *= 2
            self._enter(State.DRAINING, why)
            self._driver.post(e.ReplicaDraining(engine.replica))
            self._on_idle()

    # --- what the engine tells ------------------------------------------------------------------------------------

    def _on_trouble(self, why: str) -> None:
        """An exchange broke: look now, not at the next interval."""
        self._look_now.set()

    def _on_idle(self) -> None:
        if self.state is State.DRAINING and not self.engine.flights:
            self._out()
            self._enter(State.DRAINED if self._back_at < 0 else State.EJECTED, self.why)
            self._left.set()

    def _eject(self, why: str) -> None:
        stays = self.state is State.DRAINING and self._back_at < 0
        self._out()
        self._back_at = -1 if stays else self._driver.now
        self._enter(State.DRAINED if stays else State.EJECTED, why)
        self._left.set()

    def _out(self) -> None:
        replica = self.engine.replica
        self.engine.drop()
        self.engine.pace.count = 0
        self.ejections += 1
        self._driver.leave(replica)

    def _enter(self, state: State, why: str) -> None:
        self.state, self.why = state, why
        self._tell(self.engine, state, why)

    # --- load reports ---------------------------------------------------------------------------------------------

    async def _scrape_on(self) -> None:
        while True:
            await asyncio.sleep(self._config.scrape_s)
            if self.state is State.HEALTHY:
                await self._scrape()

    async def _scrape(self) -> None:
        adapter = self.engine.adapter
        if not adapter.running:
            return
        try:
            status, body = await self._ask(adapter.metrics)
        except (TimeoutError, UpstreamError):
            return  # a report that does not come; the probe says whether the engine is well
        if status != 200:
            return
        load = adapter.load(body.decode("utf-8", "replace"))
        self._kv_tokens = load.kv_tokens
        if load.running is None and load.waiting is None:
            return
        free = 0
        if load.kv_used is not None and load.blocks is not None:
            free = max(0, int(load.blocks * (1 - load.kv_used)))
        self.reported = {"running": load.running or 0, "waiting": load.waiting or 0, "kv_blocks_free": free}
        if self.state is State.HEALTHY:
            self._driver.post(e.ReplicaReported(self.engine.replica, load.running or 0, load.waiting or 0, free))
