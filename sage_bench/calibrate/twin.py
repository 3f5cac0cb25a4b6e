"""The same requests at the same instants, to the simulated engine that a calibration has arrived at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_bench.calibrate.shots import Answers, Shot
from sage_core.commands import AnyCommand, Dispatch, Task
from sage_core.events import AnyEvent, TaskFailed, TaskFinished, TokensProduced
from sage_core.units import NEVER, request_of, task_id
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice

Floats = NDArray[np.float64]


class Latencies(NamedTuple):
    """(n,) seconds, from the instants at which requests were sent. TTFT is NaN of an embedding, TPOT where there is no second
    token."""

    ttft: Floats
    tpot: Floats
    e2e: Floats


def measured(answers: Answers) -> Latencies:
    """Of a volley. The last token counts as the end, as in the plane: what follows it carries none."""
    last_ns = np.array([of[-1] for of in answers.tokens_ns] or answers.ended_ns)
    return _latencies(answers.shots, answers.sent_ns, answers.first_ns, last_ns)


def simulated(replica: LlmReplica | EmbedReplica, shots: Sequence[Shot], sent_ns: NDArray[np.int64]) -> Latencies:
    """What ``replica`` would have done with them; no control plane is before it, as none was in the measurement.

    Raises ValueError when it cannot serve one of them.
    """
    llm, embed = (replica, None) if isinstance(replica, LlmReplica) else (None, replica)
    device = SimulatedDevice(0, "twin", llm, embed, lambda request, _: shots[request].output_tokens)
    first_ns, ended_ns = np.zeros(len(shots), np.int64), np.zeros(len(shots), np.int64)

    def told(now: int, events: Sequence[AnyEvent]) -> None:
        for event in events:
            if isinstance(event, TaskFailed):
                raise ValueError(f"the simulated engine cannot serve request {request_of(event.task)}: {event.reason}")
            if isinstance(event, TokensProduced):
                first_ns[request_of(event.task)] = now
            elif isinstance(event, TaskFinished):
                ended_ns[request_of(event.task)] = now

    for request in np.argsort(sent_ns, kind="stable").tolist():
        at = int(sent_ns[request])
        while (wakeup_at := device.wakeup_at) <= at:
            told(wakeup_at, device.step(wakeup_at, ()))
        shot = shots[request]
        task = Task(task_id(request, 0), 0, 0, 0, 0, shot.input_tokens, shot.output_tokens)
        command: AnyCommand = Dispatch(replica.replica, (task,))
        told(at, device.step(at, (command,)))  # type: ignore[arg-type]  # whole nanoseconds
    while (wakeup_at := device.wakeup_at) < NEVER:
        told(wakeup_at, device.step(wakeup_at, ()))
    return _latencies(shots, sent_ns, first_ns, ended_ns)


def _latencies(
    shots: Sequence[Shot], sent_ns: NDArray[np.int64], first_ns: NDArray[np.int64], last_ns: NDArray[np.int64]
) -> Latencies:
    gaps = np.array([shot.output_tokens - 1 for shot in shots])
    ttft = np.where(gaps >= 0, first_ns - sent_ns, np.nan)
    tpot = np.divide(last_ns - first_ns, gaps, out=np.full(len(gaps), np.nan), where=gaps > 0)
    return Latencies(ttft / 1e9, tpot / 1e9, (last_ns - sent_ns) / 1e9)
