"""Invariant 6: configuration and seed decide everything, down to the bytes of the tables."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sage_bench.run import RunResult
from sage_policies.presets import PRESETS

Go = Callable[..., RunResult]

# Everything that could go wrong at once: shared devices, jitter, a crash, a drain, bursts, tenants, retries.
HARD = (
    "cluster=shared", "load=tenants_bursty", "load.rate=100", "load.duration_s=5", "seed=11",
    "cluster.faults=[{at_s: 0.5, device: 0, restart_after_s: 0.5}, {at_s: 1, device: 3, kind: drain}]",
)  # fmt: skip
TABLES = ("requests", "tasks", "replicas", "steps")

SCRIPT = """
import hashlib, json, sys
from sage_bench.config import composed
from sage_bench.run import RunResult, run
TABLES = {tables}
{fingerprint}
overrides = json.loads(sys.argv[1])
print(json.dumps([fingerprint(run(composed([*overrides, "policy=" + name]))) for name in sys.argv[2:]]))
"""


def fingerprint(result: RunResult) -> list[str]:
    """Digest of the decisions, name of the folder, checksum of each table."""
    sums = [hashlib.sha256((result.folder / f"{name}.parquet").read_bytes()).hexdigest() for name in TABLES]
    return [result.finish.digest.hex(), result.folder.name, *sums]


@pytest.mark.parametrize("policy", sorted(PRESETS))
def test_twice_and_by_the_reference(go: Go, policy: str) -> None:
    """The reference replaces the mechanism and the engines; only the folder, named by the configuration, differs."""
    native = fingerprint(go(*HARD, f"policy={policy}"))
    assert fingerprint(go(*HARD, f"policy={policy}")) == native
    small = (*HARD, f"policy={policy}", "load.requests=150")
    reference = fingerprint(go(*small, "mechanism=reference"))
    native = fingerprint(go(*small))
    assert reference[0] == native[0] and reference[2:] == native[2:]
    assert reference[1] != native[1]


def test_under_any_hash_seed(go: Go, tmp_path: Path) -> None:
    names = ["hybrid", "separate", "slo_aware"]
    here = [fingerprint(go(*HARD, f"policy={name}")) for name in names]
    # Importlib mode gives test modules no import path: the other process gets the text.
    script = SCRIPT.format(tables=TABLES, fingerprint=inspect.getsource(fingerprint))
    for hash_seed in ("0", "4242"):
        overrides = json.dumps([*HARD, f"results={tmp_path / hash_seed}"])
        done = subprocess.run(
            [sys.executable, "-c", script, overrides, *names],
            env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == here, f"PYTHONHASHSEED={hash_seed}"


def test_another_seed_is_another_run(go: Go) -> None:
    digests = {go(*HARD[:4], f"seed={seed}").finish.digest for seed in range(4)}
    assert len(digests) == 4


def test_the_seed_reaches_every_stream(go: Go) -> None:
    """With arrivals and lengths fixed, what is left to chance is the network: it too follows the seed."""
    fixed = ("load=standard", "load.arrivals={_target_: sage_bench.loads.Constant}", "load.requests=40")
    assert len({go(*fixed, "cluster=small", f"seed={seed}").finish.digest for seed in (1, 2)}) == 2
    assert len({go(*fixed, "cluster=standard", f"seed={seed}").finish.digest for seed in (1, 2)}) == 1


def test_where_results_go_and_who_watches_change_nothing(go: Go, tmp_path: Path) -> None:
    here, there = go(*HARD), go(*HARD, f"results={tmp_path / 'elsewhere'}")
    assert fingerprint(here) == fingerprint(there) and here.folder != there.folder
    blind = go(*HARD, "record.tasks=false", "record.steps=false")
    assert blind.finish.digest == here.finish.digest
