"""The load generator: sends what is due when it is due, whatever has become of what was sent before.

Rules:

1. Open loop: a request that is due never waits for a connection or an answer. Where no idle connection is left, one more
   is opened.
2. Latency is counted from the scheduled instant; the lag between that and sending is recorded, and a generator that
   lags too much marks its own run invalid (``summary``).
3. Every request that came due has a row, whatever happened to it.
4. Nothing is computed while the run lasts that can be computed before (encoding, in a bounded look-ahead) or after
   (statistics).
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
from array import array
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_core.errors import ConfigError
from sage_core.load import ColumnLoad, Load
from sage_core.units import MILLISECOND, NEVER, SECOND, Nanos, seconds
from sage_live.alarm import Alarm
from sage_live.loadgen.connection import Connection
from sage_live.loadgen.encode import WHOLE, Agenda, Encoder, Item, Share
from sage_live.loadgen.options import Options
from sage_live.loadgen.schema import FIELDS, Error

AHEAD = 2048  # items ready beforehand
BURST = 32  # sent in one turn of the loop; answers are read in between
CONNECT_S = 10.0
SWEEP_S = 1.0
LEAD_NS = 20 * MILLISECOND  # from ready to the start


class Effort(NamedTuple):
    """What a process spent. cpu_s: of its event loop's thread, encoding included. busy: share of one core while sending."""

    cpu_s: float
    busy: float


class Measured(NamedTuple):
    """What came out. rows: (n, len(schema.FIELDS)) in order of request. gaps: as in ``schema.client_table``.

    start_ns: CLOCK_MONOTONIC of the start of the run. objective_ns: the load's tightest objective, NEVER if none.
    """

    rows: NDArray[np.int64]
    gaps: NDArray[np.int64] | None
    start_ns: int
    objective_ns: int
    efforts: list[Effort]  # one a process


async def generate(load: Load | ColumnLoad, options: Options, *, stop: asyncio.Event | None = None) -> Measured:
    """Run ``load`` to its end in this process, or until ``stop`` is set."""
    generator = LoadGenerator(load, options)
    await generator.prepare()
    return await generator.run(stop=stop)


