"""One run of a flow: its stages as tasks that live and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sage_core.errors import ConfigError, SageError
from sage_core.units import SECOND
from sage_live.flow.clock import Clock
from sage_live.flow.edge import Edge, EndedError, Nowhere
from sage_live.flow.stage import Stage, StageStats


class Outcome(StrEnum):
    """How a run ended."""

    COMPLETED = "completed"
    """The source ended, and everything went through."""
    DRAINED = "drained"
    """It was cancelled, and everything that had been let in went through."""
    DROPPED = "dropped"
    """It was cancelled, and what was in it was lost."""
    FAILED = "failed"
    """A stage failed, and what was in the flow was lost."""


class FlowError(SageError):
    """A stage failed; ``__cause__`` is what it raised.

    ``stage`` is its name, ``position`` counts from the source, which is 0. ``dropped``: items that were lost with it.
    """

    def __init__(self, stage: str, position: int, error: BaseException) -> None:
        super().__init__(f"stage {position} ({stage}) failed: {type(error).__name__}: {error}")
        self.stage = stage
        self.position = position
        self.dropped = 0

    def __str__(self) -> str:
        lost = f"; {self.dropped} items in the flow were dropped" if self.dropped else ""
        return super().__str__() + lost


@dataclass(frozen=True, slots=True)
class FlowReport:
    """``stages``: the source first, the sink last."""

    outcome: Outcome
    elapsed_s: float
    stages: tuple[StageStats, ...]


class FlowRun:
    """Made by :meth:`sage_live.flow.Flow.to`. Runs once."""

    def __init__(self, stages: Sequence[Stage], limits: Sequence[int], on_cancel: str, clock: Clock) -> None:
        self.outcome: Outcome | None = None
        """None until it has ended."""
        self._stages = stages
        self._left = [stage.workers for stage in stages]
        self._on_cancel = on_cancel
        self._clock = clock
        self._started = False
        edges: list[Edge[Any]] = [Nowhere(), *(Edge(limit) for limit in limits), Nowhere()]
        for stage, inlet, outlet in zip(stages, edges, edges[1:], strict=False):
            stage.connect(inlet, outlet, clock)

    @property
    def stats(self) -> tuple[StageStats, ...]:
        """The numbers by now, the source first; while the run lasts and after it, whatever became of it."""
        return tuple(stage.current() for stage in self._stages)

    async def run(self) -> FlowReport:
        """Until the source has ended and the sink has done with everything.

        Raises FlowError if a stage fails, at once. A cancellation is passed on after draining or dropping, as was chosen;
        ``outcome`` and ``stats`` then say what became of the items. ConfigError for a second time.
        """
        if self._started:
            raise ConfigError("this run has been started; a flow runs again with another to(...)")
        self._started = True
        began = self._clock.now()
        whole = asyncio.create_task(self._whole())
        try:
            try:
                await asyncio.shield(whole)
                self.outcome = Outcome.COMPLETED
            except asyncio.CancelledError:
                if self._on_cancel == "drain":
                    self._stages[0].stop()
                    await asyncio.shield(whole)
                    self.outcome = Outcome.DRAINED
                raise
        except FlowError as error:
            self.outcome = Outcome.FAILED
            self._cut()
            error.dropped = sum(stage.stats.dropped for stage in self._stages)
            raise
        finally:
            if not whole.done():
                whole.cancel()
                await asyncio.wait([whole])
                if not whole.cancelled():
                    whole.exception()  # it failed while it was cut: looked at, so that asyncio does not complain
            if self.outcome is None:
                self.outcome = Outcome.DROPPED
                self._cut()
            for stage in self._stages:
                stage.close()
        return FlowReport(self.outcome, (self._clock.now() - began) / SECOND, self.stats)

    async def _whole(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for position, stage in enumerate(self._stages):
                    for _ in range(stage.workers):
                        group.create_task(self._work(stage, position))
        except BaseExceptionGroup as failures:  # the first failure cancelled the others
            first = failures.subgroup(FlowError)
            if first is None:
                raise
            raise first.exceptions[0] from first.exceptions[0].__cause__

    async def _work(self, stage: Stage, position: int) -> None:
        """One worker; the last one ends the edge behind the stage."""
        try:
            with suppress(EndedError):
                await stage.work()
            self._left[position] -= 1
            if self._left[position] == 0:
                await stage.flush()
                stage.outlet.end()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled the worker: what it awaited was cancelled, and the item would be lost without a word.
            raise FlowError(stage.stats.name, position, error) from error
        except Exception as error:
            raise FlowError(stage.stats.name, position, error) from error

    def _cut(self) -> None:
        for stage in self._stages:
            stage.cut()
