"""What people see of a sweep: how far it is, about how long it will take, what failed; whatever the launcher."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sage_bench.results.reader import load_runs
from sage_bench.sweep import progress as progress_module
from sage_bench.sweep import sweeper
from sage_bench.sweep.journal import PREFIX, Entry, Journal, Reader
from sage_bench.sweep.progress import Progress, span

Sage = Callable[..., Any]

SMALL = ("load.rate=20", "load.duration_s=2")


def entry(job: int, state: Any, **more: Any) -> Entry:
    return Entry(job=job, name=f"seed={job}", state=state, **more)


def made(tmp_path: Path, points: int) -> tuple[Reader, Progress, io.StringIO, list[str], list[str]]:
    reader, screen, lines, notes = Reader(tmp_path), io.StringIO(), [], []  # type: ignore[var-annotated]
    console = Console(file=screen, width=200, force_terminal=False)
    return reader, Progress(reader, points, lines.append, notes.append, console), screen, lines, notes


def test_counts_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    reader, progress, _, lines, notes = made(tmp_path, 100)
    for job in range(10):
        reader.journal.write(entry(job, "skipped"))
    progress.take()
    assert progress.text() == "10 of 100 points (10 there already), 0 s"
    reader.journal.write(entry(10, "begun", pid=7))
    progress.take()
    assert progress.running() == {7}
    now += 30.0
    for job in (10, 11, 12):
        reader.journal.write(entry(job, "done", line=f"run {job}", notes=("the same",)))
    reader.journal.write(entry(13, "failed", why="no"))
    assert progress.running() == set()
    # 4 points in 30 s since the first began; those that were there already cost nothing and say nothing.
    assert progress.text() == "14 of 100 points (10 there already, 1 failed), 30 s, about 10 min 45 s left"
    assert lines == ["run 10", "run 11", "run 12"] and set(notes) == {"the same"}


def test_lines_in_a_log_file_come_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "TELL_S", 0.05)
    monkeypatch.setattr(progress_module, "LOOK_S", 0.02)
    reader, progress, screen, _, _ = made(tmp_path, 2)
    told = threading.Event()
    with progress:
        reader.journal.write(entry(0, "done"))
        for _ in range(250):
            if "sweep: 1 of 2 points" in screen.getvalue() or told.wait(0.02):
                break
    assert "sweep: 1 of 2 points, 0 s" in screen.getvalue()


def test_a_summary(tmp_path: Path) -> None:
    reader, progress, screen, _, _ = made(tmp_path, 40)
    for job in range(30):
        reader.journal.write(entry(job, "failed", why=f"reason [{job}]", trace="Traceback: here" if job == 3 else ""))
    reader.journal.write(entry(30, "done", why="other code"))
    progress.take()
    progress.summary()
    told = screen.getvalue().splitlines()
    assert told[0] == "sweep: 1 of 40 points run (30 failed) in 0 s; 9 left, which the same command runs"
    assert told[1] == "sweep: 1 of those run had results that were made by other code"
    assert told[2] == "failed: 'seed=0': reason [0]" and told[22:] == ["failed: 10 more", "Traceback: here"]


def test_a_journal_has_a_writer_a_file_and_no_half_lines(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    other = Path(reader.journal.folder) / "elsewhere-12.jsonl"
    reader.journal.write(entry(1, "done"))
    other.write_bytes(b'{"job":2,"name":"seed=2","state":"done"}\n{"job":3,"na')
    assert [each.job for each in reader.new()] == [2, 1]
    with other.open("ab") as file:
        file.write(b'me":"seed=3","state":"done"}\n')
    assert [each.job for each in reader.new()] == [3] and reader.new() == []
    assert not reader.journal.stopped()
    reader.stop()
    assert reader.journal.stopped()
    Journal(str(tmp_path / "not" / "there")).write(entry(4, "done"))  # no room for it is no reason to lose a run
    reader.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_sweep_left_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    here = Reader(tmp_path).folder.name.rpartition("-")[0]
    (tmp_path / f"{here}-4194305").mkdir()  # above the highest process number
    (tmp_path / f"{here}-{os.getppid()}").mkdir()
    (tmp_path / f"{PREFIX}another-machine-1").mkdir()
    Reader(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{here}-{os.getpid()}", f"{here}-{os.getppid()}", f"{PREFIX}another-machine-1"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (4800, "1 h 20 min")],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_failures_do_not_stop_the_others(sage_process: Sage, tmp_path: Path, launcher: str) -> None:
    """A wrong value, a key that only one policy has, and a policy that breaks: each told, the rest is run."""
    if launcher == "submitit_local":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher")
    (tmp_path / "breaks.py").write_text("def policy():\n    return {}['nothing']\n")
    grid = ("policy=user", "policy._target_=sage_policies.presets.fifo,breaks.policy", "seed=-1,1")
    done = sage_process("run", *SMALL, *grid, "-m", f"results={tmp_path / 'r'}", f"hydra/launcher={launcher}")
    assert done.code == 2, done.err
    assert "1 of 4 points run (3 failed)" in done.err
    assert "seed=-1': config: seed: expected `int` >= 0, got -1" in done.err
    assert "breaks.policy seed=1': policy: breaks.policy cannot be made: KeyError: 'nothing'" in done.err
    assert "sage: 3 of 4 points failed; the first, 'policy._target_=sage_policies.presets.fifo seed=-1'" in done.err
    assert len(load_runs(tmp_path / "r")) == 1
    assert done.out.count(": done; ") == 1


def test_a_point_that_does_not_compose_is_one_failure(
    sage: Sage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the check before the first point does not meet the combination; where it does, nothing is run."""
    grid = (*SMALL, "policy=hybrid,fifo", "policy.late_margin=0.5", "-m", f"results={tmp_path}")
    early = sage("run", *grid)
    assert early.code == 2 and "late_margin" in early.err and not list(tmp_path.glob("run/*/manifest.json"))
    monkeypatch.setattr(sweeper, "_each_value_once", lambda points: [])
    late = sage("run", *grid)
    assert late.code == 2 and "1 of 2 points run (1 failed)" in late.err
    assert "failed: 'policy=fifo': config: Could not override 'policy.late_margin'" in late.err
    assert [each.manifest.policy.name for each in load_runs(tmp_path)] == ["hybrid"]
