"""Jobs as actors of a real Ray cluster of two raylets on this machine, one of which is killed; sweeps on the same cluster."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from sage_bench.job_launch import emulated_launch_of
from sage_core.cluster import Cluster, Job, Needs, Node
from sage_core.errors import ConfigError, EngineError
from sage_core.jobs import JobOptions
from sage_core.units import SECOND
from sage_live.jobs.controller import Watching
from sage_live.jobs.engine_ports import any_port
from sage_live.jobs.launch import Launch
from sage_live.jobs.ray_connection import check_nodes, connect, nodes_there, resource_of
from sage_live.jobs.ray_controller import GatewayWish, RayCluster
from sage_live.jobs.status import ClusterStatus

sys.path.insert(0, str(Path(__file__).parent))
import gateway_harness as h

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sage-serving[ray]'")
# Clusters on one machine would take each other's ports.
pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("cluster")]

MIB = 1024 * 1024
RAYLET: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80 * MIB}
QUICK_DEATH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""How Ray finds that a raylet is dead; with its defaults it took 17 s."""

NODES = tuple(Node(name, cpus=2, memory_gib=8) for name in ("a", "b"))
LLM = Job("chat", "llm", h.LLM, Needs(cpus=1, memory_gib=1), replicas=2, profile="llama-3.1-8b-h100-tp1")
CLUSTER = Cluster(NODES, (LLM,), runtime="ray", strategy="spread")
OPTIONS = JobOptions(grace_ns=5 * SECOND, backoff_first_ns=SECOND // 10, jitter=0.0)
WATCHING = Watching(probe_s=0.2, nodes_s=0.2)


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head with the resource of node a, and Ray connected to it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster as Raylets

    head = {
        **RAYLET,
        "resources": {resource_of("a"): 1},
        "include_dashboard": False,
        "node_ip_address": "127.0.0.2",  # Ray takes 127.0.0.1 for the machine's outer address
        "_system_config": QUICK_DEATH,
    }
    made: Any = Raylets(initialize_head=True, head_node_args=head)
    connect(made.address)
    try:
        yield made
    finally:
        connect().shutdown()
        made.shutdown()


@pytest.fixture
def second(raylets: Any) -> Iterator[Any]:
    """The raylet of node b, a new one for each test."""
    node = add_raylet_of_b(raylets)
    try:
        yield node
    finally:
        for each in tuple(raylets.worker_nodes):
            raylets.remove_node(each, allow_graceful=False)


def add_raylet_of_b(raylets: Any) -> Any:
    return raylets.add_node(**RAYLET, resources={resource_of("b"): 1}, node_ip_address="127.0.0.3")


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


async def status_when(cluster: RayCluster, condition: Callable[[ClusterStatus], object]) -> ClusterStatus:
    """The first status of which it holds."""
    async with asyncio.timeout(90):
        while not condition(told := await asyncio.to_thread(cluster.status)):
            await asyncio.sleep(0.1)
    return told


def engine_pids(*hosts: str) -> list[int]:
    """Of engines and their guards, by the addresses of the raylets; by default of both."""
    wanted = set(hosts or ("127.0.0.2", "127.0.0.3"))
    found = []
    for each in psutil.process_iter(["cmdline", "status"]):
        words = each.info["cmdline"] or []
        if "serve" in words and wanted & set(words) and each.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(each.pid)
    return found


def test_a_killed_raylet_under_load_loses_nothing_silently(raylets: Any, second: Any) -> None:
    import ray

    async def main() -> None:
        async with h.serving([], healthy=0) as gateway:
            cluster = await asyncio.to_thread(
                lambda: RayCluster.up(
                    ray, "kill", CLUSTER, OPTIONS, WATCHING, emulated_launch_of,
                    follow=f"http://127.0.0.1:{gateway.port}",
                )
            )  # fmt: skip
            try:
                told = await status_when(cluster, lambda told: told.healthy)
                assert sorted(each.node or "" for each in told.engines) == ["a", "b"]
                await gateway.healthy(2)
                lost = next(each.name for each in told.engines if each.node == "b")

                outcomes: Counter[str] = Counter()
                stop = asyncio.Event()

                async def client(stream: bool) -> None:
                    while not stop.is_set():
                        reply = await h.ask(gateway.port, h.CHAT, h.chat(max_tokens=40, min_tokens=40, stream=stream))
                        outcomes["sent"] += 1
                        if reply.status != 200:
                            outcomes["refused"] += 1
                        elif not stream or (reply.whole and reply.events[-1] == "[DONE]"):
                            outcomes["whole"] += 1
                        else:
                            outcomes["broken stream, told"] += not reply.whole or "error" in reply.events[-1]

                clients = [asyncio.create_task(client(n % 2 == 0)) for n in range(8)]
                await until(lambda: outcomes["whole"] > 50)
                watches = gateway.service.watches
                assert all(watch.engine.served for watch in watches.values())  # both nodes get work
                await until(lambda: len(watches[lost].engine.flights) >= 2)
                # The whole machine: its raylet and what ran there, at once and with work in progress.
                for pid in (second.all_processes["raylet"][0].process.pid, *engine_pids("127.0.0.3")):
                    os.kill(pid, signal.SIGKILL)
                await until(lambda: lost not in watches)
                told = await status_when(cluster, lambda told: told.healthy and told.nodes_lost == ("b",))
                assert [each.node for each in told.engines] == ["a", "a"]
                await gateway.healthy(2)
                after = outcomes["whole"]
                await until(lambda: outcomes["whole"] > after + 50)
                stop.set()
                await asyncio.gather(*clients)

                assert outcomes["sent"] == outcomes["whole"] + outcomes["refused"] + outcomes["broken stream, told"]
                assert outcomes["refused"] == 0  # what had not begun was retried
                counts = gateway.service.driver.plane.counts
                assert counts.arrived == outcomes["sent"]
                assert counts.responded == outcomes["whole"]
                assert counts.failed == outcomes["broken stream, told"]
                assert counts.retries + counts.failed > 0
                print(dict(outcomes), f"retried {counts.retries}")

                add_raylet_of_b(raylets)  # the machine is back (Ray wants the main thread)
                await status_when(cluster, lambda told: not told.nodes_lost)
            finally:
                await asyncio.to_thread(cluster.down)
            await until(lambda: not engine_pids())  # that of the dead raylet too

    h.run(main(), 240)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "two.yaml"
    made.write_text(
        "runtime: ray\nstrategy: spread\n"
        "nodes:\n  - {name: a, cpus: 2, memory_gib: 8}\n  - {name: b, cpus: 2, memory_gib: 8}\n"
        "jobs:\n  - {name: chat, service: llm, model: small, profile: llama-3.1-8b-h100-tp1, replicas: 2,\n"
        "     needs: {cpus: 1, memory_gib: 1}}\n"
    )
    return made


def words(raylets: Any, command: str, file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sage_bench", "cluster", command, str(file), "--address", raylets.address, *more]


def test_up_status_and_down_are_commands_of_their_own(raylets: Any, second: Any, file: Path) -> None:
    def sage(command: str, *more: str) -> subprocess.CompletedProcess[str]:
        line = words(raylets, command, file, *more)
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)

    up = sage("up", "--emulate", "--gateway", "--gateway-port", str(any_port()))
    try:
        assert up.returncode == 0, up.stderr
        assert "cluster two: up, 2 engines healthy" in up.stdout
        told = json.loads(sage("status", "--json").stdout)
        assert sorted(each["node"] for each in told["engines"]) == ["a", "b"]
        port = int(told["gateway"].rpartition(":")[2])

        async def served() -> None:
            async with asyncio.timeout(30):
                while len([e for e in (await h.ask(port, "/v1/management/engines")).json["data"] if e["served"]]) < 2:
                    await asyncio.gather(*(h.ask(port, h.CHAT, h.chat()) for _ in range(8)))

        asyncio.run(served())
        again = sage("up", "--emulate")
        assert again.returncode == 2
        assert "is up already" in again.stderr
    finally:
        down = sage("down")
    assert down.returncode == 0, down.stderr
    asyncio.run(until(lambda: not engine_pids()))
    gone = sage("status")
    assert gone.returncode == 10
    assert "is not up on this Ray cluster" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_an_interrupted_up_stops_what_it_started(raylets: Any, second: Any, file: Path) -> None:
    up = subprocess.Popen(
        words(raylets, "up", file, "--emulate"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert up.stdout is not None
    assert "starting" in up.stdout.readline()
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=60)
    assert up.returncode == 130, err
    # The guard of an engine whose actor was killed before it could answer, on a busy machine, takes a moment longer.
    asyncio.run(until(lambda: not engine_pids()))
    assert RayCluster.find(connect(), "two") is None


def test_no_engine_survives_a_kill_of_the_controller(raylets: Any, second: Any) -> None:
    cluster = RayCluster.up(connect(), "orphans", CLUSTER, OPTIONS, WATCHING, emulated_launch_of)

    async def main() -> None:
        told = await status_when(cluster, lambda told: told.healthy)
        assert len(engine_pids()) == 4  # two engines and their guards
        os.kill(told.pid, signal.SIGKILL)
        await until(lambda: not engine_pids())
        with pytest.raises(EngineError, match="the controller on Ray does not answer"):
            cluster.status()
        cluster.down()  # again: nothing
        assert RayCluster.find(connect(), "orphans") is None

    h.run(main(), 120)


def test_of_two_ups_at_one_time_one_is_told(raylets: Any, second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayCluster, "find", lambda ray, name: None)  # both have looked
    first = RayCluster.up(connect(), "twice", CLUSTER, OPTIONS, WATCHING, emulated_launch_of)
    try:
        with pytest.raises(ConfigError, match="cluster twice: is up already"):
            RayCluster.up(connect(), "twice", CLUSTER, OPTIONS, WATCHING, emulated_launch_of)
        assert first.status().name == "twice"
    finally:
        first.down()


def test_a_down_while_the_gateway_starts_ends_the_up(raylets: Any, second: Any) -> None:
    sleeper = Launch(service="gateway", model="", command=("{python}", "-c", "import time; time.sleep(600)"))
    wish = GatewayWish(sleeper, "127.0.0.1", any_port())
    with ThreadPoolExecutor() as pool:
        up = pool.submit(
            RayCluster.up, connect(), "early", CLUSTER, OPTIONS, WATCHING, emulated_launch_of, gateway=wish
        )
        found = None
        while found is None:
            found = RayCluster.find(connect(), "early")
        assert not found.status().healthy
        found.down()
        with pytest.raises(EngineError, match="the controller on Ray ended"):
            up.result(timeout=60)


def test_a_file_that_the_raylets_do_not_bear_out(raylets: Any, second: Any) -> None:
    ray = connect()
    assert nodes_there(ray, ["a", "b", "c"]) == {"a", "b"}
    check_nodes(ray, NODES)
    with pytest.raises(ConfigError, match=r"node c: no raylet.*ray start .*sage_node_c"):
        check_nodes(ray, [Node("c", cpus=1, memory_gib=1)])
    with pytest.raises(ConfigError, match="node b: the cluster file says 64 CPUs, its raylet has 2"):
        check_nodes(ray, [Node("b", cpus=64, memory_gib=1)])


def test_no_ray_cluster_is_one_line(tmp_path: Path) -> None:
    command = "from sage_live.jobs.ray_connection import connect; connect('127.0.0.1:1')"
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert f"{EngineError.__name__}: no Ray cluster at 127.0.0.1:1" in ended.stderr


def test_a_sweep_through_ray_gives_the_results_of_one_process(raylets: Any, tmp_path: Path) -> None:
    from sage_bench.results.reader import load_runs

    def sweep(name: str, *more: str) -> dict[tuple[str, int], str]:
        words = ["policy=fifo,hybrid", "seed=1,2", "load.duration_s=3", f"results={tmp_path}", f"name={name}", *more]
        command = [sys.executable, "-m", "sage_bench", "run", *words, "--multirun"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        return {
            (run.manifest.policy.name, run.manifest.seed): run.manifest.digest for run in load_runs(tmp_path / name)
        }

    on_ray = sweep("ray", "hydra/launcher=ray", f"hydra.launcher.address={raylets.address}")
    assert len(on_ray) == 4
    assert on_ray == sweep("here")
