"""Runs logged to a real MLflow store: every one once, with its numbers and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sage_bench.metrics.measure import ALL
from sage_bench.metrics.summary import summarise
from sage_bench.publish.mlflow_log import log_runs
from sage_bench.results.reader import load_runs
from sage_core.errors import ConfigError

pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'sage-serving[mlflow]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_every_run_is_logged_once(results: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    summary = summarise(load_runs(results))
    assert log_runs(summary, uri) == (8, 0)
    assert log_runs(summary, uri) == (0, 8), "a second time changes nothing"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    logged = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    assert len(logged) == 8
    rows = summary.rows[(summary.rows["kind"] == ALL) & (summary.rows["tenant"] == ALL)]
    for row in rows.to_dict("records"):
        run = logged[row["run_id"]]
        assert run.data.metrics["slo_attainment"] == pytest.approx(row["slo_attainment"])
        assert run.data.params["policy"] == run.data.params["arm"] == row["policy"]
        assert run.data.params["override.load.rate"] == f"{row['rate']:g}"
        names = {each.path for each in client.list_artifacts(run.info.run_id)}
        assert names == {"manifest.json", "config.yaml"}
    assert (tmp_path / "mlartifacts" / "tiny").is_dir()
    assert not (Path.cwd() / "mlruns").exists()


def test_a_store_that_cannot_be_used(results: Path) -> None:
    with pytest.raises(ConfigError, match="--mlflow: nonsense://x"):
        log_runs(summarise(load_runs(results)), "nonsense://x")


def test_without_mlflow_the_user_is_told(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = summarise(load_runs(results))
    for name in [name for name in sys.modules if name.startswith("mlflow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'sage-serving\[mlflow\]'"):
        log_runs(summary, "sqlite:///x.db")


def test_nothing_else_imports_mlflow() -> None:
    code = "import sys, sage_bench.report, sage_bench.publish.publish; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
