"""`sage whatif`: a recorded load under its own policy is the recorded run; under another one, what differs and how surely."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_bench.metrics.measure import measure
from sage_bench.results.manifest import read_manifest
from sage_bench.results.reader import Run
from sage_bench.run import RunResult

Sage = Callable[..., Any]
Go = Callable[..., RunResult]
SMALL = ("load.rate=40", "load.duration_s=4", "seed=4")


@pytest.fixture
def whatif(sage: Sage, tmp_path: Path) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """``whatif(run, *overrides)``: how the command ended, and what ``--json`` holds."""

    def call(*args: object) -> tuple[Any, dict[str, Any]]:
        done = sage("whatif", *args, "--json", tmp_path / "json" / "found.json")
        assert done.code == 0, done.err
        return done, json.loads((tmp_path / "json" / "found.json").read_bytes())

    return call


def by_metric(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["kind"], row["metric"]): row for row in rows}


@pytest.mark.parametrize(
    "overrides",
    [
        (*SMALL, "policy=hybrid"),
        (*SMALL, "policy=fifo", "cluster=shared"),
        (*SMALL, "policy=separate", "cluster=shared", "load=tenants"),
        (*SMALL, "policy=slo_aware", "policy/predict=oracle"),
        (*SMALL, "policy=round_robin", "cluster.faults=[{at_s: 1.5, device: 1, kind: drain}]"),
        (*SMALL, "mechanism=reference", "load.duration_s=1"),
        (*SMALL, "load=gamma", "warmup_s=1", "cooldown_s=1"),
        ("load=closed", "load.requests=200", "load.users=20", "seed=4"),
    ],
    ids=lambda overrides: overrides[3].partition("=")[2],
)
def test_nothing_changed_repeats_every_decision(
    whatif: Callable[..., tuple[Any, dict[str, Any]]], go: Go, overrides: tuple[str, ...]
) -> None:
    recorded = go(*overrides)
    done, found = whatif(recorded.folder)
    manifest, base = read_manifest(recorded.folder), read_manifest(Path(found["base"]))
    assert found["digest"] == base.digest == manifest.digest and base.steps == manifest.steps
    assert found["repeated"] and "every decision the same" in done.out
    assert found["base"].startswith(f"{recorded.folder.parent}/whatif/")
    assert (base.warmup_ns, base.cooldown_at_ns) == (manifest.warmup_ns, manifest.cooldown_at_ns)
    assert {row["error_pct"] for row in found["rows"]} <= {0.0, None}
    assert found["arms"] == []


@pytest.mark.parametrize("cut", ["driver.until_s=2", "cluster.faults=[{at_s: 2, device: 1}]"])
def test_what_did_not_finish_is_told(whatif: Callable[..., tuple[Any, dict[str, Any]]], go: Go, cut: str) -> None:
    _, found = whatif(go(*SMALL, cut).folder)
    assert any("did not finish in the recorded run" in note for note in found["notes"])
    assert found["repeated"] or any("made other decisions" in note for note in found["notes"])


def test_arms_are_held_against_the_base(
    whatif: Callable[..., tuple[Any, dict[str, Any]]], go: Go, tmp_path: Path
) -> None:
    recorded = go(
        "policy=fifo", "cluster=shared", "load=tenants_bursty", "load.rate=90", "load.duration_s=40", "seed=3"
    )
    done, found = whatif(recorded.folder, "policy=hybrid,fifo", "--out", tmp_path / "elsewhere")
    assert [arm["overrides"] for arm in found["arms"]] == [["policy=hybrid"], ["policy=fifo"]]
    hybrid, fifo = found["arms"]
    assert hybrid["folder"].startswith(str(tmp_path / "elsewhere" / "whatif" / "hybrid-s3-"))

    base = by_metric(found["rows"])
    assert set(by_metric(hybrid["rows"])) == set(base)
    assert {kind for kind, _ in base} == {"all", "chat", "generate", "embedding"}
    measured = {key: measure(Run(Path(each))) for key, each in (("base", found["base"]), ("arm", hybrid["folder"]))}
    for (kind, metric), row in by_metric(hybrid["rows"]).items():
        of = {key: frame[frame["kind"] == kind].iloc[0] for key, frame in measured.items()}
        assert row["simulated"] == pytest.approx(of["arm"][metric], nan_ok=True)
        assert base[kind, metric]["simulated"] == pytest.approx(of["base"][metric])
        if row["low"] is not None:
            assert row["low"] <= row["difference"] <= row["high"], metric
            assert row["difference"] == pytest.approx(of["arm"][metric] - of["base"][metric], abs=1e-6)

    # Interactive chat gains, and batch generation pays for it.
    verdicts = {key: row["verdict"] for key, row in by_metric(hybrid["rows"]).items()}
    assert verdicts["chat", "ttft_ns_p95"] == "better" and verdicts["all", "slo_attainment"] == "better"
    assert verdicts["generate", "ttft_ns_p50"] == "worse"
    assert verdicts["all", "throughput_rps"] is None
    # The same policy again: the same run, and nothing to report.
    assert fifo["digest"] == found["digest"]
    assert {row["verdict"] for row in fifo["rows"]} == {"no significant difference", None}
    assert all(row["difference"] == 0 for row in fifo["rows"])
    assert "what if policy=hybrid (policy hybrid)" in done.out and "better" in done.out


def test_canary_fewer_devices_are_seen(whatif: Callable[..., tuple[Any, dict[str, Any]]], go: Go) -> None:
    recorded = go("load.rate=60", "load.duration_s=30", "seed=1")
    _, found = whatif(recorded.folder, "cluster.devices.0.count=2")
    rows = by_metric(found["arms"][0]["rows"])
    for metric in ("ttft_ns_p50", "e2e_ns_p50", "e2e_ns_p95"):
        assert rows["chat", metric]["verdict"] == "worse", metric
    assert rows["all", "cost_per_1k"]["difference"] < 0


def test_a_difference_below_the_error_of_the_simulation_is_marked(
    whatif: Callable[..., tuple[Any, dict[str, Any]]], go: Go
) -> None:
    """A run recorded on other engines than its configuration says, as a live one is."""
    folder = go("load.rate=20", "load.duration_s=15", "seed=1").folder
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"] = "live"
    manifest["config"]["cluster"]["network"] = {"delay_s": 0.1, "jitter_s": 0.0}
    path.write_text(json.dumps(manifest))
    done, found = whatif(folder, "cluster.devices.0.llm.max_num_seqs=120")
    assert not found["repeated"] and found["source"] == "live"
    base, arm = by_metric(found["rows"]), by_metric(found["arms"][0]["rows"])
    row = base["chat", "ttft_ns_p50"]
    assert row["simulated"] - row["recorded"] == pytest.approx(0.2e9, rel=0.3) and row["error_pct"] > 100
    assert arm["chat", "ttft_ns_p50"]["doubtful"]
    assert "not to be trusted" in done.out and "sim. error" in done.out and " ?" in done.out


def test_short_runs_say_that_their_intervals_are_too_narrow(
    whatif: Callable[..., tuple[Any, dict[str, Any]]], go: Go
) -> None:
    _, found = whatif(go(*SMALL).folder, "policy=fifo")
    assert any("the intervals are too narrow" in note for note in found["notes"])
    assert found["block_s"] == pytest.approx(4 / 20, rel=0.1)
    assert np.isfinite(found["requests"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy=nope", "Could not find 'policy/nope' Available options in 'policy': edf fifo"),
        ("policy", "expected KEY=VALUE, as in policy=fifo"),
        ("load.rate=3", "load.rate=3: the load, objectives and window of a recorded run stand"),
        ("slo=strict", "what can be changed is policy, cluster, attempts_max, mechanism"),
        ("~policy.laxity", "what can be changed is"),
        ("cluster.devices.7.count=2", "cluster.devices.7.count=2: no such key in the run's configuration"),
        ("cluster.devices.0.cuont=2", "did you mean 'count'?"),
        ("policy.laxty=true", "laxty"),
    ],
)
def test_a_wrong_override_is_named(sage: Sage, recorded: Path, override: str, says: str) -> None:
    done = sage("whatif", recorded, override)
    assert done.code == 2 and says in done.err, done.err


def test_a_folder_that_is_no_run(sage: Sage, tmp_path: Path, recorded: Path) -> None:
    done = sage("whatif", tmp_path)
    assert done.code == 3 and "expected the manifest of a run" in done.err
    (recorded / "steps.parquet").unlink()
    done = sage("whatif", recorded, "policy=fifo")
    assert done.code == 3 and "there is no log" in done.err


def test_nothing_to_compare_and_nowhere_to_write(sage: Sage, go: Go, recorded: Path, tmp_path: Path) -> None:
    done = sage("whatif", recorded)  # its warm-up is longer than itself
    assert done.code == 3 and "no recorded request was scheduled after the warm-up" in done.err
    (tmp_path / "file").write_text("")
    done = sage("whatif", go(*SMALL).folder, "--json", tmp_path / "file" / "found.json")
    assert done.code == 8 and "cannot be written" in done.err
