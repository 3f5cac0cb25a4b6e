"""``policy_comparison``: it runs what the library has, and says of each cell what the rows say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hydra import compose, initialize_config_module

from sage_bench.config import composed
from sage_bench.results.manifest import NAME, Manifest, read_manifest
from sage_bench.studies.findings import Findings
from sage_bench.studies.policy_comparison import LEVELS, POLICY_COMPARISON
from sage_bench.studies.study import Experiments, experiments_in
from sage_core.errors import DataError
from sage_policies.presets import PRESETS


def grid() -> dict[str, Any]:
    with initialize_config_module("sage_bench.conf", version_base="1.3"):
        hydra = compose("config", ["experiment=policy_comparison"], return_hydra_config=True).hydra
    return {str(key): str(values).split(",") for key, values in hydra.sweeper.params.items()}


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("policies")
    small.sweep(
        folder,
        "policy_comparison",
        ["load.duration_s=25", "warmup_s=2", "cooldown_s=1"],
        {
            "policy": ["hybrid", "fifo"],
            "load": ["comparison/bursty_light", "comparison/bursty"],
            "seed": ["1", "2", "3", "4", "5"],
        },
    )
    return folder


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return POLICY_COMPARISON.findings(experiments_in(results, POLICY_COMPARISON))


def rows_of(findings: Findings, name: str) -> list[list[str]]:
    (table,) = (each for each in findings.tables if each.name == name)
    assert all(len(row) == len(table.sheet.columns) for row in table.sheet.rows)
    return table.sheet.rows


def kept(results: Path, copy: Path, keep: Callable[[Manifest], bool]) -> Experiments:
    """A copy with the runs that satisfy ``keep``."""
    shutil.copytree(results, copy)
    for path in list(copy.rglob(NAME)):
        if not keep(read_manifest(path)):
            shutil.rmtree(path.parent)
    return experiments_in(copy, POLICY_COMPARISON)


def test_every_preset_takes_part() -> None:
    """A policy that is added to the library is compared, or this fails."""
    assert sorted(grid()["policy"]) == sorted([*PRESETS, "upstream_hybrid_counted"])


def test_every_load_is_there_below_near_and_above_what_the_devices_sustain() -> None:
    loads = grid()["load"]
    names = list(dict.fromkeys(load.partition("_")[0] for load in loads))
    assert len(loads) == len(LEVELS) * len(names)
    for name in names:
        rates = [composed([f"load={name}{end}"])["load"]["rate"] for end in ("_light", "", "_over")]
        assert rates == sorted(rates) and len(set(rates)) == len(rates), name


def test_a_cell_for_each_load_and_the_best_other_in_it(findings: Findings) -> None:
    rows = rows_of(findings, "against_best")
    assert [row[0] for row in rows] == ["bursty light", "bursty near"]
    near = rows[1]
    assert near[2] == "fifo" and float(near[1]) > float(near[3])
    assert near[-1] == "better" and rows[0][-1] == "no significant difference"
    assert [row[0] for row in rows_of(findings, "against_each")] == ["fifo"]
    assert rows_of(findings, "trade_offs_near")[0][0] == "hybrid"


def test_where_it_does_not_matter_is_said(findings: Findings) -> None:
    assert findings.nowhere == ["bursty: up to 30 requests/s it does not matter which policy decides; at 100 it does."]


def test_a_loss_is_told_like_a_win(small: ModuleType, results: Path, findings: Findings, tmp_path: Path) -> None:
    assert [each.outcome for each in findings.claims] == ["holds", "holds"]
    names = {"hybrid": "fifo", "fifo": "hybrid"}
    found = POLICY_COMPARISON.findings(small.relabelled(results, tmp_path / "copy", POLICY_COMPARISON, names))
    assert [each.outcome for each in found.claims] == ["does not hold", "does not hold"]
    assert any(sentence.startswith("It loses under bursty near") for sentence in found.sentences)
    assert "(bursty near)" in found.claims[0].text


def test_seeds_of_one_side_decide_nothing(results: Path, tmp_path: Path) -> None:
    """fifo has five seeds, hybrid one: the pairs are what counts, and too few of them are not "no difference"."""
    runs = kept(results, tmp_path / "copy", lambda m: m.policy.name == "fifo" or m.seed == 1)
    found = POLICY_COMPARISON.findings(runs)
    assert [each.outcome for each in found.claims] == ["no significant difference"] * 2
    assert "no significant difference in 0; 2 ran with too few seeds to say." in found.sentences[0]
    assert [row[-1] for row in rows_of(found, "against_best")] == ["too few seeds"] * 2
    assert rows_of(found, "against_each")[0][1:5] == ["0", "0", "0", "2"]


def test_seeds_of_a_trace_are_no_repetitions(results: Path, tmp_path: Path) -> None:
    """The load under which hybrid is better, called a trace: it is shown, and nothing is claimed from it."""
    folder = tmp_path / "copy"
    shutil.copytree(results, folder)
    for path in folder.rglob(NAME):
        manifest = read_manifest(path)
        load = {**manifest.config["load"], "path": "trace_day.parquet", "rate_scale": 2}
        overrides = tuple("load=trace" if each == "load=comparison/bursty" else each for each in manifest.overrides)
        path.write_bytes(
            msgspec.json.encode(
                msgspec.structs.replace(manifest, overrides=overrides, config={**manifest.config, "load": load})
            )
        )
    found = POLICY_COMPARISON.findings(experiments_in(folder, POLICY_COMPARISON))
    verdicts = {row[0]: row[-1] for row in rows_of(found, "against_best")}
    assert verdicts == {"bursty light": "no significant difference", "day x2 near": "better"}
    assert "in 0 of 1 cells" in found.sentences[0]
    assert [each.outcome for each in found.claims] == ["holds", "does not hold"]
    assert found.claims[0].text.startswith(
        "significantly worse in 0 of 1 cells; no interval of a difference reaches below "
    )
    assert any("day x2" in sentence and "no claim" in sentence for sentence in found.fairness)


def test_one_policy_alone_is_compared_with_nothing(results: Path, tmp_path: Path) -> None:
    runs = kept(results, tmp_path / "copy", lambda m: m.policy.name == "hybrid")
    with pytest.raises(DataError, match="no run of a policy besides hybrid"):
        POLICY_COMPARISON.findings(runs)


def test_without_hybrid_there_is_nothing_to_say(small: ModuleType, results: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run of hybrid"):
        POLICY_COMPARISON.findings(small.relabelled(results, tmp_path / "copy", POLICY_COMPARISON, {"hybrid": "other"}))


def test_the_matrix_draws(findings: Findings) -> None:
    assert findings.figures[0].draw().axes
