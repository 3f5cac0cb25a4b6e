"""`sage validate RUN`: a live run against its simulated twin, and `sage whatif` of the same run.

The live run is a real one: the asyncio driver in real time, emulated engines that follow the profiles of the run's own
configuration, and the recorder that every run has.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sage_bench.compose import make_parts, make_plane
from sage_bench.config import checked, composed
from sage_bench.figures.run_fidelity import run_overlay
from sage_bench.results.manifest import LoadFact, PolicyFact, ReplicaFact, Timing, write_manifest
from sage_bench.results.recorder import RunRecorder
from sage_bench.results.writer import StepWriter
from sage_bench.run import RunResult
from sage_bench.validate.live import AGAINST, FIDELITY, REQUESTS
from sage_core.commands import AnyCommand
from sage_core.errors import DataError
from sage_core.events import AnyEvent
from sage_core.load import Arrival
from sage_core.units import NEVER
from sage_live.driver import LiveDriver
from sage_live.emulated import EmulatedBackend
from sage_live.loadgen.schema import CLIENT
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.profile import load_profile

Sage = Callable[..., Any]
Go = Callable[..., RunResult]

LLM, EMBED = "llama-3.1-8b-h100-tp1", "bge-large-en-v1.5-h100"
LEAD_NS = 50_000_000
"""Between the start of the driver and the first instant of the load."""

CONFIG = (
    "cluster.network={delay_s: 0.0, jitter_s: 0.0}",
    f"cluster.devices=[{{node: here, llm: {{profile: {LLM}, max_num_seqs: 64, kv_tokens: 64000}}, embed: {{profile: {EMBED}}}}}]",
    "cluster.report_interval_s=0",
    "policy=fifo",
    "load.rate=60",
    "load.duration_s=1.5",
    "load.classes.chat.output_tokens_max=32",  # so that nobody waits long for the last answer
    "seed=2",
)


def record_live(results: Path, name: str) -> Path:
    """Run CONFIG in real time and leave its folder, ``results/<name>``."""
    config, plain = checked(composed([*CONFIG, f"results={results}"]))
    parts = make_parts(config)
    folder = results / name
    pipelines = {name: [(stage.op.name, stage.op.pool) for stage in p.stages] for name, p in parts.pipelines.items()}
    arrivals = list(parts.load.arrivals())
    with RunRecorder(folder, pipelines, parts.slo) as rows, StepWriter(folder / "steps.parquet") as log:

        def record(
            now: int, events: Sequence[AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
        ) -> None:
            rows(now, events, commands)
            log(now, encoded, digest)

        driver = asyncio.run(serve(arrivals, config, record))
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    write_manifest(
        folder, experiment="run", run_id=name, source="emulated", status="complete", policy=PolicyFact("fifo"),
        seed=config.seed, load=LoadFact(), config=plain, duration_ns=int(driver.now), digest=driver.digest.hex(),
        steps=driver.steps, control_s=0.0, native_build="x", timing=Timing("2026-01-01T00:00:00+00:00", 1.0, 1.0),
        replicas=tuple(ReplicaFact(**row) for row in rows.replicas()), counts=rows.counts(),
    )  # fmt: skip
    return folder


async def serve(arrivals: list[Arrival], config: Any, record: Any) -> LiveDriver:
    """Send every request when it is due, to one device that follows the configuration's profiles; wait for the answers."""
    truth = {arrival.request.request: arrival.output_tokens for arrival in arrivals}
    llm, embed = config.cluster.devices[0].llm, config.cluster.devices[0].embed
    laws = {name: load_profile(name).iteration_time() for name in (LLM, EMBED)}
    device = SimulatedDevice(
        0,
        "here",
        LlmReplica(
            0, "llm", laws[LLM], max_num_seqs=llm.max_num_seqs, max_num_batched_tokens=llm.max_num_batched_tokens,
            block_size=llm.block_size, kv_blocks=llm.kv_tokens // llm.block_size, prefix_caching=llm.prefix_caching,
            async_scheduling=llm.async_scheduling,
        ),
        EmbedReplica(1, "embed", laws[EMBED], max_batch_tasks=embed.max_batch_tasks, max_batch_tokens=embed.max_batch_tokens),
        lambda request, stage: truth[request],
    )  # fmt: skip
    driver = LiveDriver(make_plane(config), record)
    driver.add(EmulatedBackend(device))
    left = len(arrivals)
    done = asyncio.Event()

    def ended(outcome: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    for at, request, *_ in arrivals:
        due = at + LEAD_NS
        await asyncio.sleep(max(0, due - driver.now) / 1e9)
        moved = {
            "scheduled_at": due,
            **{
                name: value + LEAD_NS
                for name in ("ttft_due_at", "due_at")
                if (value := getattr(request, name)) != NEVER
            },
        }
        fields = {name: getattr(request, name) for name in request.__struct_fields__}
        driver.submit(type(request)(**{**fields, **moved}), ended)
    await asyncio.wait_for(done.wait(), 60)
    await driver.close()
    return driver


@pytest.fixture(scope="module")
def two_live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    results = tmp_path_factory.mktemp("live")
    return record_live(results, "first"), record_live(results, "second")


@pytest.fixture
def live(two_live: tuple[Path, Path], tmp_path: Path) -> Path:
    """A live run, as a copy of this test's own to change."""
    return Path(shutil.copytree(two_live[0], tmp_path / "first"))


@pytest.fixture
def validated(sage: Sage, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``validated(run, *arguments)``: what ``fidelity.json`` holds."""

    def call(run: Path, *arguments: object) -> dict[str, Any]:
        done = sage("validate", run, *arguments, "--out", tmp_path / "out", "--no-figures")
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads((tmp_path / "out" / FIDELITY).read_bytes())
        return found | {"printed": done.out}

    return call


def test_a_live_run_is_like_its_twin(live: Path, validated: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = validated(live)
    assert found["source"] == "emulated" and found["compared"] == found["requests"] > 60
    assert found["outcomes"]["recorded"] == found["outcomes"]["simulated"] == {"responded": found["requests"]}
    assert set(found["kinds"]) == {"chat", "embedding"}
    assert set(found["kinds"]["chat"]) == {"ttft", "tpot", "e2e", "queue"}
    assert set(found["kinds"]["embedding"]) == {"e2e", "queue"}
    # The engine model is the truth here: what is left is the lateness of the event loop, on a machine that may be busy.
    for name in ("ttft", "tpot", "e2e"):
        assert abs(found["kinds"]["chat"][name]["mean"]["error_pct"]) < 25, name
    assert found["makespan_s"]["error_pct"] == pytest.approx(0, abs=10)
    assert "chat TTFT (" in found["printed"] and "chat queue time" in found["printed"]
    assert found["noise_pct"] is None and found["client"] is None

    # What is written is what the two runs' own rows say.
    rows = pq.read_table(tmp_path / "out" / REQUESTS).to_pandas().set_index("request").sort_index()
    for side, folder in (("measured", live), ("simulated", tmp_path / "out" / found["run"])):
        own = pq.read_table(folder / "requests.parquet").to_pandas().set_index("request").sort_index()
        assert rows[f"{side}_e2e_s"].to_numpy() == pytest.approx(own["e2e_ns"].to_numpy() / 1e9)
        assert rows[f"{side}_queue_s"].to_numpy() == pytest.approx(own["queue_ns"].to_numpy() / 1e9)
        assert (rows["output_tokens"] == own["output_tokens"]).all()
        assert (own["scheduled_ns"] >= LEAD_NS).all()


def test_canary_a_wrong_engine_is_seen(live: Path, validated: Callable[..., dict[str, Any]]) -> None:
    right = validated(live)["kinds"]["chat"]
    wrong = validated(live, "cluster.devices.0.llm.profile=llama-3.1-8b-l4-tp1")
    assert wrong["overrides"] == ["cluster.devices.0.llm.profile=llama-3.1-8b-l4-tp1"]
    for name in ("ttft", "tpot", "e2e"):
        assert wrong["kinds"]["chat"][name]["mean"]["error_pct"] > 100 > abs(right[name]["mean"]["error_pct"])


def test_a_simulated_run_is_its_own_twin(go: Go, validated: Callable[..., dict[str, Any]]) -> None:
    recorded = go("load.rate=40", "load.duration_s=4", "seed=4")
    found = validated(recorded.folder)
    assert found["digest"] == recorded.finish.digest.hex()
    for latencies in found["kinds"].values():
        for each in latencies.values():
            assert {each[s]["error_pct"] for s in ("mean", "p50", "p95", "p99")} <= {0.0, None}
    assert any("was simulated" in note for note in found["warnings"])


def test_noise_between_two_runs(
    two_live: tuple[Path, Path], validated: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first, second = two_live
    found = validated(first, "--against", second)
    means = {
        folder: pq.read_table(folder / "requests.parquet").to_pandas().query("kind == 'chat'")["e2e_ns"].mean()
        for folder in two_live
    }
    expected = 100 * (means[second] - means[first]) / means[first]
    assert found["noise_pct"]["chat"]["e2e"]["mean"] == pytest.approx(expected)
    assert "noise %" in found["printed"] and str(second) in found["printed"]
    assert pq.read_metadata(tmp_path / "out" / AGAINST).num_rows == found["requests"]
    # The next call is of another question: nothing of this one is left.
    assert validated(first)["noise_pct"] is None
    assert not (tmp_path / "out" / AGAINST).exists()


def test_another_load_is_no_repetition(sage: Sage, live: Path, go: Go) -> None:
    done = sage("validate", live, "--against", go("load.duration_s=2").folder)
    assert done.code == 2 and "is not a repetition of" in done.err and "its load is another" in done.err


def test_what_the_client_saw(live: Path, validated: Callable[..., dict[str, Any]]) -> None:
    rows = pq.read_table(live / "requests.parquet").to_pandas().sort_values("request")
    n = len(rows)
    error: list[str | None] = [None] * n
    error[0] = "reset"
    seen = {
        "request": rows["request"],
        "kind": rows["kind"].astype(str),
        "scheduled_ns": rows["scheduled_ns"],
        "sent_ns": rows["scheduled_ns"] + 1_000_000,
        "first_token_ns": [None if np.isnan(each) else int(each) + 2_000_000 for each in rows["first_token_ns"]],
        "ended_ns": rows["ended_ns"].astype(np.int64) + 3_000_000,
        "error": error,
        "warmup": [False] * n,
    }
    columns = [
        pa.array(seen[field.name], pa.string() if pa.types.is_dictionary(field.type) else field.type).cast(field.type)
        if field.name in seen
        else pa.nulls(n, field.type)
        for field in CLIENT
    ]
    pq.write_table(pa.Table.from_arrays(columns, schema=CLIENT), live / "client.parquet")
    found = validated(live)
    client = found["client"]
    assert sum(view["failed"] for view in client.values()) == 1
    assert sum(view["answered"] for view in client.values()) == n - 1
    for view in client.values():
        assert view["latencies"]["send_lag"] == pytest.approx({"mean": 1e-3, "p50": 1e-3, "p95": 1e-3, "p99": 1e-3})
    assert set(client["embedding"]["latencies"]) == {"send_lag", "e2e"}
    plane, of_client = found["kinds"]["embedding"]["e2e"], client["embedding"]["latencies"]["e2e"]
    if not client["embedding"]["failed"]:
        assert of_client["p95"] == pytest.approx(plane["p95"]["measured"] + 3e-3)
    assert "seen by the client" in found["printed"] and "not answered well" in found["printed"]


def test_fail_above(sage: Sage, live: Path, tmp_path: Path) -> None:
    wrong = "cluster.devices.0.llm.profile=llama-3.1-8b-l4-tp1"
    done = sage("validate", live, wrong, "--fail-above", 50, "--out", tmp_path / "out", "--no-figures")
    assert done.code == 9 and "mean E2E error of chat requests is +" in done.err
    assert (tmp_path / "out" / FIDELITY).exists() and "chat E2E" in done.out
    assert sage("validate", live, "--fail-above", 10_000, "--out", tmp_path / "out", "--no-figures").code == 0


def test_figures(sage: Sage, two_live: tuple[Path, Path], tmp_path: Path) -> None:
    done = sage("validate", two_live[0], "--against", two_live[1])
    assert done.code == 0, done.err
    folder = tmp_path / "results" / "validate" / "first"
    for name in ("fidelity_latency_chat", "fidelity_latency_embedding"):
        assert (folder / f"{name}.pdf").stat().st_size > 0 and (folder / f"{name}.png").stat().st_size > 0
        assert f"{name}.pdf" in done.out
    rows = pq.read_table(folder / REQUESTS).to_pandas().query("kind == 'chat'")
    ttft, tpot, e2e, queue = run_overlay(folder / REQUESTS, "chat", folder / AGAINST).axes
    assert [axis.get_xlabel().split(" (")[0] for axis in (ttft, tpot, e2e, queue)] == [
        "chat TTFT", "chat TPOT", "chat E2E latency", "chat queue time in the plane",
    ]  # fmt: skip
    assert [line.get_label() for line in e2e.get_lines()] == ["measured", "simulated", "measured again"]
    assert np.asarray(e2e.get_lines()[0].get_xdata()) == pytest.approx(np.sort(rows["measured_e2e_s"]))
    assert len(run_overlay(folder / REQUESTS, "embedding").axes) == 2
    with pytest.raises(DataError, match="no generate request"):
        run_overlay(folder / REQUESTS, "generate")
    with pytest.raises(DataError, match=r"requests\.parquet: not a file of `sage validate RUN`"):
        run_overlay(two_live[0] / "requests.parquet", "chat")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "RUN, --measured: expected a live run's folder, or a file of measured requests"),
        (("RUN", "--profile", LLM), "--profile: is for --measured"),
        (("RUN", "--block-size", 16), "--block-size: is for --measured"),
        (("RUN", "--measured", "x.parquet"), "--measured: is for --measured"),
        (("--measured", "x.parquet"), "--profile: needed with --measured"),
        (("--measured", "x.parquet", "--against", "RUN", "--profile", LLM), "--against: a second run is for RUN"),
        (("RUN", "load.rate=3"), "load.rate=3: the load, objectives and window of a recorded run stand"),
        (("RUN", "--fail-above", -1), "--fail-above: expected per cent from 0"),
    ],
)
def test_mistakes_are_named(sage: Sage, live: Path, arguments: tuple[object, ...], says: str) -> None:
    done = sage("validate", *(live if each == "RUN" else each for each in arguments))
    assert done.code == 2 and says in done.err, done.err


def test_a_folder_that_is_no_run(sage: Sage, tmp_path: Path, live: Path) -> None:
    done = sage("validate", tmp_path)
    assert done.code == 3 and "expected the manifest of a run" in done.err
    done = sage("validate", live, "--against", tmp_path)
    assert done.code == 3 and "expected the manifest of a run" in done.err


def test_what_if_of_a_live_run(sage: Sage, live: Path, tmp_path: Path) -> None:
    """Measured, simulated as it was, and simulated with a slower engine, side by side."""
    change = "cluster.devices.0.llm.profile=llama-3.1-8b-l4-tp1"
    done = sage("whatif", live, change, "--json", tmp_path / "found.json")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found["source"] == "emulated" and not found["repeated"]
    (row,) = (each for each in found["rows"] if (each["kind"], each["metric"]) == ("chat", "e2e_ns_p50"))
    (arm,) = (each for each in found["arms"][0]["rows"] if (each["kind"], each["metric"]) == ("chat", "e2e_ns_p50"))
    assert row["recorded"] != row["simulated"] and abs(row["error_pct"]) < 25
    assert arm["verdict"] == "worse" and not arm["doubtful"]
    assert "live code on emulated engines" in done.out and "sim. error" in done.out
