"""``sage cluster up|down|status``: the jobs of a cluster file as running engines."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sage_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from sage_core.cluster import Cluster
    from sage_core.jobs import JobOptions
    from sage_live.jobs.controller import LaunchOf
    from sage_live.jobs.ray_controller import GatewayWish, RayCluster
    from sage_live.jobs.status import ClusterStatus

# What runs jobs is imported by the command that does: a plan needs none of it, and Ray is large.

POLL_S: Final = 0.2
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

File = Annotated[Path, typer.Argument(help="A cluster file (docs/cluster.md).")]
Name = Annotated[str | None, typer.Option(help="What this cluster is called; by default as the file.")]
RuntimeOption = Annotated[
    str | None,
    typer.Option("--runtime", help="local: processes here; ray: actors on a Ray cluster. Default: the file's."),
]
Address = Annotated[str | None, typer.Option(help="Of the Ray cluster, HEAD:PORT; default: RAY_ADDRESS, or here.")]


def add(app: typer.Typer) -> None:
    """The three commands, into the app of ``sage cluster``."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(up)
    app.command()(down)
    app.command()(status)


def up(
    context: typer.Context,
    file: File,
    runtime: RuntimeOption = None,
    strategy: Annotated[str | None, typer.Option(help="How nodes are chosen; default: the file's.")] = None,
    emulate: Annotated[bool, typer.Option("--emulate", help="Emulate every engine from its job's profile.")] = False,
    gateway: Annotated[
        bool, typer.Option("--gateway", help="Start a gateway too, and keep its engines in step.")
    ] = False,
    gateway_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: SAGE_GATEWAY_PORT, 8888.")
    ] = None,
    name: Name = None,
    address: Address = None,
    grace_s: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="For an engine to finish when it is to end.")
    ] = 30.0,
    crashes_max: Annotated[int, typer.Option(min=1, max=1000, help="In an hour; then a replica is given up.")] = 5,
) -> None:
    """Start every job: in the foreground until Ctrl-C or `down`; on Ray, until all are healthy, and they stay.

    With --gateway further arguments choose its policy and objectives: policy=hybrid slo=interactive ...
    """
    from sage_bench.job_launch import (
        check_jobs,
        check_plan,
        emulated_launch_of,
        gateway_launch,
        launch_of,
        not_emulated,
    )
    from sage_core.jobs import JobOptions
    from sage_core.units import seconds
    from sage_live.jobs.ray_controller import GatewayWish
    from sage_live.ports import choose_port

    if context.args and not gateway:
        raise ConfigError(f"{context.args[0]}: is for a gateway; add --gateway")
    cluster = _cluster(file, runtime, strategy)
    check_jobs(cluster)
    check_plan(cluster, emulate=emulate)
    for job in cluster.jobs if emulate else ():
        if ignored := not_emulated(job):
            print(f"note: job {job.name}: an emulated engine has no {', '.join(ignored)}", file=sys.stderr)
    wish = None
    if gateway:
        port = choose_port("gateway") if gateway_port is None else gateway_port
        wish = GatewayWish(gateway_launch(context.args), "127.0.0.1", port)
    options = JobOptions(grace_ns=seconds(grace_s), crashes_max=crashes_max)
    start = emulated_launch_of if emulate else launch_of
    if cluster.runtime == "ray":
        _up_on_ray(_name(file, cluster, name), cluster, options, start, wish, address)
    else:
        asyncio.run(_up_here(_name(file, cluster, name), cluster, options, start, wish))


def down(file: File, runtime: RuntimeOption = None, name: Name = None, address: Address = None) -> None:
    """Stop what `up` started: engines finish what they have, within their grace."""
    cluster = _cluster(file, runtime, None)
    called = _name(file, cluster, name)
    if cluster.runtime == "ray":
        _on_ray(called, address).down()
    else:
        _down_here(called)
    print(f"cluster {called}: down", flush=True)


