"""Samples of a machine: CPU time goes to whom it belongs, and what is cut short or not there is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sage_bench import host_sampler
from sage_bench.host_sampler import Processes, Row, gpus
from sage_bench.host_samples import SAMPLES, write_host
from sage_bench.results.reader import read_table
from sage_bench.results.schema import HOST

BURN_S = 0.5
BURNS = f"""
import subprocess, sys, time
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
while time.process_time() < {BURN_S}: pass
print("burnt", flush=True)
time.sleep(60)
"""


def test_cpu_time_is_that_of_the_nearest_head_and_its_descendants() -> None:
    """Both burn half a second; the child of one is another's head."""
    with subprocess.Popen([sys.executable, "-c", BURNS, BURNS], stdout=subprocess.PIPE, text=True) as parent:
        try:
            heads = {os.getpid(): "we", parent.pid: "family"}
            processes, before = Processes(heads), time.monotonic_ns()
            rows: list[Row] = []
            assert parent.stdout is not None
            for _ in range(2):
                assert parent.stdout.readline() == "burnt\n"
            rows += processes.rows()
        finally:
            for child in host_sampler.psutil.Process(parent.pid).children():
                child.kill()
            parent.kill()
    by = {what: (at, cores) for at, what, cores, *_ in rows}
    assert set(by) == {"machine", "we", "family"}
    at, cores = by["family"]
    span_s = (at - before) / 1e9
    assert cores is not None and cores * span_s == pytest.approx(2 * BURN_S, rel=0.2)
    ours, whole = by["we"][1], by["machine"][1]
    assert ours is not None and whole is not None
    assert ours * span_s < BURN_S and whole * 1.1 > cores


def test_what_a_killed_sampler_left_is_read(tmp_path: Path) -> None:
    facts = {"interval_s": 1.0, "gpus": 0, "no_gpu": "NVML: none"}
    rows = [[2_000, "machine", 1.5, 10, None, None], [3_000, "gpu0", None, 20, 0.25, 300.0]]
    lines = [json.dumps(facts), *map(json.dumps, rows), '[4000, "mach']
    (tmp_path / SAMPLES).write_text("\n".join(lines))
    fact = write_host(tmp_path, 1_000)
    assert (fact.interval_s, fact.gpus, fact.no_gpu) == (1.0, 0, "NVML: none")
    table = read_table(tmp_path / "host.parquet", HOST).to_pylist()
    assert [row["at_ns"] for row in table] == [1_000, 2_000]
    assert table[1]["gpu_share"] == 0.25 and table[1]["cpu_cores"] is None
    assert not (tmp_path / SAMPLES).exists()


def test_without_a_sampler_there_is_an_empty_table_and_a_reason(tmp_path: Path) -> None:
    fact = write_host(tmp_path, 0)
    assert fact.gpus == 0 and fact.no_gpu
    assert read_table(tmp_path / "host.parquet", HOST).num_rows == 0


class _Unsupported(Exception):
    """What NVML says of a figure that a device does not have."""


def nvml(devices: int, power: Callable[[Any], int]) -> SimpleNamespace:
    """NVML's names, for machines without a GPU."""
    return SimpleNamespace(
        NVMLError=_Unsupported,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: devices,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40 + handle, memory=1),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=100, used=30 + handle),
        nvmlDeviceGetPowerUsage=power,
    )


def test_rows_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def power(handle: int) -> int:
        if handle:
            raise _Unsupported
        return 250_500

    monkeypatch.setitem(sys.modules, "pynvml", nvml(2, power))
    rows, count, reason = gpus()
    assert (count, reason) == (2, None)
    assert [row[1:] for row in rows()] == [("gpu0", None, 30, 0.4, 250.5), ("gpu1", None, 31, 0.41, None)]


def test_no_gpu_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(0, lambda handle: 0))
    assert gpus()[1:] == (0, "NVML finds no GPU")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus()[1:] == (0, "nvidia-ml-py is not installed")
