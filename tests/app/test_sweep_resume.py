"""A sweep goes on where it was: what is done by this code is not run again, what is not whole or not of this code is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sage_bench.config import checked, composed
from sage_bench.results.manifest import read_manifest
from sage_bench.results.reader import load_runs
from sage_bench.run import config_digest, planned, run
from sage_bench.sweep import sources
from sage_bench.sweep.resume import Found, found, held

Sage = Callable[..., Any]
Start = Callable[..., subprocess.Popen[str]]

SMALL = ("load.rate=20", "load.duration_s=2")
GRID = (*SMALL, "policy=fifo,hybrid", "seed=1,2", "--multirun")


def written(results: Path) -> dict[str, int]:
    """When each run was written, by its folder."""
    return {path.parent.name: path.stat().st_mtime_ns for path in results.glob("run/*/manifest.json")}


@pytest.fixture(scope="module")
def swept_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four points of the grid, each run by itself."""
    results = tmp_path_factory.mktemp("swept")
    for policy in ("fifo", "hybrid"):
        for seed in (1, 2):
            run(composed([*SMALL, f"policy={policy}", f"seed={seed}", f"results={results}"]))
    return results


@pytest.fixture
def swept(swept_once: Path, tmp_path: Path) -> Path:
    """A copy of one's own to damage."""
    return shutil.copytree(swept_once, tmp_path / "results")


def test_a_sweep(sage: Sage, swept_once: Path, tmp_path: Path) -> None:
    """Tells of each point, leaves runs and nothing else, and the runs are what they are alone."""
    done = sage("run", *GRID, f"results={tmp_path}")
    assert done.code == 0 and "4 of 4 points run in" in done.err, done.err
    assert done.out.count(": done; ") == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(written(swept_once))
    assert {each.manifest.digest for each in load_runs(tmp_path)} == {
        each.manifest.digest for each in load_runs(swept_once)
    }


def test_what_is_done_is_not_run_again(sage: Sage, swept: Path) -> None:
    before = written(swept)
    again = sage("run", *GRID, f"results={swept}")
    assert again.code == 0 and written(swept) == before
    assert "0 of 4 points run (4 there already)" in again.err and "--rerun" in again.err
    more = sage("run", *GRID, "policy=fifo", "seed=1,2,3", f"results={swept}")
    assert more.code == 0 and "1 of 3 points run (2 there already)" in more.err
    assert {name: written(swept)[name] for name in before} == before and len(written(swept)) == 5


def test_all_again_if_asked(sage: Sage, swept: Path) -> None:
    before = written(swept)
    again = sage("run", *GRID, "--rerun", f"results={swept}")
    assert again.code == 0 and "4 of 4 points run in" in again.err
    assert all(written(swept)[name] > before[name] for name in before)


def test_a_single_run_always_runs(sage: Sage, swept: Path) -> None:
    before = written(swept)
    assert sage("run", *SMALL, "policy=fifo", "seed=1", f"results={swept}").code == 0
    changed = [name for name, at in written(swept).items() if at != before[name]]
    assert len(changed) == 1 and changed[0].startswith("fifo-s1-")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "killed": lambda folder: (folder / "manifest.json").unlink(),
    "cut short": lambda folder: (folder / "requests.parquet").write_text("PAR1"),
    "removed": lambda folder: (folder / "tasks.parquet").unlink(),
    "interrupted": lambda folder: edit(folder, status="interrupted"),
    "not to be believed": lambda folder: edit(folder, invalid=["the generator was late"]),
    "says not by which code": lambda folder: (folder / sources.NAME).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_whole_will_not_do(swept: Path, damage: Callable[[Path], object]) -> None:
    _, plain = checked(composed([*SMALL, "policy=fifo", "seed=1"]))
    there = found(swept / "run", plain, "code").folder
    assert there is not None
    damage(there)
    assert found(swept / "run", plain, "code") == found(swept / "run", plain, "config") == Found(None, "incomplete")


def test_what_will_not_do_is_run_again(sage: Sage, swept: Path) -> None:
    before = written(swept)
    folders = sorted((swept / "run").iterdir())
    (folders[0] / "manifest.json").unlink()
    (folders[2] / sources.NAME).write_text("0" * 64 + "\n", encoding="ascii")
    again = sage("run", *GRID, f"results={swept}")
    assert again.code == 0 and "2 of 4 points run (2 there already)" in again.err
    assert "1 of those run had results that were not complete" in again.err
    assert "1 of those run had results that were made by other code" in again.err
    assert all(each.manifest.status == "complete" for each in load_runs(swept)) and len(load_runs(swept)) == 4
    assert {name for name, at in written(swept).items() if at != before[name]} == {folders[0].name, folders[2].name}


