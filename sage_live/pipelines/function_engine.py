"""Functions as a backend of the driver: retrieval, reranking, tools and what else is done in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from sage_core import events as e
from sage_core.commands import Cancel, Dispatch, Task
from sage_core.units import Nanos, PoolKind, request_of
from sage_live import errors
from sage_live.call import Call
from sage_live.driver import Post


class Workers(NamedTuple):
    """Of a pool. at_once: calls that are under way at once, those that wait for a thread of their tool among them. The
    ``*_ns`` are what a call is expected to take (sage_core.events.ReplicaJoined); 0: unknown, to be learned."""

    at_once: int = 16
    fixed_ns: float = 0.0
    input_token_ns: float = 0.0

    def joined(self, replica: int, pool: str, device: int) -> e.ReplicaJoined:
        """As the plane is told of them."""
        kind = int(PoolKind.OPERATOR)
        return e.ReplicaJoined(
            replica,
            pool,
            kind,
            device,
            "local",
            self.at_once,
            0,
            fixed_ns=self.fixed_ns,
            input_token_ns=self.input_token_ns,
        )


class FunctionEngine:
    """A :class:`sage_live.driver.Backend` with one replica: the workers of ``pool``. calls: by request id."""

    def __init__(self, pool: str, calls: Mapping[int, Call], joined: e.ReplicaJoined) -> None:
        self.pool = pool
        self._calls = calls
        self._joined = joined
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def joined(self) -> list[e.ReplicaJoined]:
        """Its one replica, which is there at once."""
        return [self._joined]

    def start(self, post: Post, now: Callable[[], Nanos]) -> None:
        """From now on commands come, and events go to ``post``."""
        self._post, self._now = post, now

    def carry_out(self, command: Dispatch | Cancel) -> None:
        """Call the functions; let go of those whose result is not wanted."""
        if isinstance(command, Dispatch):
            for task in command.tasks:
                call = self._calls[request_of(task.task)]
                if call.dispatched_ns < 0:
                    call.dispatched_ns = self._now()
                running = self._tasks[task.task] = asyncio.ensure_future(self._run(task, call))
                running.add_done_callback(partial(self._over, task.task))
        else:
            cancelled = self._tasks.pop(command.task, None)
            if cancelled is not None:
                cancelled.cancel()

    def _over(self, task: int, _: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

    async def _run(self, task: Task, call: Call) -> None:
        run = call.run
        try:
            assert run is not None
            size = await run.perform(task)
        except Exception as error:  # a defect of a stage is the end of its request, not of the control plane
            reason = errors.reason_of(error)
            call.error = errors.upstream_failed(f"The request failed: {reason}.")
            self._post(e.TaskFailed(task.task, reason, False))
        else:
            self._post(e.TaskFinished(task.task, size))

    @property
    def at_work(self) -> Iterator[int]:
        """Requests that it has a task of."""
        return map(request_of, self._tasks)

    async def close(self) -> None:
        """Let go of everything."""
        running = list(self._tasks.values())
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
