"""``scalability``: speedups, percentiles, fairness and overhead are what the rows say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from sage_bench.figures.percentiles_rate import percentiles_rate
from sage_bench.figures.throughput_backends import throughput_backends
from sage_bench.metrics.measure import measure
from sage_bench.metrics.saturation import Saturation
from sage_bench.metrics.statistics import Interval
from sage_bench.results.manifest import Manifest, read_manifest
from sage_bench.results.reader import load_runs
from sage_bench.studies.findings import Findings, number
from sage_bench.studies.scalability import SCALABILITY, _plane_text
from sage_bench.studies.study import experiments_in
from sage_core.errors import DataError

SHORT = ["load.duration_s=12", "warmup_s=1", "cooldown_s=1", "record.steps=false"]
SEEDS = {"seed": ["1", "2"]}


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("scalability")
    small.sweep(
        folder, "scalability/backends", SHORT,
        {"cluster.devices.0.count": ["1", "2"], "load.rate": ["12", "24", "80"], "seed": ["1", "2"]},
    )  # fmt: skip
    small.sweep(folder, "scalability/load", [*SHORT, "cluster.devices.0.count=2"], {"load.rate": ["5", "200"], **SEEDS})
    small.sweep(folder, "scalability/clients", SHORT, {"load.users": ["1", "20"], **SEEDS})
    small.sweep(folder, "scalability/fairness", SHORT, {"policy": ["fifo", "hybrid"], "load.rate": ["90"], **SEEDS})
    small.sweep(
        folder, "scalability/models", SHORT, {"cluster": ["models/7b", "models/70b"], "load.rate": ["4"], **SEEDS}
    )
    return folder


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return SCALABILITY.findings(experiments_in(results, SCALABILITY))


def only(results: Path, keep: Callable[[Manifest], bool]) -> Findings:
    """What the study says of some of the runs."""
    every = experiments_in(results, SCALABILITY)
    kept = {name: runs.where(keep) for name, runs in every.simulated.items()}
    return SCALABILITY.findings(replace(every, simulated=kept))


def rows_of(findings: Findings, name: str) -> list[list[str]]:
    (table,) = (each for each in findings.tables if each.name == name)
    assert all(len(row) == len(table.sheet.columns) for row in table.sheet.rows)
    return table.sheet.rows


def first(cell: str) -> float:
    return float(cell.partition(" ")[0].replace(",", ""))


def served(path: Path) -> float:
    """Answers a second in the last three quarters of the counted arrivals, from the rows."""
    rows = pq.read_table(
        path / "requests.parquet", columns=["scheduled_ns", "ended_ns", "outcome", "warmup"]
    ).to_pandas()
    counted = rows.loc[~rows["warmup"], "scheduled_ns"]
    start = counted.min() + round(0.25 * (counted.max() - counted.min()))
    inside = rows["ended_ns"].between(start, counted.max(), inclusive="left") & (rows["outcome"] == "responded")
    return float(inside.sum() / ((counted.max() - start) / 1e9))


def runs_with(results: Path, experiment: str, *texts: str) -> list[Path]:
    """Folders of runs whose manifest has all of the overrides."""
    found = []
    for path in sorted((results / experiment).iterdir()):
        manifest = (path / "manifest.json").read_text(encoding="utf-8")
        if all(f'"{text}"' in manifest for text in texts):
            found.append(path)
    return found


def test_strong_scaling_is_the_ratio_of_what_was_answered(results: Path, findings: Findings) -> None:
    answered = {
        n: [
            served(path)
            for path in runs_with(results, "scalability_backends", f"cluster.devices.0.count={n}", "load.rate=80")
        ]
        for n in (1, 2)
    }
    assert [len(each) for each in answered.values()] == [2, 2]
    one, two = rows_of(findings, "strong_scaling")
    assert (one[0], two[0]) == ("1", "2")
    assert first(one[2]) == pytest.approx(np.mean(answered[1]), rel=0.01)
    assert first(two[3]) == pytest.approx(np.mean(np.array(answered[2]) / np.array(answered[1])), rel=0.01)
    assert 1.7 < first(two[3]) < 2.3, "two backends that are both beyond saturation do not answer twice as much as one"


def test_weak_scaling_offers_every_backend_the_same(results: Path, findings: Findings) -> None:
    rows = rows_of(findings, "weak_scaling")
    assert [row[1] for row in rows] == ["12", "24"]
    paths = runs_with(results, "scalability_backends", "cluster.devices.0.count=2", "load.rate=24")
    assert first(rows[1][2]) == pytest.approx(np.mean([served(path) for path in paths]), rel=0.01)


def test_saturation_is_found_between_what_is_kept_up_with_and_what_is_not(findings: Findings) -> None:
    (sentence,) = (each for each in findings.sentences if "backends sustain" in each)
    assert "2 backends sustain 5 requests/s and not 200" in sentence
    (claim,) = (each for each in findings.claims if each.id == "scalability-supports")
    assert claim.text == "5 requests/s with 2 simulated engines, sustained"


def test_fairness_is_over_all_hundred_clients(results: Path, findings: Findings) -> None:
    """Jain's index of service of fifo, computed again from the rows."""
    indices = []
    for path in runs_with(results, "scalability_fairness", "policy=fifo"):
        rows = pq.read_table(path / "requests.parquet").to_pandas()
        rows = rows[~rows["warmup"]]
        done = (rows["outcome"] == "responded") & (rows["ended_ns"] <= rows["scheduled_ns"].max())
        share = done.groupby(rows["tenant"], observed=True).mean().to_numpy()
        indices.append(share.sum() ** 2 / (len(share) * (share**2).sum()))
    assert len(indices) == 2
    (row,) = (each for each in rows_of(findings, "fairness") if each[1] == "fifo")
    assert first(row[5]) == pytest.approx(np.mean(indices), abs=0.002)
    assert any("Among " in each and "clients" in each for each in findings.sentences)