class LoadGenerator:
    """One process's part of a load. ``prepare``, then ``run``, once."""

    def __init__(self, load: Load | ColumnLoad, options: Options, share: Share = WHOLE) -> None:
        self.start_ns = 0
        self._ended = (
            None if isinstance(load, ColumnLoad) else load.ended
        )  # who waits for answers; nobody in an open loop
        if share.of > 1 and self._ended is not None:
            raise ConfigError("processes: a closed loop runs in one process, because its users wait for their answers")
        self._options = options
        self._encoder = Encoder(options)
        self._agenda = Agenda(self._encoder.items(load, share), AHEAD)
        self._idle: list[Connection] = []  # last used last
        self._busy: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._rows = array("q")
        self._gaps: list[tuple[int, list[int]]] = []  # by request
        self._stopped = False
        self._busy_share = 0.0
        self._finished = asyncio.Event()

    async def prepare(self) -> None:
        """Everything that can be done before the start: first items encoded, first connections open.

        ConfigError: nothing answers at the address.
        """
        address = self._options.address()
        self._loop = asyncio.get_running_loop()
        _allow_sockets()
        try:
            found = await self._loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            self._peer = str(found[0][4][0]), address.port
            for _ in range(max(self._options.connections, 1)):
                await self._loop.create_connection(lambda: self._idle_connection(), *self._peer)
        except OSError as error:
            raise ConfigError(
                f"url: nothing answers at {self._options.url} ({error.strerror or error}); start the gateway or engine first"
            ) from None
        self._cpu_from_s = time.thread_time()
        self._agenda.fill(AHEAD)

    async def run(self, start_ns: int | None = None, stop: asyncio.Event | None = None) -> Measured:
        """Send until the load ends and all is answered, or until ``stop`` is set.

        start_ns: CLOCK_MONOTONIC of the run's instant 0; default is as soon as possible. What was due before this call is
        sent at once, as late as it then is.
        """
        self.start_ns = time.monotonic_ns() + LEAD_NS if start_ns is None else start_ns
        self._sending_from_s = time.thread_time()
        self._alarm = Alarm(self._send_due)
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)
        waits = [asyncio.ensure_future(self._finished.wait())]
        if stop is not None:
            waits.append(asyncio.ensure_future(stop.wait()))
        try:
            self._arm()
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when cancelled
            for wait in waits:
                wait.cancel()
            self._sweeping.cancel()
            self._alarm.close()
            self._stop()
        await asyncio.gather(*self._opening, return_exceptions=True)
        return self._measured()

    # --- sending --------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        at = self._agenda.next_at()
        if at < NEVER:
            self._alarm.set(self.start_ns + at)
        else:
            if self._ended is None:
                self._all_sent()
            if not self._busy:
                self._finished.set()

    def _send_due(self) -> None:
        agenda, start_ns = self._agenda, self.start_ns
        sent = 0
        while sent < BURST and start_ns + agenda.next_at() <= time.monotonic_ns():
            self._send(agenda.pop())
            sent += 1
        agenda.fill(2 * sent)
        self._arm()

    def _send(self, item: Item) -> None:
        if self._idle:
            connection = self._idle.pop()
            self._busy.add(connection)
            connection.send(item)
        else:
            connection = Connection(self, item)
            self._busy.add(connection)
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._loop.create_connection(lambda: connection, *self._peer)
        except (OSError, TimeoutError):
            connection.give_up(Error.CONNECT)

    def _idle_connection(self) -> Connection:
        connection = Connection(self, None)
        self._idle.append(connection)
        return connection

    def _all_sent(self) -> None:
        if not self._busy_share:
            wall_s = (time.monotonic_ns() - self.start_ns) / SECOND
            self._busy_share = (time.thread_time() - self._sending_from_s) / max(wall_s, 1e-9)

    # --- answers --------------------------------------------------------------------------------------------------

    def ended(self, connection: Connection, error: Error) -> None:
        """What became of a request."""
        item, answer = connection.item, connection.answer
        assert item is not None
        self._busy.discard(connection)
        self._record(item, connection, error)
        if connection.reusable:
            self._idle.append(connection)
        elif connection.transport is not None:
            connection.transport.abort()
        if self._options.chunk_times and answer.gaps:
            self._gaps.append((item.request, answer.gaps.copy()))
        ended_ns = connection.ended_ns - self.start_ns
        connection.next()
        if self._stopped:
            return
        arrival = None if self._ended is None else self._ended(Nanos(ended_ns), item.request)
        if arrival is not None:
            self._agenda.add(self._encoder.item(arrival))
            self._arm()
        elif not self._busy and self._agenda.next_at() == NEVER:
            self._finished.set()

    def lost(self, connection: Connection) -> None:
        """An idle connection was closed."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def _record(self, item: Item, connection: Connection | None, error: Error) -> None:
        start_ns = self.start_ns
        if connection is None:
            seen = (-1, -1, -1, -1, error, item.input_tokens, item.output_tokens, -1, -1, 0, 0)
        else:
            answer = connection.answer
            seen = (
                -1 if connection.sent_ns < 0 else connection.sent_ns - start_ns,
                -1 if answer.first_ns < 0 else answer.first_ns - start_ns,
                connection.ended_ns - start_ns,
                connection.status,
                error,
                item.input_tokens,
                item.output_tokens,
                answer.input_tokens,
                answer.output_tokens,
                answer.chunks,
                connection.bytes,
            )
        self._rows.extend((item.request, item.kind, item.at, *seen))

    def _sweep(self) -> None:
        """Once a second: what has waited too long is given up, what has been idle too long is closed."""
        now = time.monotonic_ns()
        waited_ns, idle_ns = seconds(self._options.timeout_s), seconds(self._options.idle_s)
        for connection in [c for c in self._busy if 0 <= c.sent_ns < now - waited_ns]:
            connection.give_up(Error.TIMEOUT)
        while self._idle and self._idle[0].idle_ns < now - idle_ns:  # the longest idle stand first
            connection = self._idle.pop(0)
            if connection.transport is not None:
                connection.transport.close()
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    # --- the end --------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Give up what is outstanding; what was due and not sent has a row of its own."""
        self._stopped = True
        self._all_sent()
        for connection in list(self._busy):
            connection.give_up(Error.CUT)
        now = time.monotonic_ns() - self.start_ns
        while self._agenda.next_at() <= now:
            self._record(self._agenda.pop(), None, Error.UNSENT)
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.close()

    def _measured(self) -> Measured:
        effort = Effort(time.thread_time() - self._cpu_from_s, self._busy_share)
        rows = np.array(self._rows, np.int64).reshape(-1, len(FIELDS))
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        gaps = None
        if self._options.chunk_times:
            self._gaps.sort()
            gaps = np.array([gap for _, of in self._gaps for gap in of], np.int64)
        return Measured(rows, gaps, self.start_ns, self._encoder.objective_ns, [effort])


def _allow_sockets() -> None:
    """As many open files as the system lets this process have: an open loop opens what it needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
