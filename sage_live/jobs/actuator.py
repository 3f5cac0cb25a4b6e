"""What a job controller needs of whatever runs engines."""

from __future__ import annotations

from typing import Protocol

from sage_core.job_events import Start
from sage_live.jobs.launch import Launch


class Engine(Protocol):
    """One that runs. ``url`` is where it serves."""

    @property
    def url(self) -> str: ...

    async def wait(self) -> str:
        """Until it has ended, in any way; how that was."""

    async def stop(self) -> None:
        """Ask it to finish what it has and to end (SIGTERM)."""

    async def kill(self) -> None:
        """End it now, and all it started (SIGKILL)."""


class Actuator(Protocol):
    """Starts engines on the nodes of a cluster."""

    async def start(self, name: str, launch: Launch, placed: Start) -> Engine:
        """An engine that is healthy. EngineError where it does not come up; then, and when this is cancelled, nothing of
        it is left."""

    async def nodes(self) -> frozenset[str] | None:
        """Names of the nodes that are there; None: they cannot get lost without us."""
