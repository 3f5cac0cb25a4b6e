"""A search for real, small: it starts at the defaults, goes on where it stopped, and is judged on seeds it has not seen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from sage_bench.config import checked, composed
from sage_bench.results.reader import load_runs
from sage_bench.tune import SEED_TESTED, Range, Space, Task, Tuned, _inputs, read_space, tune
from sage_core.errors import ConfigError
from sage_sim.profile import PROFILES

Sage = Callable[..., Any]

optuna = pytest.importorskip("optuna", reason="pip install optuna")

# Engines that may hold next to nothing are a default that any search improves on.
BAD = ("policy.limit_factor=0.01", "load.rate=40", "load.duration_s=3", "cluster=shared")
SPACE = Space("fifo", {"limit_factor": Range(0.01, 1.0)})


def search(folder: Path, trials: int, told: list[str]) -> Tuned:
    return tune(Task(SPACE, BAD, "e2e_ns_p95", "all", trials, seeds=1, test_seeds=3), folder, "t", told.append)


def test_a_search(tmp_path: Path) -> None:
    told: list[str] = []
    first = search(tmp_path / "a", 2, told)
    assert [each.partition(":")[0] for each in told[:2]] == ["trial 1 of 2", "trial 2 of 2"]
    assert first.history["limit_factor"].iloc[0] == 0.01 and not first.default
    assert first.values[1] < first.values[0]
    (best,) = first.best.values()
    assert first.overrides(SPACE) == ["policy=fifo", f"policy.limit_factor={best}"]
    asked = first.compared[0]
    assert (asked.metric, asked.kind, asked.verdict, asked.difference.n) == ("e2e_ns_p95", "all", "better", 3)
    assert asked.tuned < asked.default and asked.difference.high < 0

    told.clear()
    more = search(tmp_path / "a", 4, told)
    assert told[0] == "2 trials are there already" and told[1].startswith("trial 3 of 4")
    whole = search(tmp_path / "b", 4, [])
    resumed, uninterrupted = (each.history.drop(columns="started_at") for each in (more, whole))
    pd.testing.assert_frame_equal(resumed, uninterrupted)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a" / "t" / "trials.parquet"), more.history)
    assert len(pd.read_csv(tmp_path / "a" / "t" / "trials.csv")) == 4

    runs = load_runs(tmp_path / "b")
    assert sorted({run.manifest.seed for run in runs}) == [SEED_TESTED, SEED_TESTED + 1, SEED_TESTED + 2]
    assert len(runs) == 6 and not list((tmp_path / "b" / "t").glob(".trials*"))


SMALL = ("load.rate=20", "load.duration_s=2", "cluster=shared")
OTHER = "has trials of another task, configuration, data or code, which do not count"


def default_alone(folder: Path, told: list[str], *overrides: str) -> Tuned:
    """A search of one trial: the defaults'."""
    space = Space("hybrid", {"late_margin": Range(0, 1)})  # whole bounds of what is not whole
    return tune(Task(space, (*SMALL, *overrides), "e2e_ns_p95", "all", 1, seeds=1), folder, "t", told.append)


def test_trials_count_for_the_files_that_they_read(tmp_path: Path) -> None:
    profile, told = tmp_path / "p.yaml", list[str]()
    text = (PROFILES / "llama-3.1-8b-h100-tp1.yaml").read_text()
    profile.write_text(text)
    override = f"cluster.devices.0.llm.profile={profile}"
    first = default_alone(tmp_path, told, override)
    assert first.best == {"late_margin": 0.2} and first.default and len(first.history) == 1
    default_alone(tmp_path, told, override)
    assert told[1:] == ["1 trials are there already"]
    (line,) = [line for line in text.splitlines() if "per_pair_ns" in line]
    profile.write_text(text.replace(line, line.partition(":")[0] + ": 5000.0"))
    told.clear()
    slower = default_alone(tmp_path, told, override)
    assert OTHER in told[0] and told[1].startswith("trial 1 of 1")
    assert slower.values[0] > 1.5 * first.values[0]


