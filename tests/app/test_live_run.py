"""``sage run driver=live`` on emulated engines: the same folder as a simulated run, measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from sage_bench import live
from sage_bench.config import composed
from sage_bench.core_speed import probes_of
from sage_bench.live import LiveResult, run_live
from sage_bench.metrics.measure import measure
from sage_bench.replaying import replay_run
from sage_bench.results.manifest import read_manifest
from sage_bench.results.reader import Run
from sage_bench.run import run
from sage_bench.validate.live import validate_run
from sage_bench.validate.twin import twin
from sage_core.errors import EngineError, PolicyError, SageError

SHORT = (
    "cluster.devices=[{node: h100, llm: {profile: llama-3.1-8b-h100-tp1, max_num_seqs: 32}, price_per_h: 6.88}, "
    "{node: l4, embed: {profile: bge-m3-l4, max_batch_tasks: 8}, price_per_h: 0.8}]",
    "~load.classes.chat.output_tokens",
    "+load.classes.chat.output_tokens={_target_: sage_bench.loads.Uniform, low: 2, high: 12}",
    "load.classes.chat.output_tokens_max=64",
    "load.rate=25",
    "load.duration_s=4",
    "warmup_s=1",
    "cooldown_s=0.5",
)


NOWHERE = "driver.engines=[http://127.0.0.1:1,http://127.0.0.1:1]"

BREAKING = """
import numpy as np
from sage_core.policy import Policy
from sage_policies.limit import EngineLimit
from sage_policies.predict import MaxPrediction
from sage_policies.route import LeastInFlight


class Breaks:
    asked = 0
    static = True

    def score(self, now, queued):
        self.asked += 1
        return queued.arrived_at * (1.0 if self.asked < 40 else np.nan)


def make() -> Policy:
    return Policy("breaks", None, Breaks(), LeastInFlight(), EngineLimit(), MaxPrediction())
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> LiveResult:
    results = tmp_path_factory.mktemp("live")
    return run_live(composed([*SHORT, "driver=live", f"results={results}"]), SHORT)


def test_every_request_is_answered_and_in_the_books(done: LiveResult) -> None:
    rows = pd.read_parquet(done.folder / "requests.parquet")
    assert len(rows) == done.summary.requests == done.told.counts["arrived"] > 60
    assert set(rows["outcome"]) == {"responded"}
    assert set(rows["kind"]) == {"chat", "embedding"}
    assert set(rows["pipeline"]) == {"chat@llm", "embed@embed"}
    assert not done.interrupted


def test_lengths_are_those_of_the_load(done: LiveResult) -> None:
    """The policy saw the cap; the engines made what the load says; prompts are counted the same everywhere."""
    simulated = run(composed([*SHORT, f"results={done.folder.parent.parent / 'simulated'}"]))
    ours = pd.read_parquet(done.folder / "requests.parquet").set_index("request").sort_index()
    model = pd.read_parquet(simulated.folder / "requests.parquet").set_index("request").sort_index()
    for column in ("kind", "tenant", "priority", "input_tokens", "output_tokens", "output_tokens_max"):
        assert ours[column].astype(str).tolist() == model[column].astype(str).tolist(), column
    gaps = ours["scheduled_ns"] - model["scheduled_ns"]
    assert gaps.max() - gaps.min() <= 1, "arrivals are scheduled as in the simulation, from another instant"
    spans = (ours["due_ns"] - ours["scheduled_ns"], model["due_ns"] - model["scheduled_ns"])
    assert (spans[0] - spans[1]).abs().max() < 1_000_000


def test_what_counts_is_what_counts_in_a_simulation(done: LiveResult) -> None:
    """Requests of warm-up and cool-down are counted from the begin of the load, not of the gateway's life."""
    simulated = run(composed([*SHORT, f"results={done.folder.parent.parent / 'simulated'}"]))
    frames = [
        pd.read_parquet(folder / name).set_index("request").sort_index()
        for folder, name in (
            (simulated.folder, "requests.parquet"), (done.folder, "requests.parquet"), (done.folder, "client.parquet")
        )
    ]  # fmt: skip
    flags = [frame["warmup"].tolist() for frame in frames]
    assert flags[0] == flags[1] == flags[2]
    first, last = flags[0].index(False), len(flags[0]) - flags[0][::-1].index(False)
    assert 0 < first < last < len(flags[0]), "some of the load is warm-up, and some cool-down"
    ours, model = read_manifest(done.folder), read_manifest(simulated.folder)
    assert ours.cooldown_at_ns is not None and model.cooldown_at_ns is not None
    assert ours.cooldown_at_ns - ours.warmup_ns == model.cooldown_at_ns - model.warmup_ns


