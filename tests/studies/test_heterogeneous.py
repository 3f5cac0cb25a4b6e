"""``heterogeneous``: the crossover is that of ``sage hetero``, and the points are its points."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import msgspec
import pandas as pd
import pytest

from sage_bench.hetero import Asked, crossings, simulated
from sage_bench.metrics.statistics import Interval, Paired
from sage_bench.results.manifest import NAME, read_manifest
from sage_bench.studies import heterogeneous
from sage_bench.studies.findings import Findings
from sage_bench.studies.heterogeneous import HETEROGENEOUS
from sage_bench.studies.study import experiments_in

SHORT = ["load.duration_s=15", "warmup_s=1", "cooldown_s=1", "record.steps=false"]


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("hetero")
    small.sweep(
        folder, "heterogeneous", SHORT,
        {"load": ["documents/005", "documents/080"], "cluster": ["hetero_gpu", "hetero_cpu"], "seed": ["1", "2"]},
    )  # fmt: skip
    small.sweep(
        folder,
        "heterogeneous_policies",
        SHORT,
        {"load": ["documents/160"], "policy": ["round_robin", "hybrid"], "seed": ["1", "2"]},
    )
    return folder


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return HETEROGENEOUS.findings(experiments_in(results, HETEROGENEOUS))


def test_the_loads_are_those_of_sage_hetero(results: Path, findings: Findings, tmp_path: Path) -> None:
    """The same points by the other way: equal crossovers."""
    rows = [
        simulated(Asked(arm, rate, seed, 12.0, str(tmp_path), tuple(SHORT)))[0]
        for arm in ("gpu", "cpu")
        for rate in (5.0, 80.0)
        for seed in (1, 2)
    ]
    expected = crossings(pd.DataFrame(rows))
    assert expected, "no crossover between these rates: this test says nothing"
    for each in expected:
        assert any(f"{each.expense}: below {each.rate:.4g} documents/s" in sentence for sentence in findings.sentences)


def test_the_cpu_is_said_to_be_favoured(findings: Findings) -> None:
    assert any("The CPU is favoured" in sentence for sentence in findings.fairness)


def test_the_cheapest_is_marked_in_every_rate(findings: Findings) -> None:
    rows = findings.tables[0].sheet.rows
    marked = {row[0]: row[1] for row in rows if row[1].endswith("*")}
    assert marked == {"5": "CPU *", "80": "a GPU of its own *"}


def test_variance_of_utilisation_is_held_against_round_robin(findings: Findings) -> None:
    (claim,) = (each for each in findings.claims if each.requirement == 260)
    (table,) = (each for each in findings.tables if each.name == "mixed_pool")
    variance = {row[1]: float(row[-1].partition(" ")[0]) for row in table.sheet.rows}
    less = 1 - variance["hybrid"] / variance["round_robin"]
    assert float(claim.text.partition(" ")[0]) == pytest.approx(100 * abs(less), abs=1.0)
    assert f" % {'less' if less > 0 else 'more'} than under" in claim.text


def test_more_variance_is_not_called_less(results: Path, findings: Findings, small: ModuleType, tmp_path: Path) -> None:
    """Called by each other's names, the two policies change the word and the sign, and neither says less of a rise."""
    names = {"hybrid": "round_robin", "round_robin": "hybrid"}
    other = HETEROGENEOUS.findings(small.relabelled(results, tmp_path / "swapped", HETEROGENEOUS, names))
    told = [next(each.text for each in of.claims if each.requirement == 260) for of in (findings, other)]
    assert sorted("more" in text for text in told) == [False, True]
    assert not any(text.startswith("-") for text in told)


def test_claims_are_adjusted_for_how_many_rates_there_are(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same runs once more as those of another rate: two claims, so twice the p-value."""
    shutil.copytree(results, tmp_path / "two")
    for path in list((tmp_path / "two" / "heterogeneous_policies").iterdir()):
        copy = path.with_name(f"{path.name}-080")
        shutil.copytree(path, copy)
        manifest = read_manifest(copy / NAME)
        overrides = tuple(each.replace("documents/160", "documents/080") for each in manifest.overrides)
        (copy / NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, overrides=overrides)))
    monkeypatch.setattr(heterogeneous, "against", lambda *_: Paired(Interval(-0.1, -0.15, -0.05, 5), 0.03))
    outcomes = [
        each.outcome
        for of in (results, tmp_path / "two")
        for each in HETEROGENEOUS.findings(experiments_in(of, HETEROGENEOUS)).claims
        if each.requirement == 260
    ]
    assert outcomes == ["holds", "no significant difference", "no significant difference"]


def test_the_figure_is_drawn(findings: Findings) -> None:
    assert len(findings.figures[0].draw().axes) == 3
