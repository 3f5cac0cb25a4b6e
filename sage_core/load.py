"""Where requests come from, in simulation and live alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sage_core.events import RequestArrived
from sage_core.units import Nanos


class Contents(NamedTuple):
    """What a prompt begins with: ids (from 0) of its blocks of ``block_tokens`` tokens, from the start of it on.

    Equal ids mean that the prompts are equal up to the end of that block. There may be fewer blocks than the prompt has.
    """

    block_tokens: int
    blocks: tuple[int, ...]


AS_INPUT: Final = -1
"""Size of a result that is as large as what it is made of."""

ANSWER: Final = -1
"""Stands for the stage that answers, where a stage is asked for."""


class Arrival(NamedTuple):
    """A request to send at ``at`` (ns), and what only backends may know: its output length, what its prompt shares with
    others, and of a pipeline of several stages the size of each result."""

    at: Nanos
    request: RequestArrived
    output_tokens: int
    contents: Contents | None = None
    results: tuple[int, ...] = ()

    def result(self, stage: int) -> int:
        """Size of the result of ``stage``, or of the answer."""
        return self.results[stage] if self.results and stage != ANSWER else self.output_tokens


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
    contents: Sequence[Contents | None] | None = None  # a row each; None: no prompt shares anything


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
