"""What a run says of itself when it has ended: one line, and notes for people."""

from __future__ import annotations

from sage_bench.live import LiveResult
from sage_bench.run import RunResult


def line_of(result: RunResult | LiveResult) -> str:
    """Where its results are, how it ended and what became of its requests."""
    return _live(result) if isinstance(result, LiveResult) else _simulated(result)


def notes_of(result: RunResult | LiveResult) -> list[str]:
    """What a reader of its results should know."""
    if not isinstance(result, LiveResult):
        return result.warnings
    invalid = [
        f"INVALID: {reason}; latencies of this run are the generator's as much as the system's"
        for reason in result.summary.invalid
    ]
    return [*result.warnings, *invalid]


def _simulated(result: RunResult) -> str:
    counts, finish = result.counts, result.finish
    state = "interrupted, partial" if finish.interrupted else "done"
    return (
        f"{result.folder}: {state}; {counts.arrived:,} requests in {finish.now / 1e9:,.1f} simulated s, "
        f"{counts.responded:,} responded, {counts.rejected:,} rejected, {counts.cancelled:,} cancelled, "
        f"{counts.failed:,} failed; {finish.total_s:.2f} CPU s; digest {finish.digest.hex()}"
    )


def _live(result: LiveResult) -> str:
    counts, sent = result.told.counts, result.summary
    state = "INVALID" if sent.invalid else "interrupted, partial" if result.interrupted else "done"
    return (
        f"{result.folder}: {state}; {sent.requests:,} requests at {sent.achieved_rate:,.1f} of {sent.requested_rate:,.1f} "
        f"req/s, send lag p99 {sent.send_lag_ms_p99:.1f} ms; {counts['responded']:,} responded, {counts['rejected']:,} "
        f"rejected, {counts['cancelled']:,} cancelled, {counts['failed']:,} failed; digest {result.told.digest}"
    )