def status(
    file: File,
    runtime: RuntimeOption = None,
    name: Name = None,
    address: Address = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Every replica: its node, state, address, restarts, and why it is not healthy."""
    cluster = _cluster(file, runtime, None)
    called = _name(file, cluster, name)
    told: ClusterStatus | None
    if cluster.runtime == "ray":
        told = _on_ray(called, address).status()
    else:
        from sage_live.jobs.state_file import StateFile

        told = StateFile(called, os.environ).read()
    if told is None:
        raise EngineError(f"cluster {called}: is not up; `sage cluster up {file}`")
    if json:
        print(msgspec.json.encode(told).decode(), flush=True)
    else:
        _show(told)


def _cluster(file: Path, runtime: str | None, strategy: str | None) -> Cluster:
    from sage_bench.cluster.load import read_cluster

    cluster = read_cluster(file)
    given = {key: value for key, value in (("runtime", runtime), ("strategy", strategy)) if value is not None}
    try:
        return msgspec.convert(msgspec.to_builtins(cluster) | given, type(cluster))
    except msgspec.ValidationError as error:
        what, _, key = str(error).partition(" - at `$.")
        raise ConfigError(f"--{key.rstrip('`')}: {what}") from error


def _name(file: Path, cluster: Cluster, name: str | None) -> str:
    called = name or cluster.name or file.stem
    if not NAME.fullmatch(called):
        raise ConfigError(f"--name: expected letters, digits, dots, - and _, got {called!r}")
    return called


# --- on this machine ------------------------------------------------------------------------------------------------------


async def _up_here(
    name: str, cluster: Cluster, options: JobOptions, launch_of: LaunchOf, wish: GatewayWish | None
) -> None:
    from sage_core.jobs import JobManager
    from sage_core.node_selector import NodeSelector
    from sage_core.units import SECOND
    from sage_live.jobs.controller import Controller
    from sage_live.jobs.follower import Follower
    from sage_live.jobs.gateway_service import GatewayService
    from sage_live.jobs.local import LocalActuator
    from sage_live.jobs.state_file import StateFile
    from sage_live.jobs.status import ClusterStatus

    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    teller = _Teller()

    def changed() -> None:
        told = controller.status()
        state.write(told)
        if teller.tell(told):
            stop.set()

    with StateFile(name, os.environ) as state:
        state.write(ClusterStatus.starting(name, "local"))  # `down` can end it from now on
        async with AsyncExitStack() as stack:
            follower = None
            if wish is not None:
                service = GatewayService(wish.launch, wish.host, wish.port)
                await _unless(stop, service.start())
                stack.push_async_callback(service.close)
                follower = Follower(service.url)
                print(f"gateway: {service.url}/v1", flush=True)
            controller = Controller(
                name,
                "local",
                JobManager(NodeSelector(cluster.strategy), cluster.nodes, options),
                cluster.nodes,
                LocalActuator(grace_s=options.grace_ns / SECOND),
                launch_of,
                follower=follower,
                changed=changed,
            )
            controller.submit(cluster.jobs)
            running = asyncio.create_task(controller.run())
            told_to = asyncio.create_task(stop.wait())
            await asyncio.wait({running, told_to}, return_when=asyncio.FIRST_COMPLETED)
            controller.down()
            hurrying = asyncio.create_task(hurry.wait())
            await asyncio.wait({running, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            running.cancel()  # which kills what is left
            await asyncio.wait({running})
            hurrying.cancel()
            told_to.cancel()
            if not running.cancelled() and (broken := running.exception()) is not None:
                raise broken
    teller.end(name)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do it, or leave as Ctrl-C does."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        await asyncio.wait({working})
        raise KeyboardInterrupt
    stopping.cancel()
    await working


def _down_here(name: str) -> None:
    from sage_live.jobs.state_file import StateFile

    state = StateFile(name, os.environ)
    told = state.read()
    while told is None and state.held:  # it is about to write it
        time.sleep(POLL_S)
        told = state.read()
    if told is None:
        raise EngineError(f"cluster {name}: is not up")
    os.kill(told.pid, signal.SIGTERM)
    while state.held:  # its grace bounds this
        time.sleep(POLL_S)


# --- on Ray ---------------------------------------------------------------------------------------------------------------


def _up_on_ray(
    name: str, cluster: Cluster, options: JobOptions, launch_of: LaunchOf, wish: GatewayWish | None, address: str | None
) -> None:
    from sage_live.jobs.controller import Watching
    from sage_live.jobs.ray_connection import check_nodes, connect
    from sage_live.jobs.ray_controller import RayCluster

    ray = connect(address)
    check_nodes(ray, cluster.nodes)
    # A KeyboardInterrupt within Ray may be lost, or come between two lines here: Ctrl-C is noted, and seen below.
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: signal.default_int_handler(*_) if interrupted.is_set() else interrupted.set())
    started = RayCluster.up(ray, name, cluster, options, Watching(), launch_of, gateway=wish)
    teller = _Teller()
    while True:
        told = started.status()
        if interrupted.is_set():
            started.down()
            raise KeyboardInterrupt
        if teller.tell(told):
            started.down()
            teller.end(name)
        if told.healthy:
            break
        time.sleep(POLL_S)
    if told.gateway is not None:
        print(f"gateway: {told.gateway}/v1", flush=True)


def _on_ray(name: str, address: str | None) -> RayCluster:
    from sage_live.jobs.ray_connection import connect
    from sage_live.jobs.ray_controller import RayCluster

    found = RayCluster.find(connect(address), name)
    if found is None:
        raise EngineError(f"cluster {name}: is not up on this Ray cluster")
    return found


# --- what is shown --------------------------------------------------------------------------------------------------------


class _Teller:
    """Says on standard output what has changed."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, int], str] = {}
        self._failures: list[str] = []
        self.was_healthy = False

    def tell(self, told: ClusterStatus) -> bool:
        """Whether it cannot come up: a replica is given up before everything was healthy for the first time."""
        for each in told.engines:
            where = f" on {each.node}" if each.node else ""
            at = f" at {each.url}" if each.url else ""
            why = f": {each.reason}" if each.reason else ""
            line = f"{each.job}[{each.replica}]{where}: {each.state.value}{at}{why}"
            if self._said.get((each.job, each.replica)) != line:
                self._said[each.job, each.replica] = line
                print(line, flush=True)
        if told.healthy and not self.was_healthy:
            self.was_healthy = True
            print(f"cluster {told.name}: up, {len(told.engines)} engines healthy", flush=True)
        if not self.was_healthy and not self._failures:
            self._failures = told.failures
        return bool(self._failures)

    def end(self, name: str) -> None:
        """Everything has been stopped. EngineError where it never came up; as Ctrl-C does where it was not let."""
        if self._failures:
            raise EngineError(f"cluster {name}: did not come up, and was stopped: {'; '.join(self._failures)}")
        if not self.was_healthy:
            raise KeyboardInterrupt
        print(f"cluster {name}: stopped", flush=True)


def _show(told: ClusterStatus) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table("job", "replica", "node", "GPUs", "state", "address", "restarts", "why")
    for each in told.engines:
        table.add_row(
            each.job,
            str(each.replica),
            each.node or "",
            ", ".join(map(str, each.gpus)),
            each.state.value,
            each.url,
            str(each.restarts),
            escape(each.reason),
        )
    console.print(table)
    lost = f"; nodes lost: {', '.join(told.nodes_lost)}" if told.nodes_lost else ""
    serving = f"; gateway {told.gateway}/v1" if told.gateway else ""
    console.print(f"cluster {told.name} ({told.runtime}, controller {told.pid}){serving}{lost}", markup=False)
