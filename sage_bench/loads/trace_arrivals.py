"""A trace as an arrival process: its clumps and waves, stretched to the nominal rate and repeated end to end.

What the requests ask for comes from elsewhere, so any mix can be given the rhythm of a measured service.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sage_bench.loads.arrivals import Instants, Stream
from sage_bench.traces.reader import Trace
from sage_core.errors import DataError
from sage_core.units import SECOND


class TraceArrivals:
    """The instants of a trace file; ``kind`` keeps only those of one kind (chat, generation, embedding)."""

    def __init__(self, path: str, kind: str | None = None) -> None:
        self.trace = Trace(path)
        self.path = self.trace.path
        self.kind = None if kind is None else self.trace.kind_code(kind)
        self._rows, self._first_s, self._last_s = 0, 0.0, 0.0
        for rows in self._chosen():
            if self._rows == 0:
                self._first_s = float(rows[0])
            self._rows, self._last_s = self._rows + len(rows), float(rows[-1])
        if self._rows < 2 or self._last_s <= self._first_s:
            raise DataError(
                f"{path}: expected at least two instants to take an arrival pattern from (kind {kind or 'any'})"
            )

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        """As :class:`ArrivalProcess`; nothing is drawn from ``stream``."""
        # One mean gap closes the cycle, so that a cycle of n arrivals lasts exactly n mean gaps.
        cycle_s = (self._last_s - self._first_s) * self._rows / (self._rows - 1)
        stretch = self._rows / cycle_s / rate
        cycle = 0
        while True:
            for arrival_s in self._chosen():
                yield np.rint((arrival_s - self._first_s + cycle * cycle_s) * stretch * SECOND).astype(np.int64)
            cycle += 1

    def _chosen(self) -> Iterator[NDArray[np.float64]]:
        for rows in self.trace.rows():
            arrival_s = rows.arrival_s if self.kind is None else rows.arrival_s[rows.kind == self.kind]
            if len(arrival_s):
                yield arrival_s
