"""An engine as a Ray actor: the actor runs on the node that our selector chose, and the engine is its child process.

The actor claims the CPUs that the job needs, so that whatever else runs on the Ray cluster, a sweep for instance, sees them
taken. Which GPUs an engine sees is what our selector chose, not Ray. When the actor ends in any way, the guard of the process
takes the engine down; and it ends with its raylet (:func:`end_with_raylet`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sage_core.errors import EngineError
from sage_core.job_events import Start
from sage_live.jobs.engine_ports import any_port
from sage_live.jobs.launch import Launch
from sage_live.jobs.local import JobProcess, start_process
from sage_live.jobs.ray_connection import SLICE, nodes_there, ray_module, resource_of
from sage_live.processes import STOP_GRACE_S

REPLY_S = 10.0
"""What an actor may take to answer, before it counts as gone."""

GIVE_UP_S = 3.0
"""From SIGTERM to SIGKILL for an engine that is given up while it starts: it has nothing to finish. Below REPLY_S."""

LOOK_S = 0.5
"""Between two looks at whether the raylet lives."""


async def end_with_raylet() -> None:
    """Ends this process, an actor's, when the raylet that started it does. Ray lets an actor with a call in progress live on
    without one (seen with 2.60), and what runs there would be known to nobody."""
    raylet = os.getppid()
    while os.getppid() == raylet:
        await asyncio.sleep(LOOK_S)
    os._exit(1)


class EngineActor:
    """Lives on a node. Its methods run in the actor's own event loop."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._given_up = False
        self._starting: asyncio.Task[JobProcess] | None = None
        self._process: JobProcess | None = None
        self._raylet: asyncio.Task[None] | None = None

    async def start(self, name: str, launch: Launch, gpus: tuple[int, ...]) -> tuple[str, str]:
        """Its URL and "", or "" and why it did not come up."""
        self._raylet = asyncio.create_task(end_with_raylet())
        host = ray_module().util.get_node_ip_address()
        if self._given_up:  # calls of an actor that was slow to come up need not keep their order
            return "", f"{name}: was given up before it started"
        try:
            # Any port, not the registry's: raylets of one machine do not know of each other's engines.
            work = start_process(name, launch, gpus, host, any_port(host), None, self._grace_s)
            self._starting = asyncio.create_task(work)
            self._process = await self._starting
        except EngineError as error:
            return "", str(error)
        except asyncio.CancelledError:
            return "", f"{name}: ended while it started"
        return self._process.url, ""

    async def give_up(self) -> None:
        """End what :meth:`start` began, or would begin; returns when nothing of it runs."""
        self._given_up = True
        while self._starting is not None and not self._starting.done():
            self._starting.cancel()  # SIGTERM at first, SIGKILL when it is cancelled again (JobProcess.stop)
            await asyncio.wait([self._starting], timeout=GIVE_UP_S)
        if self._process is not None:
            await self._process.stop()

    async def wait(self) -> str:
        """Until the engine ends; how that was."""
        assert self._process is not None
        return await self._process.ended()

    async def stop(self) -> None:
        """SIGTERM to it."""
        if self._process is not None:
            await self._process.stop()

    async def kill(self) -> None:
        """SIGKILL to it."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()


class RayEngine:
    """One that runs in an actor."""

    def __init__(self, ray: Any, actor: Any, url: str) -> None:
        self.url = url
        self._ray = ray
        self._actor = actor
        self._ended = asyncio.ensure_future(self._end())

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        try:
            await self._actor.stop.remote()
        except self._ray.exceptions.RayActorError:
            return  # wait() says so

    async def kill(self) -> None:
        try:
            await asyncio.wait_for(self._actor.kill.remote(), REPLY_S)
        except (self._ray.exceptions.RayError, TimeoutError):
            self._ray.kill(self._actor)
        await asyncio.wait([self._ended], timeout=REPLY_S)

    async def _end(self) -> str:
        try:
            return str(await self._actor.wait.remote())
        except self._ray.exceptions.RayError as error:
            return f"its Ray actor is gone: {' '.join(str(error).split())[:300]}"
        finally:
            self._ray.kill(self._actor)


class RayActuator:
    """Within a process that is connected to the Ray cluster; ``nodes`` are names of the cluster file. grace_s: of an engine,
    from SIGTERM to SIGKILL, if no Kill comes."""

    def __init__(self, ray: Any, nodes: Sequence[str], grace_s: float = STOP_GRACE_S) -> None:
        self._ray = ray
        self._grace_s = grace_s
        self._nodes = tuple(nodes)
        self._actor = ray.remote(EngineActor)

    async def start(self, name: str, launch: Launch, placed: Start) -> RayEngine:
        actor = self._actor.options(
            num_cpus=placed.needs.cpus,
            resources={resource_of(placed.node): SLICE},
            max_restarts=0,  # starting again, and where, is the manager's to say
        ).remote(self._grace_s)
        try:
            url, why = await actor.start.remote(name, launch, placed.gpus)
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"{name}: its Ray actor: {' '.join(str(error).split())[:300]}") from error
        except asyncio.CancelledError:
            # A killed actor's engine ends a moment after it: whoever waits for this start to end waits for the engine's end.
            gone = asyncio.ensure_future(self._give_up(actor))
            while not gone.done():
                with suppress(asyncio.CancelledError):  # a Kill again changes nothing: REPLY_S bounds it
                    await asyncio.shield(gone)
            raise
        if why:
            self._ray.kill(actor)
            raise EngineError(why)
        return RayEngine(self._ray, actor, url)

    async def _give_up(self, actor: Any) -> None:
        try:
            with suppress(self._ray.exceptions.RayError, TimeoutError):
                await asyncio.wait_for(actor.give_up.remote(), REPLY_S)
        finally:
            self._ray.kill(actor)

    async def nodes(self) -> frozenset[str]:
        return await asyncio.to_thread(nodes_there, self._ray, self._nodes)
