"""The scripts a developer or CI starts: what they say, what they run, and that they pass failures on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TARGETS = ("demo", "test", "test-live", "lint", "format", "bench", "examples", "docs", "wheel", "clean")
MAKE = shutil.which("make")
needs_make = pytest.mark.skipif(MAKE is None, reason="make is not on PATH: sudo tools/install-debian.sh")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without MAKEFLAGS: these tests may themselves run under make.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def script(folder: Path, name: str, body: str) -> None:
    """An executable that stands before the real one on PATH."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


# --- make, manage.sh, quickstart.sh ----------------------------------------------------------------------------------


@needs_make
def test_make_alone_lists_the_targets() -> None:
    listed = run("make").stdout
    for target in TARGETS:
        assert re.search(rf"^{target} +\S", listed, re.M), target


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_each_target_exists(target: str) -> None:
    done = run("make", "-n", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@needs_make
def test_make_test_lints_first_and_runs_the_configured_pytest() -> None:
    plan = run("make", "-n", "test").stdout
    order = [plan.index(text) for text in ("ruff check", "mypy --strict", "lint_imports", "clang-format", "pytest -c")]
    assert order[-1] == max(order)
    assert "-c tools/pytest.ini" in plan


@needs_make
@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 2), (5, 2)])  # 5: no test was selected
def test_test_live_fails_with_its_tests_and_without_any(tmp_path: Path, code: int, expected: int) -> None:
    tmp_path.joinpath("bin").mkdir()
    script(tmp_path / "bin", "python", f"exit {code}")
    done = run("make", "test-live", f"VENV={tmp_path}", "-o", "install", "-o", "install-live")
    assert done.returncode == expected, done.stderr


