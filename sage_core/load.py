"""Where requests come from, in simulation and live alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from sage_core.events import RequestArrived
from sage_core.units import Nanos


class Arrival(NamedTuple):
    """A request to send at ``at`` (ns), and the output length that only backends may know."""

    at: Nanos
    request: RequestArrived
    output_tokens: int


class Load(Protocol):
    """Requests in time order. Ids are dense from zero in the order they are issued."""

    def arrivals(self) -> Iterator[Arrival]:
        """Arrivals that do not depend on completions (open loop), or the first request of each closed-loop user."""

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        """A closed-loop user's next request after ``request`` ended, ``at >= now``; ``None`` for open loop."""