def test_the_longest_wait_is_the_longest_of_any_run(results: Path, findings: Findings) -> None:
    longest = [
        float(measure(run)["wait_ns_max"].max()) / 1e9
        for run in load_runs(results / "scalability_fairness")
        if run.manifest.policy.name == "hybrid"
    ]
    assert longest[0] != longest[1]
    (claim,) = (each for each in findings.claims if each.id == "scalability-fairness")
    assert f"nobody was queued longer than {number(max(longest))} s in any of the 2 runs" in claim.text


BOUNDS = (
    "scalability-strong",
    "scalability-weak",
    "scalability-overhead",
    "scalability-fairness",
    "scalability-models",
)


def test_a_claim_of_a_bound_needs_an_interval_on_one_side_of_it(results: Path, findings: Findings) -> None:
    outcomes = {each.id: each.outcome for each in only(results, lambda m: m.seed == 1).claims}
    assert {outcomes[name] for name in BOUNDS} == {"no significant difference"}, "one run has no interval"
    told = {each.id: each for each in findings.claims}
    for name in ("strong", "weak"):
        claim = told[f"scalability-{name}"]
        low, high = map(float, re.search(r"95 %: (\S+) to (\S+)\)", claim.text).groups())  # type: ignore[union-attr]
        decided = "holds" if low / 2 > 0.9 else "does not hold" if high / 2 < 0.9 else "no significant difference"
        assert claim.outcome == decided
    assert told["scalability-overhead"].outcome == told["scalability-models"].outcome == "holds"