def test_the_client_saw_what_the_gateway_wrote(done: LiveResult) -> None:
    client = pd.read_parquet(done.folder / "client.parquet")
    rows = pd.read_parquet(done.folder / "requests.parquet").merge(client, on="request", suffixes=("", "_client"))
    assert len(rows) == len(client)
    assert (rows["scheduled_ns"] == rows["scheduled_ns_client"]).all()
    assert (rows["sent_ns"] <= rows["arrived_ns"]).all()
    assert (rows["ended_ns_client"] >= rows["ended_ns"] - 1_000_000).all()
    late = (rows["ended_ns_client"] - rows["ended_ns"]).median() / 1e6
    assert late < 20, "half of the answers took 20 ms from the gateway to the client on one machine"


def test_the_log_replays(done: LiveResult) -> None:
    for mechanism in ("native", "reference"):
        assert replay_run(done.folder, mechanism=mechanism).digest.hex() == done.told.digest


def test_the_manifest_says_what_was_measured(done: LiveResult) -> None:
    manifest = read_manifest(done.folder)
    assert manifest.source == "emulated" and manifest.status == "complete"
    assert {engine.model for engine in manifest.engines} == {"llm", "embed"}
    assert all(engine.version != "unknown" for engine in manifest.engines)
    assert manifest.generator is not None and manifest.generator["cpu_us"] > 0
    assert manifest.invalid == tuple(done.summary.invalid)
    assert manifest.price_per_h == pytest.approx(7.68)
    assert {replica.pool for replica in manifest.replicas} == {"llm", "embed"}
    assert {path.name for path in done.folder.iterdir()} == {*manifest.outputs, "manifest.json"}
    assert "gateway-job.json" not in manifest.outputs


def test_its_twin_has_the_network_that_was_measured(done: LiveResult) -> None:
    trips = [engine.round_trip_ns for engine in read_manifest(done.folder).engines]
    assert all(trip is not None and 10_000 < trip < 50_000_000 for trip in trips)
    config = twin(done.folder, [], "twin", Path("unused"))
    assert config["cluster"]["network"]["delay_s"] == pytest.approx(sum(t for t in trips if t) / 4e9, rel=0.6)
    assert (
        twin(done.folder, ["cluster.network.delay_s=0.25"], "twin", Path("unused"))["cluster"]["network"]["delay_s"]
        == 0.25
    )
    errors = validate_run(done.folder, done.folder.parent.parent / "validated")
    assert abs(errors.kinds["chat"]["e2e"].mean.error_pct or 0.0) < 25, "the model is the truth here"
    assert errors.source == "emulated"


def test_two_processes_send_the_same_requests(done: LiveResult) -> None:
    again = run_live(composed([*SHORT, "driver=live", "driver.processes=2", f"results={done.folder.parent.parent}-2"]))
    columns = ["request", "kind", "input_tokens_asked", "output_tokens_asked"]
    one, two = (pd.read_parquet(each.folder / "client.parquet", columns=columns) for each in (done, again))
    assert one.astype(str).equals(two.astype(str))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("driver.engines=[http://127.0.0.1:9]",), "cluster.devices has 2 engines, got 1 URLs"),
        (("cluster.faults=[{at_s: 1, device: 0}]",), "faults: are for simulations"),
        (("driver.processes=0",), "driver.processes"),
        (("driver.tokenizer=nowhere.json",), "nowhere.json"),
        (
            (
                "cluster.devices=[{node: h, disaggregated: {prefill: {profile: llama-3.1-8b-h100-tp1}, decode: {profile: llama-3.1-8b-h100-tp1}, "
                "link: {gb_per_s: 50.0, latency_s: 0.00001}}}]",
            ),
            "disaggregated and mps are for simulations",
        ),
        (("cluster.devices=[{node: cpu, operator: {pool: tool}}]",), "serves; they serve none"),
        (("driver.stream=perhaps",), "driver.stream"),
        (
            ("driver.engines=[127.0.0.1:1,http://127.0.0.1:2]",),
            "driver.engines[0]: '127.0.0.1:1': expected http://HOST",
        ),
        (("+driver.adapters.llm=foo",), "driver.adapters.llm: adapter: unknown adapter 'foo'"),
        (
            ("+driver.adapters.lmm=vllm",),
            "driver.adapters: no engine of cluster.devices is in pool 'lmm'; it has llm, embed",
        ),
        (("+driver.models.x=y",), "driver.models: no engine of cluster.devices is in pool 'x'"),
        (
            ("cluster.devices=[{node: h, llm: {profile: llama-3.1-8b-h100-tp1}}]",),
            "asks for pipeline 'embed', which no engine",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SageError) as raised:
        run_live(composed([*SHORT, "driver=live", f"results={tmp_path}", *overrides]))
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir()), "nothing is written for a run that cannot be"


