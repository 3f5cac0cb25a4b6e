"""Jobs as processes of this machine: they come up, come back, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from sage_bench.job_launch import (
    check_jobs,
    check_plan,
    emulated_launch_of,
    gateway_launch,
    launch_of,
    not_emulated,
    option_words,
)
from sage_core.cluster import Cluster, Gpu, Job, Needs, Node
from sage_core.errors import ConfigError, EngineError
from sage_core.job_events import Cancelled, RestartAsked, Start
from sage_core.job_lifecycle import ReplicaPhase
from sage_core.jobs import JobManager, JobOptions, JobState
from sage_core.node_selector import NodeSelector
from sage_core.units import SECOND
from sage_live.jobs.ask import ask
from sage_live.jobs.controller import Controller, Watching
from sage_live.jobs.engine_ports import EnginePorts, any_port
from sage_live.jobs.follower import Follower
from sage_live.jobs.gateway_service import GatewayService
from sage_live.jobs.launch import Launch
from sage_live.jobs.local import LocalActuator
from sage_live.jobs.state_file import StateFile
from sage_live.jobs.status import EngineStatus

sys.path.insert(0, str(Path(__file__).parent))
import gateway_harness as h

NODES = tuple(Node(name, cpus=2, memory_gib=64, gpus=(Gpu("H100-80GB", 80.0),)) for name in ("a", "b"))
ON_GPU = Needs(cpus=1, memory_gib=8, gpus=1)
LLM = Job("chat", "llm", "small", ON_GPU, replicas=2, anti_affinity=True, profile="llama-3.1-8b-h100-tp1")

QUICK = JobOptions(
    grace_ns=5 * SECOND,
    backoff_first_ns=SECOND // 20,
    unhealthy_max_ns=SECOND // 5,
    kill_again_ns=SECOND,
    crashes_max=3,
    jitter=0.0,
)
WATCHING = Watching(probe_s=0.1, probe_timeout_s=20.0, failures_max=2)
"""A busy machine answers late: only the test of an engine that hangs is in a hurry."""
HURRIED = Watching(probe_s=0.1, probe_timeout_s=0.3, failures_max=2)

WEB = """
    import http.server, subprocess, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def log_message(self, *args):
            pass
    print("child", subprocess.Popen(["sleep", "600"]).pid, flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def web(job: Job, placed: Start) -> Launch:
    """A server that starts in a moment, with a child of its own."""
    return Launch(service="llm", model=job.model, command=("{python}", "-c", textwrap.dedent(WEB), "{port}"))


def broken(job: Job, placed: Start) -> Launch:
    return Launch(service="llm", model=job.model, command=("{python}", "-c", "raise SystemExit('no such weights')"))


def run(main: Coroutine[Any, Any, None], timeout_s: float = 60.0) -> None:
    asyncio.run(asyncio.wait_for(main, timeout_s))


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def pid_at(port: int) -> int:
    """The process that listens there."""
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(c.laddr.port == port and c.status == "LISTEN" for c in each.net_connections("tcp")):
                return int(each.pid)
    raise AssertionError(f"nobody of ours listens on {port}")


# The other tests of clusters take the same ports.
pytestmark = pytest.mark.xdist_group("cluster")

_before: set[int] = set()


def ports_of_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engines of these tests begin to look for a port."""
    monkeypatch.setenv("SAGE_LLM_PORT", "18001")
    monkeypatch.setenv("SAGE_EMBEDDING_PORT", "18201")


@pytest.fixture(autouse=True)
def _others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tests of this process left running (a pool of workers) is none of ours; and the ports are ours alone:
    an engine that finds its port taken by a test beside this one is started again, and every count is off."""
    ports_of_clusters(monkeypatch)
    _before.clear()
    _before.update(ours())


def ours() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [each.pid for each in children if each.pid not in _before and each.status() != psutil.STATUS_ZOMBIE]


@asynccontextmanager
async def controlled(
    jobs: Sequence[Job],
    launch: Any,
    logs: Path,
    *,
    follower: Follower | None = None,
    gateways: int = 0,
    watching: Watching = WATCHING,
) -> AsyncIterator[Controller]:
    """A controller that runs; at the end everything is down and nothing is left, but gateways that the test started."""
    controller = Controller(
        "test",
        "local",
        JobManager(NodeSelector("spread"), NODES, QUICK),
        NODES,
        LocalActuator(logs),
        launch,
        follower=follower,
        watching=watching,
    )
    controller.submit(jobs)
    running = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        ports = [port_of(each.url) for each in controller.status().engines if each.url]
        controller.down()
        await running
        assert len(ours()) == 2 * gateways  # each with its guard
        assert not any(listening(port) for port in ports)


def engines(controller: Controller) -> list[EngineStatus]:
    return [each for each in controller.status().engines if each.state is ReplicaPhase.HEALTHY]


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


# --- the controller -------------------------------------------------------------------------------------------------------


def test_a_killed_engine_comes_back_with_a_history_and_nothing_is_left_of_any(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled([LLM], web, tmp_path) as controller:
            await until(lambda: controller.status().healthy)
            before = {each.replica: each for each in engines(controller)}
            assert sorted(each.node or "" for each in before.values()) == ["a", "b"]
            assert len({each.url for each in before.values()}) == 2
            os.kill(pid_at(port_of(before[0].url)), signal.SIGKILL)
            await until(lambda: controller.status().healthy and engines(controller)[0].name != before[0].name)
            after = {each.replica: each for each in engines(controller)}
            assert after[0].restarts == 1
            assert after[1] == before[1]
            assert listening(port_of(after[0].url))

    run(main())


def test_one_that_hangs_is_found_and_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled([LLM], web, tmp_path, watching=HURRIED) as controller:
            await until(lambda: controller.status().healthy)
            first = controller.status().engines[0]
            os.kill(pid_at(port_of(first.url)), signal.SIGSTOP)
            await until(lambda: controller.status().engines[0].state is ReplicaPhase.UNHEALTHY)
            assert "no answer within 0.3 s" in controller.status().engines[0].reason
            await until(lambda: controller.status().healthy)
            assert controller.status().engines[0].name != first.name

    run(main())


def test_a_crash_loop_ends_with_its_reason_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled([LLM], broken, tmp_path) as controller:
            await until(lambda: [each.state for each in controller.status().jobs] == [JobState.FAILED])
            assert all(each.restarts == QUICK.crashes_max - 1 for each in controller.status().engines)
            assert len(controller.status().failures) == 2
            assert all("no such weights" in each for each in controller.status().failures)

    run(main())


def test_a_cancelled_job_ends_while_it_starts_and_another_is_not_touched(tmp_path: Path) -> None:
    def launch(job: Job, placed: Start) -> Launch:
        sleeper = Launch(service="llm", model="x", command=("{python}", "-c", "import time; time.sleep(600)"))
        return sleeper if job.name == "slow" else web(job, placed)

    async def main() -> None:
        slow = Job("slow", "llm", "x", Needs(cpus=1, memory_gib=1))
        one = Job("chat", "llm", "small", ON_GPU)
        async with controlled([one, slow], launch, tmp_path) as controller:
            await until(lambda: engines(controller))
            controller.post(Cancelled("slow"))
            await until(lambda: {j.name: j.state for j in controller.status().jobs}["slow"] is JobState.STOPPED)
            assert [each.job for each in engines(controller)] == ["chat"]

    run(main())


def test_a_rolling_restart_never_has_both_replicas_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled([LLM], web, tmp_path) as controller:
            await until(lambda: controller.status().healthy)
            before = {each.name for each in engines(controller)}
            controller.post(RestartAsked("chat"))
            least = 2

            def replaced() -> bool:
                nonlocal least
                now = engines(controller)
                least = min(least, len(now))
                return len(now) == 2 and not before & {each.name for each in now}

            await until(replaced)
            assert least == 1

    run(main())


def test_no_engine_survives_a_kill_of_the_controller(tmp_path: Path) -> None:
    script = f"""
        import asyncio, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_jobs_local as t
        async def main():
            async with t.controlled([t.LLM], t.web, Path({str(tmp_path)!r})) as controller:
                await t.until(lambda: controller.status().healthy)
                print(*(t.port_of(each.url) for each in t.engines(controller)), flush=True)
                await asyncio.sleep(600)
        asyncio.run(main())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        ports = [int(port) for port in parent.stdout.readline().split()]
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
        parent.wait()
    assert len(ports) == 2
    assert len(family) == 6  # of each engine: its guard, itself, its child

    async def main() -> None:
        await until(lambda: not any(each.is_running() and each.status() != "zombie" for each in family))
        assert not any(listening(port) for port in ports)

    run(main())


def test_a_kill_is_at_once_and_takes_all_it_started(tmp_path: Path) -> None:
    async def main() -> None:
        needs = Needs(cpus=1, memory_gib=1)
        engine = await LocalActuator(tmp_path).start(
            "web", web(LLM, Start(0, "chat", "a", (), needs)), Start(0, "chat", "a", (), needs)
        )
        assert len(ours()) == 3  # its guard, itself, its child
        async with asyncio.timeout(5):
            await engine.kill()
            assert "killed by signal 9" in await engine.wait()
        await until(lambda: not ours())

    run(main())


def test_ports_follow_the_registry_and_none_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        taken = held.getsockname()[1]
        monkeypatch.setenv("SAGE_LLM_PORT", str(taken))
        ports = EnginePorts()
        first, second = ports.take("llm"), ports.take("llm")
        assert taken < first < second
        ports.release(first)
        assert ports.take("llm") == first
    monkeypatch.delenv("SAGE_LLM_PORT")
    monkeypatch.delenv("SAGE_EMBEDDING_PORT")
    assert len({ports.take("embedding") for _ in range(3)}) == 3


# --- with a gateway -------------------------------------------------------------------------------------------------------


def test_the_gateway_follows_and_a_drain_loses_no_request(tmp_path: Path) -> None:
    """Emulated engines behind a real gateway: requests in flight when the engines are told to end are answered."""

    async def main() -> None:
        async with h.serving([], healthy=0) as gateway:
            follower = Follower(f"http://127.0.0.1:{gateway.port}")
            async with controlled([LLM], emulated_launch_of, tmp_path, follower=follower) as controller:
                await gateway.healthy(2)
                assert sorted(gateway.service.watches) == sorted(each.name for each in engines(controller))
                os.kill(pid_at(port_of(engines(controller)[0].url)), signal.SIGKILL)
                await until(lambda: not controller.status().healthy)
                await until(lambda: controller.status().healthy)
                await gateway.healthy(2)
                await until(lambda: set(gateway.service.watches) == {each.name for each in engines(controller)})
                body = h.chat(max_tokens=100, min_tokens=100)  # about a second
                asked = [asyncio.create_task(h.ask(gateway.port, h.CHAT, body)) for _ in range(8)]
                await until(lambda: sum(len(w.engine.flights) for w in gateway.service.watches.values()) == 8)
            assert [(await each).status for each in asked] == [200] * 8
            assert not gateway.service.watches

    h.run(main(), 60)


def test_a_killed_gateway_is_back_with_its_engines(tmp_path: Path) -> None:
    async def main() -> None:
        port = any_port()
        gateway = GatewayService(gateway_launch(["policy=fifo"]), "127.0.0.1", port, tmp_path)
        await gateway.start()
        try:
            async with controlled([LLM], web, tmp_path, follower=Follower(gateway.url), gateways=1) as controller:

                async def listed() -> None:
                    wanted: set[str] = set()
                    while len(wanted) < 2 or wanted != {each.name for each in engines(controller)}:
                        with suppress(EngineError):
                            _, body = await ask(gateway.url, "/v1/management/engines")
                            wanted = {each["name"] for each in json.loads(body)["data"]}
                        await asyncio.sleep(0.05)

                await asyncio.wait_for(listed(), 20)
                os.kill(pid_at(port), signal.SIGKILL)
                await until(lambda: not listening(port))
                await asyncio.wait_for(listed(), 20)
        finally:
            await gateway.close()
        assert not ours()

    run(main())


# --- the commands ---------------------------------------------------------------------------------------------------------

CLUSTER = """
nodes:
  - {name: a, cpus: 2, memory_gib: 64, gpus: [{type: H100-80GB, memory_gib: 80}]}
  - {name: b, cpus: 4, memory_gib: 32}
jobs:
  - name: chat
    service: llm
    model: small
    profile: llama-3.1-8b-h100-tp1
    needs: {cpus: 1, memory_gib: 16, gpus: 1}
  - name: embed
    service: embedding
    model: vectors
    profile: bge-m3-h100
    needs: [{cpus: 2, memory_gib: 4}]
"""


def sage(*arguments: str, state: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "XDG_STATE_HOME": str(state)}
    command = [sys.executable, "-m", "sage_bench", "cluster", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def line(process: subprocess.Popen[str], having: str) -> str:
    """The next line with these words."""
    assert process.stdout is not None
    for text in process.stdout:
        if having in text:
            return text
    raise AssertionError(f"no line with {having!r}; {done(process)}")


def test_up_status_and_down_with_a_gateway(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    gateway = ("--gateway", "--gateway-port", str(any_port()))  # others may want the usual one
    up = sage("up", str(file), "--emulate", *gateway, "policy=fifo", state=tmp_path)
    try:
        url = line(up, "gateway: ").split()[-1]
        line(up, "up, 2 engines healthy")
        family = psutil.Process(up.pid).children(recursive=True)
        code, out, _ = done(sage("status", str(file), "--json", state=tmp_path))
        told = json.loads(out)
        assert code == 0
        assert {each["job"]: each["state"] for each in told["engines"]} == {"chat": "healthy", "embed": "healthy"}
        assert {each["job"]: each["node"] for each in told["engines"]} == {"chat": "a", "embed": "b"}

        async def served() -> None:
            async with asyncio.timeout(20):
                while get(f"{url}/management/queue")["live"] or len(get(f"{url}/models")["data"]) < 2:
                    await asyncio.sleep(0.05)
                while (await h.ask(port_of(url.removesuffix("/v1")), h.CHAT, h.chat())).status != 200:
                    await asyncio.sleep(0.05)

        asyncio.run(served())
        assert get(f"{url}/management/policy")["name"] == "fifo"
        code, _, err = done(sage("up", str(file), "--emulate", state=tmp_path))
        assert code == 2
        assert "is up already" in err
        code, _, err = done(sage("down", str(file), state=tmp_path))
        assert code == 0, err
        code, out, err = done(up)
        assert code == 0, err
        assert "cluster cluster: stopped" in out
        assert not any(each.is_running() for each in family)
        code, _, err = done(sage("status", str(file), state=tmp_path))
        assert code == 10
        assert "is not up" in err
        assert "Traceback" not in err
    finally:
        if up.poll() is None:
            up.kill()


def test_an_interrupted_up_stops_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    up = sage("up", str(file), "--emulate", state=tmp_path)
    line(up, "starting")
    family = psutil.Process(up.pid).children(recursive=True)
    up.send_signal(signal.SIGINT)
    code, _, err = done(up)
    assert code == 130, err
    assert not any(each.is_running() for each in family)
    assert not list((tmp_path / "sage-serving/clusters").glob("*.json"))


def test_an_engine_that_cannot_start_takes_the_others_with_it(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER.replace("model: small", "model: small\n    options: {max_num_seqs: many}"))
    up = sage("up", str(file), "--emulate", "--crashes-max", "1", state=tmp_path)
    code, _, err = done(up)
    assert code == 10
    assert "did not come up, and was stopped" in err
    assert "--max-num-seqs: Expected `int`" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changed", "to", "arguments", "said"),
    [
        ("gpus: 1}", "gpus: 2}", (), "chat"),
        ("memory_gib: 4}]", "memory_gib: 400}]", (), "embed"),
        ("    profile: bge-m3-h100\n", "", ("--emulate",), "job embed: profile: expected one"),
        ("service: embedding", "service: operator", (), "job embed: operators run inside"),
        ("", "", ("policy=fifo",), "policy=fifo: is for a gateway; add --gateway"),
        ("", "", ("--runtime", "slurm"), "--runtime"),
        ("", "", ("--name", "a/b"), "--name: expected letters"),
    ],
)
def test_a_mistake_starts_nothing(tmp_path: Path, changed: str, to: str, arguments: tuple[str, ...], said: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER.replace(changed, to) if changed else CLUSTER)
    from sage_bench.cli.app import app_of

    with pytest.raises(ConfigError) as caught:
        app_of("cluster")(["cluster", "up", str(file), *arguments], standalone_mode=False)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not ours()


def test_the_state_file_is_one_controllers(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    with StateFile("one", env) as held:
        assert held.held
        assert StateFile("one", env).read() is None  # held, and nothing written yet
        with pytest.raises(ConfigError, match="is up already"), StateFile("one", env):
            pass
        with StateFile("two", env):
            pass
    assert not held.held


# --- commands of engines --------------------------------------------------------------------------------------------------


def test_what_starts_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    needs = Needs(cpus=1, memory_gib=1)
    on_gpus, on_cpus = Start(0, "x", "a", (0, 3), needs), Start(1, "x", "a", (), needs)
    llm = Job("x", "llm", "m", needs, options={"max_num_seqs": 8, "enforce_eager": True, "prefix_caching": False})
    real = launch_of(llm, on_gpus)
    assert real.words("h", 7)[:3] == [sys.executable, "-m", "sage_bench"]
    assert " ".join(real.words("h", 7)[3:]) == (
        "llm serve m --host h --port 7 -- --max-num-seqs 8 --enforce-eager --no-prefix-caching "
        "--served-model-name m --tensor-parallel-size 2"
    )
    assert real.environment(on_gpus.gpus)["CUDA_VISIBLE_DEVICES"] == "0,3"
    assert real.environment(on_cpus.gpus)["CUDA_VISIBLE_DEVICES"] == ""
    embed = Job("x", "embedding", "m", needs, options={"weights": "/models/m"})
    assert launch_of(embed, on_gpus).command[3:] == (
        "embed", "serve", "/models/m", "--host", "{host}", "--port", "{port}", "--model", "m", "--device", "cuda"
    )  # fmt: skip
    assert launch_of(embed, on_cpus).command[-2:] == ("--device", "cpu")
    assert not_emulated(llm) == ["enforce_eager"]
    llm = msgspec.structs.replace(llm, profile="p")
    assert " ".join(emulated_launch_of(llm, on_cpus).command[-7:]) == (
        "--emulate p --model m --max-num-seqs 8 --no-prefix-caching"
    )
    with pytest.raises(EngineError, match="no profile for what it gets on a"):
        emulated_launch_of(embed, on_cpus)
    assert option_words({"a": {"b": [1, 2]}}) == ("--a", '{"b": [1, 2]}')


def test_a_cluster_without_jobs_or_room_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="jobs: none"):
        check_jobs(Cluster(NODES))
    crowd = Cluster(NODES, (Job("chat", "llm", "m", ON_GPU, replicas=3),))
    with pytest.raises(ConfigError, match=r"job chat: replica 2 has no place.*nothing was started"):
        check_plan(crowd, emulate=False)
