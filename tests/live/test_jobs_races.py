"""Jobs when two things happen at one time: nothing is lost, answered twice, or left running."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from sage_bench.cli.cluster_services import _show, _up_here
from sage_bench.job_launch import check_plan
from sage_core.cluster import Cluster, Job, Needs
from sage_core.errors import ConfigError
from sage_core.job_events import Cancelled, Start
from sage_core.job_lifecycle import ReplicaPhase
from sage_core.jobs import JobManager, JobOptions, JobState
from sage_core.node_selector import NodeSelector
from sage_core.units import SECOND
from sage_live.jobs.controller import Controller, LaunchOf
from sage_live.jobs.follower import Follower
from sage_live.jobs.launch import Launch
from sage_live.jobs.local import LocalActuator
from sage_live.jobs.ray_controller import ControllerActor, GatewayWish
from sage_live.jobs.ray_engine import REPLY_S, EngineActor
from sage_live.jobs.state_file import StateFile
from sage_live.jobs.status import ClusterStatus, EngineStatus

sys.path.insert(0, str(Path(__file__).parent))
import test_jobs_local as t

pytestmark = pytest.mark.xdist_group("cluster")

ONE = Job("chat", "llm", "small", Needs(cpus=1, memory_gib=1))
EMPTY = ClusterStatus("one", "local", os.getpid(), None, (), (), ())

STUBBORN = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(600)
"""
SLOW_TO_END = t.WEB.replace("http.server.HTTPServer((", "server = http.server.HTTPServer((").replace(
    ".serve_forever()",
    """
    def end(*_):
        import os, time
        time.sleep(float(sys.argv[2]))
        print("finished", flush=True)
        os._exit(0)
    import signal
    signal.signal(signal.SIGTERM, end)
    server.serve_forever()
""",
)


def stubborn(job: Job, placed: Start) -> Launch:
    """Never healthy, and deaf to SIGTERM."""
    return Launch(service="llm", model=job.model, command=("{python}", "-c", textwrap.dedent(STUBBORN)))


@pytest.fixture(autouse=True)
def _others(monkeypatch: pytest.MonkeyPatch) -> None:
    t.ports_of_clusters(monkeypatch)
    t._before.clear()
    t._before.update(t.ours())


class Nodes(LocalActuator):
    """One that can lose nodes, as Ray does: asking takes a while, and may fail."""

    def __init__(self, logs: Path) -> None:
        super().__init__(logs)
        self.slow = False
        self.broken = False
        self.asked = 0
        self.asking: set[asyncio.Task[None] | None] = set()

    async def nodes(self) -> frozenset[str]:  # type: ignore[override]
        self.asked += 1
        if self.broken:
            raise ConnectionError("the head node is busy")
        self.asking.add(asyncio.current_task())
        await asyncio.sleep(0.5 if self.slow else 0)
        self.asking.discard(asyncio.current_task())
        return frozenset("ab")


@asynccontextmanager
async def controlled(
    actuator: LocalActuator, launch: LaunchOf, jobs: tuple[Job, ...] = (ONE,), options: JobOptions = t.QUICK
) -> AsyncIterator[Controller]:
    manager = JobManager(NodeSelector("spread"), t.NODES, options)
    controller = Controller("test", "local", manager, t.NODES, actuator, launch, watching=t.WATCHING)
    controller.submit(jobs)
    running = asyncio.create_task(controller.run())
    try:
        yield controller
        controller.down()
        await asyncio.wait_for(running, 20)
    finally:
        running.cancel()
        await asyncio.wait({running})


def state(controller: Controller) -> JobState | None:
    return next((each.state for each in controller.status().jobs), None)


# --- the controller -------------------------------------------------------------------------------------------------------


def test_the_end_of_an_engine_is_told_though_it_is_killed_while_nodes_are_looked_at(tmp_path: Path) -> None:
    async def main() -> None:
        actuator = Nodes(tmp_path)
        actuator.slow = True
        async with controlled(actuator, t.broken) as controller:
            await t.until(lambda: any(life.task in actuator.asking for life in controller._lives.values()))
            controller.post(Cancelled("chat"))
            await t.until(lambda: state(controller) is JobState.STOPPED, 10)

    t.run(main())


def test_an_engine_that_ends_is_told_though_the_nodes_cannot_be_asked(tmp_path: Path) -> None:
    async def main() -> None:
        actuator = Nodes(tmp_path)
        async with controlled(actuator, t.web) as controller:
            await t.until(lambda: controller.status().healthy)
            actuator.broken = True
            first = controller.status().engines[0]
            os.kill(t.pid_at(t.port_of(first.url)), signal.SIGKILL)
            await t.until(lambda: controller.status().healthy and controller.status().engines[0].restarts == 1, 10)
            seen = actuator.asked
            await t.until(lambda: actuator.asked > seen, 5)  # the watch goes on

    t.run(main())


