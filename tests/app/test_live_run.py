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

import pandas as pd
import psutil
import pytest

from sage_bench.config import composed
from sage_bench.live import LiveResult, run_live
from sage_bench.replaying import replay_run
from sage_bench.results.manifest import read_manifest
from sage_bench.run import run
from sage_bench.validate.live import validate_run
from sage_bench.validate.twin import twin
from sage_core.errors import SageError

SHORT = (
    "cluster.devices=[{node: h100, llm: {profile: llama-3.1-8b-h100-tp1, max_num_seqs: 32}, price_per_h: 6.88}, "
    "{node: l4, embed: {profile: bge-m3-l4, max_batch_tasks: 8}, price_per_h: 0.8}]",
    "~load.classes.chat.output_tokens",
    "+load.classes.chat.output_tokens={_target_: sage_bench.loads.Uniform, low: 2, high: 12}",
    "load.classes.chat.output_tokens_max=64",
    "load.rate=25",
    "load.duration_s=4",
    "warmup_s=1",
)


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
        (("cluster.devices=[{node: cpu, operator: {pool: tool}}]",), "disaggregated and mps are for simulations"),
        (("driver.stream=perhaps",), "driver.stream"),
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
