"""Runs in an MLflow tracking store, for those who keep their experiments there.

One MLflow run for each of ours: what was configured as parameters, what was measured as metrics, manifest and
configuration as artefacts. A run that is there already is left alone, so logging twice changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.summary import Summary
from sage_bench.results.manifest import NAME, Manifest
from sage_bench.results.reader import Run
from sage_core.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG: Final = "sage.run"
"""Names our run: its id, and the hash of what it wrote, so that a run made again is another one."""

_SQLITE: Final = "sqlite:///"


def log_runs(summary: Summary, uri: str) -> tuple[int, int]:
    """Log every run of ``summary`` to the store at ``uri``; how many were logged, and how many were there.

    Raises :class:`ConfigError`: MLflow is not installed, or does not take the store.
    """
    # Before the import: it asks these, and a benchmark does not call home.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise ConfigError("--mlflow: MLflow is not installed; run: pip install 'sage-serving[mlflow]'") from error
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments: dict[str, str] = {}
        logged = before = 0
        for condition in summary.conditions:
            for arm, runs in condition.arms.items():
                for run in runs:
                    name = run.manifest.experiment
                    if name not in experiments:
                        experiments[name] = _experiment(client, name, uri)
                    if _log(client, experiments[name], run, arm, summary.rows):
                        logged += 1
                    else:
                        before += 1
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--mlflow: {uri}: {reason}; expected a store such as sqlite:///runs.db") from error
    return logged, before


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Its id in the store. Artefacts of a database in a file go into a folder beside it, not into the working folder."""
    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    beside = None
    if uri.startswith(_SQLITE):
        beside = (Path(uri.removeprefix(_SQLITE)).resolve().parent / "mlartifacts" / name).as_uri()
    return str(client.create_experiment(name, artifact_location=beside))


def _log(client: MlflowClient, experiment: str, run: Run, arm: str, rows: pd.DataFrame) -> bool:
    """Whether it was not there before."""
    from mlflow.entities import Metric, Param

    m = run.manifest
    key = f"{m.run_id}/{m.digest}/{m.timing.started_at}"
    if client.search_runs([experiment], f"tags.`{TAG}` = '{key}'", max_results=1):
        return False
    tags = {TAG: key, "source": m.source, "commit": m.software.git_commit, "config_hash": m.config_hash}
    entry = client.create_run(experiment, run_name=m.run_id, tags=tags)
    at = entry.info.start_time
    parameters = [Param(name, value) for name, value in _parameters(m, arm).items()]
    metrics = [Metric(name, value, at, 0) for name, value in _metrics(rows[rows["run_id"] == m.run_id]).items()]
    client.log_batch(entry.info.run_id, metrics=metrics, params=parameters)
    for name in (NAME, "config.yaml"):
        if (run.folder / name).is_file():
            client.log_artifact(entry.info.run_id, str(run.folder / name))
    client.set_terminated(entry.info.run_id, "FINISHED" if m.status == "complete" else "FAILED")
    return True


def _parameters(m: Manifest, arm: str) -> dict[str, str]:
    chosen = {"arm": arm, "policy": m.policy.name, "seed": str(m.seed), "load": m.load.name, "status": m.status}
    if m.load.rate is not None:
        chosen["rate_rps"] = f"{m.load.rate:g}"
    overrides: Mapping[str, Any] = dict(
        each.lstrip("+~").partition("=")[::2] for each in m.overrides if not each.startswith(("results=", "seed="))
    )
    return {**chosen, **{f"override.{name.replace('@', '.')}": str(value) for name, value in overrides.items()}}


def _metrics(rows: pd.DataFrame) -> dict[str, float]:
    """Of all requests under the metric's name, of a kind below the kind's."""
    found = {}
    for row in rows[(rows["tenant"] == ALL) & (rows["priority"] == ALL)].to_dict("records"):
        prefix = "" if row["kind"] == ALL else f"{row['kind']}/"
        for name in METRICS:
            if name in row and not pd.isna(row[name]):
                found[f"{prefix}{name}"] = float(row[name])
    return found
