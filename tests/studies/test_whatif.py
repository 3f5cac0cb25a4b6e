"""``whatif``: an open loop is predicted exactly, a closed one is not; which record is meant is never guessed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from sage_bench.config import composed
from sage_bench.results.manifest import NAME, Manifest, read_manifest
from sage_bench.run import run
from sage_bench.studies.findings import Findings
from sage_bench.studies.study import experiments_in
from sage_bench.studies.whatif import WHATIF
from sage_core.errors import DataError

SHORT = ["warmup_s=1", "cooldown_s=1"]
GRID = {"policy": ["fifo", "hybrid"], "seed": ["1", "2"]}


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("whatif")
    short = [*SHORT, "load.duration_s=10"]
    small.sweep(folder, "whatif", short, {"load": ["whatif/open"], **GRID})
    small.sweep(folder, "whatif", [*short, "load.users=200"], {"load": ["whatif/closed"], **GRID})
    small.sweep(folder, "whatif_predicted", SHORT, {"load": ["whatif/record", "whatif/record_closed"], **GRID})
    return folder


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return WHATIF.findings(experiments_in(results, WHATIF))


def test_an_open_loop_is_predicted_to_the_decision(findings: Findings) -> None:
    assert (
        "Open loop: all 2 predictions made the very decisions of the real run; their error is zero."
        in findings.sentences
    )
    (table,) = findings.tables
    for row in table.sheet.rows:
        if row[0] == "open loop":
            assert row[3] == row[4]
            assert row[5:] == ["+0.00", "+0.00"]


def test_a_closed_loop_is_not_and_it_is_said(findings: Findings) -> None:
    (claim,) = (each for each in findings.claims if each.id == "whatif-closed-simulation")
    (table,) = findings.tables
    errors = [float(row[6]) for row in table.sheet.rows if row[0] == "closed loop"]
    assert max(map(abs, errors)) > 0
    assert claim.outcome == ("holds" if max(map(abs, errors)) <= 5.0 else "does not hold")
    assert not any(each.startswith("closed loop") for each in findings.nowhere)
    assert findings.figures[0].draw().axes


def test_without_a_prediction_there_is_nothing_to_hold_against(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "whatif")
    run(composed(["experiment=whatif", *SHORT, "load.duration_s=3", f"results={tmp_path / 'other'}"]), ["policy=fifo"])
    with pytest.raises(DataError, match="run experiment=whatif, then"):
        WHATIF.findings(experiments_in(tmp_path / "other", WHATIF))


def test_the_record_is_the_one_that_was_asked_for(results: Path, small: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "more")
    asked = ["experiment=whatif_predicted", *SHORT, f"results={tmp_path / 'more'}"]
    with pytest.raises(DataError, match="seed 9: no complete and valid run; run the sweep that records it first"):
        run(composed([*asked, "seed=9"]))
    small.sweep(
        tmp_path / "more",
        "whatif",
        [*SHORT, "load.duration_s=3"],
        {"load": ["whatif/open"], "policy": ["fifo"], "seed": ["1"]},
    )
    with pytest.raises(DataError, match="seed 1: 2 runs; remove"):
        run(composed([*asked, "seed=1"]))


def changed(folder: Path, **fields: object) -> None:
    manifest: Manifest = msgspec.structs.replace(read_manifest(folder / NAME), **fields)
    (folder / NAME).write_bytes(msgspec.json.encode(manifest))


def test_a_claim_names_the_runs_of_both_experiments(findings: Findings) -> None:
    assert {each.evidence for each in findings.claims} == {("whatif", "whatif_predicted")}


def test_a_seed_without_its_prediction_is_in_no_column(results: Path, findings: Findings, tmp_path: Path) -> None:
    """Seed 3 was recorded and really run, and never predicted."""
    shutil.copytree(results, tmp_path / "more")
    for path in list((tmp_path / "more" / "whatif").glob("*-s2-*")):
        other = path.with_name(path.name.replace("-s2-", "-s3-"))
        shutil.copytree(path, other)
        changed(other, seed=3)
    more = WHATIF.findings(experiments_in(tmp_path / "more", WHATIF))
    assert more.tables[0].sheet.rows == findings.tables[0].sheet.rows


def test_of_repeated_live_runs_the_first_is_meant_everywhere(results: Path, tmp_path: Path) -> None:
    """Closed loop as if it had run live, once, and then with each run repeated later: with the requests of the other seed."""
    once = tmp_path / "once"
    shutil.copytree(results, once)
    for path in (once / "whatif").iterdir():
        if read_manifest(path / NAME).load.name == "ClosedLoop":
            changed(path, source="emulated")
    for path in (once / "whatif_predicted").iterdir():
        manifest = read_manifest(path / NAME)
        if manifest.config["load"]["load"] == "ClosedLoop":
            changed(path, config=manifest.config | {"load": manifest.config["load"] | {"source": "emulated"}})
    shutil.copytree(once, tmp_path / "twice")
    for path in list((tmp_path / "twice" / "whatif").glob("*-s1-*")):
        manifest = read_manifest(path / NAME)
        if manifest.source == "emulated":
            (second,) = (
                each
                for each in path.parent.glob(f"{manifest.policy.name}-s2-*")
                if read_manifest(each / NAME).source == "emulated"
            )
            later = msgspec.structs.replace(manifest.timing, started_at="2999-01-01T00:00:00Z")
            for name in ("aaa", "zzz"):  # whichever end of the folders is taken
                shutil.copytree(second, path.parent / f"{name}-{path.name}")
                changed(path.parent / f"{name}-{path.name}", seed=1, timing=later, digest="0")
    told = [WHATIF.findings(experiments_in(folder, WHATIF)) for folder in (once, tmp_path / "twice")]
    assert any(row[0].startswith("closed loop, ") for row in told[0].tables[0].sheet.rows)
    assert told[0].tables[0].sheet.rows == told[1].tables[0].sheet.rows
    assert told[0].sentences == told[1].sentences