@needs_make
@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["PYTHON="], "Python 3.11 or later is needed"), (["CXX=no-such-compiler"], "no-such-compiler is not on PATH")],
)
def test_make_says_which_tool_is_missing(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run("make", "install", f"VENV={tmp_path}/venv", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "tools/install-debian.sh" in done.stderr
    assert not tmp_path.joinpath("venv").exists()


@pytest.mark.parametrize("front", ["manage.sh", "quickstart.sh"])
def test_fronts_explain_themselves(front: str) -> None:
    done = run(ROOT / front, "--help")
    assert done.returncode == 0
    assert f"./{front} " in done.stdout
    assert "set -euo" not in done.stdout
    wrong = run(ROOT / front, "no-such-task")
    assert wrong.returncode == 2
    assert "'no-such-task'" in wrong.stderr


@needs_make
def test_every_task_of_manage_is_a_target(tmp_path: Path) -> None:
    script(tmp_path, "make", 'echo "make $*"')
    for task in re.findall(r"^ +\./manage\.sh (\S+) ", run(ROOT / "manage.sh", "help").stdout, re.M):
        if task in ("doctor", "hooks"):
            continue  # no target: they need the installed commands
        said = run(ROOT / "manage.sh", task, "--dry-run", PATH=f"{tmp_path}:{os.environ['PATH']}").stdout.split()
        assert said[0] == "make"
        target = "lint" if task == "quality" else task
        assert target in said
        assert run("make", "-n", target).returncode == 0


def test_quickstart_is_make_demo(tmp_path: Path) -> None:
    script(tmp_path, "make", 'echo "make $*"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert run(ROOT / "quickstart.sh", PATH=path).stdout == "make demo\n"
    assert run(ROOT / "quickstart.sh", "--install", PATH=path).stdout == "make install\n"


# --- .ci/run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("echo noise; echo '3 passed, 1 skipped in 0.12s'", 0, "3 passed, 1 skipped in 0.12s"),
        ("echo '=== 1 failed, 2 passed in 70.00s (0:01:10) ==='; echo 'make: *** Error 1'; exit 2", 2, "1 failed, 2 pass"),
        ("echo 'ruff: no'; exit 2", 2, "pytest did not run"),
    ],
)  # fmt: skip
def test_ci_ends_with_the_closing_line_and_the_status_of_make(tmp_path: Path, body: str, code: int, last: str) -> None:
    tree = tmp_path / "tree"
    tree.joinpath(".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", tree / ".ci/run")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    script(bin_dir, "make", body)
    script(bin_dir, "g++", "exit 0")
    done = run(tree / ".ci/run", cwd=tmp_path, PATH=f"{bin_dir}:{os.environ['PATH']}")
    assert done.returncode == code, done.stderr
    assert last in done.stdout.splitlines()[-1]


def test_debian_packages_are_listed() -> None:
    listed = run(ROOT / "tools/install-debian.sh", "--list").stdout.split()
    assert {"g++", "make", "git", "python3", "python3-venv"} <= set(listed)


# --- configuration of the tools ---------------------------------------------------------------------------------------


def test_bare_pytest_finds_the_configuration(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__, "-v")
    assert done.returncode == 0, done.stdout
    assert "configfile: pytest.ini" in done.stdout
    assert ROOT.joinpath("pytest.ini").resolve() == ROOT / "tools/pytest.ini"


def test_an_unregistered_mark_is_an_error(tmp_path: Path) -> None:
    test = tmp_path / "test_mark.py"
    test.write_text("import pytest\n\n@pytest.mark.lvie\ndef test_a() -> None: ...\n")
    done = run(sys.executable, "-m", "pytest", "-c", ROOT / "tools/pytest.ini", "-p", "no:cacheprovider", test)
    assert done.returncode == 2
    assert "'lvie' not found in `markers`" in done.stdout


def test_pre_commit_hooks_are_valid_and_stop_a_bad_file(tmp_path: Path) -> None:
    hooks = ROOT / ".pre-commit-config.yaml"
    home = {"PRE_COMMIT_HOME": str(tmp_path / "home")}
    assert run(BIN / "pre-commit", "validate-config", hooks, **home).returncode == 0

    shutil.copy(hooks, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tmp_path.joinpath(".venv").symlink_to(BIN.parent)
    bad = tmp_path / "sage_core" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import time\n\nprint(time.time())\n")
    run("git", "init", "--quiet", cwd=tmp_path)
    run("git", "add", "sage_core", ".pre-commit-config.yaml", cwd=tmp_path)
    done = run(BIN / "pre-commit", "run", "ruff-check", "--all-files", cwd=tmp_path, **home)
    assert done.returncode == 1
    assert "the core has no clock: take `now` (integer ns) as an argument" in done.stdout
    bad.write_text("ANSWER = 42\n")
    done = run(BIN / "pre-commit", "run", "ruff-check", "--all-files", cwd=tmp_path, **home)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("folder", "banned"), [("sage_core", True), ("policies/sage_policies", True), ("sage_live", False)]
)
def test_bans_hold_in_the_pure_packages_and_name_a_replacement(folder: str, banned: bool) -> None:
    done = subprocess.run(
        [str(BIN / "ruff"), "check", "--no-cache", "--stdin-filename", f"{folder}/planted.py", "-"],
        input="import random\n\nx = random.random()\n", cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode == 1) is banned
    assert ("sage_core.rng.Streams(seed).stream(name)" in done.stdout) is banned


def test_changelog_fragments_are_readable_by_towncrier() -> None:
    types = {
        kind["directory"]
        for kind in tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["tool"]["towncrier"]["type"]
    }
    fragments = [path for path in ROOT.joinpath("changelog.d").iterdir() if path.name != "README.md"]
    for path in fragments:
        assert re.fullmatch(rf"(\d+|\+[\w-]+)\.({'|'.join(sorted(types))})\.md", path.name), path.name
    done = run(BIN / "towncrier", "build", "--draft", "--version", "next")
    assert done.returncode == 0, done.stderr
    for path in fragments:
        assert path.read_text().strip().splitlines()[0] in done.stdout, path.name
