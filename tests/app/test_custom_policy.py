"""A policy in a file of the user's, outside the package, by ``_target_``; run from where it lies, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sage_bench.results.manifest import read_manifest
from sage_bench.results.reader import load_runs

Sage = Callable[..., Any]
TUTORIALS = Path(__file__).parents[2] / "examples" / "tutorials"
SMALL = ("load.rate=60", "load.duration_s=4")

LAST_COME = '''
"""Last come, first served."""
import numpy as np
from sage_core.policy import Policy
from sage_policies.limit import EngineLimit
from sage_policies.predict import MaxPrediction
from sage_policies.route import LeastInFlight

class LastCome:
    static = True
    def score(self, now, queued):
        return -queued.arrived_at.astype(np.float64)

class OneReplica:
    """Everything to the first replica of its pool."""
    live, load_weight = False, 0.0
    def score(self, now, tasks, replicas):
        scores = np.full((len(tasks), len(replicas)), np.inf)
        scores[:, 0] = 0.0
        return scores

def make(tasks: float = 0.05, one_replica: bool = False) -> Policy:
    route = OneReplica() if one_replica else LeastInFlight()
    return Policy("last_come", None, LastCome(), route, EngineLimit(tasks), MaxPrediction())
'''


@pytest.fixture
def author(tmp_path: Path) -> Path:
    folder = tmp_path / "author"
    folder.mkdir()
    (folder / "last_come_first.py").write_text(LAST_COME)
    return folder


def run_it(sage: Sage, author: Path, *overrides: str) -> Path:
    """Run from the author's folder into its ``results``; the run's folder."""
    before = set(author.glob("results/run/*"))
    done = sage("run", *SMALL, "policy=user", "policy._target_=last_come_first.make", *overrides, cwd=author)
    assert done.code == 0 and "sage:" not in done.err
    (folder,) = set(author.glob("results/run/*")) - before
    return folder


def test_it_decides(sage: Sage, author: Path) -> None:
    folder = run_it(sage, author)
    assert folder.name.startswith("last_come-s0-")
    assert read_manifest(folder).policy.name == "last_come"
    tasks = pq.read_table(folder / "tasks.parquet").to_pandas().query("pool == 'llm'").sort_values("dispatched_ns")
    waited = tasks[tasks["dispatched_ns"] > tasks["queued_ns"]]
    overtaken = (waited["queued_ns"].diff() < 0).sum()
    assert len(waited) > 20 and overtaken > len(waited) / 2, "of those who waited, the last to come went first"


def test_its_parameters_are_overrides(sage: Sage, author: Path) -> None:
    plain = read_manifest(run_it(sage, author))
    other = read_manifest(run_it(sage, author, "+policy.one_replica=true"))
    assert other.policy.parameters == {"one_replica": True} and other.digest != plain.digest
    (folder,) = author.glob(f"results/run/{other.run_id}")
    tasks = pq.read_table(folder / "tasks.parquet").to_pandas()
    assert tasks.groupby("pool", observed=True)["replica"].nunique().to_dict() == {"llm": 1, "embed": 1}


def test_its_runs_replay_and_compare(sage: Sage, author: Path) -> None:
    folder = run_it(sage, author)
    done = sage("replay", folder, cwd=author)
    assert done.code == 0 and "sage:" not in done.err
    away = sage("replay", folder, cwd=author.parent)
    assert away.code == 2 and "no module 'last_come_first'" in away.err
    source = author / "last_come_first.py"
    source.write_text(source.read_text().replace("-queued", "+queued"))
    changed = sage("replay", folder, cwd=author)
    assert changed.code == 7 and "replay diverged at step " in changed.err


def test_the_reference_mechanism_agrees(sage: Sage, author: Path) -> None:
    native, reference = run_it(sage, author), run_it(sage, author, "mechanism=reference")
    assert read_manifest(native).digest == read_manifest(reference).digest


def test_launchers_agree(sage: Sage, sage_process: Sage, author: Path) -> None:
    """One after the other or by worker processes, which look for the module where the command was given."""
    target = "policy._target_=last_come_first.make,sage_policies.presets.fifo"
    sweep = ("run", *SMALL, "policy=user", target, "seed=1,2", "--multirun")
    parallel = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    digests = []
    for call, name, extra in ((sage, "one", ()), (sage_process, "two", parallel)):
        done = call(*sweep, f"results={name}", *extra, cwd=author)
        assert done.code == 0 and "sage:" not in done.err
        digests.append({r.manifest.run_id: r.manifest.digest for r in load_runs(author / name)})
    assert digests[0] == digests[1] and len(set(digests[0].values())) == 4


def test_the_tutorial(sage_process: Sage, tmp_path: Path) -> None:
    """As its docstring says, word for word but for the length of the run."""
    command = "sage run policy=user policy._target_=my_policy.shortest_first load.duration_s=30"
    assert command in (TUTORIALS / "my_policy.py").read_text()
    done = sage_process(*command.split()[1:-1], "load.duration_s=5", f"results={tmp_path}", cwd=TUTORIALS)
    assert done.code == 0 and "sage:" not in done.err
    (run,) = load_runs(tmp_path)
    assert run.manifest.policy.name == "shortest_first" and run.manifest.counts["responded"] > 10
