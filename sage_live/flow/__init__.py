"""Streaming dataflow: a pipeline over a source that need not end, between bounded queues.

    flow = Flow.of(documents).map(embed, parallelism=8).batch(32, max_wait_s=0.1)
    report = await flow.to(store).run()

A stage is one or more coroutines between two queues. A full queue holds up the stage before it, and so on back to the
source; only there may an item be rejected, before any work was spent on it. A stage that fails ends the flow.
"""

from sage_live.flow.aggregate import Aggregate, Count, Max, Mean, Min, Quantile, Sum
from sage_live.flow.clock import Clock, RealClock, Timer
from sage_live.flow.flow import QUEUE_LIMIT, Flow
from sage_live.flow.run import FlowError, FlowReport, FlowRun, Outcome
from sage_live.flow.source import FlowClosed, Inlet
from sage_live.flow.stage import StageStats
from sage_live.flow.window import Window, Windows, sliding, tumbling

__all__ = [
    "QUEUE_LIMIT",
    "Aggregate",
    "Clock",
    "Count",
    "Flow",
    "FlowClosed",
    "FlowError",
    "FlowReport",
    "FlowRun",
    "Inlet",
    "Max",
    "Mean",
    "Min",
    "Outcome",
    "Quantile",
    "RealClock",
    "StageStats",
    "Sum",
    "Timer",
    "Window",
    "Windows",
    "sliding",
    "tumbling",
]
