"""The import rules hold, the documents show what the code does, and a planted violation is noticed (canaries)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sage_core", "sage_sim", "sage_live", "sage_bench", "policies", "tools")
DOCUMENTS = ("pyproject.toml", "ARCHITECTURE.md", "README.md", "docs")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in ``tree``, seeing the packages of ``tree`` and the installed libraries.

    ``-S`` keeps .pth files out, so an editable install of the real tree cannot stand in for a copy.
    """
    path = os.pathsep.join([str(tree), str(tree / "policies"), sysconfig.get_paths()["purelib"]])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=tree, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return run(tree, "-c", LINT, "--no-logo", "--no-cache")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources that the lint reads, somewhere else."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.parquet"))
    for name in DOCUMENTS:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def test_every_import_contract_is_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("tool", ["tools/layers.py", "tools/tables.py"])
def test_documents_show_what_the_code_does(tool: str) -> None:
    done = run(ROOT, tool, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("sage_core/units.py", "import sage_policies.order", "no package imports upward"),
        ("policies/sage_policies/order.py", "import sage_bench.doctor", "no package imports upward"),
        ("sage_core/events.py", "import sage_core.plane", "kernel over operators over foundation"),
        ("sage_core/reference.py", "import sage_core.plane", "kernel over operators over foundation"),
        ("sage_core/plane.py", "import time", "sans-I/O"),
        ("policies/sage_policies/order.py", "import random", "sans-I/O"),
        ("sage_sim/driver.py", "import sage_policies.order", "drivers know no policy"),
    ],
)
def test_canary_a_planted_import_fails_the_lint(copy: Path, module: str, statement: str, contract: str) -> None:
    with copy.joinpath(module).open("a") as file:
        file.write(f"\n\ndef planted() -> None:\n    {statement}\n")
    done = lint(copy)
    assert done.returncode != 0
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(contract in line for line in broken), done.stdout


def test_canary_a_module_without_a_floor_fails_the_lint_and_the_drawing(copy: Path) -> None:
    copy.joinpath("sage_core/homeless.py").write_text('"""Planted."""\n')
    assert "sage_core.homeless" in lint(copy).stdout
    done = run(copy, "tools/layers.py", "--check")
    assert done.returncode == 1
    assert "sage_core.homeless has no layer" in done.stderr


def test_canary_the_native_module_is_below_the_kernel_only(copy: Path) -> None:
    """import-linter cannot see an extension; the drawing does."""
    with copy.joinpath("sage_core/units.py").open("a") as file:
        file.write("\n\ndef planted() -> object:\n    from sage_core import _native\n\n    return _native\n")
    done = run(copy, "tools/layers.py", "--check")
    assert done.returncode == 1
    assert "imports that point upward: sage_core: words -> sage_core: operators" in done.stderr


def test_canary_a_new_module_makes_the_figure_stale_and_docs_freshens_it(copy: Path) -> None:
    copy.joinpath("sage_bench/planted.py").write_text('"""Planted."""\n')
    done = run(copy, "tools/layers.py", "--check")
    assert done.returncode == 1
    assert "docs/figures/layers.svg is out of date: run `make docs`" in done.stderr
    assert run(copy, "tools/layers.py").returncode == 0
    assert run(copy, "tools/layers.py", "--check").returncode == 0
    assert "`planted`" in copy.joinpath("ARCHITECTURE.md").read_text()


def test_canary_a_changed_exit_code_makes_the_readme_stale(copy: Path) -> None:
    errors = copy / "sage_core/errors.py"
    errors.write_text(errors.read_text().replace("exit_code = 8", "exit_code = 9"))
    done = run(copy, "tools/tables.py", "--check")
    assert done.returncode == 1
    assert "README.md is out of date" in done.stderr


def test_a_document_without_marks_is_a_clear_error(copy: Path) -> None:
    copy.joinpath("ARCHITECTURE.md").write_text("# Architecture\n")
    done = run(copy, "tools/layers.py")
    assert done.returncode == 1
    assert "ARCHITECTURE.md: expected one line '<!-- layers:" in done.stderr
    assert "Traceback" not in done.stderr
