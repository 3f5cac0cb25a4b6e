"""Simulated and live runs side by side: over the same seeds, of one kind of engines. And what is not among the runs is told."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from sage_bench.results.reader import load_runs
from sage_bench.studies.findings import Findings
from sage_bench.studies.study import Experiments, Study, experiments_in
from sage_bench.studies.twins import TWIN, side_by_side, sides
from sage_core.errors import DataError

Engines = Literal["simulation", "live", "emulated"]


@pytest.fixture
def results(tmp_path: Path, queueing: ModuleType) -> Path:
    """Seed 1 ran both ways, seed 2 only in simulation and on a server that is slower; seed 3 is the sweep's."""

    def one(name: str, source: Engines, seed: int, service_s: float, *overrides: str) -> None:
        queueing.run(
            tmp_path / "queueing" / name, queueing.Queue(20, service_s, 300, seed), source=source, overrides=overrides
        )

    one("live-1", "emulated", 1, 0.01)
    one("twin-1", "simulation", 1, 0.01, TWIN)
    one("twin-2", "simulation", 2, 0.04, TWIN)
    one("sweep", "simulation", 3, 0.01)
    return tmp_path


def study() -> Study:
    return Study("queueing", "", "", "", ("queueing",), lambda _: Findings((), (), (), ()))


def table(results: Path) -> list[str]:
    of = sides(experiments_in(results, study()), "queueing")
    (found,) = side_by_side("live", of, lambda _: {}, {}, [("e2e_ns_p95", "chat")])
    (row,) = found.sheet.rows
    return row


def test_both_sides_are_over_the_seeds_that_both_have(results: Path) -> None:
    _, simulated, live, error = table(results)
    assert simulated == live and float(error) == 0.0


def test_two_kinds_of_engines_are_not_averaged(results: Path, queueing: ModuleType) -> None:
    queueing.run(results / "queueing" / "real", queueing.Queue(20, 0.01, 300, 1), source="live")
    with pytest.raises(DataError, match=r"different sources \(emulated, live\)"):
        table(results)


def test_what_is_left_out_is_told(results: Path, queueing: ModuleType) -> None:
    queueing.run(results / "queueing" / "cut", queueing.Queue(20, 0.01, 300, 4), status="interrupted")
    queueing.run(results / "queueing" / "late", queueing.Queue(20, 0.01, 300, 5), source="live", invalid=("too late",))
    found: Experiments = experiments_in(results, study())
    assert found.left_out == ["queueing/cut: interrupted, left out.", "queueing/late: invalid (too late), left out."]
    assert len(load_runs(results)) == len(found.runs) + 2
