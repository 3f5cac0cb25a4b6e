"""Points of sweeps, and the experiments that studies name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module

from sage_bench.config import composed
from sage_bench.metrics.statistics import Interval
from sage_bench.results.reader import Run
from sage_bench.run import run
from sage_bench.studies.e2e_rag import E2E_RAG
from sage_bench.studies.heterogeneous import HETEROGENEOUS
from sage_bench.studies.points import about, cell, choice_of, plain, ratio, span
from sage_bench.studies.robustness import ROBUSTNESS
from sage_bench.studies.scalability import SCALABILITY
from sage_bench.studies.study import FOLDERS, Size, Study, folder_of
from sage_bench.studies.whatif import WHATIF
from sage_core.errors import DataError

STUDIES = (E2E_RAG, SCALABILITY, HETEROGENEOUS, ROBUSTNESS, WHATIF)
SIZES: tuple[Size, ...] = ("full", "quick", "live")


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_size_of_an_experiment_writes_into_one_folder(study: Study) -> None:
    """And is a sweep over seeds: five at full size."""
    for size in SIZES:
        for experiment in study.live if size == "live" else study.experiments:
            with initialize_config_module("sage_bench.conf", version_base="1.3"):
                config = compose("config", [f"experiment={FOLDERS[size]}{experiment}"], return_hydra_config=True)
            assert config.name == folder_of(experiment)
            assert str(config.hydra.mode) == "RunMode.MULTIRUN"
            seeds = str(config.hydra.sweeper.params["seed"]).split(",")
            assert len(seeds) == 5 if size == "full" else len(seeds) <= 2


def test_what_was_chosen_is_read_from_the_command_line(tmp_path: Path) -> None:
    overrides = [
        "experiment=robustness",
        "cluster=robustness/slow",
        "load.duration_s=1",
        "warmup_s=0",
        f"results={tmp_path}",
    ]
    manifest = Run(run(composed(overrides), overrides).folder).manifest
    assert choice_of(manifest, "cluster") == "slow"
    with pytest.raises(DataError, match=r"run without load=; it is not a point"):
        choice_of(manifest, "load")


def test_words() -> None:
    assert cell(Interval(2e9, 1.9e9, 2.1e9, 5), "e2e_ns_p95") == "2.00 ±0.10"
    assert cell(Interval(float("nan"), float("nan"), float("nan"), 0), "e2e_ns_p95") == "–"
    assert cell(Interval(2.0, float("nan"), float("nan"), 1)) == "2.00"
    assert span(Interval(2.0, 1.0, 3.0, 5)) == " (95 %: 1.00 to 3.00)"
    assert span(Interval(2.0, float("nan"), float("nan"), 1)) == ""
    assert (plain(1000.0), about(156_682.3)) == ("1,000", "160,000")


def test_a_ratio_is_tested_as_it_is_told() -> None:
    """The sign of the mean difference is another question: where one seed is ten times as slow, it is that seed's alone."""
    seeds = range(1, 9)
    baseline = pd.DataFrame({"seed": seeds, "x": [100.0] * 7 + [1000.0]})
    other = pd.DataFrame({"seed": seeds, "x": [110.0] * 7 + [800.0]})
    found = ratio(baseline, other, "x")
    assert found.ratio.n == 8 and found.ratio.mean == pytest.approx(np.exp(np.mean(np.log([1.1] * 7 + [0.8]))))
    assert found.ratio.low < 1 < found.ratio.mean < found.ratio.high and found.p > 0.05
    always = ratio(baseline, baseline.assign(x=baseline["x"] * np.linspace(1.1, 1.2, 8)), "x")
    assert 1.1 < always.ratio.low < always.ratio.mean < always.ratio.high < 1.2 and always.p < 1e-4
    assert ratio(baseline, other[other["seed"] < 2], "x").ratio.n == 1
    assert ratio(baseline, other[other["seed"] > 99], "x").ratio.n == 0