def test_a_trace_that_was_changed_is_other_data(trace: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copy(trace, tmp_path / "mine.parquet"))
    overrides = ["load=trace", f"load.path={mine}", f"results={tmp_path}"]
    _, plain = checked(composed(overrides))
    result = run(composed(overrides))
    assert found(tmp_path / "run", plain, "code").folder == result.folder
    table = pq.read_table(mine)
    pq.write_table(table.slice(1), mine)
    assert found(tmp_path / "run", plain, "config") == Found(None, "other data")
    mine.unlink()
    assert found(tmp_path / "run", plain, "config") == Found(None, "other data")


def test_every_file_that_a_load_reads_counts(trace: Path, tmp_path: Path) -> None:
    first, second = (Path(shutil.copy(trace, tmp_path / f"{name}.parquet")) for name in ("first", "second"))
    arrivals = f"{{_target_: sage_bench.loads.TraceArrivals, path: {second}}}"
    overrides = ["load=trace", f"load.path={first}", f"load.embedding.arrivals={arrivals}", f"results={tmp_path}"]
    _, plain = checked(composed(overrides))
    result = run(composed(overrides))
    assert [Path(each.path).name for each in read_manifest(result.folder).traces] == [first.name, second.name]
    assert found(tmp_path / "run", plain, "code").folder == result.folder
    pq.write_table(pq.read_table(second).slice(1), second)
    assert found(tmp_path / "run", plain, "code") == Found(None, "other data")


def test_of_live_measurements_the_first_valid_one_counts(swept: Path) -> None:
    _, plain = checked(composed([*SMALL, "driver=live"]))
    there = next((swept / "run").iterdir())
    name = f"live-hybrid-s0-{config_digest(plain)}"
    for each in (name, f"{name}-2", f"{name}-3"):
        folder = shutil.copytree(there, swept / "run" / each)
        (folder / sources.NAME).write_text(sources.sources_digest(plain), encoding="ascii")
        edit(folder, outputs={}, invalid=["late"] if each == name else [])
    assert found(swept / "run", plain, "code").folder == swept / "run" / f"{name}-2"


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_other_code_will_do_if_the_user_says_so(sage: Sage, swept: Path) -> None:
    for folder in (swept / "run").iterdir():
        (folder / sources.NAME).write_text("0" * 64 + "\n", encoding="ascii")
    again = sage("run", *GRID, "hydra.sweeper.resume=config", f"results={swept}")
    assert again.code == 0 and "0 of 4 points run (4 there already)" in again.err
    wrong = sage("run", *GRID, "hydra.sweeper.resume=always", f"results={swept}")
    assert wrong.code == 2 and "hydra.sweeper.resume: expected one of code, config, never, got 'always'" in wrong.err


def test_a_policy_of_the_users_is_code_too(sage: Sage, tmp_path: Path) -> None:
    policy = tmp_path / "mine.py"
    policy.write_text("from sage_policies.presets import fifo as policy\n")
    grid = (*SMALL, "policy=user", "policy._target_=mine.policy", "seed=1,2", "-m", f"results={tmp_path / 'results'}")
    assert "2 of 2 points run" in sage("run", *grid).err
    assert "0 of 2 points run" in sage("run", *grid).err
    policy.write_text("from sage_policies.presets import slo_aware as policy\n")
    changed = sage("run", *grid)
    assert "2 of 2 points run" in changed.err, changed.err


