"""``robustness``: recovery by its rule, losses told like wins, every request accounted for."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.studies.findings import Findings
from sage_bench.studies.robustness import LOST, ROBUSTNESS, STRETCH_S, recovery_s
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
    assert f"{failed:,} that an engine was streaming" in findings.sentences[0]
    (claim,) = (each for each in findings.claims if each.id == "robustness-nothing-lost")
    assert claim.outcome == "holds"
    assert claim.text.startswith("0 of ")


def test_the_table_around_a_fault_counts_what_the_rows_say(results: Path) -> None:
    """Attainment during the fault, computed again from the rows."""
    shares = []
    for path in sorted(results.glob("robustness/hybrid-*")):
        if FAULT.split(",")[0].strip("{") not in (path / "config.yaml").read_text(encoding="utf-8").replace("8.0", "8"):
            continue
        rows = pq.read_table(path / "requests.parquet", columns=["scheduled_ns", "good"]).to_pandas()
        inside = rows[(rows["scheduled_ns"] >= 8e9) & (rows["scheduled_ns"] < 14e9)]
        shares.append(100 * float(inside["good"].mean()))
    assert len(shares) == 2
    (row,) = (each for each in rows_of(found(results), "faults") if each[1] == "hybrid")
    assert float(row[3].partition(" ")[0]) == pytest.approx(np.mean(shares), abs=0.06)


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
    import shutil

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
