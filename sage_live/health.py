"""Who is in service: probes, ejection and re-admission of engines. docs/health.md says what clients see of it.

Two degrees. An engine that seems unwell gets no more work at once and may finish what it has, because answers that still
come are worth more than a clean sweep. Only one that has work and says nothing is cut off, and the work is given to others.
Both end in the same state, out of service, from which it comes back under a new replica id when it answers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sage_core import events as e
from sage_core.errors import ConfigError
from sage_core.units import SECOND, seconds
from sage_live.driver import LiveDriver
from sage_live.http.client import UpstreamError
from sage_live.http.exchange import Reason
from sage_live.http_engine import HttpEngine
from sage_live.pace import slowness
from sage_live.probe import Late, Probe

LOOK_GAP_S: Final = 0.05
"""Least time between two probes, however much trouble there is."""

PENALTY_MAX: Final = 16
"""Longest probation, in times the configured one."""

CLOSED_TOGETHER_NS: Final = SECOND // 10
"""Two exchanges that break off within this are no accident of one connection."""

STALE_REPORTS: Final = 5
"""Reports that may fail to come before the last one counts for nothing."""

_log = logging.getLogger(__name__)


class State(StrEnum):
    """Of an engine, as operators see it."""

    STARTING = "starting"
    """It has not been healthy yet."""
    HEALTHY = "healthy"
    DRAINING = "draining"
    """It finishes what it has and gets no more, by an operator's wish or because something is wrong with it."""
    EJECTED = "ejected"
    """Out of service until it answers again (and its probation is over)."""
    DRAINED = "drained"
    """An operator's wish; it does not come back by itself."""


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """Seconds and counts.

    interval_s, timeout_s: of probes; failures_max: that many in a row take an engine out. scrape_s: between load reports.
    stall_s: silence of an engine with work; halfway it is asked for one token. errors_max: exchanges that failed in a row.
    slow_factor: times the pace of the others of its pool (0: off), for slow_s, over at least slow_answers_min answers.
    probation_s: how long a slow engine stays out, and how long one must stay in for its past to be forgotten.
    """

    interval_s: float = 2.0
    timeout_s: float = 2.0
    failures_max: int = 2
    scrape_s: float = 1.0
    stall_s: float = 60.0
    slow_factor: float = 2.0
    slow_answers_min: int = 20
    probation_s: float = 30.0
    slow_s: float = 10.0
    errors_max: int = 5

    def __post_init__(self) -> None:
        for key in ("interval_s", "timeout_s", "scrape_s", "stall_s", "probation_s", "slow_s"):
            if not 0 < getattr(self, key) <= 1e6:
                raise ConfigError(f"health.{key}: expected seconds above 0, got {getattr(self, key)!r}")
        for key in ("failures_max", "slow_answers_min", "errors_max"):
            if getattr(self, key) < 1:
                raise ConfigError(f"health.{key}: expected 1 or more, got {getattr(self, key)!r}")
        if self.slow_factor and not self.slow_factor > 1:
            raise ConfigError(f"health.slow_factor: expected more than 1, or 0 for off, got {self.slow_factor!r}")


