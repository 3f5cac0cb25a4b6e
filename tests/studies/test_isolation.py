"""``isolation``: the interactive requests are the same in every arm, and what is said of the two tenants is what the rows say."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from sage_bench.results.reader import Run, Runs, load_runs
from sage_bench.studies.findings import Claim, Findings
from sage_bench.studies.isolation import ISOLATION, _frame
from sage_bench.studies.study import experiments_in
from sage_core.errors import DataError

ARMS = ("solo", "reserved", "fifo")
SEEDS = ("1", "2")


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("isolation")
    small.sweep(
        folder,
        "isolation",
        ["load.duration_s=45", "warmup_s=2"],
        {"arm": [f"isolation/{arm}" for arm in ARMS], "seed": SEEDS},
    )
    return folder


@pytest.fixture(scope="module")
def runs(results: Path) -> dict[tuple[str, int], Run]:
    return {(r.manifest.config["arm"]["name"], r.manifest.seed): r for r in load_runs(results)}


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return ISOLATION.findings(experiments_in(results, ISOLATION))


def claim(findings: Findings, id: str) -> Claim:
    return next(each for each in findings.claims if each.id == id)


def test_the_interactive_requests_are_the_same_in_every_arm(runs: dict[tuple[str, int], Run]) -> None:
    columns = ["kind", "scheduled_ns", "input_tokens", "output_tokens", "output_tokens_max"]
    for seed in map(int, SEEDS):
        seen = []
        for arm in ARMS:
            rows = runs[arm, seed].frame("requests", ("tenant", *columns))
            rows = rows[rows["tenant"] == "interactive"].sort_values(["scheduled_ns", "kind"])
            seen.append(rows[columns].astype({"kind": str}).reset_index(drop=True))
        assert len(seen[0]) > 800
        assert seen[0].equals(seen[1]) and seen[0].equals(seen[2])


def test_the_numbers_are_those_of_the_rows(runs: dict[tuple[str, int], Run], findings: Findings) -> None:
    (table,) = (each for each in findings.tables if each.name == "isolation")
    rows = {row[0]: row for row in table.sheet.rows}
    p99, served = {}, {}
    for arm in ARMS:
        latencies, flows = [], []
        for seed in map(int, SEEDS):
            of = runs[arm, seed].frame("requests")
            counted = of[~of["warmup"]]
            chats = counted[(counted["kind"] == "chat")]["ttft_ns"].sort_values().to_numpy()
            latencies.append(chats[-(-99 * len(chats) // 100) - 1])
            first, last = counted["scheduled_ns"].min(), counted["scheduled_ns"].max()
            batch = of[(of["tenant"] == "batch") & of["ended_ns"].between(first, last)]
            flows.append(len(batch) / (last - first))
        p99[arm], served[arm] = latencies, flows
    for arm in ARMS:
        of_solo = sum(a / b for a, b in zip(p99[arm], p99["solo"], strict=True)) / 2
        assert float(rows[arm][3].split(" ")[0]) == pytest.approx(of_solo, rel=0.01)
    share = sum(a / b for a, b in zip(served["reserved"], served["fifo"], strict=True)) / 2
    assert claim(findings, "isolation-batch").text.startswith(f"{100 * share:.1f} %")


def test_percentiles_are_by_nearest_rank(runs: dict[tuple[str, int], Run]) -> None:
    """As docs/metrics.md says: a p95 is a latency that a request had."""
    run = runs["fifo", 1]
    rows = run.frame("requests")
    long = rows[~rows["warmup"] & (rows["tenant"] == "batch") & (rows["kind"] == "generate")]["e2e_ns"].dropna()
    (p95,) = _frame(Runs([run]))["batch_e2e_p95"]
    assert p95 == sorted(long)[math.ceil(0.95 * len(long)) - 1] != long.quantile(0.95)


def test_a_loss_is_told_like_a_win(small: ModuleType, results: Path, tmp_path: Path) -> None:
    """With the names of the two arms exchanged, isolation is what does the damage."""
    found = ISOLATION.findings(
        small.relabelled(results, tmp_path / "copy", ISOLATION, {"reserved": "fifo", "fifo": "reserved"})
    )
    told = claim(found, "isolation-latency")
    assert float(told.text.split("x")[0]) > 3 and told.outcome != "holds"
    assert "more than the 1.2x asked for" in found.sentences[0]


def test_two_configurations_of_an_arm_and_seed_are_refused(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(results, folder)
    first = load_runs(folder)[0].folder
    shutil.copytree(first, first.with_name("z"))
    with pytest.raises(DataError, match=rf"{first.name} and .*z: two configurations of one point"):
        ISOLATION.findings(experiments_in(folder, ISOLATION))


def test_an_arm_that_was_not_run_is_named(small: ModuleType, results: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="isolation: no run of solo"):
        ISOLATION.findings(small.relabelled(results, tmp_path / "copy", ISOLATION, {"solo": "alone"}))


def test_figures_draw(findings: Findings) -> None:
    for drawing in findings.figures:
        assert len(drawing.draw().axes) == 2
