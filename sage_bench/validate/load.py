"""The requests of a measured run as a load: the same instants and lengths, to the nanosecond."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sage_bench.validate.measured import Arrivals, MeasuredRun, read_run
from sage_bench.validate.prefixes import read_prefixes
from sage_core.errors import ConfigError
from sage_core.events import RequestArrived
from sage_core.load import Arrival
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import Nanos, RequestKind


class MeasuredLoad:
    """A :class:`sage_core.load.Load`. arrivals: which column says when a request reaches the engine. prefix_trace: a trace
    that says which blocks prompts share; without one they share nothing.

    Requests are numbered by arrival, equal instants by row. The cap on output tokens, all that a policy sees, is one
    number for the run: the smallest power of two that no output exceeds.
    """

    def __init__(
        self,
        path: str,
        arrivals: Arrivals = "queued",
        prefix_trace: str | None = None,
        *,
        streams: Streams,
        slo: SloTable,
    ) -> None:
        if arrivals not in ("queued", "arrival"):
            raise ConfigError(f"load.arrivals: expected queued or arrival, got {arrivals!r}")
        self.run: MeasuredRun = read_run(Path(path))
        self.arrivals_by: Arrivals = arrivals
        self._prefix_trace = prefix_trace
        self._contents = None if prefix_trace is None else read_prefixes(Path(prefix_trace), self.run)
        self._cap = 1 << (int(self.run.output_tokens.max()) - 1).bit_length()

    def arrivals(self) -> Iterator[Arrival]:
        """Arrivals in time order."""
        run = self.run
        at_ns = np.rint((run.start_s(self.arrivals_by) - run.origin_s(self.arrivals_by)) * 1e9).astype(np.int64)
        for request, row in enumerate(order(run, self.arrivals_by).tolist()):
            at = Nanos(int(at_ns[row]))
            asked = RequestArrived(
                request,
                "chat",
                RequestKind.LLM_CHAT,
                "measured",
                0 if run.priority is None else int(run.priority[row]),
                int(run.prompt_tokens[row]),
                self._cap,
                at,
            )
            contents = None if self._contents is None else self._contents[row]
            yield Arrival(at, asked, int(run.output_tokens[row]), contents)

    def ended(self, now: int, request: int) -> Arrival | None:
        """None: the measured instants stand, whatever the simulation does."""
        return None

    def files(self) -> list[str]:
        """Files the load reads: what a manifest has to give checksums of."""
        return [str(self.run.path), *([] if self._prefix_trace is None else [self._prefix_trace])]


def order(run: MeasuredRun, arrivals: Arrivals) -> NDArray[np.int64]:
    """(n,) rows by instant of arrival, equal instants by row: row of each request id of a simulation."""
    return np.asarray(np.argsort(run.start_s(arrivals), kind="stable"), np.int64)
