"""``robustness``: recovery by its rule, losses told like wins, every request accounted for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.metrics.statistics import Interval, Paired
from sage_bench.results.manifest import NAME, read_manifest
from sage_bench.studies import robustness
from sage_bench.studies.bench_figures import bench_figures
from sage_bench.studies.findings import Findings
from sage_bench.studies.robustness import LOST, ROBUSTNESS, STRETCH_S, LiveFaults, Span, compared, recovery_s
from sage_bench.studies.study import experiments_in
from sage_core.errors import DataError

FAULT = "{at_s: 8, device: 0, kind: crash, restart_after_s: 6}"


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("robustness")
    small.sweep(
        folder,
        "robustness",
        ["load.rate=150", "load.duration_s=25", "warmup_s=2", "cooldown_s=2", "record.steps=false"],
        {
            "cluster": ["robustness/none", "robustness/stale"],
            "policy": ["fifo", "hybrid"],
            "seed": ["1", "2"],
        },
    )
    small.sweep(
        folder,
        "robustness",
        [
            "load.rate=150", "load.duration_s=25", "warmup_s=2", "cooldown_s=2", "record.steps=false",
            f"cluster.faults=[{FAULT}]",
        ],
        {"cluster": ["robustness/crash"], "policy": ["fifo", "hybrid"], "seed": ["1", "2"]},
    )  # fmt: skip
    return folder


def found(results: Path) -> Findings:
    return ROBUSTNESS.findings(experiments_in(results, ROBUSTNESS))


def rows_of(findings: Findings, name: str) -> list[list[str]]:
    (table,) = (each for each in findings.tables if each.name == name)
    assert all(len(row) == len(table.sheet.columns) for row in table.sheet.rows)
    return table.sheet.rows


def test_every_request_is_accounted_for(results: Path) -> None:
    findings = found(results)
    arrived = failed = 0
    for path in results.rglob("requests.parquet"):
        outcome = pq.read_table(path, columns=["outcome"])["outcome"].cast("string").to_pylist()
        arrived, failed = arrived + len(outcome), failed + outcome.count("failed")
    assert failed > 0, "the fault hit nothing: this test says nothing"
    assert findings.sentences[0].startswith("No request is lost silently: ")
    assert f"{failed:,} are reported as failed: {failed:,} whose engine left" in findings.sentences[0]
    (claim,) = (each for each in findings.claims if each.id == "robustness-nothing-lost")
    assert claim.outcome == "holds"
    assert claim.text.startswith("0 of ")


def folder_of(results: Path, scenario: str, policy: str, seed: int) -> Path:
    (path,) = (
        path
        for path in results.glob(f"robustness/{policy}-s{seed}-*")
        if f'"cluster=robustness/{scenario}"' in (path / NAME).read_text(encoding="utf-8")
    )
    return path


def test_a_request_lost_is_told_and_a_failure_has_its_reason(results: Path, tmp_path: Path) -> None:
    """One request of a run without its outcome, and one failure that no engine's end explains."""
    shutil.copytree(results, tmp_path / "less")
    path = folder_of(tmp_path / "less", "crash", "fifo", 1) / "requests.parquet"
    table = pq.read_table(path)
    outcome, reason = (table[name].cast(pa.string()).to_pylist() for name in ("outcome", "reason"))
    outcome[outcome.index("responded")] = None
    failed = outcome.index("failed")
    reason[failed] = "no retries left"
    for name, values in (("outcome", outcome), ("reason", reason)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values).cast(table.schema.field(at).type))
    pq.write_table(table, path)
    findings = found(tmp_path / "less")
    assert "lost silently" not in findings.sentences[0]
    assert " 1 ended without an outcome" in findings.sentences[0]
    assert " and 1 for other reasons" in findings.sentences[0]
    (claim,) = (each for each in findings.claims if each.id == "robustness-nothing-lost")
    assert claim.outcome == "does not hold"


def test_the_table_around_a_fault_counts_what_the_rows_say(results: Path) -> None:
    """Attainment during the fault, computed again from the rows; whoever was killed is in it."""
    shares: dict[str, list[float]] = {"none": [], "crash": []}
    columns = ["request", "scheduled_ns", "ended_ns", "good", "outcome"]
    for seed in (1, 2):
        rows = {
            name: pq.read_table(folder_of(results, name, "hybrid", seed) / "requests.parquet", columns=columns)
            .to_pandas()
            .set_index("request")
            for name in shares
        }
        alive = {
            request
            for each in rows.values()
            for request in each.index[(each["scheduled_ns"] < 14e9) & ~(each["ended_ns"] < 8e9)]
        }
        killed = set(rows["crash"].index[rows["crash"]["outcome"] == "failed"])
        assert killed
        assert killed <= alive
        for name, each in rows.items():
            shares[name].append(100 * float(each.loc[sorted(alive)]["good"].mean()))
    (row,) = (each for each in rows_of(found(results), "faults") if each[1] == "hybrid")
    for at, name in ((2, "none"), (3, "crash")):
        assert float(row[at].partition(" ")[0]) == pytest.approx(np.mean(shares[name]), abs=0.06)


def test_whom_the_fault_kills_is_lost_in_it_however_long_ago_they_came() -> None:
    """A hundred requests a second that take 3 s; those of the last 3 s before the fault die, nobody else notices."""
    at_s = np.arange(0, 40, 0.01)
    ended_s = at_s + 3.0
    killed = (at_s < 20) & (ended_s >= 20)
    both = pd.DataFrame(
        {
            "scheduled_ns": at_s * 1e9,
            "ended_ns_without": ended_s * 1e9,
            "ended_ns_with": np.where(killed, 20.0, ended_s) * 1e9,
            "good_without": True,
            "good_with": ~killed,
        }
    )
    told = compared("crash", "fifo", 1, both, Span(20.0, 30.0), np.arange(0.0, 41.0, STRETCH_S))
    assert told.during == (1.0, pytest.approx(1 - killed.sum() / (killed.sum() + 1000)))
    assert told.after == (1.0, 1.0)
    assert told.recovered == STRETCH_S


