"""What a run leaves behind: the folder, its tables and its manifest; the same in a sweep, in parallel and closed loop."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from sage_bench.config import checked, composed
from sage_bench.results.manifest import Manifest, read_manifest
from sage_bench.results.reader import load_runs
from sage_bench.results.schema import OUTCOMES, REPLICAS, REQUESTS, STEPS, TASKS
from sage_bench.run import RunResult, run
from sage_core.errors import SageError
from sage_core.ops import native_build

Go = Callable[..., RunResult]
SMALL = ("load.rate=30", "load.duration_s=3")
AZURE = Path(__file__).parents[3] / "shared" / "data" / "trace_azure2023_conv.parquet"


def outcomes(folder: Path) -> Counter[str]:
    return Counter(pq.read_table(folder / "requests.parquet")["outcome"].cast(pa.string()).to_pylist())


def assert_conserved(result: RunResult) -> Manifest:
    """Every request that arrived has one row and one outcome, and all the places that count agree."""
    manifest = read_manifest(result.folder)
    table = pq.read_table(result.folder / "requests.parquet", columns=["request", "outcome", "arrived_ns", "ended_ns"])
    counts, found = result.counts, outcomes(result.folder)
    assert table.num_rows == counts.arrived == manifest.counts["arrived"]
    assert len(pc.unique(table["request"])) == table.num_rows
    assert [found[o] for o in OUTCOMES] == [counts.responded, counts.rejected, counts.cancelled, counts.failed]
    assert [found[o] for o in OUTCOMES] == [manifest.counts[o] for o in OUTCOMES]
    assert pc.all(pc.greater_equal(table["ended_ns"], table["arrived_ns"])).as_py()
    assert table["ended_ns"].null_count == 0
    return manifest


class TestFolder:
    def test_files_and_schemas(self, recorded: Path) -> None:
        assert sorted(path.name for path in recorded.iterdir()) == [
            "config.yaml", "manifest.json", "replicas.parquet", "requests.parquet", "sources.sha256", "steps.parquet",
            "tasks.parquet",
        ]  # fmt: skip
        for name, schema in (("requests", REQUESTS), ("tasks", TASKS), ("replicas", REPLICAS), ("steps", STEPS)):
            assert pq.read_schema(recorded / f"{name}.parquet").equals(schema), name

    def test_tables_agree_with_each_other(self, recorded: Path) -> None:
        requests = pq.read_table(recorded / "requests.parquet").to_pandas()
        tasks = pq.read_table(recorded / "tasks.parquet").to_pandas()
        by_request = tasks.groupby("request").size().reindex(requests["request"], fill_value=0)
        assert (by_request.to_numpy() == requests["tasks"].to_numpy()).all()
        assert tasks["task"].is_unique
        assert (tasks["attempt"] > 0).sum() == requests["retries"].sum() > 0, "the crash made nobody try again"
        assert (tasks["outcome"] == "lost").sum() > 0
        assert (tasks["dispatched_ns"] >= tasks["queued_ns"]).all()
        assert (requests["arrived_ns"] == requests["scheduled_ns"]).all()
        responded = requests[requests["outcome"] == "responded"]
        assert (responded["e2e_ns"] == responded["ended_ns"] - responded["scheduled_ns"]).all()
        generating = responded[responded["kind"] != "embedding"]
        assert (generating["ttft_ns"] <= generating["e2e_ns"]).all() and generating["ttft_ns"].gt(0).all()

    def test_the_log_is_whole(self, recorded: Path) -> None:
        steps, manifest = pq.read_table(recorded / "steps.parquet"), read_manifest(recorded)
        assert steps["step"].to_pylist() == list(range(manifest.steps))
        assert steps["digest"][-1].as_py().hex() == manifest.digest
        assert (np.diff(steps["now"].to_numpy()) >= 0).all()
        assert steps["now"][-1].as_py() == manifest.duration_ns

    def test_the_configuration_makes_the_same_run_again(self, recorded: Path, tmp_path: Path) -> None:
        plain = yaml.safe_load((recorded / "config.yaml").read_text())
        again = run({**plain, "results": str(tmp_path / "again")})
        assert again.folder.name == read_manifest(recorded).run_id
        assert again.finish.digest.hex() == read_manifest(recorded).digest
        for name in ("requests", "tasks", "replicas", "steps"):
            assert (again.folder / f"{name}.parquet").read_bytes() == (recorded / f"{name}.parquet").read_bytes(), name


@pytest.fixture(scope="module")
def manifest(recorded_once: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((recorded_once / "manifest.json").read_text())
    return read


class TestManifest:
    """The reproducibility checklist, requirements 277 to 294; what a simulation does not have says so."""

    def test_hardware(self, manifest: dict[str, Any]) -> None:
        hardware = manifest["hardware"]
        assert hardware["memory_bytes"] == psutil.virtual_memory().total
        assert hardware["cores"] == psutil.cpu_count()
        assert hardware["cpu"] and isinstance(hardware["gpus"], list) and hardware["network"] == "simulated"

    def test_software(self, manifest: dict[str, Any]) -> None:
        software = manifest["software"]
        assert software["python"] == platform.python_version()
        assert software["native_build"] == native_build()
        assert set(software["packages"]) >= {"numpy", "simpy", "msgspec", "hydra-core", "pyarrow"}
        assert len(software["packages_sha256"]) == 64
        assert software["sage"] and software["cuda"] and software["git_commit"]

    def test_models_and_workload(self, manifest: dict[str, Any], recorded_once: Path) -> None:
        for fact in manifest["profiles"].values():
            assert hashlib.sha256(Path(fact["path"]).read_bytes()).hexdigest() == fact["sha256"]
        profiles = {d[role]["profile"] for d in manifest["config"]["cluster"]["devices"] for role in d if role in ("llm", "embed")}  # fmt: skip
        assert set(manifest["profiles"]) == profiles
        assert manifest["load"]["rate"] == 60 and manifest["load"]["parameters"]["classes"]
        assert manifest["traces"] == []

    def test_procedure(self, manifest: dict[str, Any], recorded_once: Path) -> None:
        assert manifest["warmup_ns"] == 10_000_000_000
        assert manifest["duration_ns"] > 4_000_000_000
        assert manifest["seed"] == 5 and manifest["status"] == "complete" and manifest["source"] == "simulation"
        assert manifest["timing"]["wall_s"] > 0 and manifest["timing"]["cpu_s"] > manifest["control_s"] > 0
        rows = pq.read_table(recorded_once / "requests.parquet", columns=["warmup"])["warmup"].to_pylist()
        assert all(rows), "all of 4 s lies within a warm-up of 10 s: kept and flagged"

    def test_configuration_and_raw_data(self, manifest: dict[str, Any], recorded_once: Path) -> None:
        assert manifest["config"] == yaml.safe_load((recorded_once / "config.yaml").read_text())
        checked(manifest["config"])
        assert set(manifest["outputs"]) == {path.name for path in recorded_once.iterdir()} - {"manifest.json"}
        for name, fact in manifest["outputs"].items():
            assert hashlib.sha256((recorded_once / name).read_bytes()).hexdigest() == fact["sha256"], name
            assert fact["bytes"] == (recorded_once / name).stat().st_size

    def test_replicas(self, manifest: dict[str, Any]) -> None:
        """Five devices, one of which crashed and came back as another replica."""
        replicas = manifest["replicas"]
        assert [r["replica"] for r in replicas] == list(range(6))
        left = [r for r in replicas if r["left_ns"] is not None]
        assert [(r["device"], r["left_ns"]) for r in left] == [(1, 2_500_000_000)]
        assert [r["joined_ns"] for r in replicas if r["device"] == 1] == [0, 3_500_000_000]

    def test_overrides_and_price(self, go: Go) -> None:
        result = go(*SMALL, "seed=3")
        manifest = read_manifest(result.folder)
        assert manifest.overrides == (*SMALL, "seed=3")
        assert manifest.price_per_h == pytest.approx(4 * 3.4309 + 0.8048)

    def test_a_trace_is_named_with_its_checksum(self, go: Go, trace: Path) -> None:
        fact = read_manifest(go("load=trace", f"load.path={trace}").folder).traces[0]
        assert fact is not None and fact.path == str(trace) and fact.rows == 40
        assert fact.sha256 == hashlib.sha256(trace.read_bytes()).hexdigest()


class TestOutcomes:
    def test_a_run_is_conserved(self, go: Go) -> None:
        result = go(*SMALL)
        assert assert_conserved(result).status == "complete"
        assert result.counts.responded == result.counts.arrived > 50

    def test_the_same_configuration_goes_to_the_same_folder(self, go: Go) -> None:
        one = go(*SMALL)
        (one.folder / "requests.parquet").write_bytes(b"left over")
        two = go(*SMALL)
        assert (two.folder, two.finish.digest) == (one.folder, one.finish.digest)
        assert_conserved(two)
        assert go(*SMALL, "seed=1").folder != one.folder

    def test_faults(self, go: Go) -> None:
        """A crash, a drain, both with a restart, and a device that goes for good; tried twice at most."""
        faults = (
            "cluster.faults=[{at_s: 1, device: 0}, {at_s: 1.5, device: 1, kind: drain, restart_after_s: 20},"
            "{at_s: 2, device: 2, restart_after_s: 1}, {at_s: 2.5, device: 4, restart_after_s: 0.5}]"
        )
        result = go(faults, "load.rate=40", "load.duration_s=6", "attempts_max=2")
        manifest = assert_conserved(result)
        assert manifest.counts["retries"] > 0
        assert {r.device for r in manifest.replicas if r.left_ns is not None} == {0, 1, 2, 4}

    def test_all_devices_gone_for_good(self, go: Go) -> None:
        result = go("cluster.faults=[{at_s: 1, device: 4}]", "load.rate=20", "load.duration_s=3")
        assert_conserved(result)
        assert 0 < result.counts.failed < result.counts.arrived
        assert any("requests failed: run ended with the request unserved" in note for note in result.warnings)

    def test_a_kind_that_nothing_serves(self, go: Go) -> None:
        result = go("cluster=standard", *SMALL)
        assert_conserved(result)
        failed = pq.read_table(result.folder / "requests.parquet", filters=[("outcome", "=", "failed")])
        assert set(failed["kind"].cast(pa.string()).to_pylist()) == {"embedding"}
        assert "no device serves pool 'embed' (cluster.devices)" in result.warnings

    def test_operator_workers_join(self, go: Go) -> None:
        """CPU workers have no token budget, which must not keep them out of the plane."""
        devices = (
            "cluster.devices=[{node: gpu, llm: {profile: llama-3.1-8b-a100-tp1}, embed: {profile: bge-large-en-v1.5-l4}},"
            "{node: cpu, count: 2, operator: {pool: rerank, workers: 2, fixed_s: 0.01}}]"
        )
        result = go(devices, *SMALL)
        manifest = assert_conserved(result)
        assert result.counts.responded == result.counts.arrived
        assert [r.pool for r in manifest.replicas] == ["llm", "embed", "rerank", "rerank"]

    def test_until(self, go: Go) -> None:
        """The clock stops with work under way: it fails, in the log too."""
        result = go(*SMALL, "driver.until_s=1.5")
        assert_conserved(result)
        assert 0 < result.counts.failed < result.counts.arrived
        assert result.finish.now <= 1_500_000_000

    def test_optional_tables(self, go: Go) -> None:
        result = go(*SMALL, "record.tasks=false", "record.steps=false")
        assert_conserved(result)
        assert sorted(path.name for path in result.folder.glob("*.parquet")) == ["replicas.parquet", "requests.parquet"]
        assert result.finish.digest == go(*SMALL).finish.digest

    def test_closed_loop(self, go: Go) -> None:
        result = go("load=closed", "load.users=8", "load.requests=120", "load.think.mean_s=0.2")
        manifest = assert_conserved(result)
        assert result.counts.arrived == result.counts.responded == 120
        assert manifest.load.rate is None
        spans = pq.read_table(result.folder / "requests.parquet", columns=["scheduled_ns", "ended_ns"])
        starts, ends = (np.sort(spans[name].to_numpy()) for name in ("scheduled_ns", "ended_ns"))
        in_flight = np.searchsorted(starts, starts, "right") - np.searchsorted(ends, starts, "right")
        assert in_flight.max() == 8, "as many requests as users, and never more"

    def test_closed_loop_users_of_failed_requests_go_on(self, go: Go) -> None:
        result = go(
            "load=closed", "load.users=20", "load.requests=200", "cluster.faults=[{at_s: 2, device: 0}]",
            "attempts_max=1",
        )  # fmt: skip
        assert_conserved(result)
        assert result.counts.arrived == 200 and result.counts.failed > 0

    def test_an_error_leaves_readable_tables_and_says_failed(self, go: Go, tmp_path: Path) -> None:
        """The policy breaks in the middle of a run."""
        module = tmp_path / "breaks_at_two_seconds.py"
        module.write_text(
            "from dataclasses import replace\n"
            "import numpy as np\n"
            "from sage_policies.presets import fifo\n"
            "class Breaks:\n"
            "    static = False\n"
            "    def score(self, now, queued):\n"
            "        return np.full(len(queued), np.nan if now > 2e9 else 0.0)\n"
            "def policy():\n"
            "    return replace(fifo(), name='breaks', order=Breaks())\n"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(tmp_path)
            with pytest.raises(SageError, match="order Breaks: score of task"):
                go("policy=user", "policy._target_=breaks_at_two_seconds.policy", *SMALL)
        (only,) = load_runs(tmp_path / "results")
        assert only.manifest.status == "failed"
        table = only.table("requests")
        assert table.num_rows == only.manifest.counts["arrived"] > 20
        assert set(table["outcome"].cast(pa.string()).to_pylist()) == {"responded", "failed"}
        assert "the run was cut short: PolicyError" in table["reason"].cast(pa.string()).to_pylist()


class TestSweep:
    def test_a_point_of_a_sweep_is_the_run_alone(self, sage: Callable[..., Any], go: Go, tmp_path: Path) -> None:
        """In parallel too: see test_custom_policy.py."""
        done = sage("run", *SMALL, "policy=fifo,hybrid", "seed=1,2", "--multirun", f"results={tmp_path / 'sweep'}")
        assert done.code == 0 and "sage:" not in done.err
        runs = load_runs(tmp_path / "sweep")
        assert sorted((r.manifest.policy.name, r.manifest.seed) for r in runs) == [
            ("fifo", 1), ("fifo", 2), ("hybrid", 1), ("hybrid", 2),
        ]  # fmt: skip
        for each in runs:
            alone = go(*SMALL, f"policy={each.manifest.policy.name}", f"seed={each.manifest.seed}")
            assert (alone.folder.name, alone.finish.digest.hex()) == (each.manifest.run_id, each.manifest.digest)
        assert len({each.manifest.digest for each in runs}) == 4

    def test_flags_and_overrides_come_in_any_order(self, sage: Callable[..., Any], tmp_path: Path) -> None:
        done = sage("run", "seed=1,2", "--multirun", *SMALL, "policy=fifo", f"results={tmp_path}")
        assert done.code == 0, done.err
        assert len(load_runs(tmp_path)) == 2

    def test_one_bad_point_does_not_stop_the_others(self, sage: Callable[..., Any], tmp_path: Path) -> None:
        done = sage("run", "-m", "seed=1,-1,2", *SMALL, f"results={tmp_path}")
        assert done.code == 2
        assert "config: seed: expected `int` >= 0, got -1" in done.err and "'seed=-1'" in done.err
        assert sorted(r.manifest.seed for r in load_runs(tmp_path)) == [1, 2]


class TestTrace:
    def test_a_small_trace(self, go: Go, trace: Path) -> None:
        result = go("experiment=mixed", "load=trace", f"load.path={trace}")
        assert_conserved(result)
        kinds = Counter(pq.read_table(result.folder / "requests.parquet")["kind"].cast(pa.string()).to_pylist())
        assert kinds["chat"] == 40 and kinds["embedding"] > 5

    @pytest.mark.skipif(not AZURE.exists(), reason=f"needs {AZURE.name}, the Azure 2023 conversation trace")
    @pytest.mark.parametrize("policy", ["hybrid", "fifo"])
    def test_the_whole_hour_of_a_real_trace(self, go: Go, policy: str) -> None:
        result = go("experiment=mixed", "load=trace", f"load.path={AZURE}", f"policy={policy}", "record.steps=false")
        assert_conserved(result)
        assert result.counts.responded == result.counts.arrived
        rows = pq.read_metadata(AZURE).num_rows
        kinds = Counter(
            pq.read_table(result.folder / "requests.parquet", columns=["kind"])["kind"].cast(pa.string()).to_pylist()
        )
        assert kinds["chat"] == rows and kinds.total() == result.counts.arrived
        assert kinds["embedding"] / kinds.total() == pytest.approx(0.30, abs=0.01)
        assert result.finish.now / 1e9 > 3400


def test_from_python_no_override_is_needed() -> None:
    config, plain = checked(composed())
    assert (config.name, config.seed, config.mechanism) == ("run", 0, "native")
    assert plain["policy"]["_target_"] == "sage_policies.presets.hybrid"
