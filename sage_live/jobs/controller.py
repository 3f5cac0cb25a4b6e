"""Pumps a :class:`sage_core.jobs.JobManager` in real time: its actions go to an actuator, what becomes of them comes back.

Each instance is one Task, from its start to its end; it posts what it sees, and the loop steps the manager with all that was
posted since. Nothing here decides anything: when to start again, where, and when to give up is the manager's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from sage_core.cluster import Job, Node
from sage_core.errors import EngineError, SageError
from sage_core.job_events import (
    Cancelled,
    InstanceExited,
    InstanceHealthy,
    InstanceUnhealthy,
    JobAction,
    JobEvent,
    Kill,
    NodeJoined,
    NodeLeft,
    Start,
    Stop,
    Submitted,
)
from sage_core.jobs import JobManager, JobState
from sage_core.units import NEVER, Nanos
from sage_live.jobs.actuator import Actuator, Engine
from sage_live.jobs.ask import ask
from sage_live.jobs.follower import Follower
from sage_live.jobs.launch import Launch
from sage_live.jobs.status import ClusterStatus, EngineStatus, JobLine

LaunchOf = Callable[[Job, Start], Launch]
"""How an engine of a job is started where it was placed."""

_log = logging.getLogger(__name__)

NAME_MAX: Final = 50
"""Characters of a job's name in an engine's: the gateway takes 64."""


@dataclass(frozen=True, slots=True)
class Watching:
    """Seconds: between two probes of an engine, and what an answer may take; between two looks at the nodes. failures_max:
    probes that fail in a row until an engine counts as unhealthy."""

    probe_s: float = 2.0
    probe_timeout_s: float = 2.0
    failures_max: int = 3
    nodes_s: float = 1.0


class _Life:
    """An instance. ``engine`` once it is healthy."""

    def __init__(self, placed: Start, name: str) -> None:
        self.placed = placed
        self.name = name
        self.engine: Engine | None = None
        self.task: asyncio.Task[None] | None = None


class Controller:
    """Of one cluster. Build inside a running event loop; :meth:`run` is its life, and ends with :meth:`down`.

    nodes: that the manager was given. launch_of: see :data:`LaunchOf`. follower: of the gateway that is to send work.
    changed: is told after every step that did something.
    """

    def __init__(
        self,
        name: str,
        runtime: str,
        manager: JobManager,
        nodes: Sequence[Node],
        actuator: Actuator,
        launch_of: LaunchOf,
        *,
        follower: Follower | None = None,
        watching: Watching | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.runtime = runtime
        self._manager = manager
        self._nodes = {node.name: node for node in nodes}
        self._lost: set[str] = set()
        self._actuator = actuator
        self._launch_of = launch_of
        self._follower = follower
        self._watching = watching or Watching()
        self._changed = changed
        self._lives: dict[int, _Life] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._posted: list[JobEvent] = []
        self._woken = asyncio.Event()
        self._down = False
        self._origin_ns = time.monotonic_ns()

    def submit(self, jobs: Sequence[Job]) -> None:
        """These are to run."""
        self.post(*(Submitted(job) for job in jobs))

    def post(self, *events: JobEvent) -> None:
        """Facts and wishes for the manager."""
        self._posted += events
        self._woken.set()

    async def run(self) -> None:
        """Returns after :meth:`down`, when nothing runs any more. If it is cancelled or breaks, everything is killed."""
        nodes = asyncio.create_task(self._watch_nodes())
        follows = None if self._follower is None else asyncio.create_task(self._follower.run())
        try:
            while not (self._down and self.status().over):
                await self._turn()
        finally:
            for task in (nodes, follows):
                if task is not None:
                    task.cancel()
            await self._kill_all()

    def down(self) -> None:
        """End every job: drain, stop, and after the grace kill. :meth:`run` returns then."""
        self._down = True
        ended = (JobState.STOPPED, JobState.DRAINING)
        asked = {event.job for event in self._posted if isinstance(event, Cancelled)}
        jobs = self._manager.jobs().items()
        self.post(*(Cancelled(name) for name, job in jobs if job.state not in ended and name not in asked))

    def status(self) -> ClusterStatus:
        """As it is now."""
        jobs = self._manager.jobs()
        engines = []
        for name, job in jobs.items():
            for each in job.instances:
                life = None if each.id is None else self._lives.get(each.id)
                engine = None if life is None else life.engine
                engines.append(
                    EngineStatus(
                        name,
                        each.replica,
                        "" if life is None else life.name,
                        each.node,
                        each.gpus,
                        each.state,
                        "" if engine is None else engine.url,
                        each.restarts,
                        each.reason,
                    )
                )
        return ClusterStatus(
            self.name,
            self.runtime,
            os.getpid(),
            None if self._follower is None else self._follower.url,
            tuple(sorted(self._lost)),
            tuple(
                JobLine(name, job.job.service, job.job.model, job.state, job.job.replicas, job.reason)
                for name, job in jobs.items()
            ),
            tuple(engines),
        )

    # --- the pump -------------------------------------------------------------------------------------------------

    def _now(self) -> Nanos:
        return Nanos(time.monotonic_ns() - self._origin_ns)

    async def _turn(self) -> None:
        """Step, or wait for a reason to."""
        now = self._now()
        if self._posted or now >= self._manager.wakeup_at:
            events, self._posted = self._posted, []
            actions = self._manager.step(now, events)
            for action in actions:
                self._do(action)
            self._changed()
            return
        self._woken.clear()
        at = self._manager.wakeup_at
        with suppress(TimeoutError):  # not wait_for: that of 3.11 may lose a cancellation
            async with asyncio.timeout(None if at == NEVER else (at - now) / 1e9):
                await self._woken.wait()

    def _do(self, action: JobAction) -> None:
        match action:
            case Start():
                life = _Life(action, f"{action.job[:NAME_MAX]}-{action.instance}")
                self._lives[action.instance] = life
                life.task = self._spawn(self._live(life))
            case Stop():
                self._spawn(self._stop(action.instance))
            case Kill():
                self._spawn(self._kill(action.instance))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- an instance ----------------------------------------------------------------------------------------------

    async def _live(self, life: _Life) -> None:
        instance = life.placed.instance
        try:
            reason = await self._run_engine(life)
        except SageError as error:
            first, *others = str(error).splitlines()
            reason = f"{first} {others[-1]}" if others else first  # the last words of what it printed
        except asyncio.CancelledError:
            reason = "ended while it started"
        except Exception as error:  # a defect of ours is a crash of the instance, and not one that nobody hears of
            _log.exception("%s", life.name)
            reason = f"{type(error).__name__}: {error}"
        try:
            if instance in self._lives:
                await self._look_at_nodes()  # first: what ended with its node is not a crash
        finally:  # a Kill may come meanwhile, and cancel this
            if self._lives.pop(instance, None) is not None:
                self.post(InstanceExited(instance, reason))

    async def _run_engine(self, life: _Life) -> str:
        """From its start to its end; how that was. EngineError where it does not come up."""
        job = self._manager.jobs()[life.placed.job].job
        launch = self._launch_of(job, life.placed)
        engine = life.engine = await self._actuator.start(life.name, launch, life.placed)
        self.post(InstanceHealthy(life.placed.instance))
        if self._follower is not None and job.service != "operator":
            self._follower.add(life.name, engine.url, launch.model, job.service, launch.adapter)
        probe = asyncio.create_task(self._probe(life.placed.instance, engine.url, launch.health))
        try:
            return await engine.wait()
        finally:
            probe.cancel()
            if self._follower is not None:
                self._follower.remove(life.name)

    async def _probe(self, instance: int, url: str, path: str) -> None:
        """Tell the manager when it stops answering, and when it answers again."""
        watching = self._watching
        failures = 0
        while True:
            await asyncio.sleep(watching.probe_s)
            why = ""
            try:
                status, _ = await ask(url, path, timeout_s=watching.probe_timeout_s)
                if status != 200:
                    why = f"{path} answered {status}"
            except EngineError as error:
                why = str(error)
            if not why and failures >= watching.failures_max:
                self.post(InstanceHealthy(instance))
            failures = failures + 1 if why else 0
            if failures == watching.failures_max:
                self.post(InstanceUnhealthy(instance, why))

    async def _stop(self, instance: int) -> None:
        """The gateway first, so that what it has there can finish. The manager's Kill bounds this."""
        life = self._lives.get(instance)
        if life is None or life.task is None:
            return
        if life.engine is None:
            life.task.cancel()
            return
        if self._follower is not None:
            await self._follower.drain(life.name)
        await life.engine.stop()

    async def _kill(self, instance: int) -> None:
        life = self._lives.get(instance)
        if life is None:
            self.post(InstanceExited(instance, "not known here"))
        elif life.engine is None:
            assert life.task is not None
            life.task.cancel()
        else:
            await life.engine.kill()

    async def _kill_all(self) -> None:
        await asyncio.gather(*(self._kill(instance) for instance in tuple(self._lives)), return_exceptions=True)
        lives = [life.task for life in self._lives.values() if life.task is not None]
        if lives:
            await asyncio.wait(lives)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- nodes ----------------------------------------------------------------------------------------------------

    async def _watch_nodes(self) -> None:
        while await self._look_at_nodes():
            await asyncio.sleep(self._watching.nodes_s)

    async def _look_at_nodes(self) -> bool:
        """Tell the manager which nodes have come and gone; whether there is anything to watch."""
        try:
            there = await self._actuator.nodes()
        except Exception as error:  # of whatever runs them: no news, and asked again
            _log.warning("nodes: cannot be asked: %s: %s", type(error).__name__, error)
            return True
        if there is None:
            return False
        for name in sorted(self._nodes.keys() - self._lost - there):
            self._lost.add(name)
            for instance, life in list(self._lives.items()):
                if life.placed.node == name:
                    del self._lives[instance]
                    if life.task is not None and life.task is not asyncio.current_task():
                        life.task.cancel()
                    if self._follower is not None:
                        self._follower.remove(life.name)
            self.post(NodeLeft(name))
        for name in sorted(self._lost & there):
            self._lost.discard(name)
            self.post(NodeJoined(self._nodes[name]))
        return True