class Watch:
    """One engine's health: tasks of its own, which end with :meth:`close`.

    peers: the other engines of its pool that are healthy. tell: of every change of state, with the reason.
    """

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
        """The engine's own account of its load; empty where it gives none, or gave none of late."""
        self._driver = driver
        self._config = config
        self._peers = peers
        self._tell = tell
        self._asked = Probe(engine)
        self._stays = False  # out of service, by an operator's wish
        self._failures = 0  # of probes, in a row
        self._errors = 0  # of exchanges, in a row
        self._error_at = self._closed_at = -1
        self._answers = 0  # of the engine, when the last error came
        self._slow_since: int | None = None
        self._joined_at: int | None = None
        self._penalty_s = 0.0
        self._back_at = 0
        self._kv_tokens: int | None = None
        self._reports_missed = 0
        self._look_now = asyncio.Event()
        self._left = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._proof: asyncio.Task[None] | None = None
        engine.on_trouble = self._on_trouble
        engine.on_idle = self._on_idle
        self._tasks = [self._loop.create_task(self._probe_on()), self._loop.create_task(self._scrape_on())]

    async def close(self) -> None:
        """Watch no more. The replica stays as it is."""
        self.engine.on_trouble = self.engine.on_idle = None
        tasks = self._tasks if self._proof is None else [*self._tasks, self._proof]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drain(self) -> asyncio.Event:
        """Finish what it has, get no more, stay out. The event is set when it is out."""
        self._stays = True
        if self.state is State.HEALTHY:
            self._drain("drained by an operator")
        elif self.state is not State.DRAINING:
            self._enter(State.DRAINED, "drained by an operator")
            self._left.set()
        return self._left

    def resume(self) -> None:
        """In service again at the next probe that succeeds: undoes :meth:`drain`, and ends a probation."""
        self._stays = False
        self._penalty_s = 0.0
        self._back_at = self._driver.now
        if self.state is State.DRAINED:
            self._enter(State.EJECTED, "resumed by an operator, not probed yet")
        self._look_now.set()

    # --- probes ---------------------------------------------------------------------------------------------------

    async def _probe_on(self) -> None:
        interval = min(0.1, self._config.interval_s)  # until it is up: a newcomer should not wait
        while True:
            self._look_now.clear()
            try:
                await self._probe()
            except Exception:  # an engine that nobody watches would be worse
                _log.exception("engine %s: its health could not be judged", self.engine.name)
            interval = (
                min(2 * interval, self._config.interval_s) if self.state is State.STARTING else self._config.interval_s
            )
            await asyncio.sleep(min(LOOK_GAP_S, interval))
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._look_now.wait()

    async def _probe(self) -> None:
        if self.state is State.DRAINED or (self.state is State.EJECTED and self._driver.now < self._back_at):
            return
        try:
            status, _ = await self._asked.get(self.engine.adapter.health, self._config.timeout_s)
            if status == 200:
                await self._well()
            else:
                self._failed(f"its health endpoint answered {status}")
        except Late:
            self._look_now.set()
        except TimeoutError:
            self._failed(f"its health endpoint did not answer within {self._config.timeout_s:g} s")
        except UpstreamError as error:
            self._failed(str(error), certain=True)

    def _failed(self, why: str, *, certain: bool = False) -> None:
        """``certain``: no connection, which an engine under load does not do."""
        if self.state is not State.DRAINING:  # that has a reason
            self.why = why
        self._failures += 1
        enough = self._failures >= self._config.failures_max
        if self.state is State.HEALTHY and (certain or enough):
            self._out_of_order(why)
        if self.state is State.DRAINING and enough and self.engine.flights:
            self.engine.hear()
            silent = self._driver.now - self.engine.heard_ns
            if silent > seconds(self._config.interval_s + self._config.timeout_s):
                self._cut(f"{why}, and its work is silent too")

    async def _well(self) -> None:
        self._failures = 0
        if self.state in (State.STARTING, State.EJECTED):
            await self._admit()
        elif self.state in (State.HEALTHY, State.DRAINING):
            if self.state is State.HEALTHY:
                self.why = ""
                self._look_at_pace()
            self._look_at_silence()

    async def _admit(self) -> None:
        """It says that it is well. One that was in service before must show it: many an engine is well but does not work."""
        state = self.state
        if self._joined_at is not None and (why := await self._asked.for_one_token(self._config.stall_s / 2)):
            self.why = why
            return
        await self._scrape()
        if self.state is not state:  # an operator's wish meanwhile
            return
        now = self._driver.now
        joined = self.engine.as_joined(self._driver.replica_number(), self._kv_tokens)
        self.engine.heard_ns = self._joined_at = now
        self._errors = 0
        self._slow_since = None
        self._left.clear()
        self._enter(State.HEALTHY, "")
        self._driver.join(self.engine, joined)

    # --- silence --------------------------------------------------------------------------------------------------

    def _look_at_silence(self) -> None:
        """Work on it and not a word for long: ask for one token more. A busy engine answers that between two others."""
        now = self._driver.now
        engine = self.engine
        engine.hear()
        oldest = min((flight.since for flight in engine.flights.values() if not flight.paused), default=now)
        silent = now - max(oldest, engine.heard_ns)
        if silent > seconds(self._config.stall_s) // 2 and (self._proof is None or self._proof.done()):
            self._proof = self._loop.create_task(self._prove(engine.replica))

    async def _prove(self, replica: int) -> None:
        asked_at = self._driver.now
        try:
            why = await self._asked.for_one_token(self._config.stall_s / 2)
        except Late:
            return
        engine = self.engine
        if engine.replica != replica or not engine.flights:
            return
        engine.hear()
        if not why:
            engine.heard_ns = self._driver.now
        elif engine.heard_ns < asked_at:
            self._cut(f"it has work and said nothing of it for {self._config.stall_s:g} s; {why}")

    # --- pace -----------------------------------------------------------------------------------------------------

    def _look_at_pace(self) -> None:
        """Slow for long, as its peers have it: out, for a while."""
        config = self._config
        if not config.slow_factor:
            return
        now = self._driver.now
        others = [peer.pace for peer in self._peers(self.engine)]
        times = slowness(self.engine.pace, others, now, config.slow_answers_min)
        if times <= config.slow_factor:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now
        elif now - self._slow_since >= seconds(config.slow_s):
            self._out_of_order(f"it takes {times:.1f} times as long as the others", config.probation_s)

    # --- what the engine tells ------------------------------------------------------------------------------------

    def _on_trouble(self, trouble: UpstreamError | str) -> None:
        """An exchange failed, and its task may be tried again in this turn: now is the time to give it no more work."""
        if self.state is not State.HEALTHY:
            return
        if self.engine.pace.answers != self._answers:
            self._answers = self.engine.pace.answers
            self._errors = 0
        if self.engine.heard_ns == self._error_at:
            return  # another task of the same exchange
        self._error_at = self.engine.heard_ns
        self._errors += 1
        if isinstance(trouble, UpstreamError) and self._seems_dead(trouble.reason):
            self._out_of_order(str(trouble))
        elif self._errors >= self._config.errors_max and self._peers(self.engine):
            self._out_of_order(f"{self._errors} requests in a row failed; the last: {trouble}")
        else:
            self._look_now.set()

    def _seems_dead(self, reason: Reason) -> bool:
        """Nobody listens, or it hung up on two at once, as one that was killed does."""
        if reason is Reason.CLOSED:
            before, self._closed_at = self._closed_at, self._driver.now
            return before >= 0 and self._closed_at - before < CLOSED_TOGETHER_NS
        return reason is Reason.CONNECT

    def _on_idle(self) -> None:
        """The last exchange is over; what came of it has not been posted yet, and must be before the replica leaves."""
        if self.state is State.DRAINING:
            self._loop.call_soon(self._leave_if_idle)

    # --- out of service -------------------------------------------------------------------------------------------

    def _out_of_order(self, why: str, probation_s: float = 0.0) -> None:
        """From healthy: something is wrong with it. It may finish what it has."""
        self._punish(probation_s)
        self._drain(why)

    def _drain(self, why: str) -> None:
        self._enter(State.DRAINING, why)
        self._driver.post(e.ReplicaDraining(self.engine.replica))
        self._on_idle()

    def _leave_if_idle(self) -> None:
        if self.state is State.DRAINING and not self.engine.flights:
            self._leave(self.why)

    def _cut(self, why: str) -> None:
        """Nothing more is expected of it: what it has goes to others."""
        if self.state is State.HEALTHY:
            self._punish(0.0)
        self._leave(why)

    def _leave(self, why: str) -> None:
        replica = self.engine.replica
        self.engine.drop()
        self.engine.pace.clear()
        self.reported = {}
        self._driver.leave(replica)
        self._enter(State.DRAINED if self._stays else State.EJECTED, why)
        self._left.set()
        self._look_now.set()

    def _punish(self, least_s: float) -> None:
        """When it may come back. Who is put out again soon after stays out twice as long each time."""
        self.ejections += 1
        now = self._driver.now
        joined_at = now if self._joined_at is None else self._joined_at
        longest = PENALTY_MAX * self._config.probation_s
        again = now - joined_at < seconds(max(self._config.probation_s, 2 * self._penalty_s))
        if again and self.ejections > 1:
            least_s = max(least_s, self._config.interval_s, 2 * self._penalty_s)
        self._penalty_s = min(least_s, longest)
        self._back_at = now + seconds(self._penalty_s)

    def _enter(self, state: State, why: str) -> None:
        self.state, self.why = state, why
        self._tell(self.engine, state, why)

    # --- load reports ---------------------------------------------------------------------------------------------

    async def _scrape_on(self) -> None:
        while True:
            await asyncio.sleep(self._config.scrape_s)
            if self.state is State.HEALTHY:
                try:
                    await self._scrape()
                except Exception:
                    _log.exception("engine %s: its load report could not be read", self.engine.name)

    async def _scrape(self) -> None:
        adapter = self.engine.adapter
        if not adapter.reports:
            return
        status, body = 0, b""
        with suppress(TimeoutError, UpstreamError, Late):  # the probe says whether the engine is well
            status, body = await self._asked.get(adapter.metrics, self._config.timeout_s)
        load = adapter.load(body.decode("utf-8", "replace"))
        if status != 200 or (load.running is None and load.waiting is None):
            self._reports_missed += 1
            if self._reports_missed >= STALE_REPORTS:
                self.reported = {}
            return
        self._reports_missed = 0
        self._kv_tokens = load.kv_tokens
        free = 0
        if load.kv_used is not None and load.blocks is not None:
            free = max(0, int(load.blocks * (1 - load.kv_used)))
        self.reported = {"running": load.running or 0, "waiting": load.waiting or 0, "kv_blocks_free": free}
        if self.state is State.HEALTHY:
            self._driver.post(e.ReplicaReported(self.engine.replica, load.running or 0, load.waiting or 0, free))
