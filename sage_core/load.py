"""Where requests come from, in simulation and live alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sage_core.events import RequestArrived
from sage_core.units import Nanos


class Arrival(NamedTuple):
    """A request to send at ``at`` (ns), and the output length that only backends may know."""

    at: Nanos
    request: RequestArrived
    output_tokens: int


class Arrivals(NamedTuple):
    """Many arrivals as columns, in time order; row i of each array (n,) int64 is one request, numbered ``first + i``.

    ``pipeline`` and ``tenant`` are indices into ``pipelines`` and ``tenants``. Requests are scheduled at ``at`` (ns).
    """

    pipelines: list[str]
    tenants: list[str]
    first: int
    at: NDArray[np.int64]
    pipeline: NDArray[np.int64]
    kind: NDArray[np.int64]
    tenant: NDArray[np.int64]
    priority: NDArray[np.int64]
    input_tokens: NDArray[np.int64]
    output_tokens_max: NDArray[np.int64]
    ttft_due_at: NDArray[np.int64]
    due_at: NDArray[np.int64]
    prefix: NDArray[np.int64]
    output_tokens: NDArray[np.int64]


class Load(Protocol):
    """Requests in time order. Ids are dense from zero in the order they are issued."""

    def arrivals(self) -> Iterator[Arrival]:
        """Arrivals that do not depend on completions (open loop), or the first request of each closed-loop user."""

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        """A closed-loop user's next request after ``request`` ended, ``at >= now``; ``None`` for open loop."""


@runtime_checkable
class ColumnLoad(Protocol):
    """An open-loop load that can also give its arrivals in columns: the same ones, many times faster."""

    def columns(self) -> Iterator[Arrivals]:
        """What ``arrivals()`` gives; some may be empty."""
