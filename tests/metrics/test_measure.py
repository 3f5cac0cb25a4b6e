"""Metrics of one run: classes add up, warm-up does not count, and everything offered does."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from sage_bench.metrics.definitions import LATENCIES, METRICS, OVERALL
from sage_bench.metrics.measure import ALL, CLASS, measure
from sage_bench.results.reader import load_runs
from sage_core.errors import DataError
from sage_core.units import SECOND, RequestKind

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, queueing: ModuleType) -> Path:
    path: Path = tmp_path_factory.mktemp("measure")
    classes = (
        queueing.Class(tenant="a", share=0.5),
        queueing.Class(tenant="b", priority=1, share=0.2),
        queueing.Class(kind=RequestKind.EMBEDDING, tenant="b", share=0.3, output_tokens=0),
    )
    queue = queueing.Queue(60, 0.03, 3000, servers=2, order="priority", queue_max=20, classes=classes)
    queueing.run(path, queue, warmup_s=5.0, price_per_h=7.2)
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> pd.DataFrame:
    return measure(load_runs(folder)[0])


def test_every_metric_has_a_column_and_only_those(rows: pd.DataFrame) -> None:
    samples = {f"{name}_samples" for name in LATENCIES}
    assert set(rows.columns) == {*CLASS, *METRICS, *samples}


def test_counts_of_classes_add_up(rows: pd.DataFrame) -> None:
    whole = rows.iloc[0]
    kinds = rows[(rows["kind"] != ALL) & (rows["tenant"] == ALL)]
    leaves = rows[rows["tenant"] != ALL]
    assert list(kinds["kind"]) == ["chat", "embedding"] and len(leaves) == 3
    for part in (kinds, leaves):
        for name in ("offered", "responded", "rejected", "throughput_rps", "goodput_rps", "tokens_per_s"):
            assert part[name].sum() == pytest.approx(whole[name])
    assert whole["offered"] == whole[["responded", "rejected", "cancelled", "failed"]].sum()
    assert whole["rejected"] > 0
    assert leaves[list(OVERALL)].isna().all(axis=None)


def test_attainment_is_over_offered_so_rejecting_is_missing(folder: Path, rows: pd.DataFrame) -> None:
    requests = load_runs(folder)[0].frame("requests")
    counted = requests[~requests["warmup"]]
    assert len(counted) < len(requests)
    assert rows.iloc[0]["slo_attainment"] == pytest.approx(counted["good"].sum() / len(counted))
    responded = counted[counted["outcome"] == "responded"]
    assert rows.iloc[0]["slo_attainment"] < responded["good"].mean()


def test_cost_follows_the_makespan(folder: Path, rows: pd.DataFrame) -> None:
    requests = load_runs(folder)[0].frame("requests")
    counted = requests[~requests["warmup"]]
    makespan_s = (counted["ended_ns"].max() - counted["scheduled_ns"].min()) / SECOND
    whole = rows.iloc[0]
    assert whole["throughput_rps"] == pytest.approx(whole["responded"] / makespan_s)
    assert whole["cost_per_1k"] == pytest.approx(7.2 / 3600 * makespan_s / whole["responded"] * 1000)


def test_embeddings_have_no_ttft(rows: pd.DataFrame) -> None:
    embedding = rows[(rows["kind"] == "embedding") & (rows["tenant"] == ALL)].iloc[0]
    assert math.isnan(embedding["ttft_ns_p50"]) and embedding["ttft_ns_samples"] == 0
    assert embedding["e2e_ns_p50"] > 0


def test_starvation_shows_as_the_longest_wait_of_the_low_class(rows: pd.DataFrame) -> None:
    wait = rows[rows["tenant"] != ALL].set_index(["kind", "priority"])["wait_ns_max"]
    assert wait["chat", "1"] > 3 * wait["chat", "0"]
    assert wait.max() == rows.iloc[0]["wait_ns_max"]


def test_priority_order_blocks_nobody_and_fifo_overtakes_nobody(tmp_path: Path, queueing: ModuleType) -> None:
    classes = (queueing.Class(), queueing.Class(priority=1))
    found = {}
    for order in ("fifo", "priority"):
        queueing.run(tmp_path / order, queueing.Queue(45, 0.02, 800, order=order, classes=classes))
        found[order] = measure(load_runs(tmp_path / order)[0]).iloc[0]
    assert found["fifo"]["hol_blocked"] > 100 and found["fifo"]["overtaken"] == 0
    assert found["priority"]["hol_blocked"] == found["priority"]["overtaken"] == 0


def test_a_warm_up_that_eats_the_run(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path, queueing.Queue(rate=50, service_s=0.01, requests=20), warmup_s=1000.0)
    with pytest.raises(DataError, match=r"requests\.parquet: no request was scheduled after the warm-up"):
        measure(load_runs(tmp_path)[0])


def test_without_tasks_the_queue_measures_are_absent(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path, queueing.Queue(rate=50, service_s=0.01, requests=50), tasks=False)
    assert "queue_depth_mean" not in measure(load_runs(tmp_path)[0]).columns


def test_the_documentation_names_every_metric() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in text] == []
    meanings = [metric.definition for metric in METRICS.values() if not metric.name.startswith(tuple(LATENCIES))]
    meanings += [meaning for _, meaning in LATENCIES.values()]
    assert [meaning for meaning in meanings if meaning not in text] == []
