"""Whether a run may be believed, and what it cost.

A generator that cannot keep up measures itself. A run is INVALID when

* the 99th percentile of the send lag is above the larger of LAG_MS and LAG_SHARE of the load's tightest objective: a lag
  of that size can turn an objective met into one missed;
* less than ACHIEVED of the requests that came due were sent by the last scheduled instant and that lag;
* a process was busy for more than BUSY of a core while it sent (for at least BUSY_S), when what it times is its own
  queue.

Fewer than P99_SAMPLES requests have no 99th percentile worth the name (99 % confidence that it lies within the sample):
their largest lag is held to the same limit instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from sage_core.units import MILLISECOND, NEVER, SECOND
from sage_live.loadgen.generator import Measured
from sage_live.loadgen.schema import FIELDS, Error

LAG_MS = 5.0
LAG_SHARE = 0.05
ACHIEVED = 0.99
BUSY = 0.9
BUSY_S = 1.0
P99_SAMPLES = 662


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates are requests/s from the start to the last scheduled instant; failures are counts by class, where a status
    counts by its number. cpu_us: CPU-microseconds of the generator for each request. ``*_tokens_off``: answers whose
    server counted other numbers than were asked for (input: as built; output: with fixed lengths only).
    """

    requests: int
    requested_rate: float
    achieved_rate: float
    send_lag_ms_p50: float
    send_lag_ms_p99: float
    send_lag_ms_max: float
    cpu_s: float
    cpu_us: float
    busy: float
    failures: dict[str, int]
    input_tokens_off: int
    output_tokens_off: int
    invalid: list[str]

    @property
    def valid(self) -> bool:
        """Whether the generator kept up."""
        return not self.invalid

    def as_dict(self) -> dict[str, object]:
        """For a manifest."""
        return asdict(self)


def summary(measured: Measured, *, fixed_lengths: bool) -> Summary:
    """Of a run that was made with ``Options.fixed_lengths`` as given."""
    c = dict(zip(FIELDS, measured.rows.T, strict=True))
    due = len(measured.rows)
    sent = c["sent_ns"] >= 0
    lag_ms = (c["sent_ns"] - c["scheduled_ns"])[sent] / MILLISECOND
    p50, p99, worst = np.quantile(lag_ms, (0.5, 0.99, 1.0)).tolist() if len(lag_ms) else (0.0, 0.0, 0.0)
    limit_ms = LAG_MS
    if measured.objective_ns < NEVER:
        limit_ms = max(limit_ms, LAG_SHARE * measured.objective_ns / MILLISECOND)
    last_ns = int(c["scheduled_ns"].max(initial=0))
    achieved = int(np.count_nonzero(sent & (c["sent_ns"] <= last_ns + limit_ms * MILLISECOND)))
    span_s = max(last_ns, 1) / SECOND
    cpu_s = sum(effort.cpu_s for effort in measured.efforts)
    busy = max((effort.busy for effort in measured.efforts), default=0.0)

    invalid = []
    lag_name, lag = ("p99", p99) if due >= P99_SAMPLES else ("max", worst)
    if lag > limit_ms:
        invalid.append(f"send lag {lag_name} {lag:.1f} ms, above {limit_ms:.1f} ms")
    if achieved < ACHIEVED * due:
        invalid.append(f"{achieved} of {due} requests sent in time, below {100 * ACHIEVED:.0f} %")
    if busy > BUSY and span_s >= BUSY_S:
        invalid.append(f"generator busy {100 * busy:.0f} % of a core, above {100 * BUSY:.0f} %")

    answered = c["error"] == Error.NONE
    input_off = answered & (c["input_tokens"] >= 0) & (c["input_tokens"] != c["input_tokens_asked"])
    output_off = answered & (c["output_tokens"] >= 0) & (c["output_tokens"] != c["output_tokens_asked"])
    return Summary(
        due,
        due / span_s,
        achieved / span_s,
        p50,
        p99,
        worst,
        cpu_s,
        1e6 * cpu_s / max(due, 1),
        busy,
        _failures(c["error"].tolist(), c["status"].tolist()),
        int(np.count_nonzero(input_off)),
        int(np.count_nonzero(output_off)) if fixed_lengths else 0,
        invalid,
    )


def _failures(errors: list[int], statuses: list[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for error, status in zip(errors, statuses, strict=True):
        if error:
            name = f"status_{status}" if error == Error.STATUS else Error(error).name.lower()
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