def test_a_fault_is_held_against_the_run_of_its_own_seed(results: Path, tmp_path: Path) -> None:
    """Seeds 1 and 3 with the fault, 1 and 2 without: one seed is compared, and that is said."""
    shutil.copytree(results, tmp_path / "one")
    for policy in ("fifo", "hybrid"):
        shutil.rmtree(folder_of(tmp_path / "one", "crash", policy, 2))
    one = found(tmp_path / "one")
    shutil.copytree(results, tmp_path / "other")
    for policy in ("fifo", "hybrid"):
        path = folder_of(tmp_path / "other", "crash", policy, 2) / NAME
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(read_manifest(path), seed=3)))
    other = found(tmp_path / "other")
    both = zip(rows_of(one, "faults"), rows_of(other, "faults"), strict=True)
    assert all(mine[2:7] == theirs[2:7] for mine, theirs in both)
    assert all("±" not in cell for row in rows_of(one, "faults") for cell in row[2:6])
    assert (
        "One engine dies, hybrid: of seed 2 only one of the two runs is there, so differences are without." in one.notes
    )
    assert any("hybrid: of seeds 2, 3 only one" in note for note in other.notes)
    shutil.rmtree(folder_of(tmp_path / "one", "crash", "fifo", 1))
    with pytest.raises(DataError, match="policy fifo has no seed with both"):
        found(tmp_path / "one")


def test_a_fault_and_other_requests_are_not_compared(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "mixed")
    for policy in ("fifo", "hybrid"):
        shutil.copy(
            folder_of(tmp_path / "mixed", "none", policy, 2) / "requests.parquet",
            folder_of(tmp_path / "mixed", "none", policy, 1) / "requests.parquet",
        )
    with pytest.raises(DataError, match="not the same requests"):
        found(tmp_path / "mixed")


def test_claims_are_adjusted_for_how_many_there_are(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "against", lambda *_: Paired(Interval(0.1, 0.05, 0.15, 5), 0.03))
    outcomes = {each.id: each.outcome for each in found(results).claims}
    assert outcomes["robustness-crash"] == outcomes["robustness-stale"] == "no significant difference"


def test_figures_of_a_benchmark_are_told_apart_and_read_whole(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "not in results/bench" in found(results).notes[0]
    path = tmp_path / "results" / "bench" / "faults.json"
    path.parent.mkdir(parents=True)
    figures = {name: {"requests": 9, "lost": 1} for name in ("killed", "slow", "hanging", "frozen", "outage")}
    path.write_text(json.dumps(figures), encoding="utf-8")
    (note,) = found(results).notes
    assert note.startswith("Not from these runs: ")
    assert "killed 1 of 9" in note
    for broken in (path.read_bytes()[:30], b"[]", b'{"killed": 3}', b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"faults\.json"):
            bench_figures("faults", LiveFaults)
    with pytest.raises(DataError, match=r"faults\.json"):
        found(results)


def test_a_loss_is_told_like_a_win(results: Path, small: ModuleType, tmp_path: Path) -> None:
    """Called by each other's names, the two policies change their places in what is said."""
    other = ROBUSTNESS.findings(
        small.relabelled(results, tmp_path / "swapped", ROBUSTNESS, {"fifo": "hybrid", "hybrid": "fifo"})
    )
    for claim in found(results).claims:
        if claim.id == "robustness-nothing-lost":
            continue
        (swapped,) = (each for each in other.claims if each.id == claim.id)
        assert swapped.text != claim.text
        if claim.outcome == "holds":
            assert swapped.outcome == "does not hold"
        if claim.outcome == "does not hold":
            assert swapped.outcome == "holds"
    (row,) = (each for each in rows_of(found(results), "faults") if each[1] == "hybrid")
    (moved,) = (each for each in rows_of(other, "faults") if each[1] == "fifo")
    assert row[2:] == moved[2:]


def test_the_figure_is_drawn_and_refuses_nothing(results: Path) -> None:
    (drawing,) = found(results).figures
    assert len(drawing.draw().axes) == 2
    from sage_bench.figures.attainment_time import attainment_time

    with pytest.raises(DataError, match="no runs"):
        attainment_time({}, np.arange(3.0), [], "simulated")


def test_without_the_calm_runs_nothing_can_be_said(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "less")
    for path in (tmp_path / "less" / "robustness").iterdir():
        if "robustness/none" in (path / "manifest.json").read_text(encoding="utf-8"):
            shutil.rmtree(path)
    with pytest.raises(DataError, match="robustness/none"):
        found(tmp_path / "less")


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=30), st.integers(0, 10))
def test_recovery_ends_where_the_last_loss_ends(losses: list[float], fault: int) -> None:
    """Against the rule read aloud: walk from the end to the last stretch that loses too much."""
    without = np.ones(len(losses))
    with_fault = without - np.array(losses)
    edges = np.arange(len(losses) + 1) * STRETCH_S
    start = fault * STRETCH_S
    bad = [i for i, loss in enumerate(losses) if 1.0 - (1.0 - loss) > LOST and edges[i + 1] > start]
    expected = 0.0 if not bad else math.inf if bad[-1] == len(losses) - 1 else edges[bad[-1] + 1] - start
    assert recovery_s(with_fault, without, edges, start) == expected