def test_the_digest_covers_what_a_run_executes(tmp_path: Path) -> None:
    """Loaded by a run in a process of its own, less what the digest says that it leaves out on purpose."""
    script = (
        "import sys; from sage_bench.config import composed; from sage_bench.run import run\n"
        f"run(composed(['load.duration_s=1', 'pipeline=rag', 'load=pipeline/rag', 'cluster=pipelines', 'results={tmp_path}']))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('sage_')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name for name in done.stdout.split() if name.count(".")}
    covered = tuple(
        f"{name}" for name in (*sources.PACKAGES, *(f"sage_bench.{each.replace('/', '.')}" for each in sources.BENCH))
    )
    apart = (
        "sage_bench.sweep",
        "sage_bench.conf",
    )  # reads and writes the digest itself; composed into the configuration
    missed = [
        name
        for name in loaded
        if not any(name == each or name.startswith(f"{each}.") for each in (*covered, *apart))
        and f"{name}." not in "".join(f"{each}." for each in loaded if each != name)
    ]
    assert not missed


def test_the_digest_tells_code_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = checked(composed(SMALL))
    first = sources.sources_digest(plain)
    assert first == sources.sources_digest(plain) != sources.sources_digest(checked(composed(["driver=live"]))[1])
    file = tmp_path / "patched.py"
    file.write_text("x = 1\n")
    sources._own.cache_clear()
    real = sources._package
    monkeypatch.setattr(sources, "_package", lambda name: [*real(name), file])
    try:
        added = sources.sources_digest(plain)
        file.write_text("x = 2\n")
        sources._own.cache_clear()
        assert len({first, added, sources.sources_digest(plain)}) == 3
    finally:
        monkeypatch.undo()
        sources._own.cache_clear()


def test_two_processes_do_not_run_one_point_at_a_time(tmp_path: Path) -> None:
    """The second waits, and then finds what the first has made."""
    overrides = [*SMALL, f"results={tmp_path}"]
    plan = planned(*checked(composed(overrides)))
    script = (
        "import sys; from pathlib import Path; from sage_bench.sweep.resume import held\n"
        f"with held(Path({str(plan.folder)!r})): print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "held\n"
        result = run(composed(overrides))  # whoever does not ask is not held
        command = [sys.executable, "-m", "sage_bench", "run", *overrides, "seed=0,1", "-m", "--rerun"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as sweep:
            time.sleep(4.0)  # the longest that it would take; a sweep that does not wait would be done
            assert sweep.poll() is None and not list(tmp_path.glob("run/*-s1-*"))
            other.stdin.write("\n")
            other.stdin.flush()
            assert sweep.stderr is not None
            told = sweep.stderr.read()
        assert sweep.returncode == 0, told
    assert found(tmp_path / "run", plan.plain, "code").folder == result.folder
    with held(plan.folder) as waited:
        assert not waited


LONG = ("experiment=mixed", "load.rate=60", "load.duration_s=100000", "warmup_s=0")


def begun(results: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many runs have written something. If they do not, the process is ended: nobody else would."""
    for _ in range(2400):
        if sum(path.stat().st_size > 4 for path in results.glob("mixed/*/steps.parquet")) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError("nothing was begun in two minutes")


@pytest.mark.parametrize("everybody", [True, False], ids=["terminal", "parent only"])
def test_ctrl_c_ends_the_runs_of_workers_in_order(tmp_path: Path, everybody: bool) -> None:
    """As a terminal does it, which tells every process of the group at once, and as `kill -INT PID` does."""
    arguments = [*LONG, f"results={tmp_path}", "seed=1,2,3", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "sage_bench", "run", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        begun(tmp_path, 2, process)
        (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()  # or a test that failed would wait for it
    assert process.returncode == 130 and "Traceback" not in err, err
    assert [run.manifest.status for run in load_runs(tmp_path)] == ["interrupted"] * 2
    assert out.count("interrupted, partial") == 2
    assert "0 of 3 points run (2 interrupted)" in err and "1 left, which the same command runs" in err
    assert not list(tmp_path.rglob(".sweep*"))


def test_workers_do_not_outlive_a_killed_sweep(tmp_path: Path) -> None:
    arguments = [*LONG, f"results={tmp_path}", "seed=1,2", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "sage_bench", "run", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        begun(tmp_path, 2, process)
        process.kill()
    for _ in range(400):
        folders = [path.parent for path in tmp_path.glob("mixed/*/manifest.json")]
        if len(folders) == 2:
            break
        time.sleep(0.05)
    assert [run.manifest.status for run in load_runs(tmp_path)] == ["interrupted"] * 2
    (left,) = (tmp_path / "mixed").glob(".sweep*")
    done = subprocess.run([*command[:4], *SMALL, "name=mixed", f"results={tmp_path}", "seed=1,2", "-m"], check=False)
    assert done.returncode == 0 and not left.exists()


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    """As a machine without memory does it."""
    (tmp_path / "dies.py").write_text("import os\n\ndef policy():\n    os.kill(os.getpid(), 9)\n")
    command = [
        sys.executable, "-m", "sage_bench", "run", *SMALL, "policy=user", "policy._target_=dies.policy", "seed=1,2", "-m",
        f"results={tmp_path}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 10, done.stderr
    assert "a worker process was killed" in done.stderr and "Traceback" not in done.stderr
