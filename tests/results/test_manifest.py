"""The reproducibility checklist: complete, true, readable again, and written without git or a GPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sage_bench.results.manifest import (
    NAME,
    UNKNOWN,
    LoadFact,
    Manifest,
    PolicyFact,
    Timing,
    config_hash,
    read_manifest,
    software,
    write_manifest,
)
from sage_core.errors import DataError, OutputError


def written(folder: Path, **changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "experiment": "e",
        "run_id": "r",
        "source": "simulation",
        "status": "complete",
        "policy": PolicyFact("fifo", {"k": 1}),
        "seed": 3,
        "load": LoadFact(8.0, "poisson"),
        "config": {"seed": 3, "policy": {"name": "fifo"}, "load": {"rate": 8.0}},
        "duration_ns": 10**9,
        "digest": "ab" * 16,
        "steps": 2,
        "control_s": 0.1,
        "timing": Timing("2024-01-01T00:00:00Z", 1.0, 0.9, (0.1, 0.2, 0.3)),
        "native_build": "g++ 12",
    }
    return write_manifest(folder, **(facts | changes))


def test_it_reads_back_as_written_with_every_field(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_bytes(b"1,2\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes(b"seed: 3\n")
    manifest = written(run, traces=[trace], profiles={"llama": trace}, price_per_h=3.5, counts={"arrived": 7})
    assert read_manifest(run) == read_manifest(run / NAME) == manifest
    assert [trace.sha256 for trace in manifest.traces] == [hashlib.sha256(b"1,2\n").hexdigest()]
    assert manifest.profiles["llama"].bytes == 4
    assert manifest.outputs["config.yaml"].sha256 == hashlib.sha256(b"seed: 3\n").hexdigest()
    assert manifest.hardware.cores == os.cpu_count() and manifest.hardware.memory_bytes > 2**28
    assert manifest.hardware.network == "simulated"
    assert manifest.software.packages["numpy"] and len(manifest.software.packages_sha256) == 64
    assert not list(run.glob("*.partial"))


def test_rows_and_checksums_are_those_of_the_files(tmp_path: Path, queueing: ModuleType) -> None:
    manifest = queueing.run(tmp_path, queueing.Queue(rate=10, service_s=0.01, requests=50))
    for name, fact in manifest.outputs.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == fact.sha256
    assert manifest.outputs["requests.parquet"].rows == manifest.counts["arrived"] == 50


def test_config_hash_is_shared_by_arms_and_seeds_only() -> None:
    base = {"seed": 1, "policy": {"name": "fifo"}, "results": "here", "load": {"rate": 8, "kind": "poisson"}}
    same = [base | {"seed": 2}, base | {"policy": {}}, base | {"results": "there"}, dict(reversed(base.items()))]
    assert {config_hash(each) for each in same} == {config_hash(base)}
    assert config_hash(base | {"load": {"rate": 9, "kind": "poisson"}}) != config_hash(base)


def test_outside_a_checkout_the_commit_is_unknown(tmp_path: Path) -> None:
    found = software("build", tmp_path)
    assert (found.git_commit, found.git_dirty) == (UNKNOWN, None)


def test_without_git_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert written(tmp_path, checkout=tmp_path / "elsewhere").software.git_commit == UNKNOWN


def test_commit_and_dirt_of_a_checkout(tmp_path: Path) -> None:
    for name in ("clean", "dirty"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_text("1")
        for command in (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "c"],
        ):
            subprocess.run(["git", *command], cwd=folder, check=True)
    (tmp_path / "dirty" / "file").write_text("2")
    clean, dirty = software("", tmp_path / "clean"), software("", tmp_path / "dirty")
    assert len(clean.git_commit) == 40 and (clean.git_dirty, dirty.git_dirty) == (False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not the manifest of a run"),
        (b"{}", "missing required field `experiment`"),
        (b'{"format": 1, "experiment": 5}', r"Expected `str`, got `int` - at `\$.experiment`"),
    ],
)
def test_what_is_not_a_manifest_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / NAME).write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / NAME) in str(caught.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    text = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="format 99, expected 1"):
        read_manifest(tmp_path)


def test_a_missing_trace_and_an_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: cannot be read"):
        written(tmp_path, traces=[tmp_path / "nowhere.csv"])
    with pytest.raises(OutputError, match=r"gone.*cannot be written"):
        written(tmp_path / "gone")