def test_a_gateway_is_judged_by_its_own_runs(results: Path, tmp_path: Path) -> None:
    """Runs made to look live: few of them decide nothing, and take nothing from what the simulations decide."""
    live = tmp_path / "live"
    for path in runs_with(results, "scalability_backends", "load.rate=12"):
        shutil.copytree(path, live / path.name)
        manifest = msgspec.structs.replace(read_manifest(path), source="emulated")
        (live / path.name / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    every = experiments_in(results, SCALABILITY)
    for seeds, outcome in (((1, 2), "holds"), ((1,), "no significant difference")):
        runs = load_runs(live).where(lambda m, seeds=seeds: m.seed in seeds)  # type: ignore[misc]
        found = SCALABILITY.findings(replace(every, live={"scalability/backends": runs}))
        told = {each.id: each.outcome for each in found.claims}
        assert (told["scalability-overhead"], told["scalability-overhead-live"]) == ("holds", outcome)


def test_answered_is_one_number_in_every_table(findings: Findings) -> None:
    models, plane = rows_of(findings, "models"), rows_of(findings, "models_measured")
    assert [row[2] for row in models] == [row[2] for row in plane]


def test_the_ceiling_is_named_only_where_the_runs_show_it(results: Path, findings: Findings) -> None:
    assert any("The engines are the ceiling" in each for each in findings.sentences)
    for keep, said in (
        (lambda m: m.experiment != "scalability_load" or m.load.rate == 5, "No rate of the sweep is above the ceiling"),
        (lambda m: m.experiment != "scalability_load" or m.seed == 1, "these runs do not say what the ceiling is"),
    ):
        sentences = only(results, keep).sentences
        assert any(said in each for each in sentences)
        assert not any("The engines are the ceiling" in each for each in sentences)


def test_whether_the_plane_depends_on_the_model_is_tested(results: Path) -> None:
    (sentence,) = (each for each in only(results, lambda m: m.seed == 1).sentences if "The plane itself" in each)
    assert sentence.endswith("with 70B (no significant difference).")
    small, large = (
        pd.DataFrame({"seed": range(5), "control_ns_per_request": [scale * (1000.0 + seed) for seed in range(5)]})
        for scale in (1, 10)
    )
    assert _plane_text("7B", "70B", small, large).endswith("(more).")
    assert _plane_text("7B", "70B", large, small).endswith("(less).")
    assert _plane_text("7B", "70B", small, small).endswith("(no significant difference).")


def test_engines_of_the_experiments_are_told_apart(findings: Findings) -> None:
    (sentence,) = (each for each in findings.fairness if each.startswith("Engines are the same"))
    assert "backends: a100 (llama-3.1-8b-a100-tp1 with 256 sequences, no embeddings)" in sentence
    assert "clients, fairness: h100 (llama-3.1-8b-h100-tp1 with 128 sequences, bge-large-en-v1.5-h100)" in sentence


def test_overhead_is_a_smaller_part_of_a_larger_model(findings: Findings) -> None:
    small, large = rows_of(findings, "models")
    assert (small[0], large[0]) == ("7B", "70B")
    assert float(large[5].replace(",", "")) > float(small[5].replace(",", "")), "70B is not slower than 7B"
    assert all(0 < float(row[-2].partition(" ")[0]) < 1 for row in rows_of(findings, "models_measured"))


def test_figures_are_drawn_and_refuse_nothing(findings: Findings) -> None:
    for drawing in findings.figures:
        assert drawing.draw().axes
    with pytest.raises(DataError, match="no runs"):
        throughput_backends([], {}, "simulated")
    with pytest.raises(DataError, match="two rates"):
        percentiles_rate({"s": {"p50": {1.0: Interval(1.0, 1.0, 1.0, 2)}}}, Saturation(1.0, 2.0, 1.0), "simulated")


def test_a_point_of_another_configuration_is_not_averaged_in(results: Path, small: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "old")
    small.sweep(tmp_path / "old", "scalability/clients", [*SHORT, "warmup_s=2"], {"load.users": ["1"], "seed": ["1"]})
    with pytest.raises(DataError, match="two configurations of one point"):
        SCALABILITY.findings(experiments_in(tmp_path / "old", SCALABILITY))


def test_a_cut_file_is_named(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "cut")
    victim = next((tmp_path / "cut" / "scalability_load").iterdir()) / "requests.parquet"
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(DataError, match=r"requests\.parquet.*cut short"):
        SCALABILITY.findings(experiments_in(tmp_path / "cut", SCALABILITY))
