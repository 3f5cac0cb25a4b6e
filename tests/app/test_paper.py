"""``sage paper`` around its runs: it waits for what it started, and knows beforehand what its report will lack."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sage_bench.cli.paper import Sweep, ended, run_beside
from sage_bench.config import composed
from sage_bench.run import run
from sage_core.errors import ConfigError

Sage = Callable[..., Any]

CHILD = """
import pathlib, signal, sys, time
def end(number, frame):
    time.sleep(1.0)
    pathlib.Path("ended").write_text("in order")
    sys.exit(130)
signal.signal(signal.SIGINT, end)
pathlib.Path("ready").touch()
while True:
    signal.pause()
"""
PARENT = f"""
import sys
from sage_bench.cli.paper import ended
try:
    ended([sys.executable, "-c", {CHILD!r}])
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_ctrl_c_leaves_a_sweep_the_time_to_end(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PARENT]
    with subprocess.Popen(words, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if (tmp_path / "ready").exists():
                break
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: both get it
        _, err = process.communicate(timeout=30)
    assert process.returncode == 7, err
    assert (tmp_path / "ended").read_text() == "in order"


def test_exit_codes_are_handed_on() -> None:
    assert [ended([sys.executable, "-c", f"raise SystemExit({code})"]) for code in (0, 3)] == [0, 3]


def test_live_runs_need_the_simulated_ones(sage: Sage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []

    def no_run(words: tuple[str, ...]) -> int:
        ran.append(words)
        return 9

    monkeypatch.setattr("sage_bench.cli.paper.ended", no_run)
    done = sage("paper", "--size", "live", "--only", "heterogeneous", "--results", tmp_path)
    assert done.code == 2 and not ran and "Traceback" not in done.err
    assert f"{tmp_path} has no simulated runs of heterogeneous" in done.err
    assert f"run `sage paper --only heterogeneous --results {tmp_path}` first" in done.err
    done = sage("paper", "--size", "live")
    assert done.code == 2 and not ran and "run `sage paper` first" in done.err, done.err

    small = ["name=isolation", "load.rate=20", "load.duration_s=1", f"results={tmp_path}"]
    run(composed([*small, "driver=sim"]), ["driver=sim"])
    done = sage("paper", "--size", "live", "--only", "isolation", "--results", tmp_path)
    assert done.code == 2 and not ran, "the twin of a live run is no run of the study"
    run(composed([*small, "seed=2"]), ["seed=2"])
    done = sage("paper", "--size", "live", "--only", "isolation", "--results", tmp_path)
    assert len(ran) == 1 and "experiment=live/isolation" in ran[0] and "ended with exit code 9" in done.err


SWEEP = """
import pathlib, sys, time
name, needs, code = sys.argv[1:]
assert not needs or pathlib.Path(needs).exists(), f"{name} before {needs}"
print(f"runs {name}", flush=True)
pathlib.Path(name).touch()
sys.exit(int(code))
"""


def sweeps(*said: tuple[str, str, str, int]) -> list[Sweep]:
    return [Sweep(study, f"[{name}]", [name, needs, str(code)]) for study, name, needs, code in said]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes that stand for sweeps leave a file each."""
    monkeypatch.setattr("sage_bench.cli.paper.SAGE_RUN", (sys.executable, "-c", SWEEP))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_studies_side_by_side_and_their_sweeps_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_beside(sweeps(("a", "a1", "", 0), ("a", "a2", "a1", 0), ("b", "b1", "", 0), ("c", "c1", "", 0)), at_once=2)
    assert sorted(path.name for path in folder.iterdir()) == ["a1", "a2", "b1", "c1"]
    said = capsys.readouterr().out.splitlines()
    assert said.index("[a2]: sage run a2 a1 0") > said.index("a: runs a1") and "c: runs c1" in said


def test_after_a_failure_no_sweep_is_begun(folder: Path) -> None:
    many = sweeps(*((f"s{i}", f"n{i}", "", 0) for i in range(40)))
    with pytest.raises(ConfigError, match="sage run a1  3 ended with exit code 3"):
        run_beside([*sweeps(("a", "a1", "", 3), ("a", "a2", "", 0)), *many], at_once=2)
    assert not (folder / "a2").exists() and not (folder / "n39").exists()
    with pytest.raises(KeyboardInterrupt):
        run_beside(sweeps(("a", "a1", "", 130)), at_once=2)


def test_every_failure_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"a1  3 ended with exit code 3.*\n.*b1  4 ended with exit code 4"):
        run_beside(sweeps(("a", "a1", "", 3), ("b", "b1", "", 4)), at_once=2)


def test_what_cannot_be_started_stops_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sage_bench.cli.paper.SAGE_RUN", (str(folder / "no_such_program"),))
    with pytest.raises(FileNotFoundError, match="no_such_program"):
        run_beside(sweeps(*((f"s{i}", f"n{i}", "", 0) for i in range(9))), at_once=1)
