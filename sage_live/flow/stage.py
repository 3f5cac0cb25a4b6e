"""What every stage has: two edges, one or more workers, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sage_live.flow.clock import Clock
from sage_live.flow.edge import Edge, Nowhere


@dataclass(slots=True)
class StageStats:
    """Counts of items, and times in ns."""

    name: str
    items_in: int = 0
    """Taken from its queue; of an iterable, by a source."""
    items_finished: int = 0
    """Of these, done with: passed on, filtered out, put into windows."""
    items_out: int = 0
    """Given to the next stage; of a sink, done with."""
    rejected: int = 0
    """Of a source: not let in because the first queue was full."""
    late: int = 0
    """Of windows: came after a window that they belong to was closed."""
    dropped: int = 0
    """In its queue or in its hands when the flow was cut."""
    windows_dropped: int = 0
    """Open when the flow was cut."""
    queue_limit: int = 0
    """Of the queue before it."""
    queue_depth_max: int = 0
    busy_ns: int = 0
    """Within the user's function, waiting included, summed over workers."""


class Stage:
    """Made anew for each run; ``connect`` before ``work``."""

    workers = 1
    """How many times ``work`` runs at once."""

    def __init__(self, name: str) -> None:
        self.stats = StageStats(name)
        self.inlet: Edge[Any] = Nowhere()
        self.outlet: Edge[Any] = Nowhere()
        self.clock: Clock

    def connect(self, inlet: Edge[Any], outlet: Edge[Any], clock: Clock) -> None:
        self.inlet, self.outlet, self.clock = inlet, outlet, clock
        self.stats.queue_limit = inlet.limit

    async def work(self) -> None:
        """Take items and pass on what becomes of them, until EndedError or a return."""
        raise NotImplementedError

    async def flush(self) -> None:
        """After the last item: pass on what was held back."""

    def stop(self) -> None:
        """Let no more in; what is in goes on. Only a source has something to do."""

    def close(self) -> None:
        """The flow is over, one way or another."""

    def cut(self) -> None:
        """The flow was ended before its source: count what is lost, and let go of it."""
        self.stats.dropped = len(self.inlet.items) + self.stats.items_in - self.stats.items_finished
        self.inlet.items.clear()

    def current(self) -> StageStats:
        """The numbers by now."""
        self.stats.queue_depth_max = self.inlet.depth_max
        return self.stats
