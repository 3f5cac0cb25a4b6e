"""A study of real runs, small enough to make in a second: two policies, two seeds, two rates."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sage_bench.config import composed
from sage_bench.figures.slo_attainment import slo_attainment
from sage_bench.metrics.compare import conditions, means, measured
from sage_bench.metrics.measure import ALL
from sage_bench.publish.chapter import Chapter, chapter_of
from sage_bench.run import run
from sage_bench.studies.findings import Claim, Drawing, Findings, TableOf, decided, number
from sage_bench.studies.study import Experiments, Study, evidence, experiments_in
from sage_bench.tables import Sheet

RATES = (10, 120)


def _browser() -> ModuleType:
    """``browser.py`` beside this file; importlib mode has no import path to it."""
    spec = importlib.util.spec_from_file_location("sage_tests_browser", Path(__file__).parent / "browser.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["sage_tests_browser"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium: ``look`` at a page, or open a ``tab``."""
    module = _browser()
    if module.CHROMIUM is None:
        pytest.skip("no Chromium on PATH; on Debian: sudo tools/install-debian.sh --report")
    with module.Browser(tmp_path / "profile") as running:
        yield running


def findings(experiments: Experiments) -> Findings:
    """Attainment of two policies, with a text of every character that HTML or LaTeX might trip over."""
    runs = experiments.simulated["tiny"]
    rows = means(measured(conditions(runs)))
    whole = rows[(rows["metric"] == "slo_attainment") & (rows["kind"] == ALL)]
    cells = [[str(row["policy"]), f"{row['rate']:g}", f"{100 * row['mean']:.1f}"] for row in whole.to_dict("records")]
    best = float(whole["mean"].max())
    at_low = rows[rows["rate"] == RATES[0]]
    return Findings(
        tables=[
            TableOf(
                "attainment", "Means over seeds.", Sheet("Attainment", ["policy", "rate\n(req/s)", "SLO\n(%)"], cells)
            ),
            TableOf(
                "odd",
                "Odd & <b>bold</b>.",
                Sheet("Odd 100 % of $x_1$", ["a & b", "#"], [["<i>~^\\{}", "[1, 2] ±3"]]),
                core=False,
            ),
        ],
        figures=[Drawing("bars", f"Attainment at {RATES[0]} req/s & below 100 %.", lambda: slo_attainment(at_low))],
        sentences=[f"The best attains {number(100 * best)} % at one of the two rates."],
        claims=[
            Claim(
                "tiny-1",
                259,
                "attains 100 %",
                f"attains {number(100 * best)} %",
                decided(best >= 2, True),
                evidence(runs),
            ),
            Claim("tiny-2", 257, "p99 lower", "p99 differs by 0.0 %", decided(True, False), evidence(runs)),
        ],
        fairness=["Both policies see the same requests."],
    )


STUDY = Study("tiny", "9.9", "A tiny study", "Does it work at 100 % & below?", ("tiny",), findings)


def make_runs(results: Path) -> None:
    for rate in RATES:
        for policy in ("fifo", "hybrid"):
            for seed in (1, 2):
                overrides = [
                    "name=tiny", f"policy={policy}", f"load.rate={rate}", "load.duration_s=4", f"seed={seed}",
                    "record.steps=false", f"results={results}",
                ]  # fmt: skip
                run(composed(overrides), overrides)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    make_runs(folder)
    return folder


@pytest.fixture(scope="session")
def study() -> Study:
    return STUDY


@pytest.fixture(scope="session")
def chapter(results: Path) -> Chapter:
    return chapter_of(STUDY, experiments_in(results, STUDY))


@pytest.fixture(scope="session")
def make_tiny_runs() -> ModuleType:
    """This module: another test makes the same runs again."""
    return sys.modules[__name__]
