"""Ctrl-C (or a batch system's SIGTERM) in the middle of a run leaves a partial result that is whole in itself, and exit code 130."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.config import composed
from sage_bench.results.manifest import Manifest, read_manifest
from sage_bench.run import run
from sage_core.events import RunEnded
from sage_core.log import decode_events

Sage = Callable[..., Any]
Start = Callable[..., subprocess.Popen[str]]
ENDLESS = ("experiment=mixed", "load.rate=60", "load.duration_s=100000", "warmup_s=0")


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    """The first file like ``pattern`` below ``path`` that holds more than its magic number, while ``process`` runs."""
    for _ in range(600):
        for found in path.glob(pattern):
            if found.stat().st_size > 4:
                return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} below {path} after 30 s")


def assert_whole(folder: Path) -> Manifest:
    """Readable, every request with an outcome, the log with its end."""
    manifest = read_manifest(folder)
    requests = pq.read_table(folder / "requests.parquet")
    outcomes = Counter(requests["outcome"].cast(pa.string()).to_pylist())
    assert outcomes.total() == manifest.counts["arrived"] == requests.num_rows
    assert outcomes["failed"] == manifest.counts["failed"] > 0
    steps = pq.read_table(folder / "steps.parquet")
    assert steps.num_rows == manifest.steps and steps["digest"][-1].as_py().hex() == manifest.digest
    (last,) = decode_events(manifest.steps, steps["events"][-1].as_py())
    assert isinstance(last, RunEnded)
    return manifest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run(sage: Sage, sage_started: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = sage_started("run", *ENDLESS, f"results={tmp_path}")
    folder = wait_for(tmp_path, "mixed/*/steps.parquet", process).parent
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert f"{folder}: interrupted, partial; " in out and "Traceback" not in err
    manifest = assert_whole(folder)
    assert manifest.status == "interrupted"
    reasons = pq.read_table(folder / "requests.parquet", filters=[("outcome", "=", "failed")])["reason"]
    assert set(reasons.cast(pa.string()).to_pylist()) == {"run was interrupted"}
    assert sage("replay", folder).code == 0
    done = sage("report", folder, "--no-figures", "--out", tmp_path / "report")
    assert done.code == 0 and "mixed" in done.out


def test_a_sweep_stops(sage_started: Start, tmp_path: Path) -> None:
    process = sage_started("run", *ENDLESS, f"results={tmp_path}", "seed=1,2,3", "--multirun")
    wait_for(tmp_path, "mixed/*/steps.parquet", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    (folder,) = (path.parent for path in (tmp_path / "mixed").glob("*/manifest.json"))
    assert assert_whole(folder).status == "interrupted"
    assert out.count("interrupted, partial") == 1


def test_before_the_run(sage_started: Start, tmp_path: Path) -> None:
    """While Python is still importing: nothing is written, nothing is printed but a word."""
    process = sage_started("run", *ENDLESS, f"results={tmp_path}")
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT) and not list(tmp_path.iterdir())
    assert process.returncode == -signal.SIGINT or "Traceback" not in err


@pytest.mark.parametrize("mechanism", ["native", "reference"])
def test_a_run_that_the_clock_stops_ends_the_same_way(sage: Sage, tmp_path: Path, mechanism: str) -> None:
    overrides = ("load.rate=30", "load.duration_s=5", "driver.until_s=2", f"mechanism={mechanism}")
    result = run(composed([*overrides, f"results={tmp_path}"]))
    assert assert_whole(result.folder).status == "complete"
    assert sage("replay", result.folder).code == 0
