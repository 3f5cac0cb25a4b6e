"""The controller of a cluster as a detached Ray actor, so that ``up``, ``status`` and ``down`` are commands of their own.

It runs on the head node, whose loss ends a Ray cluster anyway. The actors of the engines belong to it: when it ends in any
way, they do, and their engines.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

import msgspec

from sage_core.cluster import Cluster
from sage_core.errors import ConfigError, EngineError
from sage_core.jobs import JobManager, JobOptions
from sage_core.node_selector import NodeSelector
from sage_core.units import SECOND
from sage_live.jobs.controller import Controller, LaunchOf, Watching
from sage_live.jobs.follower import Follower
from sage_live.jobs.gateway_service import GatewayService
from sage_live.jobs.launch import Launch
from sage_live.jobs.ray_connection import NAMESPACE, SLICE, ray_module
from sage_live.jobs.ray_engine import RayActuator, end_with_raylet
from sage_live.jobs.status import ClusterStatus

HEAD: Final = "node:__internal_head__"
"""Ray's own name for the resource that the head node has."""

REPLY_S: Final = 30.0


class GatewayWish(msgspec.Struct, frozen=True):
    """A gateway to start beside the controller."""

    launch: Launch
    host: str
    port: int


class ControllerActor:
    """What it is given is plain data and functions by name: it runs in a process of the Ray cluster."""

    def __init__(
        self, name: str, cluster: Cluster, options: JobOptions, watching: Watching, launch_of: LaunchOf
    ) -> None:
        self._name = name
        self._cluster = cluster
        self._options = options
        self._watching = watching
        self._launch_of = launch_of
        self._gateway: GatewayService | None = None
        self._controller: Controller | None = None
        self._running: asyncio.Task[None] | None = None
        self._raylet: asyncio.Task[None] | None = None

    async def up(self, gateway: GatewayWish | None, follow: str | None) -> str:
        """Start everything; "", or why not. gateway: to start; follow: the URL of one that runs."""
        nodes = self._cluster.nodes
        self._raylet = asyncio.create_task(end_with_raylet())
        try:
            if gateway is not None:
                self._gateway = GatewayService(gateway.launch, gateway.host, gateway.port)
                await self._gateway.start()
                follow = self._gateway.url
        except EngineError as error:
            return str(error)
        self._controller = Controller(
            self._name,
            "ray",
            JobManager(NodeSelector(self._cluster.strategy), nodes, self._options),
            nodes,
            RayActuator(ray_module(), [node.name for node in nodes], self._options.grace_ns / SECOND),
            self._launch_of,
            follower=None if follow is None else Follower(follow),
            watching=self._watching,
        )
        self._controller.submit(self._cluster.jobs)
        self._running = asyncio.create_task(self._controller.run())
        return ""

    async def status(self) -> bytes:
        """A :class:`ClusterStatus`, encoded."""
        if self._controller is None:  # its gateway comes first
            return msgspec.msgpack.encode(ClusterStatus.starting(self._name, "ray"))
        if self._running is not None and self._running.done():
            self._running.result()  # a defect of ours is told, and not shown as a cluster without a pulse
        return msgspec.msgpack.encode(self._controller.status())

    async def down(self) -> None:
        """Returns when nothing runs any more."""
        if self._controller is not None and self._running is not None:
            self._controller.down()
            await asyncio.wait([self._running])
        if self._gateway is not None:
            await self._gateway.close()


class RayCluster:
    """A cluster that is up on Ray, as seen from a command. Within a process that is connected."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor

    @classmethod
    def find(cls, ray: Any, name: str) -> RayCluster | None:
        """None: it is not up."""
        try:
            return cls(ray, ray.get_actor(_actor_name(name), namespace=NAMESPACE))
        except ValueError:
            return None

    @classmethod
    def up(
        cls,
        ray: Any,
        name: str,
        cluster: Cluster,
        options: JobOptions,
        watching: Watching,
        launch_of: LaunchOf,
        *,
        gateway: GatewayWish | None = None,
        follow: str | None = None,
    ) -> RayCluster:
        """Begin to start it. ConfigError where one of that name is up; EngineError where the gateway does not start."""
        taken = ConfigError(f"cluster {name}: is up already; `sage cluster down` it first")
        if cls.find(ray, name) is not None:
            raise taken
        placed = ray.remote(ControllerActor).options(
            name=_actor_name(name),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            resources={HEAD: SLICE},
            max_restarts=0,
        )
        try:
            actor = placed.remote(name, cluster, options, watching, launch_of)
        except ValueError as error:  # Ray's, of a name that is taken: another `up` was a moment sooner
            raise taken from error
        try:
            why = ray.get(actor.up.remote(gateway, follow))
        except ray.exceptions.RayError as error:  # a `down` from elsewhere, for one
            cls(ray, actor).down()
            raise EngineError(f"the controller on Ray ended: {' '.join(str(error).split())[:300]}") from error
        except BaseException:
            cls(ray, actor).down()
            raise
        if why:
            ray.kill(actor)
            raise EngineError(why)
        return cls(ray, actor)

    def status(self) -> ClusterStatus:
        """EngineError where the controller is gone."""
        try:
            told = self._ray.get(self._actor.status.remote(), timeout=REPLY_S)
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"the controller on Ray does not answer: {' '.join(str(error).split())[:300]}") from error
        return msgspec.msgpack.decode(told, type=ClusterStatus)

    def down(self) -> None:
        """Returns when nothing runs any more."""
        try:
            with suppress(self._ray.exceptions.RayActorError):
                self._ray.get(self._actor.down.remote())
        finally:
            self._ray.kill(self._actor)


def _actor_name(cluster: str) -> str:
    return f"sage-cluster-{cluster}"