def test_ctrl_c_ends_the_load_and_keeps_what_was_measured(
    tmp_path: Path, sage_started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = sage_started("run", *SHORT, "load.duration_s=600", "driver=live", f"results={tmp_path}")
    children = _children_when_sending(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in out
    (folder,) = (tmp_path / "run").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    rows = pd.read_parquet(folder / "requests.parquet")
    assert len(rows) > 20 and set(rows["outcome"]) <= {"responded", "cancelled"}
    assert replay_run(folder).steps == manifest["steps"]
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_before_anything_was_sent_leaves_nothing(
    tmp_path: Path, sage_started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = sage_started("run", *SHORT, "driver=live", f"results={tmp_path}")
    until(lambda: psutil.Process(process.pid).children(recursive=True))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not list((tmp_path / "run").iterdir())
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_engines_that_are_not_there_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEALTHY_S", 5.0)
    with pytest.raises(EngineError, match="engines not healthy after 5 s"):
        run_live(composed([*SHORT, "driver=live", f"results={tmp_path}", NOWHERE]))
    assert not list((tmp_path / "run").iterdir())


def test_a_gateway_that_is_killed_ends_the_run_and_is_told(
    tmp_path: Path, sage_started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = sage_started("run", *SHORT, "load.duration_s=600", "driver=live", f"results={tmp_path}")
    children = _children_when_sending(process)
    (gateway,) = [child for child in children if child.cmdline()[1:3] == ["-m", "sage_bench.gateway_process"]]
    gateway.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == EngineError.exit_code, err
    assert "the gateway ended in the middle of the run, with signal 9" in err and "Traceback" not in err
    (folder,) = (tmp_path / "run").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "failed" and manifest["policy"]["name"] == "hybrid" and len(manifest["engines"]) == 2
    client = pd.read_parquet(folder / "client.parquet")
    assert len(client) > 20 and client["error"].isna().sum() > 20
    assert client["scheduled_ns"].max() < 60e9, "the load ended with the gateway"


def test_an_engine_that_is_killed_is_told(tmp_path: Path, sage_started: Callable[..., subprocess.Popen[str]]) -> None:
    process = sage_started("run", *SHORT, "load.duration_s=8", "driver=live", "driver.drain_s=2", f"results={tmp_path}")
    children = _children_when_sending(process)
    engine = next(c for c in children if "--embed-config" in c.cmdline() and c.cmdline()[2] == "sage_bench")
    engine.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "note: engine l4-1-embed: ejected at" in err.replace("\n", " ")
    assert "the generator counts" in err and "failures: " in err
    (folder,) = (tmp_path / "run").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    (states,) = [engine["states"] for engine in manifest["engines"] if engine["model"] == "embed"]
    assert states[0]["state"] == "healthy" and "ejected" in [each["state"] for each in states]


def test_a_run_in_which_every_request_failed_is_no_measurement(
    tmp_path: Path, sage_started: Callable[..., subprocess.Popen[str]]
) -> None:
    serving = ["--emulate", "llama-3.1-8b-h100-tp1", "--model", "llm", "--embed-profile", "bge-m3-l4"]
    engine = sage_started("llm", "serve", *serving, "--embed-model", "embed", "--port", "0", "--fail-rate", "1")
    assert engine.stdout is not None
    url = engine.stdout.readline().split()[0]
    given = [*SHORT, "driver=live", f"driver.engines=[{url},{url}]", "load.duration_s=1", "warmup_s=0"]
    process = sage_started("run", *given, f"results={tmp_path}")
    out, err = process.communicate(timeout=90)
    assert process.returncode == EngineError.exit_code, out + err
    assert "every request failed" in err and "status_502" in err and "done" not in out and "Traceback" not in err
    (folder,) = (tmp_path / "run").iterdir()
    assert read_manifest(folder).status == "failed"
    assert pd.read_parquet(folder / "requests.parquet")["outcome"].eq("failed").all()


def test_a_policy_that_breaks_ends_the_run(tmp_path: Path, sage_started: Callable[..., subprocess.Popen[str]]) -> None:
    (tmp_path / "mine.py").write_text(BREAKING)
    args = (
        *SHORT,
        "load.duration_s=600",
        "driver=live",
        f"results={tmp_path}",
        "policy=user",
        "policy._target_=mine.make",
    )
    process = sage_started("run", *args)
    _, err = process.communicate(timeout=90)
    assert process.returncode == PolicyError.exit_code, err
    (folder,) = (tmp_path / "run").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "failed" and (folder / "client.parquet").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_what_has_no_answer_after_the_drain_is_given_up(tmp_path: Path, processes: int) -> None:
    slow = "+load.classes.chat.output_tokens={_target_: sage_bench.loads.Uniform, low: 3000, high: 3001}"
    given = [*SHORT[:2], slow, "load.classes.chat.output_tokens_max=4000", "load.rate=20", "load.duration_s=1"]
    given += ["warmup_s=0", "driver=live", "driver.drain_s=0.5", f"driver.processes={processes}", f"results={tmp_path}"]
    began = time.monotonic()
    done = run_live(composed(given))
    client = pd.read_parquet(done.folder / "client.parquet")
    cut = client[client["error"] == "cut"]
    assert len(cut) == done.summary.failures["cut"] >= 1
    assert (cut["ended_ns"] - client["scheduled_ns"].max()).between(0.45e9, 5e9).all()
    assert any("driver.drain_s" in warning for warning in done.warnings)
    assert time.monotonic() - began < 60
    assert done.told.counts["cancelled"] == len(cut)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 40
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def _children_when_sending(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Engines and gateway of a live run, once the load generator has been sending for a moment."""
    deadline = time.monotonic() + 60
    sent: Any = None
    while time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        gateways = [child for child in children if "sage_bench.gateway_process" in " ".join(child.cmdline())]
        counts = [len([c for c in gateway.net_connections() if c.status == "ESTABLISHED"]) for gateway in gateways]
        if counts and max(counts) > 12:  # beyond probes: the generator's own
            if sent is None:
                sent = time.monotonic()
            elif time.monotonic() - sent > 2.0:
                return children
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    raise AssertionError("it never sent anything")


def test_who_used_the_machine_was_sampled(done: LiveResult) -> None:
    run = Run(done.folder)
    host = run.frame("host")
    assert set(host["what"]) == {"machine", "generator", "gateway", "engine-0", "engine-1", "sampler"}
    fact = run.manifest.host
    assert fact is not None and fact.interval_s == 1.0
    assert (fact.gpus == 0) == (fact.no_gpu is not None)
    assert host["memory_bytes"].gt(1_000_000).all() and host["cpu_cores"].ge(0).all()
    machine = host[host["what"] == "machine"].set_index("at_ns")
    assert machine.index.to_series().diff().dropna().between(0.5e9, 3e9).all()
    whole = measure(run).iloc[0]
    assert whole["machine_cpu_max"] <= 1.05 and 0 < whole["gateway_cpu_mean"] <= whole["gateway_cpu_max"]
    # The gateway's samples and what the kernel says that it took for the plane alone are of one scale.
    assert host.loc[host["what"] == "gateway", "cpu_cores"].sum() > 0.5 * run.manifest.control_s
    assert not (done.folder / "host-samples.jsonl").exists()
    assert run.manifest.outputs["host.parquet"].rows == len(host)


def test_the_core_of_an_engine_is_watched(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    result = run_live(composed([*SHORT, "driver=live", f"driver.watch_core={core}", f"results={tmp_path}"]))
    probes, run = probes_of(result.folder), Run(result.folder)
    assert probes is not None
    rows = run.frame("requests")
    assert probes.at_ns[0] <= rows["scheduled_ns"].min() and probes.at_ns[-1] >= rows["ended_ns"].max() - 1e9
    assert (np.diff(probes.at_ns) > 0).all() and 1e2 < np.median(probes.took_ns) < 1e7
    assert run.manifest.outputs["core_speed.parquet"].rows == len(probes.at_ns)
    assert not (result.folder / "core-samples.bin").exists()


def test_a_core_that_cannot_be_watched_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="core 4095 cannot be watched"):
        run_live(composed([*SHORT, "driver=live", "driver.watch_core=4095", f"results={tmp_path}"]))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
