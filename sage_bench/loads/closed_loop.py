"""Closed loop: users who wait for an answer, think, and ask again.

Kept apart from the open loop because it answers another question: how much a fixed population gets done, not whether an
offered rate is served. A slow system slows its own load down, so latencies under a closed loop hide overload.

Each user has one random stream of its own; what the k-th request of a user looks like does not depend on how fast the
system answered anybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sage_bench.loads.check import number, shares, whole
from sage_bench.loads.mix import Batch, Drawn, Limits, Mix, before, empty_batch, pick
from sage_bench.loads.open_loop import check_drawable, files_of
from sage_bench.loads.request_class import RequestClass
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.load import Arrival
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import SECOND, SECONDS_MAX, seconds

AHEAD = 32  # requests drawn for a user at a time; draws do not depend on it
QUANTITIES = ("class", "think", "tenant", "input_tokens", "output_tokens", "prefix")


class Think(Protocol):
    """How long a user waits between an answer and the next request."""

    def spans_s(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) seconds of at least 0 from (n,) uniform numbers in [0, 1)."""

    @property
    def mean_s(self) -> float:
        """Mean, seconds."""


class ConstantThink:
    """Always ``mean_s`` seconds; 0 asks again at once."""

    def __init__(self, mean_s: float = 0.0) -> None:
        self.mean_s = number("load.think.mean_s", mean_s, 0.0, 1e6)

    def spans_s(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(len(u), self.mean_s)


class ExponentialThink:
    """Exponential with mean ``mean_s`` seconds: the usual model of a person."""

    def __init__(self, mean_s: float) -> None:
        self.mean_s = number("load.think.mean_s", mean_s, 0.0, 1e6, above=True)

    def spans_s(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(-self.mean_s * np.log1p(-u))


class ClosedLoop:
    """``users`` users, each with at most one request in flight.

    requests: in all. requests_per_user: of each. duration_s: no request is issued from that instant on. ramp_s: the
    users start evenly spread over this long. The load is stateful: ``arrivals()`` starts a new run.
    """

    def __init__(
        self,
        users: int,
        classes: Mapping[str, RequestClass],
        think: Think | None = None,
        requests: int | None = None,
        requests_per_user: int | None = None,
        duration_s: float | None = None,
        ramp_s: float = 0.0,
        *,
        streams: Streams,
        slo: SloTable,
    ) -> None:
        self.users = whole("load.users", users, 1)
        self.think = ConstantThink() if think is None else think
        self.limits = Limits.of(requests, duration_s, needed=requests_per_user is None)
        self.requests_per_user = (
            None if requests_per_user is None else whole("load.requests_per_user", requests_per_user, 1)
        )
        self.ramp_s = number("load.ramp_s", ramp_s, 0.0, SECONDS_MAX)
        if self.think.mean_s == 0 and self.limits.requests is None and self.requests_per_user is None:
            raise ConfigError(
                "load.requests: users who do not think (load.think.mean_s=0) and are rejected at once would ask forever "
                "without time passing; set load.requests or load.requests_per_user"
            )
        self.shares = shares("load.classes.<name>.share", {name: c.share for name, c in classes.items()})
        for name, c in classes.items():
            check_drawable(name, c)
            if c.arrivals is not None:
                raise ConfigError(f"load.classes.{name}.arrivals: a closed loop has no arrival process; leave it out")
        self.mix = Mix(classes, slo)
        self._class_before = before(list(self.shares.values()))
        self._streams = streams
        self._begin()

    def arrivals(self) -> Iterator[Arrival]:
        """The first request of each user, in time order."""
        self._begin()
        for user in range(self.users):
            arrival = self._next(user, seconds(self.ramp_s * user / self.users))
            if arrival is None:
                return
            yield arrival

    def ended(self, now: int, request: int) -> Arrival | None:
        """The next request of the user whose ``request`` ended at ``now``, after thinking; None when the load is over."""
        user = self._waiting.pop(request, None)
        if user is None:
            raise IllegalEvent(
                f"request {request} ended at {now} ns, but no user waits for it: it ended before, or never began"
            )
        return self._next(user, now)

    def files(self) -> list[str]:
        """Files the load reads: what a manifest has to give checksums of."""
        return files_of(self.mix.classes)

    @property
    def in_flight(self) -> int:
        """Users who wait for an answer."""
        return len(self._waiting)

    def _begin(self) -> None:
        self._issued = 0
        self._waiting: dict[int, int] = {}
        self._of: list[_User | None] = [None] * self.users

    def _next(self, user: int, now: int) -> Arrival | None:
        state = self._of[user]
        if state is None:
            state = self._of[user] = _User(self._streams.stream(f"load/user/{user}"))
        if self._issued == self.limits.requests or state.asked == self.requests_per_user:
            return None
        if state.asked % AHEAD == 0:
            state.batch = self._drawn(state)
        row = state.asked % AHEAD
        assert state.batch is not None
        # The first request comes at the start; every later one after a think time.
        at = now + (int(state.batch.at[row]) if state.asked else 0)
        if self.limits.until is not None and at >= self.limits.until:
            return None
        one = Batch._make(column[row : row + 1] for column in state.batch)._replace(at=np.array([at], np.int64))
        arrival = next(self.mix.issue(one, self._issued))
        self._waiting[self._issued] = user
        self._issued += 1
        state.asked += 1
        return arrival

    def _drawn(self, state: _User) -> Batch:
        """A user's next requests, with the think time before each (ns) in the column ``at``."""
        u = dict(zip(QUANTITIES, state.rng.random((AHEAD, len(QUANTITIES))).T, strict=True))
        think_ns = np.rint(self.think.spans_s(u["think"]) * SECOND).astype(np.int64)
        cls = pick(self._class_before, u["class"])
        batch = empty_batch(think_ns, cls)
        for c in np.unique(cls).tolist():
            rows = np.flatnonzero(cls == c)
            drawn: Drawn = self.mix.draw(c, lambda quantity, rows=rows: u[quantity][rows])  # type: ignore[misc]
            for column, values in zip(batch[2:], drawn, strict=True):
                column[rows] = values
        return batch


class _User:
    __slots__ = ("asked", "batch", "rng")

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.asked = 0
        self.batch: Batch | None = None
