"""``ablation``: the sign of a difference is that of the rows, and every part that is missing is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_module

from sage_bench.results.reader import load_runs
from sage_bench.studies.ablation import ABLATION
from sage_bench.studies.findings import Findings
from sage_bench.studies.study import experiments_in
from sage_core.errors import DataError

CONF = Path(__file__).parents[2] / "conf"
SHORT = ["load.duration_s=25", "warmup_s=2", "cooldown_s=1"]


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("ablation")
    policies = ["hybrid", "hybrid_without/classes", "hybrid_without/in_flight_limits"]
    seeds = ["1", "2", "3"]
    small.sweep(folder, "ablation", SHORT, {"policy": policies, "load": ["comparison/adversarial"], "seed": seeds})
    arms = [f"ablation/{name}" for name in ("full", "no_control_plane", "no_batching", "no_cpu")]
    short = [*SHORT, "load.requests=2000"]
    small.sweep(folder, "ablation_system", short, {"arm": arms, "seed": seeds})
    return folder


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return ABLATION.findings(experiments_in(results, ABLATION))


def test_differences_are_without_less_with(results: Path, findings: Findings) -> None:
    (table,) = (each for each in findings.tables if each.name == "one_factor_off")
    rows = {row[0]: row for row in table.sheet.rows}
    assert set(rows) == {"no_classes", "no_in_flight_limits"}
    good: dict[str, list[float]] = {}
    for run in load_runs(results / "ablation"):
        of = run.frame("requests", ("good", "warmup"))
        good.setdefault(run.manifest.policy.name, []).append(of.loc[~of["warmup"], "good"].mean())
    less = 100 * (sum(good["no_in_flight_limits"]) - sum(good["hybrid"])) / 3
    assert less != 0 and float(rows["no_in_flight_limits"][1].split(" ")[0]) == pytest.approx(less, abs=0.06)


def test_parts_of_the_system_are_held_against_the_whole(findings: Findings) -> None:
    told = {each.id: each for each in findings.claims}
    assert {each.requirement for each in told.values()} == {91, 92, 93}
    assert told["part-no_batching"].outcome == "holds"
    (table,) = (each for each in findings.tables if each.name == "ablation_system")
    assert table.sheet.rows[0][0] == "full" and all(len(row) == len(table.sheet.columns) for row in table.sheet.rows)


def test_a_part_that_costs_is_told(small: ModuleType, results: Path, tmp_path: Path) -> None:
    names = {"full": "no_batching", "no_batching": "full"}
    found = ABLATION.findings(small.relabelled(results, tmp_path / "copy", ABLATION, names))
    told = {each.id: each for each in found.claims}
    assert told["part-no_batching"].outcome == "does not hold"


def test_few_seeds_are_told_to_be_few(findings: Findings) -> None:
    assert findings.nowhere == ["3 seeds are too few to say which ingredients make no difference."]


def test_the_whole_has_to_be_there(small: ModuleType, results: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ablation_system: no run of full"):
        ABLATION.findings(small.relabelled(results, tmp_path / "copy", ABLATION, {"full": "most"}))


def test_an_ingredient_that_is_missing_under_one_load_is_named(
    small: ModuleType, results: Path, tmp_path: Path
) -> None:
    shutil.copytree(results, tmp_path / "copy")
    grid = {"policy": ["hybrid", "hybrid_without/classes"], "load": ["comparison/overload"], "seed": ["1"]}
    short = ["load.duration_s=6", "warmup_s=1", "cooldown_s=0"]
    small.sweep(tmp_path / "copy", "ablation", short, grid)
    missing = r"no_in_flight_limits and hybrid have no runs of one seed under overload"
    with pytest.raises(DataError, match=missing):
        ABLATION.findings(experiments_in(tmp_path / "copy", ABLATION))


@pytest.mark.parametrize("kept", ["hybrid", "no_classes"])
def test_a_load_without_the_whole_or_a_whole_without_others(results: Path, kept: str) -> None:
    every = experiments_in(results, ABLATION)
    rest = every.simulated["ablation"].where(lambda m: m.policy.name == kept)
    with pytest.raises(DataError, match=r"ablation: no run of"):
        ABLATION.findings(replace(every, simulated={**every.simulated, "ablation": rest}))


def test_the_fewest_seeds_of_a_pair_count(results: Path) -> None:
    every = experiments_in(results, ABLATION)
    rest = every.simulated["ablation"].where(lambda m: m.policy.name == "hybrid" or m.seed < 3)
    found = ABLATION.findings(replace(every, simulated={**every.simulated, "ablation": rest}))
    assert found.nowhere == ["2 seeds are too few to say which ingredients make no difference."]


def test_the_figure_draws(findings: Findings) -> None:
    assert findings.figures[0].draw().axes


def test_every_ingredient_is_switched_off_once() -> None:
    with initialize_config_module("sage_bench.conf", version_base="1.3"):
        params = compose("config", ["experiment=ablation"], return_hydra_config=True).hydra.sweeper.params
    files = {f"hybrid_without/{path.stem}" for path in (CONF / "policy" / "hybrid_without").glob("*.yaml")}
    assert set(str(params.policy).split(",")) == {"hybrid", *files}