def test_what_is_killed_twice_while_it_starts_is_gone_when_that_is_said(tmp_path: Path) -> None:
    """The second kill must not leave the first one's work undone: its GPU would be given to the next engine."""
    hurried = JobOptions(grace_ns=SECOND // 5, kill_again_ns=SECOND // 5, jitter=0.0)

    async def main() -> None:
        async with controlled(LocalActuator(tmp_path), stubborn, options=hurried) as controller:
            await t.until(lambda: any("deaf" in log.read_text() for log in tmp_path.glob("*.log")))
            controller.post(Cancelled("chat"))
            await t.until(lambda: state(controller) is JobState.STOPPED, 9)
            assert not t.ours()

    t.run(main())


def test_down_can_be_asked_for_twice(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled(LocalActuator(tmp_path), t.web) as controller:
            await t.until(lambda: controller.status().healthy)
            controller.post(Cancelled("chat"))
            controller.down()
            controller.down()

    t.run(main())


def test_a_port_that_cannot_be_had_is_a_reason_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAGE_LLM_PORT", "many")

    async def main() -> None:
        async with controlled(LocalActuator(tmp_path), t.web) as controller:
            await t.until(lambda: state(controller) is JobState.FAILED)
            assert "SAGE_LLM_PORT" in controller.status().failures[0]
            assert "ConfigError" not in controller.status().failures[0]

    t.run(main())
    assert not caplog.records


@pytest.mark.parametrize(("grace_s", "finishes"), [(0.2, False), (60, True)])
def test_the_grace_is_what_the_actuator_was_given(tmp_path: Path, grace_s: float, finishes: bool) -> None:
    """And not that of a process that nobody gave any: `--grace-s` promises it."""
    patient = JobOptions(grace_ns=60 * SECOND)

    def slow(job: Job, placed: Start) -> Launch:
        return Launch(service="llm", model="m", command=("{python}", "-c", textwrap.dedent(SLOW_TO_END), "{port}", "2"))

    async def main() -> None:
        async with controlled(LocalActuator(tmp_path, grace_s=grace_s), slow, options=patient) as controller:
            await t.until(lambda: controller.status().healthy)
        assert any("finished" in log.read_text() for log in tmp_path.glob("chat-*.log")) is finishes

    t.run(main())


def test_an_actor_that_gives_up_leaves_nothing_however_deaf_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sage-serving[ray]'")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    async def main() -> None:
        actor = EngineActor(grace_s=60)
        starting = asyncio.create_task(actor.start("deaf", stubborn(ONE, Start(0, "chat", "a", (), Needs(1, 1))), ()))
        await t.until(lambda: any("deaf" in log.read_text() for log in tmp_path.rglob("*.log")))
        async with asyncio.timeout(REPLY_S):
            await actor.give_up()
        assert not t.ours()
        assert (await starting)[1] == "deaf: ended while it started"
        assert actor._raylet is not None
        actor._raylet.cancel()

    t.run(main())


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = stubborn(ONE, Start(0, "chat", "a", (), Needs(1, 1)))
    for visible, gpus, seen in (("4,6", (1,), "6"), ("4,6", (), ""), ("", (0, 1), "0,1"), ("GPU-x", (0,), "GPU-x")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.environment(gpus)["CUDA_VISIBLE_DEVICES"] == seen


# --- the gateway's list ---------------------------------------------------------------------------------------------------


class Listing:
    """A gateway's list of engines over HTTP; ``hold`` delays the answer to who adds an engine."""

    def __init__(self) -> None:
        self.engines: dict[str, str] = {}
        self.refused: set[str] = set()
        self.hold: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []
        self.garbage = False

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = next((int(x.split(":")[1]) for x in head.splitlines() if x.startswith("content-length")), 0)
                body = await reader.readexactly(length)
                method, path, _ = head.split(" ", 2)
                status, told = await self._do(method, path.rpartition("/")[2].partition("?")[0], body)
                data = json.dumps(told).encode()
                writer.write(b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n%b" % (status, len(data), data))
        writer.close()

    async def _do(self, method: str, name: str, body: bytes) -> tuple[int, object]:
        if method == "get":
            listed = [{"name": name, "url": url} for name, url in self.engines.items()]
            return 200, {"data": [{}]} if self.garbage else {"data": listed}
        if method == "delete":
            return (204, None) if self.engines.pop(name, None) else (404, None)
        wanted = json.loads(body)
        self.asked.append(wanted["name"])
        if wanted["name"] in self.hold:
            await self.hold[wanted["name"]].wait()
        if wanted["name"] in self.refused:
            return 400, {"error": "no"}
        self.engines[wanted["name"]] = wanted["url"]
        return 201, wanted


@asynccontextmanager
async def followed() -> AsyncIterator[tuple[Follower, Listing, asyncio.Task[None]]]:
    listing = Listing()
    server = await asyncio.start_server(listing.answer, "127.0.0.1", 0)
    follower = Follower(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    running = asyncio.create_task(follower.run())
    try:
        yield follower, listing, running
    finally:
        running.cancel()
        await asyncio.wait({running})
        server.close()


@pytest.mark.parametrize("leaving", ["a", "b"])
def test_an_engine_drained_while_the_list_is_compared_is_not_put_back(leaving: str) -> None:
    async def main() -> None:
        async with followed() as (follower, listing, _):
            listing.hold["a"] = asyncio.Event()
            for name in "ab":
                follower.add(name, f"http://{name}:1", "m", "llm", "vllm")
            await t.until(lambda: listing.asked == ["a"])
            draining = asyncio.create_task(follower.drain(leaving))
            await asyncio.sleep(0.1)  # a drain that does not wait for the list asks now
            listing.hold["a"].set()
            await draining
            assert leaving not in listing.engines
            await t.until(lambda: listing.engines)
            assert list(listing.engines) == [{"a": "b", "b": "a"}[leaving]]

    t.run(main())


def test_one_engine_that_the_gateway_refuses_does_not_keep_out_the_others() -> None:
    async def main() -> None:
        async with followed() as (follower, listing, _):
            listing.refused.add("a")
            for name in "ab":
                follower.add(name, f"http://{name}:1", "m", "llm", "vllm")
            await t.until(lambda: list(listing.engines) == ["b"], 5)

    t.run(main())


def test_a_list_that_is_none_does_not_end_the_following() -> None:
    async def main() -> None:
        async with followed() as (follower, listing, running):
            listing.garbage = True
            follower.add("a", "http://a:1", "m", "llm", "vllm")
            await asyncio.sleep(0.5)
            assert not running.done()
            listing.garbage = False
            await t.until(lambda: list(listing.engines) == ["a"], 5)

    t.run(main())


# --- what other commands are told -----------------------------------------------------------------------------------------


def test_what_a_killed_controller_wrote_is_not_told_of_the_next(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    with StateFile("one", env) as held:
        held.write(EMPTY)
        told = held.path.read_bytes()
    held.path.write_bytes(told)  # as kill -9 leaves it
    with StateFile("one", env) as held:
        assert held.read() is None


def test_who_asks_whether_a_cluster_is_up_does_not_keep_it_from_coming_up(tmp_path: Path) -> None:
    import fcntl

    env = {"HOME": str(tmp_path)}
    with StateFile("one", env) as held:
        lock = held.path.with_suffix(".lock")
    with lock.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        with StateFile("one", env):
            pass
        time.sleep(0.1)


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    with StateFile("one", {"HOME": str(tmp_path)}) as held:
        shutil.rmtree(held.path.parent)
        held.write(EMPTY)
        held.write(EMPTY)


def test_a_reason_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "exit code 1: [rank0] unexpected [/INST]"
    engine = EngineStatus("chat", 0, "", "a", (), ReplicaPhase.BACKOFF, "", 1, reason)
    _show(ClusterStatus("one", "local", 1, None, (), (), (engine,)))
    assert reason in " ".join(capsys.readouterr().out.split())


def test_a_cluster_whose_gateway_starts_is_up_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    wish = GatewayWish(stubborn(ONE, Start(0, "chat", "a", (), Needs(1, 1))), "127.0.0.1", t.any_port())

    async def main() -> None:
        up = asyncio.create_task(_up_here("one", Cluster(t.NODES, (ONE,)), t.QUICK, t.web, wish))
        try:
            await t.until(lambda: StateFile("one", os.environ).held)
            await t.until(lambda: StateFile("one", os.environ).read(), 5)
        finally:
            up.cancel()
            await asyncio.wait({up})

    t.run(main())
    assert not t.ours()


def test_a_controller_on_ray_that_starts_its_gateway_has_a_status() -> None:
    async def main() -> None:
        actor = ControllerActor("one", Cluster(t.NODES, (ONE,)), t.QUICK, t.WATCHING, t.web)
        told = await actor.status()
        assert b"one" in told

    asyncio.run(main())


# --- mistakes that are seen before anything starts ------------------------------------------------------------------------


def test_a_profile_that_is_not_there_starts_nothing() -> None:
    job = Job("chat", "llm", "m", Needs(1, 1), profile="mine/gone.yaml")
    check_plan(Cluster(t.NODES, (job,)), emulate=False)
    with pytest.raises(ConfigError, match=r"job chat: profile: .*gone\.yaml"):
        check_plan(Cluster(t.NODES, (job,)), emulate=True)
