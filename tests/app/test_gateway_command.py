"""``sage gateway start`` as a user meets it: mistakes in one line, and what its record says."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sage_bench.config import composed
from sage_bench.run import run
from sage_bench.serving import EngineConfig, parse_engine, read_engines, with_names
from sage_bench.validate.twin import asked, twin
from sage_bench.whatif import what_if
from sage_core.errors import ConfigError, DataError, PolicyError
from sage_live.http_engine import EngineSpec

PROFILE = "llama-3.1-8b-h100-tp1"
CLUSTER = f"cluster.devices=[{{node: h100, llm: {{profile: {PROFILE}, pool: llama}}}}]"
Started = Callable[..., subprocess.Popen[str]]

BREAKING = """
import numpy as np
from sage_core.policy import Policy
from sage_policies.limit import EngineLimit
from sage_policies.predict import MaxPrediction
from sage_policies.route import LeastInFlight


class Breaks:
    static = True

    def score(self, now, queued):
        return queued.arrived_at * np.nan


def make() -> Policy:
    return Policy("breaks", None, Breaks(), LeastInFlight(), EngineLimit(), MaxPrediction())
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(url: str, body: object = None, method: str | None = None) -> Any:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), method=method)
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read() or b"null")


def until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 40
    while True:
        try:
            if true():
                return
        except (OSError, urllib.error.URLError):
            pass
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("policy=nope",), "Could not find 'policy/nope'"),
        (("policy.nokey=3",), "nokey"),
        (("attempts_max=0",), "attempts_max"),
        (("cluster=small",), "cluster=small: not for a gateway"),
        (("--port", "65536"), "--port: expected 0 to 65,535, got 65536"),
        (("--port", "-1"), "--port: expected 0 to 65,535, got -1"),
        (("--body-max", "0"), "--body-max: expected 1 to"),
        (("--grace-s", "nan"), "--grace-s: expected 0 to"),
        (("--live-max", "0"), "--live-max: expected 1 to"),
        (("--otlp", "collector"), "--otlp: expected a URL"),
        (("--engine", "127.0.0.1:8001"), "expected http://HOST:PORT"),
        (("--engine", "http://127.0.0.1:1,model=m,tasks_max=99999999"), "tasks_max"),
        (("--engine", "http://127.0.0.1:1,model=m,fixed_ns=nan"), "fixed_ns"),
        (("--engine", "http://127.0.0.1:1,model=m,colour=red"), "colour"),
    ],
)
def test_a_mistake_is_one_line(sage: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    done = sage("gateway", "start", "--record", "kept", *arguments)
    assert done.code == 2, done.err
    assert message in done.err and done.err.count("\n") == 1


def test_a_start_that_fails_leaves_no_record(sage: Callable[..., Any], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = sage("gateway", "start", "--port", taken.getsockname()[1], "--record", tmp_path / "kept")
    assert done.code not in (0, 1), done.err
    assert not (tmp_path / "kept").exists()


def test_composing_tells_of_a_mistake_in_one_line() -> None:
    for override in ("policy=nope", "polcy=fifo", "policy", "cluster.deviced=1"):
        with pytest.raises(ConfigError) as raised:
            composed([override])
        assert "\n" not in str(raised.value)


def test_a_file_of_engines_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text("- {url: http://127.0.0.1:1, model: m}\n- {url: 127.0.0.1:2, model: m}\n")
    with pytest.raises(DataError, match=r"127\.0\.0\.1:2.*\$\[1\]"):
        read_engines(path)
    assert parse_engine("http://127.0.0.1:1/base,tasks_max=65536").tasks_max == 65536
    with pytest.raises(ConfigError, match="url"):
        EngineConfig(url="ftp://x")


def test_engines_of_one_address_get_names_of_their_own() -> None:
    url = "http://127.0.0.1:8001"
    specs = with_names([EngineSpec(url, "llama"), EngineSpec(url, "org/bge"), EngineSpec("http://h:1", "x", name="y")])
    assert [spec.called for spec in specs] == ["127.0.0.1:8001", "127.0.0.1:8001-bge", "y"]
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1:8001-llama' is another engine's"):
        with_names([EngineSpec(url, "llama")] * 3)
    with pytest.raises(ConfigError, match="two engines cannot have one name"):
        with_names([EngineSpec(url, "a", name="n"), EngineSpec(url, "b", name="n")])


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a gateway whose policy was changed and that was given an engine while it ran."""
    folder = tmp_path_factory.mktemp("gateway")
    entry = "import sys; sys.argv[0] = 'sage'; from sage_bench.cli import main; main()"
    ports = [free_port(), free_port()]
    running = []

    def start(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", entry, *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        return process

    try:
        engine = start("llm", "serve", "--emulate", PROFILE, "--model", "llama", "--port", str(ports[0]))
        until(lambda: ask(f"http://127.0.0.1:{ports[0]}/v1/models"), engine)
        gateway = start(
            *("gateway", "start", "--engine", f"http://127.0.0.1:{ports[0]},name=first", "--port", str(ports[1])),
            *("--record", "kept", "policy=hybrid", "policy.reserve=0.25"),
        )
        url = f"http://127.0.0.1:{ports[1]}"
        until(lambda: ask(f"{url}/health") is None or True, gateway)
        chat = {"model": "llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        for _ in range(3):
            ask(f"{url}/v1/chat/completions", chat)
        ask(f"{url}/v1/management/policy", {"name": "fifo"}, "PUT")
        second = f"http://127.0.0.1:{ports[0]}"
        ask(f"{url}/v1/management/engines", {"url": second, "model": "llama", "name": "second"}, "POST")
        until(lambda: ask(f"{url}/v1/management/engines/second")["state"] == "healthy", gateway)
        for _ in range(3):
            ask(f"{url}/v1/chat/completions", chat)
        gateway.send_signal(signal.SIGINT)
        out, err = gateway.communicate(timeout=60)
        assert gateway.returncode == 0, err
        assert "served 6 requests" in out
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return folder / "kept"


def test_a_policy_that_breaks_ends_it(tmp_path: Path, sage_started: Started) -> None:
    (tmp_path / "mine.py").write_text(BREAKING)
    port, there = free_port(), free_port()
    engine = sage_started("llm", "serve", "--emulate", PROFILE, "--model", "llama", "--port", str(there))
    until(lambda: ask(f"http://127.0.0.1:{there}/v1/models"), engine)
    given = ("--engine", f"http://127.0.0.1:{there}", "--record", "kept", "policy=user", "policy._target_=mine.make")
    gateway = sage_started("gateway", "start", "--port", str(port), *given)
    url = f"http://127.0.0.1:{port}"
    until(lambda: ask(f"{url}/v1/management/engines")["data"][0]["state"] == "healthy", gateway)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(f"{url}/v1/chat/completions", {"model": "llama", "messages": [{"role": "user", "content": "x"}]})
    refused.value.close()
    assert refused.value.code == 500
    _, err = gateway.communicate(timeout=60)
    assert gateway.returncode == PolicyError.exit_code, err
    assert json.loads((tmp_path / "kept" / "manifest.json").read_text())["status"] == "failed"


def test_its_manifest_says_what_happened(record: Path) -> None:
    manifest = json.loads((record / "manifest.json").read_text())
    assert manifest["policy"]["name"] == "hybrid" and manifest["policy"]["parameters"]["reserve"] == 0.25
    ((at, name),) = manifest["policy"]["switches"]
    assert name == "fifo" and 0 < at < manifest["duration_ns"]
    assert [engine["name"] for engine in manifest["engines"]] == ["first", "second"]
    for engine in manifest["engines"]:
        assert engine["version"] != "unknown"
        assert engine["states"][0]["state"] == "healthy"


def test_its_twin_must_be_told_what_the_engines_are(record: Path, tmp_path: Path) -> None:
    assert asked(record) == {"llama": "llm"}
    for overrides in ([], ["policy=fifo"], ["cluster.network.delay_s=0.1"]):
        with pytest.raises(ConfigError, match=r"cluster=NAME or cluster\.devices=.*pool 'llama' \(llm\)"):
            twin(record, overrides, "twin", tmp_path)
    with pytest.raises(ConfigError, match=r"are for pool 'llama' \(llm\), and no device has that"):
        twin(record, ["cluster=small"], "twin", tmp_path)
    with pytest.raises(ConfigError, match="llama"):
        what_if(record, ["policy=fifo"], tmp_path)


def test_what_if_of_it(record: Path, tmp_path: Path) -> None:
    found = what_if(record, [CLUSTER, "policy=fifo,priority"], tmp_path)
    assert found.requests == 6
    assert [arm.policy for arm in found.arms] == ["fifo", "priority"]
    assert [arm.overrides for arm in found.arms] == [["policy=fifo"], ["policy=priority"]]


def test_validate_of_it(record: Path, sage: Callable[..., Any], tmp_path: Path) -> None:
    done = sage("validate", record, "--out", tmp_path / "v")
    assert done.code == 2 and "cluster.devices" in done.err
    assert sage("validate", record, CLUSTER, "--out", tmp_path / "v").code == 0


def test_a_simulation_says_which_pool_nothing_serves(record: Path, tmp_path: Path) -> None:
    config = twin(record, [CLUSTER], "twin", tmp_path)
    config["cluster"]["devices"][0]["llm"]["pool"] = "other"
    assert "no device serves pool 'llama' (cluster.devices)" in run(config).warnings
