"""The application as a user meets it: the command line, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.cli import main
from sage_bench.config import composed
from sage_bench.run import RunResult, run

ENTRY = "import sys; sys.argv[0] = 'sage'; from sage_bench.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Sage = Callable[..., Done]


@pytest.fixture
def sage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sage:
    """``sage(*args, cwd=folder)`` in this process. What is not a documented error comes out as the exception it is."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by the command too; here so that it is put back

    def call(*args: object, cwd: Path = tmp_path) -> Done:
        out, err = io.StringIO(), io.StringIO()
        code: Any = 0
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["sage", *map(str, args)])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "dont_write_bytecode", True)
            patch.chdir(cwd)
            try:
                main()
            except SystemExit as leaving:
                code = leaving.code or 0
        for name, module in list(sys.modules.items()):  # a user's own module is read anew by the next command
            if str(getattr(module, "__file__", None)).startswith(str(cwd)):
                del sys.modules[name]
        return Done(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def sage_process(tmp_path: Path) -> Sage:
    """The same in a process of its own. ``env``: added to this one's. ``under``: a command that runs it."""

    def call(
        *args: object, cwd: Path = tmp_path, env: dict[str, str] | None = None, under: tuple[str, ...] = ()
    ) -> Done:
        done = subprocess.run(
            [*under, sys.executable, "-c", ENTRY, *map(str, args)],
            cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def sage_started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A process that is still running; killed at the end of the test if need be."""
    running: list[subprocess.Popen[str]] = []

    def start(*args: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, *map(str, args)],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


Go = Callable[..., RunResult]


@pytest.fixture
def go(tmp_path: Path) -> Go:
    """``go(*overrides)``: one run from Python, into a folder of this test."""

    def call(*overrides: str) -> RunResult:
        return run(composed([f"results={tmp_path / 'results'}", *overrides]), overrides)

    return call


@pytest.fixture(scope="session")
def recorded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("recorded")
    overrides = ["experiment=mixed", "load.rate=60", "load.duration_s=4", "seed=5", f"results={results}"]
    faults = "cluster.faults=[{at_s: 2.5, device: 1, restart_after_s: 1.0}]"
    return run(composed([*overrides, faults])).folder


@pytest.fixture
def recorded(recorded_once: Path, tmp_path: Path) -> Path:
    """A recorded run with a crash in it, as a copy of this test's own to damage."""
    folder = tmp_path / "recorded"
    shutil.copytree(recorded_once, folder)
    return folder


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of 40 chat requests over 8 s."""
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    pq.write_table(trace_table(), path)
    return path


def trace_table(**columns: Any) -> pa.Table:
    whole: dict[str, Any] = {
        "arrival_s": [0.2 * i for i in range(40)],
        "prompt_tokens": pa.array([100 + 10 * i for i in range(40)], pa.int32()),
        "output_tokens": pa.array([5 + i for i in range(40)], pa.int32()),
        "kind": ["chat"] * 40,
    }
    return pa.table({**whole, **columns})


@pytest.fixture
def damaged_trace(tmp_path: Path) -> Callable[..., Path]:
    """``damaged_trace(column=values)``: the trace with that column instead."""

    def make(**columns: Any) -> Path:
        path = tmp_path / "damaged.parquet"
        pq.write_table(trace_table(**columns), path)
        return path

    return make