def test_what_trials_are_made_of(tmp_path: Path, trace: Path) -> None:
    copy = tmp_path / "trace.parquet"
    copy.write_bytes(trace.read_bytes())

    def inputs(*overrides: str) -> tuple[str, ...]:
        return _inputs(*checked(composed(["load=trace", f"load.path={copy}", *overrides])))

    before = inputs()
    assert before == inputs() == inputs(f"results={tmp_path}") != inputs("policy=fifo")
    rows = pq.read_table(copy)
    pq.write_table(rows.slice(1), copy)
    assert inputs() != before


def test_the_kind_of_number_is_the_parameters() -> None:
    distributions = optuna.distributions
    assert isinstance(Range(0, 4).distribution(0.2), distributions.FloatDistribution)
    assert isinstance(Range(0, 4).distribution(2), distributions.IntDistribution)
    assert isinstance(Range(0.0, 4).distribution(2), distributions.FloatDistribution)


def test_two_searches_in_one_folder_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("policy: fifo\nspace:\n  limit_factor: {choices: [0.1, 1.0]}\n")
    options = ("--trials", "1", "--seeds", "1", "--jobs", "1", "--results", str(tmp_path))
    words = [sys.executable, "-m", "sage_bench", "tune", str(file), *SMALL, "policy.limit_factor=0.1", *options]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(text.count("trial ") for text in said) == [0, 1], said
    assert sum("1 trials are there already" in text for text in said) == 1


def test_the_command(sage: Sage, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("policy: fifo\nspace:\n  limit_factor: {choices: [0.01, 1.0]}\n")
    options = ("--trials", "3", "--seeds", "1", "--test-seeds", "2", "--metric", "e2e_ns_p95", "--jobs", "1")
    done = sage("tune", file, *BAD, *options, "--results", tmp_path)
    assert done.code == 0, done.err
    assert "policy=fifo policy.limit_factor=1.0" in done.out and "The table is of 2 other seeds" in done.out
    facts = json.loads((tmp_path / "tune_mine" / "tune.json").read_text())
    assert facts["best"] == {"limit_factor": 1.0} and not facts["best_is_default"]
    assert facts["task"]["space"]["space"]["limit_factor"]["choices"] == [0.01, 1.0]


@pytest.mark.parametrize("name", ["hybrid", "separate"])
def test_what_is_shipped_holds_the_defaults(name: str, tmp_path: Path) -> None:
    space = read_space(name)
    with pytest.raises(ConfigError, match="--metric: expected a metric that has a better side"):
        tune(Task(space, (), "offered"), tmp_path, "t", print)
    from sage_bench.tune import _defaults

    assert _defaults(space, composed([f"policy={space.policy}"]).policy).keys() == space.space.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: hybrid\nspace: {late_margin: {low: 1, high: 0}}", "expected low < high, got 1 and 0"),
        ("policy: hybrid\nspace: {late_margin: {low: 0, high: 1, log: true}}", "expected 0 < low < high"),
        ("policy: hybrid\nspace: {late_margin: {low: 0}}", "expected low and high, or choices"),
        ("policy: hybrid\nspace: {late_margin: {lowest: 0}}", "unknown field `lowest`"),
        ("policy: hybrid\nspace: {}", "expected `object` of length >= 1"),
        (
            "policy: hybrid\nspace: {margin: {low: 0, high: 1}}",
            "policy hybrid has no parameter 'margin'; it has laxity",
        ),
        (
            "policy: hybrid\nspace: {late_margin: {low: 0.5, high: 1.0}}",
            "space.late_margin leaves out the default",
        ),
        ("policy: none_such\nspace: {late_margin: {low: 0.5, high: 1.0}}", "none_such"),
        ("policy: [", "mine.yaml: "),
    ],
)
def test_a_space_that_makes_no_sense(sage: Sage, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    done = sage("tune", tmp_path / "mine.yaml", "--results", tmp_path)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err, done.err


def test_names(sage: Sage, tmp_path: Path) -> None:
    assert "expected one of hybrid, separate, or a YAML file" in sage("tune", "nothing").err
    assert "cannot be read: No such file" in sage("tune", "nothing.yaml").err
    assert "--name: expected a plain folder name" in sage("tune", "hybrid", "--name", "a/b").err
